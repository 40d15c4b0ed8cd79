//! `cargo lab status`: which brokers answer.

use std::process::ExitCode;

use anyhow::Result;
use lab::{
    broker::Broker,
    probe,
    up::{self, Running},
};

/// Shows which brokers are up, where, and who has started them.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: &Args) -> Result<ExitCode> {
    let all = up::running()?;
    for broker in Broker::ALL {
        let running = all.iter().find(|running| running.broker == broker);
        println!("{}", line(broker, running)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn line(broker: Broker, running: Option<&Running>) -> Result<String> {
    let name = broker.title();
    let Some(running) = running else {
        let probe::Endpoint { host, port } = probe::endpoint(broker)?;
        return Ok(format!("{name:8}  down  nobody answers at {host}:{port}"));
    };
    let version = match &running.version {
        Some(version) => format!(", version {version}"),
        None => String::new(),
    };
    Ok(format!(
        "{name:8}  up    {} ({}{version})",
        running.shown(),
        running.by
    ))
}
