//! A Kafka for one example, with the settings that are its lesson.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use super::{Private, Running, certificates, wait_for};
use crate::{
    broker::Broker,
    cleanup,
    docker::{self, Engine},
    images,
    kafka_settings::{
        CONTAINER_FOLDER, CONTAINER_JAVA, KafkaSettings, LOGGING, Reach,
        container_command, container_logging,
    },
    native, progress, shell, workspace,
};

/// How long Kafka may take to start in a container.
const START_LIMIT: Duration = Duration::from_secs(90);

pub(super) fn start(config: &Path, yes: bool) -> Result<Private> {
    let text = workspace::read(config)?;
    let settings = KafkaSettings::new(&text)?;
    let folder = tempfile::Builder::new().prefix("lab-kafka-").tempdir()?;
    let guard = cleanup::folder(folder.path())?;
    let folder = folder.keep().canonicalize()?;
    let address = Broker::Kafka.address(settings.port());
    let mut variables = vec![(Broker::Kafka.address_var(), address)];
    let names = ["KAFKA_CA", "KAFKA_CERT", "KAFKA_KEY"];
    variables.extend(certificates(&text, &folder, names)?);

    let missing = !native::missing(Broker::Kafka).is_empty();
    let container = missing && matches!(docker::engine(), Engine::Ready { .. });
    if missing && !container {
        native::prepare(Broker::Kafka, yes)?;
    }
    let step = progress::step("starting a Kafka with its own settings");
    let server = match container {
        true => in_container(&settings, &folder, yes)?,
        false => Running::Native {
            _server: Box::new(native::start_kafka(&settings, &folder)?),
        },
    };
    let shown = workspace::shown(workspace::root(), config);
    let port = settings.port();
    step.done(format!("Kafka with {shown} is ready on port {port}"));
    Ok(Private {
        variables,
        _server: server,
        _folder: guard,
    })
}

fn in_container(
    settings: &KafkaSettings,
    folder: &Path,
    yes: bool,
) -> Result<Running> {
    let properties = settings.properties(Reach::Container, "/tmp/data");
    fs::write(folder.join("server.properties"), properties)?;
    fs::write(folder.join("log4j2.properties"), LOGGING)?;
    let images = images::ensure(&[Broker::Kafka], yes)?;
    let (_, image) = images.first().context("the image of Kafka")?;
    let name = format!("lab-kafka-{}-{}", settings.port(), std::process::id());
    let label = format!("mq-examples.private={name}");
    let guard = cleanup::containers_with_label(&label)?;
    let mut run = Command::new("docker");
    run.args(["run", "--detach", "--name", &name, "--label", &label])
        // The keys in the folder are for their owner alone.
        .args(["--user", "root", "--volume"])
        .arg(format!("{}:{CONTAINER_FOLDER}:ro", folder.display()))
        .args(["--env", "KAFKA_HEAP_OPTS=-Xmx512m", "--env"])
        .arg(format!("KAFKA_JVM_PERFORMANCE_OPTS={CONTAINER_JAVA}"))
        .args([
            "--env",
            &format!("KAFKA_LOG4J_OPTS={}", container_logging()),
        ]);
    for port in settings.ports() {
        run.args(["--publish", &format!("127.0.0.1:{port}:{port}")]);
    }
    run.args(["--entrypoint", "/bin/bash", image]);
    shell::output(run.args(container_command(settings)))?;

    wait_for(Broker::Kafka, &name, "Kafka Server started", START_LIMIT)?;
    for words in settings.commands() {
        let mut exec = Command::new("docker");
        exec.args(["exec", &name]);
        let (script, arguments) = words.split_first().context("no command")?;
        exec.arg(format!("/opt/kafka/bin/{script}")).args(arguments);
        shell::output(&mut exec)?;
    }
    Ok(Running::Container { _guard: guard })
}
