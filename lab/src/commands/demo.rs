//! `cargo lab demo`: the seven examples of the guide, on real brokers, with
//! their real output.

mod play;
mod stage;

use std::process::{Command, ExitCode};

use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, Result, bail};
use lab::{
    job, progress, shell,
    workspace::{self, Example},
};

use play::Outcome;
use stage::Stage;

/// The examples in the order of the guide: each producer before its consumer.
const STORY: [&str; 7] = [
    "kafka_producer",
    "kafka_consumer",
    "rabbitmq_publisher",
    "rabbitmq_consumer",
    "nats_pubsub",
    "nats_request_reply",
    "task_queue_rabbitmq",
];

/// Runs the seven examples of the guide against brokers of its own.
///
/// The brokers are those in the environment, else containers where a Docker
/// engine runs, else native processes; what the demo starts is gone when it
/// ends. Ends with 0 only if each example printed what its header says.
#[derive(clap::Args)]
pub struct Args {
    /// Install what is missing
    #[arg(long, short)]
    yes: bool,
    /// Use native processes, also where a Docker engine runs
    #[arg(long)]
    native: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let examples = story()?;
    build()?;
    let stage = Stage::set(args.native, args.yes)?;
    let bold = Style::new().bold();
    anstream::println!("Brokers: {}", stage.shown());
    let mut bad = Vec::new();
    for example in &examples {
        anstream::println!("\n{bold}$ cargo run --bin {}{bold:#}", example.name);
        let broker = stage.broker(example.broker)?;
        match play::play(example, broker)? {
            Outcome::AsItsHeaderSays(seconds) => {
                let green = AnsiColor::Green.on_default();
                let on = match broker.simulated {
                    true => ", on a simulation",
                    false => "",
                };
                anstream::println!(
                    "{green}✓ as its header says{on}{green:#} ({seconds:.1} s)"
                );
            }
            Outcome::Bad(reason) => {
                let red = AnsiColor::Red.on_default();
                anstream::println!("{red}✗ {reason}{red:#}");
                bad.push(example.name.as_str());
            }
        }
    }
    let all = examples.len();
    if bad.is_empty() {
        anstream::println!(
            "\n{bold}{all} of {all} examples did what they must{bold:#}"
        );
        anstream::println!("Next: cargo lab up && cargo lab list");
        return Ok(ExitCode::SUCCESS);
    }
    let good = all - bad.len();
    anstream::println!(
        "\n{bold}{good} of {all} examples did what they must{bold:#}, and not: {}",
        bad.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

fn story() -> Result<Vec<Example>> {
    let mut all = workspace::examples()?;
    STORY
        .into_iter()
        .map(|name| {
            let at = all.iter().position(|example| example.name == name);
            let at = at.with_context(|| format!("there is no example {name}"))?;
            Ok(all.swap_remove(at))
        })
        .collect()
}

/// Builds them all at once. By the names of the programs and not of packages,
/// for cargo chooses the features of shared dependencies by what is selected:
/// this is what `cargo run --bin` selects too, so nothing is compiled twice.
fn build() -> Result<()> {
    let mut build = Command::new("cargo");
    build.arg("build");
    for name in STORY.into_iter().chain([stage::SIMULATION]) {
        build.args(["--bin", name]);
    }
    progress::line(format!("$ {}", shell::shown(&build)));
    if !job::in_view(&mut build)?.success() {
        bail!("the examples do not compile; cargo has said why");
    }
    Ok(())
}
