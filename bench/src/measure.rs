//! One run: all cases, again and again, examples and tool taking turns.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::{broker::Broker, progress, shell, workspace};
use time::OffsetDateTime;

use crate::{
    kafka, machine, nats,
    process::{Call, Ended, Running},
    rabbitmq,
    report::{Case, Measure, Report, Sample, Side, Text, Versions},
    server::Server,
};

/// Fewer say nothing about how far the samples spread.
const FEWEST_REPEATS: u32 = 5;

const WARM_UPS: u32 = 1;

#[derive(clap::Args)]
pub struct Options {
    /// The broker whose examples are measured
    pub broker: Broker,
    /// How often each case is measured, after one run to warm up
    #[arg(long, default_value_t = FEWEST_REPEATS, value_name = "N")]
    pub repeats: u32,
    /// Try the machinery with few messages; its figures say nothing
    #[arg(long)]
    pub quick: bool,
    /// Install what is missing
    #[arg(long)]
    pub yes: bool,
}

/// What is to be measured, on both sides.
pub struct Task {
    pub id: &'static str,
    pub title: Text,
    pub settings: Text,
    pub messages: u64,
    /// How many times as quick as the tool the example should be, if anything was
    /// aimed at.
    pub target: Option<f64>,
    /// The example that is measured.
    pub example: &'static str,
    pub rust: Plan,
    pub tool: Plan,
}

/// How one side does a task.
pub struct Plan {
    /// What has to be done before, unmeasured.
    pub before: Vec<Before>,
    /// What runs meanwhile.
    pub beside: Option<Beside>,
    pub call: Call,
    /// Finds the values in what was printed, by this call or the one beside it.
    pub read: Reader,
}

pub enum Before {
    /// Removes what earlier samples have stored.
    Clean,
    Run(Call),
}

pub struct Beside {
    pub call: Call,
    /// A line that it prints when it is ready, or about to be.
    pub ready: &'static str,
    /// How long after that it may take to be ready, if the line comes early.
    pub settle: Duration,
    /// Does it end by itself, or when it is asked to?
    pub ends: bool,
}

pub struct Printed {
    pub call: String,
    pub beside: String,
}

type Reader = Box<dyn Fn(&Printed) -> Result<Values>>;

pub type Values = BTreeMap<Measure, f64>;

/// What the cases of a broker are made with.
pub struct Context<'a> {
    pub broker: Broker,
    pub address: &'a str,
    pub version: &'a str,
    /// The folder with the binaries of the examples.
    pub examples: PathBuf,
    pub quick: bool,
    pub yes: bool,
}

impl Context<'_> {
    /// A binary of the workspace, as its reader runs it.
    pub fn example(&self, name: &str, arguments: &[&str]) -> Call {
        let file = format!("{name}{}", env::consts::EXE_SUFFIX);
        self.call(&self.examples.join(file), arguments)
    }

    /// So many that a sample takes a second or more, or a twentieth to try it.
    pub fn messages(&self, count: u64) -> u64 {
        if self.quick { count / 20 } else { count }
    }

    pub fn call(&self, program: &Path, arguments: &[&str]) -> Call {
        Call {
            program: program.to_owned(),
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
            environment: vec![(
                self.broker.address_var().to_owned(),
                self.address.to_owned(),
            )],
        }
    }
}

pub fn run(options: &Options) -> Result<Report> {
    let Options {
        broker,
        repeats,
        quick,
        yes,
    } = *options;
    ensure!(
        quick || repeats >= FEWEST_REPEATS,
        "--repeats {repeats} is too few; {FEWEST_REPEATS} at least, or --quick"
    );
    let mut machine = machine::describe();
    let server = Server::find(broker, yes)?;
    let context = Context {
        broker,
        address: &server.address,
        version: &server.version,
        examples: folder_of_this_program()?,
        quick,
        yes,
    };
    let (bench, versions) = match broker {
        Broker::Nats => nats::bench(&context)?,
        Broker::RabbitMq => rabbitmq::bench(&context)?,
        Broker::Kafka => kafka::bench(&context)?,
    };
    if quick {
        // Measured while something else may well be going on.
        machine.load_before = None;
    }
    let mut cases = Vec::new();
    for task in &bench.tasks {
        cases.push(case(task, context.examples.join(task.example).is_file()));
    }
    for repeat in 0..WARM_UPS + repeats {
        let name = match repeat.checked_sub(WARM_UPS) {
            None => "warm-up".to_owned(),
            Some(number) => format!("repeat {} of {repeats}", number + 1),
        };
        for (task, case) in bench.tasks.iter().zip(&mut cases) {
            if case.not_run.is_some() {
                continue;
            }
            let step = progress::step(format!("{name}: {}", task.title.en));
            let measured = pair(task, &bench, &server, repeat)
                .with_context(|| task.title.en.clone())?;
            let text = format!("{name}: {}: {}", task.title.en, shown(&measured));
            step.done(text);
            if repeat >= WARM_UPS {
                let [rust, tool] = measured;
                case.rust.samples.push(rust);
                case.tool.samples.push(tool);
            }
        }
    }
    Ok(Report {
        broker: broker.title().to_owned(),
        date: today(),
        quick,
        repeats,
        warm_ups: WARM_UPS,
        message_bytes: bench.message_bytes,
        machine,
        versions,
        server_from: server.from.clone(),
        cases,
    })
}

