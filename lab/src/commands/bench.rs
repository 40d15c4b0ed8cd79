//! `cargo lab bench`: the examples about speed, beside the brokers' own tools.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use lab::{
    broker::Broker,
    job, progress, shell,
    workspace::{self, files},
};

/// Measures the examples about speed beside the tool of the broker's makers.
///
/// Both run on one server, in one run, taking turns. The server is the one in
/// the environment, else a native process, else a container. The results go to
/// docs/bench, as JSON, as the tables that the book includes, and as a picture.
#[derive(clap::Args)]
#[command(after_help = "\
EXAMPLES:
  cargo lab bench nats            about ten minutes, on a machine with nothing
                                  else to do
  cargo lab bench rabbitmq        about as long
  cargo lab bench kafka           about six minutes
  cargo lab bench nats --quick    a try, into target/lab/bench; its figures say
                                  nothing
  cargo lab bench --render        draws docs/bench anew from its JSON")]
pub struct Args {
    /// The broker
    #[arg(required_unless_present = "render", value_parser = ["kafka", "nats", "rabbitmq"])]
    broker: Option<String>,
    /// How often each case is measured; five times at least
    #[arg(long, value_name = "N")]
    repeats: Option<u32>,
    /// Try everything with few messages
    #[arg(long)]
    quick: bool,
    /// Measure nothing: write tables and picture from the results that are there
    #[arg(long, conflicts_with_all = ["broker", "repeats", "quick"])]
    render: bool,
    /// Install what is missing: the server, the tool
    #[arg(long, short)]
    yes: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut bench = match &args.broker {
        Some(name) => {
            let broker = name.parse::<Broker>().map_err(anyhow::Error::msg)?;
            build(broker)?;
            measure(args, broker)
        }
        None => bench(&["render"]),
    };
    progress::line(format!("$ {}", shell::shown(&bench)));
    Ok(match job::in_view(&mut bench)?.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The examples that the driver measures, as `cargo run --release` would build
/// them; it looks for them beside itself.
fn build(broker: Broker) -> Result<()> {
    let mut build = Command::new("cargo");
    build.current_dir(workspace::root());
    build.args(["build", "--release"]);
    let sources = workspace::sources_in(workspace::root())?;
    let step = progress::step("building the driver");
    let measured = shell::output(&mut bench(&["examples", broker.name()]))?;
    step.done("built the driver");
    for name in measured.lines() {
        // One that is missing is told as not run.
        if sources.iter().any(|source| source.name == name) {
            build.args(["--bin", name]);
        }
    }
    progress::line(format!("$ {}", shell::shown(&build)));
    if !job::in_view(&mut build)?.success() {
        bail!("the examples do not compile; cargo has said why");
    }
    Ok(())
}

fn measure(args: &Args, broker: Broker) -> Command {
    let mut run = bench(&["run", broker.name()]);
    if let Some(repeats) = args.repeats {
        run.args(["--repeats", &repeats.to_string()]);
    }
    if args.quick {
        run.arg("--quick");
    }
    if args.yes {
        run.arg("--yes");
    }
    run
}

fn bench(arguments: &[&str]) -> Command {
    let mut bench = Command::new("cargo");
    bench.current_dir(workspace::root());
    bench.args(["run", "--quiet", "--release", "--bin", "bench", "--"]);
    bench.args(arguments);
    bench
}

/// What below docs/bench does not show its results: each file, relative to the
/// root, with the problem. Nothing is built where there are no results.
///
/// # Errors
///
/// If the driver cannot be built, or cannot read the results.
pub fn problems(root: &std::path::Path) -> Result<Vec<(String, String)>> {
    if files(&root.join("docs/bench"), "json")?.is_empty() {
        return Ok(Vec::new());
    }
    let mut check = Command::new("cargo");
    check.current_dir(root);
    // As `cargo test` builds it, so that it is there already.
    check.args(["run", "--quiet", "--package", "bench", "--", "check"]);
    let found = shell::output(&mut check)?;
    let problems = found.lines().filter_map(|line| line.split_once('\t'));
    Ok(problems
        .map(|(file, text)| (file.into(), text.into()))
        .collect())
}
