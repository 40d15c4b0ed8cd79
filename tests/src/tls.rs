//! Certificates for a broker of a test's own and for its clients.

use std::path::PathBuf;

use anyhow::Result;
use certs::Certificates;
use lab::cleanup::{self, Guard};

/// Certificates, also in a folder of this machine, for clients. As part of a
/// static, it is gone with the test binary.
pub struct Files {
    certificates: Certificates,
    folder: PathBuf,
    _guard: Guard,
}

impl Files {
    /// Makes them anew.
    ///
    /// # Errors
    ///
    /// If they cannot be made, or written to a temporary folder.
    pub fn make() -> Result<Self> {
        let certificates = Certificates::make()?;
        let folder = tempfile::Builder::new().prefix("lab-certs-").tempdir()?;
        let guard = cleanup::folder(folder.path())?;
        certificates.write(folder.path())?;
        Ok(Self {
            certificates,
            folder: folder.keep(),
            _guard: guard,
        })
    }

    /// All of them, below `certs/`, where the configurations look for them.
    pub fn for_server(&self) -> Vec<(String, Vec<u8>)> {
        let files = self.certificates.files();
        files
            .map(|(name, text)| (format!("certs/{name}"), text.as_bytes().to_vec()))
            .to_vec()
    }

    /// The path of one of them on this machine.
    pub fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }
}