/// The examples of a broker that are measured.
pub fn examples(broker: Broker) -> &'static [&'static str] {
    match broker {
        Broker::Nats => nats::EXAMPLES,
        Broker::RabbitMq => rabbitmq::EXAMPLES,
        Broker::Kafka => kafka::EXAMPLES,
    }
}

/// What a broker's module knows.
pub struct Bench {
    pub tasks: Vec<Task>,
    /// None where each case says it.
    pub message_bytes: Option<u32>,
    /// Removes all that is stored in a server of our own.
    pub clean: Box<dyn Fn() -> Result<()>>,
}

/// The examples are built into the same folder.
fn folder_of_this_program() -> Result<PathBuf> {
    let program = env::current_exe()?;
    Ok(program
        .parent()
        .context("a program in a folder")?
        .to_owned())
}

fn case(task: &Task, is_there: bool) -> Case {
    let side = |plan: &Plan| Side {
        commands: plan
            .beside
            .iter()
            .map(|beside| &beside.call)
            .chain([&plan.call])
            .map(Call::shown)
            .collect(),
        samples: Vec::new(),
    };
    let not_run = format!("there is no example {}", task.example);
    Case {
        id: task.id.to_owned(),
        title: task.title.clone(),
        settings: task.settings.clone(),
        messages: task.messages,
        target: task.target,
        not_run: (!is_there).then_some(not_run),
        rust: side(&task.rust),
        tool: side(&task.tool),
    }
}

/// A sample of each side. Which comes first changes, as the second may find a
/// server that is warmer, or fuller.
fn pair(
    task: &Task,
    bench: &Bench,
    server: &Server,
    repeat: u32,
) -> Result<[Sample; 2]> {
    if repeat.is_multiple_of(2) {
        let rust = sample(&task.rust, bench, server)?;
        Ok([rust, sample(&task.tool, bench, server)?])
    } else {
        let tool = sample(&task.tool, bench, server)?;
        Ok([sample(&task.rust, bench, server)?, tool])
    }
}

fn sample(plan: &Plan, bench: &Bench, server: &Server) -> Result<Sample> {
    for before in &plan.before {
        match before {
            // What others have stored is theirs.
            Before::Clean if !server.ours => {}
            Before::Clean => (bench.clean)()?,
            Before::Run(call) => drop(call.output()?),
        }
    }
    let broker_cpu = || server.process.and_then(machine::cpu_seconds);
    let reset = server.process.and_then(machine::reset_peak);
    let (client_before, broker_before) =
        (machine::children_cpu_seconds(), broker_cpu());

    let beside = plan.beside.as_ref().map(start_beside).transpose()?;
    let call = Running::start(&plan.call)?.end()?;
    let beside = match (beside, &plan.beside) {
        (Some(running), Some(Beside { ends: true, .. })) => Some(running.end()?),
        (Some(running), _) => Some(running.stop()?),
        (None, _) => None,
    };

    let client_cpu_seconds =
        difference(client_before, machine::children_cpu_seconds());
    let broker_cpu_seconds = difference(broker_before, broker_cpu());
    let peak = |ended: &Option<Ended>| ended.as_ref().map(|ended| ended.peak_mib);
    let client_peak_mib = match peak(&beside) {
        Some(beside) => beside.zip(call.peak_mib).map(|(a, b)| a + b),
        None => call.peak_mib,
    };
    let printed = Printed {
        call: call.printed,
        beside: beside.map(|ended| ended.printed).unwrap_or_default(),
    };
    let values = (plan.read)(&printed).with_context(|| {
        let text = format!("{}{}", printed.beside, printed.call);
        format!("{}{}", plan.call.shown(), shell::tail(&text))
    })?;
    Ok(Sample {
        values,
        client_cpu_seconds,
        broker_cpu_seconds,
        client_peak_mib: client_peak_mib.map(one_decimal),
        broker_peak_mib: reset
            .and(server.process)
            .and_then(machine::peak_mib)
            .map(one_decimal),
    })
}

fn start_beside(beside: &Beside) -> Result<Running> {
    let mut running = Running::start(&beside.call)?;
    running.wait_for(beside.ready)?;
    thread::sleep(beside.settle);
    Ok(running)
}

fn difference(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    // Both are hundredths; what is beyond comes from the subtraction.
    Some(((after? - before?) * 100.0).round() / 100.0)
}

