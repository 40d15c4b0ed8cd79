//! `cargo lab record`: what the READMEs and the book show as output.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use lab::{
    book::Language,
    guarantees, progress, shell, svg,
    workspace::{self, read, write},
};

use super::{index, test};

/// Records the outputs that the READMEs and the book show.
///
/// Runs the tests of all examples, which write docs/outputs/NAME.txt, then the
/// demo, whose transcript becomes docs/outputs/demo.txt and demo.svg, and writes
/// the generated parts of the READMEs anew. The summary of `cargo lab test` in
/// test.txt is that of the last complete run.
#[derive(clap::Args)]
pub struct Args {
    /// Run nothing: draw demo.svg from demo.txt and write the READMEs anew
    #[arg(long)]
    picture: bool,
    /// Install what is missing
    #[arg(long)]
    yes: bool,
    /// Use native brokers, without Docker
    #[arg(long)]
    native: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let root = workspace::root();
    let transcript = root.join("docs/outputs/demo.txt");
    if !args.picture {
        record_outputs(args)?;
        write(&transcript, &demo_transcript(args)?)?;
        record_summary()?;
    }
    let picture = svg::render(&read(&transcript)?);
    write(&transcript.with_extension("svg"), &picture)?;
    guarantees::update(root)?;
    for language in Language::ALL {
        index::update(root, language)?;
    }
    println!("docs/outputs and the READMEs are up to date");
    Ok(ExitCode::SUCCESS)
}

/// The tests write the output of each example where they would compare it. They
/// run for minutes, so they print what they do.
fn record_outputs(args: &Args) -> Result<()> {
    let mut tests = lab("test", args);
    tests.args(["kafka", "rabbitmq", "nats", "patterns", "faults"]);
    tests.env("LAB_RECORD", "1");
    println!("$ {}", shell::shown(&tests));
    if !tests.status().context("cargo does not start")?.success() {
        bail!("the tests failed, so the demo was not recorded");
    }
    Ok(())
}

/// The end of the last complete run of the tests, if there was one here.
fn record_summary() -> Result<()> {
    if let Ok(summary) = read(&test::last_summary()) {
        let recorded = workspace::root().join("docs/outputs/test.txt");
        let command = "$ cargo lab test --yes\n...\n\n";
        write(&recorded, &format!("{command}{summary}"))?;
    }
    Ok(())
}

/// What a reader sees who types the command into a terminal: the prompt, the
/// command, its output in colour.
fn demo_transcript(args: &Args) -> Result<String> {
    let step = progress::step("recording the demo");
    let mut demo = lab("demo", args);
    demo.env("CLICOLOR_FORCE", "1");
    match shell::output(&mut demo) {
        Ok(output) => {
            step.done("recorded the demo");
            Ok(format!("$ cargo lab demo --yes\n{output}\n"))
        }
        Err(error) => {
            step.failed("the demo failed");
            Err(error)
        }
    }
}

/// `cargo lab` with one of its own commands and the settings of this one.
fn lab(command: &str, args: &Args) -> Command {
    let mut lab = Command::new("cargo");
    lab.args(["lab", command]);
    if args.yes {
        lab.arg("--yes");
    }
    if args.native {
        lab.arg("--native");
    }
    lab
}
