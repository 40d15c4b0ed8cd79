//! A server for one example, with the configuration that is its lesson: NATS
//! here, the others in modules of their own.

mod kafka;
#[cfg(unix)]
mod rabbitmq;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    broker::Broker,
    cleanup::{self, Guard},
    images, native, progress, shell, workspace,
};

/// The ending of Kafka's configurations.
const PROPERTIES: &str = "properties";

/// How long a NATS server may take to start in a container.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running server; dropped, it is gone, with its folder.
pub struct Private {
    /// What the example is to find in its environment.
    pub variables: Vec<(&'static str, String)>,
    /// Before `_folder`, so that the server ends before its files go.
    _server: Running,
    _folder: Guard,
}

/// Held for its end.
enum Running {
    Native { _server: Box<native::Server> },
    Container { _guard: Guard },
}

/// The configuration of an example, `<package>/config/<example>.conf`, or
/// `.properties` for Kafka, if it has one.
pub fn config(source: &workspace::Source) -> Option<PathBuf> {
    let package = source.path.ancestors().nth(3)?;
    let paths = ["conf", PROPERTIES]
        .map(|ending| package.join(format!("config/{}.{ending}", source.name)));
    paths.into_iter().find(|path| path.is_file())
}

/// Starts a server for the example of this configuration: natively, else in a
/// container. The certificates and the files of `<example> setup` that it names
/// are made before, in a temporary folder.
///
/// # Errors
///
/// If a step fails, or the server does not get ready.
pub fn start(broker: Broker, config: &Path, yes: bool) -> Result<Private> {
    match broker {
        Broker::Kafka => kafka::start(config, yes),
        #[cfg(unix)]
        Broker::RabbitMq => rabbitmq::start(config, yes),
        #[cfg(not(unix))]
        Broker::RabbitMq => bail!("this needs Linux or macOS"),
        Broker::Nats => start_nats(config, yes),
    }
}

/// Makes certificates in the folder, if the configuration names any. Returns the
/// variables by which an example finds those of a client.
fn certificates(
    text: &str,
    folder: &Path,
    [ca, certificate, key]: [&'static str; 3],
) -> Result<Vec<(&'static str, String)>> {
    // As a path, or as the folder of a file.
    if !text.contains("certs/") && !text.contains(":certs:") {
        return Ok(Vec::new());
    }
    let folder = folder.join("certs");
    let mut make = Command::new("cargo");
    make.args(["run", "--quiet", "--bin", "make_certs", "--"]);
    shell::run(make.arg(&folder))?;
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    Ok(vec![
        (ca, path("ca.pem")),
        (certificate, path("client.pem")),
        (key, path("client.key")),
    ])
}

fn start_nats(config: &Path, yes: bool) -> Result<Private> {
    let name = config.file_stem().context("a path of a file")?;
    let text = workspace::read(config)?;
    let folder = tempfile::Builder::new().prefix("lab-nats-").tempdir()?;
    let guard = cleanup::folder(folder.path())?;
    let folder = folder.keep().canonicalize()?;
    fs::write(folder.join("server.conf"), &text)?;

    let [port] = native::free_ports()?;
    let mut variables =
        vec![(Broker::Nats.address_var(), Broker::Nats.address(port))];
    let names = ["NATS_CA", "NATS_CERT", "NATS_KEY"];
    variables.extend(certificates(&text, &folder, names)?);
    if text.contains("generated/") {
        let path = folder.join("generated").to_string_lossy().into_owned();
        let generated = ("NATS_GENERATED", path);
        let mut setup = Command::new("cargo");
        setup.args(["run", "--quiet", "--bin"]).arg(name);
        setup.args(["--", "setup"]).env(generated.0, &generated.1);
        shell::run(&mut setup)?;
        variables.push(generated);
    }

    let step = progress::step("starting a NATS server with its own settings");
    let native = native::missing(Broker::Nats).is_empty();
    let server = match native {
        true => Running::Native {
            _server: Box::new(native::start_nats(
                &folder.join("server.conf"),
                port,
            )?),
        },
        false => container(&folder, port, yes)?,
    };
    let shown = workspace::shown(workspace::root(), config);
    step.done(format!("NATS with {shown} is ready on port {port}"));
    Ok(Private {
        variables,
        _server: server,
        _folder: guard,
    })
}

fn container(folder: &Path, port: u16, yes: bool) -> Result<Running> {
    let images = images::ensure(&[Broker::Nats], yes)?;
    let (_, image) = images.first().context("the image of NATS")?;
    let name = format!("lab-nats-{port}-{}", std::process::id());
    let label = format!("mq-examples.private={name}");
    let guard = cleanup::containers_with_label(&label)?;
    let port = port.to_string();
    let mut run = Command::new("docker");
    run.args(["run", "--detach", "--name", &name, "--label", &label])
        // The keys in the folder are for their owner alone.
        .args(["--user", "root", "--workdir", "/run/nats", "--volume"])
        .arg(format!("{}:/run/nats", folder.display()))
        .args(["--publish", &format!("127.0.0.1:{port}:{port}"), image])
        .args(["--config", "server.conf", "--addr", "0.0.0.0"])
        .args(["--port", &port, "--store_dir", "/tmp/nats"]);
    shell::output(&mut run)?;
    wait_for(Broker::Nats, &name, "Server is ready", START_LIMIT)?;
    Ok(Running::Container { _guard: guard })
}

/// Waits until the log of a container has these words.
///
/// # Errors
///
/// If the container ends, or after this limit; with the end of its log.
fn wait_for(broker: Broker, name: &str, words: &str, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        // Asked before the log is read, which then is complete.
        let mut inspect = Command::new("docker");
        inspect.args(["inspect", "--format", "{{.State.Running}}", name]);
        let running = shell::output(&mut inspect)?.trim() == "true";
        let script = "docker logs \"$0\" 2>&1";
        let log = shell::output(Command::new("sh").args(["-c", script, name]))?;
        if log.contains(words) {
            return Ok(());
        }
        if !running {
            bail!("{broker} has ended{}", shell::tail(&log));
        }
        if Instant::now() > deadline {
            bail!("{broker} was not ready in time{}", shell::tail(&log));
        }
        thread::sleep(Duration::from_millis(100));
    }
}
