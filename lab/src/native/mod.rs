//! Real brokers as plain processes, where no Docker engine runs.
//!
//! What is installed is used; the rest is fetched into the cache folder, which
//! needs neither root nor Docker for Kafka and NATS. Each broker has free ports
//! on 127.0.0.1 and a data folder of its own, and ends with this program.

mod detached;
pub(crate) mod fetch;
mod kafka;
mod nats;
mod process;
mod rabbitmq;
pub(crate) mod version;

use std::{
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{
    broker::Broker,
    cleanup::{self, Guard},
    kafka_settings::KafkaSettings,
    progress,
    rabbitmq_settings::{self, DEFINITIONS, RabbitMqSettings},
};
use process::Process;

pub use detached::{Detached, detached, remove_data, start_detached};

/// How to start a broker.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The port for its clients; any free one if not given.
    pub port: Option<u16>,
    /// The folder for data, settings and log; if not given, a temporary one
    /// that is removed at the end.
    pub data: Option<PathBuf>,
    /// May whatever is missing be fetched and installed?
    pub yes: bool,
}

/// Something that this machine lacks for the native way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub what: String,
    /// The command that mends it, if there is one.
    pub command: Option<String>,
    /// Does [`start`] mend it by itself, if [`Options::yes`] is set?
    pub by_yes: bool,
}

/// A running broker; dropped, it is stopped, and a temporary folder removed.
pub struct Server {
    broker: Broker,
    launch: Launch,
    address: String,
    version: String,
    /// None after [`Server::kill`]. Stands before `_folder`, so that the
    /// processes are gone before it is removed.
    process: Option<Process>,
    _folder: Option<Guard>,
}

/// How the processes of one broker are started and recognised as ready.
struct Launch {
    command: Command,
    port: u16,
    log: PathBuf,
    /// The log holds this when clients are served.
    ready: &'static str,
    /// The word that follows this in the log is the version.
    version_mark: &'static str,
    /// The oldest version that the examples run on.
    oldest: &'static [u32],
    management: Option<String>,
}

/// What this machine lacks to run a broker natively; nothing, if it can.
pub fn missing(broker: Broker) -> Vec<Missing> {
    if cfg!(windows) {
        return vec![Missing {
            what: "the native way needs Linux or macOS; use Docker".to_owned(),
            command: None,
            by_yes: false,
        }];
    }
    match broker {
        Broker::Kafka => kafka::missing(),
        Broker::RabbitMq => rabbitmq::missing(),
        Broker::Nats => nats::missing(),
    }
}

/// Starts a broker and returns when it accepts clients.
///
/// # Errors
///
/// If something is [`missing`] and may not or cannot be fetched, if the port is
/// taken, or if the broker does not get ready; then the error holds the last
/// lines of its log.
pub fn start(broker: Broker, options: &Options) -> Result<Server> {
    prepare(broker, options.yes)?;
    let step = progress::step(format!("starting {broker}"));
    let (folder, guard) = data_folder(options.data.as_deref())?;
    let mut launch = Launch::new(broker, options.port, &folder)?;
    let (process, version) = Process::start(broker, &mut launch)?;
    let address = broker.address(launch.port);
    step.done(format!("{broker} {version} is ready on {address}"));
    Ok(Server {
        broker,
        launch,
        address,
        version,
        process: Some(process),
        _folder: guard,
    })
}

/// Starts a nats-server that is described by a configuration file and not by
/// this program; only address, port and data folder are ours. Paths in the file
/// are relative to the folder in which it lies; data and log go there too.
///
/// # Errors
///
/// If nats-server is [`missing`], if the port is taken, or if the server does not
/// get ready; then the error holds the last lines of its log.
pub fn start_nats(config: &Path, port: u16) -> Result<Server> {
    prepare(Broker::Nats, false)?;
    let port = checked(Broker::Nats, port)?;
    let mut launch = nats::launch_with(config, port)?;
    let (process, version) = Process::start(Broker::Nats, &mut launch)?;
    Ok(Server {
        broker: Broker::Nats,
        address: Broker::Nats.address(port),
        launch,
        version,
        process: Some(process),
        _folder: None,
    })
}

/// Starts a Kafka with settings of its own. The files that they name are in
/// `folder`; data, log and the complete settings go there too. The commands for
/// its permissions have been run when this returns.
///
/// # Errors
///
/// If something is [`missing`], or Kafka does not get ready; then the error holds
/// the last lines of its log.
pub fn start_kafka(settings: &KafkaSettings, folder: &Path) -> Result<Server> {
    prepare(Broker::Kafka, false)?;
    let mut launch = kafka::launch_with(settings, folder, folder.join("log"))?;
    let (process, version) = Process::start(Broker::Kafka, &mut launch)?;
    for command in settings.commands() {
        kafka::tool(folder, &command)?;
    }
    Ok(Server {
        broker: Broker::Kafka,
        address: Broker::Kafka.address(launch.port),
        launch,
        version,
        process: Some(process),
        _folder: None,
    })
}

