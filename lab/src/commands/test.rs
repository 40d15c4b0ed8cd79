//! `cargo lab test`: all that must be true before a change lands.

use std::{
    env,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::Result;
use clap::ValueEnum;
use lab::{
    broker::Broker,
    docker, features, images, job, native, progress, shell, tools,
    workspace::{self, read, write},
};

/// Runs all tests, on real brokers.
///
/// They are testcontainers tests, so a Docker engine is installed and started
/// where there is none; with --native they use native brokers instead.
#[derive(clap::Args)]
#[command(after_help = "\
PARTS, in this order:
  lint      cargo fmt --check, cargo clippy
  check     cargo lab check
  lab       unit tests of all crates, tests of cargo lab itself
  kafka, rabbitmq, nats, patterns
            tests of the examples, each against its brokers; Kafka's with tls
  faults    a thousand messages and ten kills for each line of the book's table
            of guarantees
  features  kafka-examples with tls, kerberos and cmake-build
  book      both books

EXAMPLES:
  cargo lab test --yes        everything
  cargo lab test nats         the tests of one crate
  cargo lab test faults       only the faults, with what each has counted")]
pub struct Args {
    /// Only these parts
    #[arg(value_name = "PART", hide_possible_values = true)]
    parts: Vec<Part>,
    /// Install what is missing, the Docker engine included
    #[arg(long, short)]
    yes: bool,
    /// Use native brokers, for machines where no engine may run
    #[arg(long)]
    native: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Lint,
    Check,
    Lab,
    Kafka,
    Rabbitmq,
    Nats,
    Patterns,
    Faults,
    Features,
    Book,
}

/// How many tests of a part run at a time. Most of them wait, for time limits and for
/// brokers that come back, so there may be more than the machine has cores.
const THREADS: &str = "4";

/// The same for NATS, whose servers are small.
const NATS_THREADS: &str = "6";

/// The same for the patterns. The tests of one of them take turns, and come one after
/// the other: with so many threads, two or three patterns are tested at a time.
const PATTERN_THREADS: &str = "12";

/// The same for the faults, each with a broker of its own. Those of the task queue wait
/// for tasks most of the time.
const FAULT_THREADS: &str = "6";

/// How a part ended.
enum Verdict {
    Passed,
    Failed,
    /// With what is missing. Not a success where nobody reads the summary.
    NotRun(String),
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let parts: Vec<Part> = Part::value_variants()
        .iter()
        .filter(|part| args.parts.is_empty() || args.parts.contains(part))
        .copied()
        .collect();
    let brokers: Vec<Broker> = Broker::ALL
        .into_iter()
        .filter(|broker| parts.iter().any(|part| part.needs(*broker)))
        .collect();
    let settings = prepare(&brokers, args)?;
    if parts.contains(&Part::Nats) {
        // Some of its tests run it.
        tools::install_nats_cli(args.yes)?;
    }
    if parts.contains(&Part::Rabbitmq) || parts.contains(&Part::Patterns) {
        tools::install_pika(args.yes)?;
    }

    let mut summary = Vec::new();
    let (mut failed, mut not_run) = (0, 0);
    for part in parts {
        let started = Instant::now();
        let verdict = part.run(args, &settings)?;
        let seconds = started.elapsed().as_secs_f32();
        summary.push(match verdict {
            Verdict::Passed => format!("✓ {:9} {seconds:6.1} s", part.name()),
            Verdict::Failed => {
                failed += 1;
                format!("✗ {:9} {seconds:6.1} s", part.name())
            }
            Verdict::NotRun(reason) => {
                not_run += 1;
                format!("- {:9} not run: {reason}", part.name())
            }
        });
    }
    let summary = summary.join("\n");
    println!("\n{summary}");
    if args.parts.is_empty() && failed == 0 && not_run == 0 {
        // For `cargo lab record`: to run all this again would take minutes.
        write(&last_summary(), &format!("{summary}\n"))?;
    }
    // In continuous integration nobody reads what was not run.
    let in_ci = env::var_os("CI").is_some();
    if failed > 0 || (not_run > 0 && in_ci) {
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the last complete run in which all was well has left its summary.
pub fn last_summary() -> PathBuf {
    workspace::cache().join("test-summary.txt")
}

/// Does this text, printed by `cargo lab test`, tell of each part in its order?
pub fn tells_of_each_part(text: &str) -> bool {
    let told = text.lines().filter_map(|line| line.strip_prefix("✓ "));
    let told = told.map(|line| line.split_whitespace().next().unwrap_or_default());
    told.eq(Part::value_variants().iter().map(|part| part.name()))
}

/// Variable and value, for the tests.
type Settings = Vec<(&'static str, String)>;

/// Makes sure that these brokers can be started by the tests.
fn prepare(brokers: &[Broker], args: &Args) -> Result<Settings> {
    if brokers.is_empty() {
        return Ok(Vec::new());
    }
    if args.native {
        for broker in brokers {
            native::prepare(*broker, args.yes)?;
        }
        return Ok(vec![("LAB_NATIVE", "1".to_owned())]);
    }
    docker::install_and_start(args.yes)?;
    images::ensure(brokers, args.yes)
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Lint => "lint",
            Self::Check => "check",
            Self::Lab => "lab",
            Self::Kafka => "kafka",
            Self::Rabbitmq => "rabbitmq",
            Self::Nats => "nats",
            Self::Patterns => "patterns",
            Self::Faults => "faults",
            Self::Features => "features",
            Self::Book => "book",
        }
    }

    fn needs(self, broker: Broker) -> bool {
        match self {
            Self::Kafka => broker == Broker::Kafka,
            Self::Rabbitmq => broker == Broker::RabbitMq,
            Self::Nats => broker == Broker::Nats,
            Self::Patterns | Self::Faults => patterns_use(broker),
            Self::Lint | Self::Check | Self::Lab | Self::Features | Self::Book => {
                false
            }
        }
    }

    fn run(self, args: &Args, settings: &Settings) -> Result<Verdict> {
        // By the name of the test and not of its package, for cargo chooses the
        // features of shared dependencies by what is selected: so they are the
        // same in each part, in clippy and in `cargo run --bin`.
        let tests = |name: &str, features: &[&str], words: &[&str]| {
            let mut test = cargo(&["test", "--test", name]);
            test.args(features)
                .args(["--", "--test-threads"])
                .args(words);
            test.envs(settings.iter().map(|(name, value)| (name, value)));
            vec![test]
        };
        match self {
            Self::Lint => all(vec![
                cargo(&["fmt", "--all", "--check"]),
                cargo(&[
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--",
                    "--deny",
                    "warnings",
                ]),
            ]),
            // A recording is about to change what would be checked.
            Self::Check if env::var_os("LAB_RECORD").is_some() => {
                Ok(Verdict::NotRun("recording".to_owned()))
            }
            Self::Check => all(vec![cargo(&["lab", "check"])]),
            Self::Lab => all(vec![
                unit_tests()?,
                cargo(&["test", "--package", "lab", "--test", "*"]),
            ]),
            Self::Kafka => {
                kafka(|features| tests("kafka", features, &[THREADS]), args.yes)
            }
            Self::Rabbitmq => all(tests("rabbitmq", &[], &[THREADS])),
            Self::Nats => all(tests("nats", &[], &[NATS_THREADS])),
            Self::Patterns => all(tests("patterns", &[], &[PATTERN_THREADS])),
            // What each of them has counted so far is shown as it runs.
            Self::Faults => {
                all(tests("faults", &[], &[FAULT_THREADS, "--nocapture"]))
            }
            Self::Features => build_features(args.yes),
            Self::Book => {
                let mut book = cargo(&["lab", "book"]);
                if args.yes {
                    book.arg("--yes");
                }
                all(vec![book])
            }
        }
    }
}

/// Does any pattern use this broker?
fn patterns_use(broker: Broker) -> bool {
    let sources = workspace::sources_in(workspace::root()).unwrap_or_default();
    let mut patterns = sources.iter().filter(|source| source.package == "patterns");
    patterns.any(|source| source.broker == broker)
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(arguments).current_dir(workspace::root());
    cargo
}

/// Runs all commands, also after one has failed: two faults are told at once.
fn all(commands: Vec<Command>) -> Result<Verdict> {
    let mut verdict = Verdict::Passed;
    for mut command in commands {
        println!("$ {}", shell::shown(&command));
        if !job::in_view(&mut command)?.success() {
            verdict = Verdict::Failed;
        }
    }
    Ok(verdict)
}

/// The unit tests of the libraries, and of the programs that have some: to build each
/// example a second time, as a test without a test, takes minutes.
fn unit_tests() -> Result<Command> {
    let mut test = cargo(&["test", "--lib", "--bin", "bench", "--bin", "lab"]);
    for source in workspace::sources_in(workspace::root())? {
        if has_tests(&read(&source.path)?) {
            test.args(["--bin", &source.name]);
        }
    }
    Ok(test)
}

fn has_tests(source: &str) -> bool {
    const MARKS: [&str; 3] = ["#[cfg(test)]", "#[test]", "#[tokio::test"];
    let mut lines = source.lines().map(str::trim_start);
    lines.any(|line| MARKS.iter().any(|mark| line.starts_with(mark)))
}

/// Runs the tests of the Kafka examples, with TLS where it can be built.
fn kafka(tests: impl Fn(&[&str]) -> Vec<Command>, yes: bool) -> Result<Verdict> {
    if features::TLS.provide(yes)? {
        return all(tests(&["--features", features::TLS.name]));
    }
    match all(tests(&[]))? {
        Verdict::Passed => {
            let missing = features::TLS.packages.join(" ");
            Ok(Verdict::NotRun(format!("without TLS, missing: {missing}")))
        }
        verdict => Ok(verdict),
    }
}

/// Builds the features of the guide's dependency block, each alone.
fn build_features(yes: bool) -> Result<Verdict> {
    let mut missing: Vec<&str> = Vec::new();
    let mut builds = Vec::new();
    for feature in &features::ALL {
        match feature.provide(yes)? {
            true => builds.push(build_with(feature.name)),
            false => missing.extend(feature.packages),
        }
    }
    if features::TLS.provide(yes)? {
        // What only this feature compiles.
        let mut clippy = cargo(&["clippy", "--package", "kafka-examples"]);
        clippy.args(["--all-targets", "--features", features::TLS.name]);
        clippy.args(["--", "--deny", "warnings"]);
        builds.push(clippy);
    }
    let verdict = all(builds)?;
    if missing.is_empty() || matches!(verdict, Verdict::Failed) {
        return Ok(verdict);
    }
    missing.sort_unstable();
    missing.dedup();
    let missing = missing.join(" ");
    progress::line(format!(
        "features: some were not built for want of {missing}"
    ));
    Ok(Verdict::NotRun(format!("missing: {missing}")))
}

fn build_with(feature: &str) -> Command {
    let feature = format!("kafka-examples/{feature}");
    cargo(&["build", "--bin", "kafka_producer", "--features", &feature])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_any_kind_of_test_is_tested() {
        for text in [
            "fn main() {}\n#[cfg(test)]\nmod tests {}\n",
            "    #[test]\n    fn a() {}\n",
            "#[tokio::test(flavor = \"multi_thread\")]\nasync fn a() {}\n",
        ] {
            assert!(has_tests(text), "{text}");
        }
        assert!(!has_tests("//! Run cargo test: #[test]\nfn main() {}\n"));
    }

    #[test]
    fn the_examples_about_tests_are_among_the_unit_tests() -> Result<()> {
        let command = shell::shown(&unit_tests()?);
        for name in ["kafka_mock_tests", "nats_test_server"] {
            assert!(command.contains(name), "{command}");
        }
        Ok(())
    }
}
