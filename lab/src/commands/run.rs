//! `cargo lab run`: one example, and the broker that it needs.

use std::{
    env,
    process::{Command, ExitCode, ExitStatus},
};

use anyhow::Result;
use lab::{
    broker::Broker,
    cleanup, features, header, private, progress, shell,
    up::{self, Way},
    workspace,
};

/// Starts the broker that an example needs, and runs the example.
///
/// The broker stays up, so that the other half of a lesson finds it; `cargo lab
/// down` stops it. With an address in the environment, nothing is started.
///
/// An example about the settings of a server, `<package>/config/NAME.conf` or, for
/// Kafka, `NAME.properties`, gets a server of its own, which ends with it.
#[derive(clap::Args)]
#[command(after_help = "\
EXAMPLES:
  cargo lab run kafka_producer
  cargo lab run task_queue_rabbitmq -- worker")]
pub struct Args {
    /// The name of the example; `cargo lab list` shows all
    name: String,
    /// What the example itself takes
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
    /// Install what is missing
    #[arg(long, short)]
    yes: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let examples = workspace::sources_in(workspace::root())?;
    let Some(example) = examples.iter().find(|source| source.name == args.name)
    else {
        let names = examples.iter().map(|source| source.name.as_str());
        let near = workspace::near_matches(&args.name, names);
        let hint = match near.as_slice() {
            [] => "cargo lab list shows all".to_owned(),
            near => format!("did you mean {}?", near.join(", ")),
        };
        eprintln!("error: no example is named {}; {hint}", args.name);
        return Ok(ExitCode::from(2));
    };
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "--bin", &example.name]);
    // Its header is judged by `cargo lab check`, not here.
    if let Ok(header) = header::parse(&workspace::read(&example.path)?)
        && let Some(name) = header.features()
    {
        let feature = features::ALL.iter().find(|feature| feature.name == name);
        if let Some(feature) = feature {
            feature.require(&example.name, args.yes)?;
        }
        command.args(["--features", name]);
    }
    if !args.args.is_empty() {
        command.arg("--").args(&args.args);
    }
    let given = env::var_os(example.broker.address_var()).is_some();
    if let Some(config) = private::config(example)
        && !given
    {
        let server = private::start(example.broker, &config, args.yes)?;
        command.envs(server.variables.iter().map(|(name, value)| (name, value)));
        return attend(command);
    }
    if let Some(address) = address(example.broker, args.yes)? {
        command.env(example.broker.address_var(), address);
    }
    progress::line(format!("$ {}", shell::shown(&command)));
    replace(command)
}

/// Starts the broker, unless the environment names one. Returns the address, if
/// it is not where the example looks by itself.
fn address(broker: Broker, yes: bool) -> Result<Option<String>> {
    if env::var_os(broker.address_var()).is_some() {
        return Ok(None);
    }
    let (running, _started) = up::start(&[broker], Way::Any, yes)?;
    let port = running.first().map(|running| running.endpoint.port);
    Ok(port
        .filter(|port| *port != broker.default_port())
        .map(|port| broker.address(port)))
}

/// Waits for the end of the example, after which its server can go.
fn attend(mut command: Command) -> Result<ExitCode> {
    progress::line(format!("$ {}", shell::shown(&command)));
    let mut child = command.spawn()?;
    // Newer than the server's guard, so it ends before the server.
    let guard = cleanup::process(child.id())?;
    let status = child.wait()?;
    guard.release();
    Ok(exit_code(status))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or(1);
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Becomes the example, so that Ctrl-C is the example's affair alone.
#[cfg(unix)]
fn replace(mut command: Command) -> Result<ExitCode> {
    Err(std::os::unix::process::CommandExt::exec(&mut command).into())
}

#[cfg(not(unix))]
fn replace(mut command: Command) -> Result<ExitCode> {
    Ok(exit_code(command.status()?))
}
