//! The brokers of the demo, each from the best place that this machine offers.

use std::{
    any::Any,
    env,
    io::{BufRead as _, BufReader},
    process::{ChildStdout, Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use lab::{
    broker::Broker,
    cleanup::{self, Guard},
    compose::{Project, Temporary},
    docker::{self, Engine},
    images,
    native::{self, Options, Server},
    progress,
};

/// The example that stands in for Kafka where none can be had.
pub const SIMULATION: &str = "kafka_mock_cluster";

/// All brokers of the demo; dropped, those that it started are gone.
pub struct Stage {
    brokers: Vec<Staged>,
    /// Holds the containers, if there are any.
    _project: Option<Temporary>,
}

/// One broker, or the reason why there is none.
pub struct Staged {
    broker: Broker,
    pub address: Result<String>,
    /// Nobody else has used it before.
    pub fresh: bool,
    /// It is no real broker.
    pub simulated: bool,
    /// What it is, for the reader.
    how: String,
    /// Ends the broker when it is dropped.
    _process: Option<Box<dyn Any + Send>>,
}

impl Stage {
    /// Finds or starts the three brokers.
    ///
    /// # Errors
    ///
    /// If containers cannot be started. A broker that cannot be had natively is
    /// no error here: its examples will not run, and say so.
    pub fn set(native: bool, yes: bool) -> Result<Self> {
        let (given, wanted): (Vec<_>, Vec<_>) = Broker::ALL
            .into_iter()
            .partition(|broker| env::var_os(broker.address_var()).is_some());
        let mut brokers: Vec<_> =
            given.into_iter().map(Staged::of_environment).collect();
        let mut project = None;
        if wanted.is_empty() {
            // Nothing is left to start.
        } else if !native && matches!(docker::engine(), Engine::Ready { .. }) {
            let containers = Project::temporary(yes)?;
            containers.up(&wanted)?;
            for broker in wanted {
                brokers.push(Staged::of_container(broker, &containers)?);
            }
            project = Some(containers);
        } else {
            brokers.extend(start_natively(&wanted, yes));
        }
        brokers.sort_by_key(|staged| staged.broker as u8);
        Ok(Self {
            brokers,
            _project: project,
        })
    }

    /// The broker of an example.
    ///
    /// # Errors
    ///
    /// If it was never set, which would be a mistake in [`Self::set`].
    pub fn broker(&self, broker: Broker) -> Result<&Staged> {
        let mut brokers = self.brokers.iter();
        brokers
            .find(|staged| staged.broker == broker)
            .with_context(|| format!("{broker} is not on the stage"))
    }

    /// What each broker is, on one line.
    pub fn shown(&self) -> String {
        let how = |staged: &Staged| staged.how.clone();
        let shown: Vec<_> = self.brokers.iter().map(how).collect();
        shown.join(", ")
    }
}

impl Staged {
    fn of_environment(broker: Broker) -> Self {
        let variable = broker.address_var();
        Self {
            broker,
            address: env::var(variable).context(variable),
            fresh: false,
            simulated: false,
            how: format!("{broker} of {variable}"),
            _process: None,
        }
    }

    fn of_container(broker: Broker, project: &Project) -> Result<Self> {
        let port = project
            .port(broker)
            .with_context(|| format!("the container of {broker} has no port"))?;
        let image = images::available(broker).unwrap_or_default();
        Ok(Self {
            broker,
            address: Ok(broker.address(port)),
            fresh: true,
            simulated: false,
            how: format!("{broker} (container of {image})"),
            _process: None,
        })
    }

    fn of_process(server: Server, broker: Broker) -> Self {
        Self {
            broker,
            address: Ok(server.address().to_owned()),
            fresh: true,
            simulated: false,
            how: format!("{broker} {} (native)", server.version()),
            _process: Some(Box::new(server)),
        }
    }

    /// The last resort for Kafka.
    fn of_simulation(address: String, process: impl Any + Send) -> Self {
        Self {
            broker: Broker::Kafka,
            address: Ok(address),
            fresh: true,
            simulated: true,
            how: "librdkafka's mock cluster, a simulation and no Kafka".to_owned(),
            _process: Some(Box::new(process)),
        }
    }

    fn absent(broker: Broker, reason: anyhow::Error) -> Self {
        Self {
            broker,
            address: Err(reason),
            fresh: true,
            simulated: false,
            how: format!("no {broker}"),
            _process: None,
        }
    }
}

fn start_natively(brokers: &[Broker], yes: bool) -> Vec<Staged> {
    thread::scope(|scope| {
        let threads: Vec<_> = brokers
            .iter()
            .map(|broker| scope.spawn(|| start(*broker, yes)))
            .collect();
        brokers
            .iter()
            .zip(threads)
            .map(|(broker, thread)| {
                thread.join().unwrap_or_else(|_| {
                    Staged::absent(*broker, anyhow!("the start of {broker} failed"))
                })
            })
            .collect()
    })
}

fn start(broker: Broker, yes: bool) -> Staged {
    let options = Options {
        yes,
        ..Options::default()
    };
    let error = match native::start(broker, &options) {
        Ok(server) => return Staged::of_process(server, broker),
        Err(error) => error,
    };
    cleanup::hold_if_interrupted();
    progress::line(format!("{error:#}"));
    if broker != Broker::Kafka {
        return Staged::absent(broker, error);
    }
    match simulate() {
        Ok((address, process)) => Staged::of_simulation(address, process),
        Err(error) => Staged::absent(broker, error),
    }
}

/// Starts the mock cluster and reads its address from its first line. Returns
/// it with what ends the process, and the pipe into which it prints the rest.
fn simulate() -> Result<(String, (Guard, BufReader<ChildStdout>))> {
    let mut command = Command::new("cargo");
    command
        .args(["run", "--quiet", "--bin", SIMULATION])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("cannot start the mock cluster")?;
    let guard = cleanup::group(child.id())?;
    let output = child.stdout.take().context("its output is piped")?;
    let mut line = String::new();
    let mut output = BufReader::new(output);
    output.read_line(&mut line)?;
    let (_, address) = line
        .trim()
        .split_once("KAFKA_BROKERS=")
        .context("the mock cluster did not get ready")?;
    Ok((address.to_owned(), (guard, output)))
}
