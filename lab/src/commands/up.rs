//! `cargo lab up`: brokers that stay up.

use std::process::ExitCode;

use anyhow::Result;
use lab::{
    broker::Broker,
    up::{self, Running, Way},
};

use super::Brokers;

/// Starts brokers and leaves them running.
///
/// Where a Docker engine runs, with docker-compose.yml; else as native processes.
/// What is up already stays as it is. KAFKA_PORT, RABBITMQ_PORT and NATS_PORT
/// take other ports than the usual ones.
#[derive(clap::Args)]
#[command(after_help = "\
EXAMPLES:
  cargo lab up                        all three brokers
  cargo lab up nats                   one of them
  KAFKA_PORT=19092 cargo lab up kafka on another port")]
pub struct Args {
    #[command(flatten)]
    brokers: Brokers,
    /// Use Docker; with --yes, install and start the engine if there is none
    #[arg(long, conflicts_with = "native")]
    docker: bool,
    /// Use native processes, also where a Docker engine runs
    #[arg(long)]
    native: bool,
    /// Install what is missing
    #[arg(long, short)]
    yes: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let way = match (args.docker, args.native) {
        (true, _) => Way::Docker,
        (_, true) => Way::Native,
        _ => Way::Any,
    };
    let (running, started) = up::start(&args.brokers.or_all(), way, args.yes)?;
    if !started {
        println!("already up:");
    }
    for broker in &running {
        println!("{}", line(broker));
    }
    let moved: Vec<String> = running.iter().filter_map(export).collect();
    if !moved.is_empty() {
        println!("\nThe examples find them after:\n{}", moved.join("\n"));
    }
    println!("\nNext: {}", next(&running));
    Ok(ExitCode::SUCCESS)
}

fn line(running: &Running) -> String {
    let address = format!("{:8}  {}", running.broker.title(), running.shown());
    match (&running.management, running.broker) {
        (Some(url), Broker::RabbitMq) => {
            format!("{address}  ({url}, user guest, password guest)")
        }
        (Some(url), _) => format!("{address}  ({url})"),
        (None, _) => address,
    }
}

/// What must be in the environment, if the broker is not where the examples look
/// by default.
fn export(running: &Running) -> Option<String> {
    let Running {
        broker, endpoint, ..
    } = running;
    let address = broker.address(endpoint.port);
    let moved = endpoint.port != broker.default_port();
    moved.then(|| format!("  export {}={address}", broker.address_var()))
}

/// A command that shows one of these brokers at work: NATS before the others, as
/// its examples are built soonest.
fn next(running: &[Running]) -> String {
    let brokers: Vec<Broker> = running.iter().map(|up| up.broker).collect();
    let example = if brokers.contains(&Broker::Nats) {
        "nats_pubsub"
    } else if brokers.contains(&Broker::RabbitMq) {
        "rabbitmq_publisher"
    } else {
        "kafka_producer"
    };
    format!("cargo run --bin {example}")
}
