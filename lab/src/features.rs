//! Features of `kafka-examples` that need more than a C compiler.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{packages, shell};

/// A feature and what this machine must have for it.
pub struct Feature {
    pub name: &'static str,
    /// The Debian packages with the headers.
    pub packages: &'static [&'static str],
    /// The names by which pkg-config or the search path knows them.
    needed: &'static [Needed],
}

enum Needed {
    Library(&'static str),
    Program(&'static str),
}

/// What some of the examples need.
pub const TLS: Feature = Feature {
    name: "tls",
    packages: &["libssl-dev", "pkg-config"],
    needed: &[Needed::Library("openssl")],
};

/// What `kafka-examples` can be built with beside its default.
pub const ALL: [Feature; 3] = [
    TLS,
    Feature {
        name: "kerberos",
        packages: &["libssl-dev", "libsasl2-dev", "pkg-config"],
        needed: &[Needed::Library("openssl"), Needed::Library("libsasl2")],
    },
    Feature {
        name: "cmake-build",
        packages: &["libssl-dev", "cmake", "pkg-config"],
        needed: &[Needed::Library("openssl"), Needed::Program("cmake")],
    },
];

impl Feature {
    /// Can it be built? Installs what it needs, if that is allowed.
    ///
    /// # Errors
    ///
    /// If the installation fails.
    pub fn provide(&self, yes: bool) -> Result<bool> {
        if self.needed.iter().all(Needed::is_here) {
            return Ok(true);
        }
        let may_install = yes && packages::can_install();
        if may_install {
            packages::install(self.packages)?;
        }
        Ok(may_install)
    }

    /// As [`Self::provide`], for an example that cannot be built without it.
    ///
    /// # Errors
    ///
    /// If something is missing, with the way out.
    pub fn require(&self, example: &str, yes: bool) -> Result<()> {
        if self.provide(yes)? {
            return Ok(());
        }
        let missing = self.packages.join(" ");
        match packages::install_command(self.packages) {
            Some(command) => bail!(
                "{example} needs {missing}; run again with --yes to install them, \
                 or run: {command}"
            ),
            None => bail!("{example} needs OpenSSL's headers ({missing} on Debian)"),
        }
    }
}

impl Needed {
    fn is_here(&self) -> bool {
        match self {
            Self::Library(name) => {
                let mut exists = Command::new("pkg-config");
                exists.args(["--exists", name]);
                shell::output(&mut exists).is_ok()
            }
            Self::Program(name) => shell::which(name).is_some(),
        }
    }
}
