//! The official command line of NATS, as the other side of an example.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use tokio::{process::Command, task::spawn_blocking, time::timeout};

use crate::wait::DEADLINE;

/// Runs `nats` against a server and returns what it printed to stdout.
///
/// # Errors
///
/// If it is not installed, with the command that installs it; if it does not end
/// with 0 or not in time, with what it printed.
pub async fn nats(address: &str, args: &[&str]) -> Result<String> {
    let program = spawn_blocking(lab::tools::nats_cli).await??;
    let shown = args.join(" ");
    let output = Command::new(program)
        .args(["--server", address])
        .args(args)
        // Not the settings of whoever runs the test.
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE, output)
        .await
        .with_context(|| format!("nats {shown} has not ended"))?
        .context("cannot run nats")?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("nats {shown}: {}\n{stdout}{stderr}", output.status);
    }
    Ok(stdout)
}
