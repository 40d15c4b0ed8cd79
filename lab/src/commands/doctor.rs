//! `cargo lab doctor`: what is here, what is missing, and what mends it.

use std::process::{Command, ExitCode};

use anyhow::Result;
use lab::{
    broker::Broker,
    compose::{self, Tool},
    docker::{self, Engine},
    images, native, packages,
    probe::{self, Listener},
    services, shell, tools,
};

/// Shows what this machine has for the examples, and how to get the rest.
///
/// Ends with 0 if there is at least one way to each broker.
#[derive(clap::Args)]
pub struct Args {}

/// A line of the table.
struct Finding {
    what: String,
    /// `Err` holds what is missing and the command that mends it.
    state: Result<String, String>,
    /// Nothing works worse without it.
    optional: bool,
}

impl Finding {
    fn new(what: &str, state: Result<String, String>) -> Self {
        Self {
            what: what.to_owned(),
            state,
            optional: false,
        }
    }

    fn print(&self) {
        let (mark, text) = match &self.state {
            Ok(text) => ("✓", text),
            Err(text) if self.optional => ("-", text),
            Err(text) => ("✗", text),
        };
        println!("  {mark} {:10} {text}", self.what);
    }
}

pub fn run(_: &Args) -> Result<ExitCode> {
    let engine = docker::engine();
    let docker = docker_findings(&engine);
    print("Docker", &docker);
    let native: Vec<Finding> = Broker::ALL.map(native_finding).into();
    print("Native brokers, for machines without Docker", &native);
    print("Building the examples", &building());
    let answering: Vec<Finding> = Broker::ALL.map(answering).into();
    print("Brokers that answer now", &answering);

    let docker_works = docker.iter().all(|finding| finding.state.is_ok());
    let works = |index: usize| {
        docker_works || native[index].state.is_ok() || answering[index].state.is_ok()
    };
    let lost: Vec<&str> = Broker::ALL
        .iter()
        .enumerate()
        .filter(|(index, _)| !works(*index))
        .map(|(_, broker)| broker.title())
        .collect();
    if lost.is_empty() {
        println!("There is a way to each broker. Next: cargo lab up");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "There is no way to {} yet; a command above mends it, and most of them are \
         run by cargo lab up --yes",
        lost.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

fn print(title: &str, findings: &[Finding]) {
    println!("{title}");
    for finding in findings {
        finding.print();
    }
    println!();
}

fn docker_findings(engine: &Engine) -> Vec<Finding> {
    let Engine::Ready { version } = engine else {
        let way_out = docker::way_out(engine).unwrap_or_default();
        return vec![Finding::new("engine", Err(way_out))];
    };
    let compose = match Tool::find() {
        Some(tool) => Ok(tool.version().unwrap_or_default()),
        None => Err(mended_by("missing", compose::install_command())),
    };
    let mut findings = vec![
        Finding::new("engine", Ok(version.clone())),
        Finding::new("Compose", compose),
    ];
    findings.extend(Broker::ALL.map(image));
    findings
}

/// An image that is not here yet is no fault: it is pulled or built when needed.
fn image(broker: Broker) -> Finding {
    let state = images::available(broker)
        .unwrap_or_else(|| format!("will be pulled: {}", services::image(broker)));
    Finding::new(broker.title(), Ok(state))
}

fn native_finding(broker: Broker) -> Finding {
    let missing = native::missing(broker);
    let texts: Vec<String> = missing
        .into_iter()
        .map(|missing| mended_by(&missing.what, missing.command))
        .collect();
    let state = match texts.as_slice() {
        [] => Ok("ready".to_owned()),
        texts => Err(texts.join("; ")),
    };
    Finding::new(broker.title(), state)
}

fn mended_by(what: &str, command: Option<String>) -> String {
    match command {
        Some(command) => format!("{what}: {command}"),
        None => what.to_owned(),
    }
}

fn building() -> Vec<Finding> {
    let optional = |finding: Finding| Finding {
        optional: true,
        ..finding
    };
    vec![
        program("cargo", "cargo", "rust"),
        program("C compiler", "cc", "gcc"),
        program("make", "make", "make"),
        optional(program("cmake", "cmake", "cmake")),
        optional(nats_cli()),
    ]
}

/// A program with the first line of its `--version`, or the package to install.
fn program(what: &str, name: &str, package: &str) -> Finding {
    let version = shell::output(Command::new(name).arg("--version"));
    let state = match version {
        Ok(text) => Ok(text.lines().next().unwrap_or_default().to_owned()),
        Err(_) => Err(mended_by("missing", packages::install_command(&[package]))),
    };
    Finding::new(what, state)
}

/// What some tests of the NATS examples and the benchmark run.
fn nats_cli() -> Finding {
    let found = tools::nats_cli();
    let state = found.map(|program| program.display().to_string());
    Finding::new("nats", state.map_err(|error| error.to_string()))
}

fn answering(broker: Broker) -> Finding {
    let state = match probe::endpoint(broker) {
        Err(error) => Err(error.to_string()),
        Ok(endpoint) => {
            let place = format!("{}:{}", endpoint.host, endpoint.port);
            match probe::listener(broker, &endpoint) {
                Listener::Broker { version } => {
                    Ok([place, version.unwrap_or_default()].join(" "))
                }
                Listener::Other => Err(format!("{place} is another program's")),
                Listener::Nothing => Err(format!("nobody at {place}")),
            }
        }
    };
    Finding {
        // That no broker runs before one is started is as it should be.
        optional: true,
        ..Finding::new(broker.title(), state)
    }
}
