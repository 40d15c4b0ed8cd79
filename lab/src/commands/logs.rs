//! `cargo lab logs`: what the brokers of `cargo lab up` write.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use lab::{broker::Broker, compose::Project, native, progress, shell};

use super::Brokers;

/// Shows the last lines of the brokers' logs.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    brokers: Brokers,
    /// Go on showing new lines until Ctrl-C
    #[arg(long, short)]
    follow: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let wanted = args.brokers.or_all();
    let project = Project::ours(false);
    let containers: Vec<Broker> = wanted
        .iter()
        .copied()
        .filter(|broker| project.has(*broker))
        .collect();
    let mut commands = Vec::new();
    if !containers.is_empty() {
        commands.push(project.logs(&containers, args.follow)?);
    }
    commands.extend(native_logs(&wanted, args.follow));
    if commands.is_empty() {
        bail!("cargo lab up has started none of these; see cargo lab status");
    }
    let children = commands
        .iter_mut()
        .map(|command| {
            progress::line(format!("$ {}", shell::shown(command)));
            command.spawn().context("cannot show the logs")
        })
        .collect::<Result<Vec<_>>>()?;
    for mut child in children {
        child.wait()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One `tail` for all, which prints a heading where they are several.
fn native_logs(wanted: &[Broker], follow: bool) -> Option<Command> {
    let mut logs = native::detached()
        .into_iter()
        .filter(|detached| wanted.contains(&detached.broker))
        .map(|detached| detached.log)
        .peekable();
    logs.peek()?;
    let mut tail = Command::new("tail");
    tail.args(["-n", "200"]);
    if follow {
        tail.arg("-f");
    }
    tail.args(logs);
    Some(tail)
}