/// Starts a RabbitMQ with settings of its own, and returns it with its port for
/// TLS. The files that the settings name are in `folder`; data and log go there
/// too. [`Server::address`] is that of the plain port, which is there as well.
///
/// # Errors
///
/// If something is [`missing`], or RabbitMQ does not get ready; then the error
/// holds the last lines of its log.
pub fn start_rabbitmq(
    settings: &RabbitMqSettings,
    folder: &Path,
) -> Result<(Server, u16)> {
    prepare(Broker::RabbitMq, false)?;
    let [port, tls, management, names, distribution] = free_ports()?;
    if let Some(definitions) = &settings.definitions {
        fs::write(folder.join(DEFINITIONS), definitions)?;
    }
    let mut launch = rabbitmq::launch_with(
        folder,
        folder.join("log"),
        &rabbitmq::Node::alone(port, [management, names, distribution]),
        rabbitmq_settings::PLUGINS,
        |home| settings.native(home, tls),
    )?;
    let (process, version) = Process::start(Broker::RabbitMq, &mut launch)?;
    let server = Server {
        broker: Broker::RabbitMq,
        address: Broker::RabbitMq.address(port),
        launch,
        version,
        process: Some(process),
        _folder: None,
    };
    Ok((server, tls))
}

/// The name service that the nodes of a RabbitMQ cluster find each other by, on this
/// port. Its log is in `folder`.
///
/// # Errors
///
/// If something is [`missing`], or it does not start.
pub fn start_rabbitmq_names(folder: &Path, port: u16) -> Result<Server> {
    prepare(Broker::RabbitMq, false)?;
    let mut launch = rabbitmq::names(folder, folder.join("names.log"), port)?;
    let (process, version) = Process::start(Broker::RabbitMq, &mut launch)?;
    Ok(Server {
        broker: Broker::RabbitMq,
        address: Broker::RabbitMq.address(port),
        launch,
        version,
        process: Some(process),
        _folder: None,
    })
}

/// A node of a RabbitMQ cluster with this name and these ports, for clients, for the
/// [name service](start_rabbitmq_names), and between the nodes. Data and log are in
/// `folder`, and Erlang's cookie, which is the same for all nodes.
///
/// # Errors
///
/// As [`start_rabbitmq`].
pub fn start_rabbitmq_node(
    name: &'static str,
    ports: [u16; 3],
    config: &str,
    folder: &Path,
) -> Result<Server> {
    prepare(Broker::RabbitMq, false)?;
    let node = rabbitmq::Node::of_cluster(name, ports);
    let log = folder.join("log");
    let mut launch = rabbitmq::launch_with(folder, log, &node, "[].\n", |_home| {
        config.to_owned()
    })?;
    let (process, version) = Process::start(Broker::RabbitMq, &mut launch)?;
    Ok(Server {
        broker: Broker::RabbitMq,
        address: Broker::RabbitMq.address(launch.port),
        launch,
        version,
        process: Some(process),
        _folder: None,
    })
}

/// Runs `rabbitmqctl` for a running RabbitMQ, and returns what it prints.
///
/// # Errors
///
/// If it fails; with what it has printed.
pub fn rabbitmqctl(server: &Server, words: &[&str]) -> Result<String> {
    rabbitmq::ctl(&server.launch, words)
}

/// Runs a script of Kafka's, as `kafka-acls.sh`, and returns what it prints;
/// `folder` is that of a Kafka of [`start_kafka`].
///
/// # Errors
///
/// If there is no such script, or it fails; with what it has printed.
pub fn kafka_tool(folder: &Path, words: &[String]) -> Result<String> {
    kafka::tool(folder, words)
}

/// Starts several brokers at the same time; they are returned in the order
/// asked for. A port or a data folder in the options is for one broker only.
///
/// # Errors
///
/// As [`start`]. If one fails, the others are stopped.
pub fn start_all(brokers: &[Broker], options: &Options) -> Result<Vec<Server>> {
    thread::scope(|scope| {
        let threads: Vec<_> = brokers
            .iter()
            .map(|broker| scope.spawn(move || start(*broker, options)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .map_err(|_| anyhow!("a broker's thread ended"))?
            })
            .collect()
    })
}

/// Fetches and installs what is [`missing`].
///
/// # Errors
///
/// If `yes` is not set, with the commands that mend it, or if that fails.
pub fn prepare(broker: Broker, yes: bool) -> Result<()> {
    let missing = missing(broker);
    if yes && missing.iter().all(|item| item.by_yes) {
        return match broker {
            Broker::Kafka => kafka::fetch(),
            Broker::RabbitMq => rabbitmq::fetch(),
            Broker::Nats => nats::fetch(),
        };
    }
    ensure!(missing.is_empty(), "{}", refusal(broker, &missing));
    Ok(())
}

