//! Files that a server of a test's own finds where its configuration looks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use lab::cleanup::{self, Guard};

/// A temporary folder with these files, whose paths may have folders. It is gone
/// with the guard, or with the test binary.
///
/// # Errors
///
/// If it cannot be made, or a file cannot be written.
pub(crate) fn folder(
    prefix: &str,
    files: &[(String, Vec<u8>)],
) -> Result<(PathBuf, Guard)> {
    let folder = tempfile::Builder::new().prefix(prefix).tempdir()?;
    let guard = cleanup::folder(folder.path())?;
    // As a server would resolve the paths of its configuration: on macOS the folder
    // for temporary files is a link.
    let folder = folder.keep().canonicalize()?;
    write(&folder, files)?;
    Ok((folder, guard))
}

/// Writes files into a folder, some of which may be there.
///
/// # Errors
///
/// If one cannot be written.
pub(crate) fn write(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    for (path, data) in files {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().context("a path of a file")?)?;
        fs::write(&path, data)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