fn one_decimal(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn shown([rust, tool]: &[Sample; 2]) -> String {
    let values = rust.values.iter().filter_map(|(measure, rust)| {
        let tool = tool.values.get(measure)?;
        Some(format!("{rust:.0} beside {tool:.0} {}", measure.name()))
    });
    values.collect::<Vec<_>>().join(", ")
}

fn today() -> String {
    OffsetDateTime::now_utc().date().to_string()
}

/// The version of a crate, as the workspace has it.
pub fn locked_version(name: &str) -> Result<String> {
    let lock = fs::read_to_string(workspace::root().join("Cargo.lock"))?;
    version_in(&lock, name).with_context(|| format!("{name} is not in Cargo.lock"))
}

fn version_in(lock: &str, name: &str) -> Option<String> {
    let (_, rest) =
        lock.split_once(&format!("\nname = \"{name}\"\nversion = \""))?;
    rest.split('"').next().map(str::to_owned)
}

pub fn rust_version() -> String {
    let version = shell::output(Command::new("rustc").arg("--version"));
    // `rustc 1.95.0 (f2d3ce0bd 2026-03-21)`
    let version = version.unwrap_or_else(|_| "unknown".to_owned());
    let words: Vec<&str> = version.split_whitespace().take(2).collect();
    words.join(" ")
}

pub fn versions(server: String, client: String, tool: String) -> Versions {
    Versions {
        server,
        client,
        tool,
        rust: rust_version(),
    }
}

/// Reads `published: 1000 messages of 128 B in 0.5 s (2000 msg/s)`.
pub fn rate_of_example(printed: &str, word: &str, expected: u64) -> Result<Values> {
    let line = line_of_example(printed, word, expected)?;
    let rate = line
        .split_once('(')
        .and_then(|(_, rest)| rest.split_once(" msg/s"))
        .with_context(|| format!("no rate in {line:?}"))?;
    Ok(Values::from([(Measure::Rate, number(rate.0)?)]))
}

/// Reads `answered: 1000 requests of 128 B in 0.5 s (p50 200 us, p99 400 us)`.
pub fn latencies_of_example(printed: &str, expected: u64) -> Result<Values> {
    let line = line_of_example(printed, "answered", expected)?;
    let after = |mark: &str| -> Result<f64> {
        let (_, rest) = line.split_once(mark).context("no percentile")?;
        let (value, _) = rest.split_once(" us").context("no unit")?;
        number(value)
    };
    Ok(Values::from([
        (Measure::P50, after("p50 ")?),
        (Measure::P99, after("p99 ")?),
    ]))
}

/// The last line that begins with this word, if it counts what was asked for.
fn line_of_example<'a>(
    printed: &'a str,
    word: &str,
    expected: u64,
) -> Result<&'a str> {
    let begin = format!("{word}: ");
    let line = printed
        .lines()
        .rfind(|line| line.starts_with(&begin))
        .with_context(|| format!("no line begins with {begin:?}"))?;
    let count = line[begin.len()..].split(' ').next().unwrap_or_default();
    ensure!(
        count == expected.to_string(),
        "{line:?} counts {count} where {expected} were sent"
    );
    Ok(line)
}

/// A number with commas between the thousands.
pub fn number(text: &str) -> Result<f64> {
    let digits = text.trim().replace(',', "");
    digits
        .parse()
        .with_context(|| format!("{text:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_an_example_is_read() -> Result<()> {
        let printed =
            "ready: x\npublished: 1000 messages of 128 B in 0.5 s (2000 msg/s)\n";
        let values = rate_of_example(printed, "published", 1000)?;
        assert_eq!(values, Values::from([(Measure::Rate, 2000.0)]));
        Ok(())
    }

    #[test]
    fn the_latencies_of_an_example_are_read() -> Result<()> {
        let printed =
            "answered: 10 requests of 128 B in 1.0 s (p50 200 us, p99 400 us)\n";
        let values = latencies_of_example(printed, 10)?;
        let expected = [(Measure::P50, 200.0), (Measure::P99, 400.0)];
        assert_eq!(values, Values::from(expected));
        Ok(())
    }

    #[test]
    fn an_example_that_counts_less_is_no_result() {
        let printed = "consumed: 999 messages of 128 B in 0.5 s (2000 msg/s)\n";
        assert!(rate_of_example(printed, "consumed", 1000).is_err());
        assert!(rate_of_example(printed, "published", 999).is_err());
    }

    #[test]
    fn the_version_of_a_client_is_that_of_the_lock_file() {
        let lock = "[[package]]\nname = \"async-nats\"\nversion = \"0.51.0\"\n\
                    [[package]]\nname = \"nats\"\nversion = \"1.0.0\"\n";
        assert_eq!(version_in(lock, "nats").as_deref(), Some("1.0.0"));
        assert_eq!(version_in(lock, "async-nats").as_deref(), Some("0.51.0"));
        assert_eq!(version_in(lock, "async"), None);
    }

    #[test]
    fn a_difference_needs_both_ends() {
        assert_eq!(difference(Some(0.1), Some(0.3)), Some(0.2));
        assert_eq!(difference(None, Some(0.3)), None);
    }
}
