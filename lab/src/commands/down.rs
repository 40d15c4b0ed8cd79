//! `cargo lab down`: stops what `cargo lab up` has started.

use std::process::ExitCode;

use anyhow::Result;
use lab::up;

/// Stops the brokers that `cargo lab up` has started.
///
/// Their data stay for the next `up`, unless --volumes is given.
#[derive(clap::Args)]
pub struct Args {
    /// Remove the brokers' data too
    #[arg(long, short)]
    volumes: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let message = match (up::stop(args.volumes)?, args.volumes) {
        (false, false) => "nothing is up",
        (false, true) => "nothing is up, and there are no data",
        (true, false) => "the data are kept; cargo lab down --volumes removes them",
        (true, true) => "the data are removed",
    };
    println!("{message}");
    Ok(ExitCode::SUCCESS)
}
