//! `cargo lab`: the helper program of the workspace.

mod commands;

use std::{
    panic,
    process::{self, ExitCode},
};

use anyhow::Result;
use clap::Parser;
use lab::cleanup;

/// Brokers, examples, tests and book of this workspace.
///
/// Each command prints the plain commands that it stands for, so nothing here
/// needs this program.
#[derive(Parser)]
#[command(
    name = "cargo lab",
    bin_name = "cargo lab",
    disable_help_subcommand = true,
    after_help = "\
EXAMPLES:
  cargo lab doctor            what is here, what is missing
  cargo lab up nats           start NATS and leave it running
  cargo lab list consumer     the examples about consumers
  cargo lab down --volumes    stop all brokers, remove their data

Each command has a --help of its own."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Doctor(commands::doctor::Args),
    Up(commands::up::Args),
    Down(commands::down::Args),
    Status(commands::status::Args),
    Logs(commands::logs::Args),
    List(commands::list::Args),
    Run(commands::run::Args),
    Demo(commands::demo::Args),
    Test(commands::test::Args),
    Check(commands::check::Args),
    Index(commands::index::Args),
    Record(commands::record::Args),
    Book(commands::book::Args),
    Bench(commands::bench::Args),
}

fn main() -> ExitCode {
    end_with_the_reader();
    let cli = Cli::parse();
    let result = cleanup::on_interrupt().and_then(|()| run(&cli.command));
    cleanup::hold_if_interrupted();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends this program without a word when nobody reads its output any more, as in
/// `cargo lab list | head -1`. Printing would panic, and to have the system send
/// SIGPIPE instead takes unsafe code.
fn end_with_the_reader() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>();
        if text.is_some_and(|text| text.contains("Broken pipe")) {
            process::exit(0);
        }
        usual(info);
    }));
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Up(args) => commands::up::run(args),
        Command::Down(args) => commands::down::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Logs(args) => commands::logs::run(args),
        Command::List(args) => commands::list::run(args),
        Command::Run(args) => commands::run::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Test(args) => commands::test::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Index(args) => commands::index::run(args),
        Command::Record(args) => commands::record::run(args),
        Command::Book(args) => commands::book::run(args),
        Command::Bench(args) => commands::bench::run(args),
    }
}