/// The `nats-server` program, fetched if it is missing: for tests of what starts
/// a server by itself.
///
/// # Errors
///
/// If it can neither be found nor fetched.
pub fn nats_server() -> Result<PathBuf> {
    prepare(Broker::Nats, true)?;
    nats::program().context("nats-server is gone; run again")
}

/// The program `java`, for the tools of the brokers' makers.
///
/// # Errors
///
/// If there is none that is new enough.
pub fn java() -> Result<PathBuf> {
    kafka::java().context(
        "Java 17 or newer is missing; cargo lab up kafka --native --yes gets one",
    )
}

/// The folder with Kafka's jars, which has its tools too.
///
/// # Errors
///
/// If they have not been fetched, and `KAFKA_HOME` names none.
pub fn kafka_jars() -> Result<PathBuf> {
    kafka::jars().context(
        "Kafka's jars are missing; cargo lab up kafka --native --yes gets them",
    )
}

/// One line: what is missing, and what to do.
fn refusal(broker: Broker, missing: &[Missing]) -> String {
    let what: Vec<_> = missing.iter().map(|item| item.what.as_str()).collect();
    let commands: Vec<_> =
        missing.iter().filter_map(|m| m.command.clone()).collect();
    let mut ways = Vec::new();
    if missing.iter().all(|item| item.by_yes) {
        ways.push("run again with --yes to fetch it".to_owned());
    }
    if !commands.is_empty() {
        ways.push(format!("run: {}", commands.join(" && ")));
    }
    let text = format!("{broker} cannot start here: missing {}", what.join(", "));
    match ways.is_empty() {
        true => text,
        false => format!("{text}; {}", ways.join("; or ")),
    }
}

fn data_folder(wanted: Option<&Path>) -> Result<(PathBuf, Option<Guard>)> {
    if let Some(folder) = wanted {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        return Ok((folder.canonicalize()?, None));
    }
    let folder = tempfile::Builder::new()
        .prefix("lab-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let guard = cleanup::folder(folder.path())?;
    Ok((folder.keep(), Some(guard)))
}

impl Launch {
    fn new(broker: Broker, port: Option<u16>, data: &Path) -> Result<Self> {
        let [free, second, third, fourth] = free_ports()?;
        let port = match port {
            Some(port) => checked(broker, port)?,
            None => free,
        };
        let log = data.join("log");
        match broker {
            Broker::Kafka => kafka::launch(data, log, port, second),
            Broker::RabbitMq => {
                rabbitmq::launch(data, log, port, [second, third, fourth])
            }
            Broker::Nats => nats::launch(data, log, port, second),
        }
    }
}

/// Ports that were free a moment ago. All are held until all are chosen, so
/// that they differ.
///
/// # Errors
///
/// If there is none.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// The port, if nobody listens on it.
fn checked(broker: Broker, port: u16) -> Result<u16> {
    let address = (Ipv4Addr::LOCALHOST, port);
    // On macOS one can bind 127.0.0.1 while another program has all addresses.
    let answered = TcpStream::connect(address).is_ok();
    if answered || TcpListener::bind(address).is_err() {
        bail!(
            "port {port} is taken; set {} to a free one",
            broker.port_var()
        );
    }
    Ok(port)
}

impl Server {
    /// The value for the environment variable that the examples read.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The broker's version, as its log says.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The port for clients, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.launch.port
    }

    /// The file with all that the broker prints, restarts included.
    pub fn log(&self) -> &Path {
        &self.launch.log
    }

    /// The id of the broker's first process; none after [`Self::kill`].
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// The address of RabbitMQ's management API, or of NATS' monitoring.
    pub fn management(&self) -> Option<&str> {
        self.launch.management.as_deref()
    }

    /// Ends all processes of the broker with SIGKILL; its data stay.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn kill(&mut self) -> Result<()> {
        let broker = self.broker;
        let process = self.process.take();
        process
            .with_context(|| format!("{broker} does not run"))?
            .kill()
    }

    /// Asks the broker to stop, and returns when it has; its data stay.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn stop(&mut self) -> Result<()> {
        let broker = self.broker;
        let process = self.process.take();
        process
            .with_context(|| format!("{broker} does not run"))?
            .stop()
    }

    /// Starts the broker again after [`Self::kill`] or [`Self::stop`], on the
    /// same port and data, and returns when it accepts clients.
    ///
    /// # Errors
    ///
    /// If it runs, or as [`start`].
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "{} runs already", self.broker);
        let (process, _) = Process::start(self.broker, &mut self.launch)?;
        self.process = Some(process);
        Ok(())
    }

    /// Freezes all processes of the broker with SIGSTOP: connections stay open,
    /// and nobody answers.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Lets the broker go on after [`Self::pause`].
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// Sends a signal, `USR2` for example, to all processes of the broker.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn signal(&self, name: &str) -> Result<()> {
        let process = self.process.as_ref();
        let process =
            process.with_context(|| format!("{} does not run", self.broker))?;
        process::signal(process.id(), name)
    }
}
