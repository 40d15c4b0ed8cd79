//! A NATS server for one example, with the configuration that is its lesson.

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

/// How long a server may take to start in a container.
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

/// The configuration of an example, `<package>/config/<example>.conf`, if it has
/// one.
pub fn config(source: &workspace::Source) -> Option<PathBuf> {
    let package = source.path.ancestors().nth(3)?;
    let path = package.join(format!("config/{}.conf", source.name));
    path.is_file().then_some(path)
}

/// Starts a server for the example of this configuration: natively, else in a
/// container. The certificates and the files of `<example> setup` that it names
/// are made before, in a temporary folder.
///
/// # Errors
///
/// If a step fails, or the server does not get ready.
pub fn start(config: &Path, yes: bool) -> Result<Private> {
    let name = config.file_stem().context("a path of a file")?;
    let text = workspace::read(config)?;
    let folder = tempfile::Builder::new().prefix("lab-nats-").tempdir()?;
    let guard = cleanup::folder(folder.path())?;
    let folder = folder.keep().canonicalize()?;
    let in_folder = |name: &str| folder.join(name).to_string_lossy().into_owned();
    fs::write(folder.join("server.conf"), &text)?;

    let [port] = native::free_ports()?;
    let mut variables =
        vec![(Broker::Nats.address_var(), Broker::Nats.address(port))];
    if text.contains("certs/") {
        let mut make = Command::new("cargo");
        make.args(["run", "--quiet", "--bin", "make_certs", "--"]);
        shell::run(make.arg(folder.join("certs")))?;
        variables.extend([
            ("NATS_CA", in_folder("certs/ca.pem")),
            ("NATS_CERT", in_folder("certs/client.pem")),
            ("NATS_KEY", in_folder("certs/client.key")),
        ]);
    }
    if text.contains("generated/") {
        let generated = ("NATS_GENERATED", in_folder("generated"));
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
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let script = "docker logs \"$0\" 2>&1";
        let log = shell::output(Command::new("sh").args(["-c", script, &name]))?;
        if log.contains("Server is ready") {
            return Ok(Running::Container { _guard: guard });
        }
        if Instant::now() > deadline {
            bail!("NATS was not ready in time{}", shell::tail(&log));
        }
        thread::sleep(Duration::from_millis(50));
    }
}
