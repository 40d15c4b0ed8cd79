//! RabbitMQ's client for Python, as the other side of an example.

use anyhow::{Context as _, Result};
use lab::{tools, workspace};
use tokio::task::spawn_blocking;

use crate::Example;

/// Starts `tests/peers/pika_peer.py` with these words, which the file explains.
///
/// # Errors
///
/// If pika is not there, with the command that fetches it; if there is no Python.
pub async fn start(address: &str, words: &[&str]) -> Result<Example> {
    let pika = spawn_blocking(tools::pika).await??;
    let pika = pika.to_str().context("a path that is no text")?;
    let script = workspace::root().join("tests/peers/pika_peer.py");
    let script = script.to_str().context("a path that is no text")?;
    let words = [&[script, address][..], words].concat();
    Example::start_with("python3", &words, &[("PYTHONPATH", pika)])
}

/// As [`start`], and waits for its end. Returns what it printed.
///
/// # Errors
///
/// As [`start`], or if it does not end with 0 and without a word on stderr.
pub async fn run(address: &str, words: &[&str]) -> Result<String> {
    let ended = start(address, words).await?.end().await?;
    Ok(ended.succeeded()?.stdout)
}
