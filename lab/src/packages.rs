//! Installing with the system's own package manager.

use std::{
    process::Command,
    sync::{LazyLock, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};

use crate::{progress, shell};

/// Is this program run by root?
pub fn is_root() -> bool {
    static ROOT: LazyLock<bool> = LazyLock::new(|| {
        shell::output(Command::new("id").arg("-u")).is_ok_and(|id| id == "0")
    });
    *ROOT
}

/// The command that installs these Debian packages; `None` where there is no
/// apt-get.
pub fn install_command(packages: &[&str]) -> Option<String> {
    shell::which("apt-get")?;
    let sudo = if is_root() { "" } else { "sudo " };
    let packages = packages.join(" ");
    Some(format!(
        "{sudo}apt-get install -y --no-install-recommends {packages}"
    ))
}

/// Can [`install`] work here: is there apt-get, and the right to use it?
pub fn can_install() -> bool {
    shell::which("apt-get").is_some()
        && (is_root() || shell::which("sudo").is_some())
}

/// Installs Debian packages.
///
/// # Errors
///
/// If apt-get fails, also after it has fetched new package lists.
pub fn install(packages: &[&str]) -> Result<()> {
    // Two brokers are prepared at the same time, and apt-get runs once only.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);

    let names = packages.join(", ");
    let step = progress::step(format!("installing {names}"));
    let install = || {
        let mut command = apt_get();
        command.args(["install", "-y", "--no-install-recommends"]);
        shell::run(command.args(packages))
    };
    // The lists of a fresh image are empty and those of an old one name
    // packages that are gone. Updating them first would cost everybody else.
    if install().is_err() {
        shell::run(apt_get().arg("update"))?;
        install().with_context(|| format!("cannot install {names}"))?;
    }
    step.done(format!("installed {names}"));
    Ok(())
}

fn apt_get() -> Command {
    let mut command;
    if is_root() {
        command = Command::new("apt-get");
    } else {
        command = Command::new("sudo");
        command.arg("apt-get");
    }
    // Waits for another apt-get, such as the nightly one, in place of failing.
    command.arg("-oDPkg::Lock::Timeout=120");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}
