//! A RabbitMQ for one example, with the settings that are its lesson.

use std::{
    fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{Private, Running, certificates, wait_for};
use crate::{
    broker::Broker,
    cleanup,
    docker::{self, Engine},
    images, native, progress,
    rabbitmq_settings::{
        CONTAINER_CONFIG, CONTAINER_FOLDER, DEFINITIONS, PLUGINS, RabbitMqSettings,
        TLS_PORT,
    },
    shell, workspace,
};

/// How long RabbitMQ may take to start in a container.
const START_LIMIT: Duration = Duration::from_secs(90);

pub(super) fn start(config: &Path, yes: bool) -> Result<Private> {
    let definitions = config.with_extension("json");
    let definitions = match definitions.is_file() {
        true => Some(workspace::read(&definitions)?),
        false => None,
    };
    let config_text = workspace::read(config)?;
    let settings = RabbitMqSettings {
        config: config_text,
        definitions,
    };
    let folder = tempfile::Builder::new().prefix("lab-rabbitmq-").tempdir()?;
    let guard = cleanup::folder(folder.path())?;
    let folder = folder.keep().canonicalize()?;
    let names = ["AMQP_CA", "AMQP_CERT", "AMQP_KEY"];
    let mut variables = certificates(&settings.config, &folder, names)?;

    let missing = !native::missing(Broker::RabbitMq).is_empty();
    let container = missing && matches!(docker::engine(), Engine::Ready { .. });
    if missing && !container {
        native::prepare(Broker::RabbitMq, yes)?;
    }
    let step = progress::step("starting a RabbitMQ with its own settings");
    let (server, address) = match container {
        true => in_container(&settings, &folder, yes)?,
        false => {
            let (server, tls) = native::start_rabbitmq(&settings, &folder)?;
            let address = settings.address(server.port(), tls);
            let server = Box::new(server);
            (Running::Native { _server: server }, address)
        }
    };
    let shown = workspace::shown(workspace::root(), config);
    step.done(format!("RabbitMQ with {shown} is ready on {address}"));
    variables.push((Broker::RabbitMq.address_var(), address));
    Ok(Private {
        variables,
        _server: server,
        _folder: guard,
    })
}

fn in_container(
    settings: &RabbitMqSettings,
    folder: &Path,
    yes: bool,
) -> Result<(Running, String)> {
    let images = images::ensure(&[Broker::RabbitMq], yes)?;
    let (_, image) = images.first().context("the image of RabbitMQ")?;
    let [plain, tls] = native::free_ports()?;
    let name = format!("lab-rabbitmq-{plain}-{}", std::process::id());
    let label = format!("mq-examples.private={name}");
    let guard = cleanup::containers_with_label(&label)?;
    let mut run = Command::new("docker");
    run.args(["run", "--detach", "--name", &name, "--label", &label])
        .args(["--hostname", "rabbitmq"])
        .args(["--publish", &format!("127.0.0.1:{plain}:5672")])
        .args(["--publish", &format!("127.0.0.1:{tls}:{TLS_PORT}")]);
    let mut mount = |from: &Path, to: &str| {
        run.arg("--volume")
            .arg(format!("{}:{to}:ro", from.display()));
    };
    let mut file = |name: &str, text: &str, to: &str| {
        let path = folder.join(name);
        fs::write(&path, text)?;
        mount(&path, to);
        Ok::<_, anyhow::Error>(())
    };
    file("lesson.conf", &settings.config, CONTAINER_CONFIG)?;
    let plugins = format!("{CONTAINER_FOLDER}/enabled_plugins");
    file("enabled_plugins", PLUGINS, &plugins)?;
    if let Some(text) = &settings.definitions {
        file(
            DEFINITIONS,
            text,
            &format!("{CONTAINER_FOLDER}/{DEFINITIONS}"),
        )?;
    }
    let certs = folder.join("certs");
    if certs.is_dir() {
        // The server's user in the container is nobody's here; the folder above
        // is closed to all others.
        let key = certs.join("server.key");
        fs::set_permissions(key, fs::Permissions::from_mode(0o644))?;
        mount(&certs, &format!("{CONTAINER_FOLDER}/certs"));
    }
    shell::output(run.arg(image))?;

    let words = "Server startup complete";
    wait_for(Broker::RabbitMq, &name, words, START_LIMIT)?;
    let running = Running::Container { _guard: guard };
    Ok((running, settings.address(plain, tls)))
}
