//! Measures the examples that teach speed beside the tools that the brokers'
//! makers ship: the binaries that a reader copies, on the same server, in the
//! same run, taking turns. `cargo lab bench` builds and runs this.

mod kafka;
mod machine;
mod measure;
mod nats;
mod plot;
mod process;
mod rabbitmq;
mod report;
mod server;
mod statistics;
mod table;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use lab::{
    broker::Broker,
    cleanup, progress,
    workspace::{self, files, read, shown, write},
};

use report::Report;

#[derive(Parser)]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures, and writes the results and what shows them
    Run {
        #[command(flatten)]
        options: measure::Options,
    },
    /// Prints the names of the examples that are measured
    Examples { broker: Broker },
    /// Writes table and picture anew from results that are there
    Render,
    /// Prints what does not show the results: a file, a tab, the problem
    Check,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = cleanup::on_interrupt().and_then(|()| run(cli.command));
    cleanup::hold_if_interrupted();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Run { options } => {
            let report = measure::run(&options)?;
            // A quick run tries the machinery and measures nothing.
            let folder = match options.quick {
                true => workspace::cache().join("bench"),
                false => results(),
            };
            let json = folder.join(format!("{}.json", report.broker.to_lowercase()));
            write(&json, &report.to_json()?)?;
            for (path, text) in shows(&json)? {
                write(&path, &text)?;
                progress::line(format!("  {}", path.display()));
            }
            print!("{}", table::render(&report, table::Language::English));
        }
        Command::Examples { broker } => {
            for name in measure::examples(broker) {
                println!("{name}");
            }
        }
        Command::Render => {
            for json in files(&results(), "json")? {
                for (path, text) in shows(&json)? {
                    if write(&path, &text)? {
                        println!("{} is up to date now", path.display());
                    }
                }
            }
        }
        Command::Check => {
            for json in files(&results(), "json")? {
                for (path, text) in shows(&json)? {
                    if read(&path).is_ok_and(|old| old == text) {
                        continue;
                    }
                    let root = workspace::root();
                    let (path, json) = (shown(root, &path), shown(root, &json));
                    println!("{path}\tdoes not show what {json} holds");
                }
            }
        }
    }
    Ok(())
}

fn results() -> PathBuf {
    workspace::root().join("docs/bench")
}

/// The files that show these results, with the text that they must have.
fn shows(json: &std::path::Path) -> Result<Vec<(PathBuf, String)>> {
    let report = Report::from_json(&read(json)?)?;
    ensure!(!report.cases.is_empty(), "{} has no case", json.display());
    let english = table::render(&report, table::Language::English);
    let chinese = table::render(&report, table::Language::Chinese);
    Ok(vec![
        (json.with_extension("en.md"), english),
        (json.with_extension("zh-CN.md"), chinese),
        (json.with_extension("svg"), plot::render(&report)?),
    ])
}
