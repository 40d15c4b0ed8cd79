//! A Kafka with settings of its own, for lessons that are about the broker:
//! users, TLS, permissions, time limits.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use tests::kafka::Kafka;
//!
//! let kafka = Kafka::start("group.max.size=2", &[]).await?;
//! let address = kafka.address();
//! # Ok(())
//! # }
//! ```

use std::{env, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use lab::{
    broker::Broker,
    cleanup::Guard,
    kafka_settings::{
        self, CONTAINER_FOLDER, CONTAINER_JAVA, KafkaSettings, LOGGING, Reach,
        container_command, container_logging,
    },
    native,
};
use testcontainers::{
    ContainerRequest, GenericImage, ImageExt as _, core::IntoContainerPort as _,
};
use tokio::task::spawn_blocking;

use crate::{
    TestBroker,
    broker::{NATIVE, Process, docker, image, run_container},
    files,
};

/// A Kafka of a test's own. Dropped, or when the test ends in whatever way, it is
/// gone with its data.
pub struct Kafka {
    /// Its address is that of the listener between brokers.
    broker: TestBroker,
    settings: KafkaSettings,
    address: String,
    place: Place,
}

enum Place {
    Container { id: String },
    Native { folder: PathBuf, _guard: Guard },
}

impl Kafka {
    /// Starts a Kafka with these lines of a `server.properties` on top of those
    /// for a single node, and returns when it serves clients. See
    /// [`KafkaSettings::new`] for the ports; users and permissions are made as the
    /// comments of the settings say.
    ///
    /// The files, certificates for example, lie where a relative path in the
    /// settings finds them, and their paths may have folders: `certs/ca.pem`.
    ///
    /// The listener between brokers has no TLS and asks for no password, as the
    /// methods of this type use it.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn start(settings: &str, files: &[(String, Vec<u8>)]) -> Result<Self> {
        let settings = KafkaSettings::new(settings)?;
        let (place, process) = match env::var_os(NATIVE) {
            Some(_) => start_process(&settings, files).await?,
            None => start_container(&settings, files).await?,
        };
        let inside = Broker::Kafka.address(settings.inside_port());
        let kafka = Self {
            broker: TestBroker::from_process(Broker::Kafka, inside, None, process),
            address: Broker::Kafka.address(settings.port()),
            settings,
            place,
        };
        kafka.broker.ready().await?;
        if let Place::Container { id } = &kafka.place {
            for command in kafka.settings.commands() {
                run_script(id, command).await?;
            }
        }
        Ok(kafka)
    }

    /// The address for an example: of the first listener.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The address of another listener.
    ///
    /// # Errors
    ///
    /// If the settings have none of this name.
    pub fn address_of(&self, listener: &str) -> Result<String> {
        let port = self.settings.port_of(listener);
        let port = port.with_context(|| format!("no listener {listener}"))?;
        Ok(Broker::Kafka.address(port))
    }

    /// The address between brokers, for `tests::observe`.
    pub fn inside(&self) -> &str {
        self.broker.address()
    }

    /// Runs a script of Kafka's against this broker and returns what it prints:
    /// `kafka-acls.sh --list`.
    ///
    /// # Errors
    ///
    /// If it fails; with what it has printed.
    pub async fn run(&self, command: &str) -> Result<String> {
        let mut words = kafka_settings::words(command);
        self.settings.to_this_broker(&mut words);
        match &self.place {
            Place::Container { id } => run_script(id, words).await,
            Place::Native { folder, .. } => {
                let folder = folder.clone();
                spawn_blocking(move || native::kafka_tool(&folder, &words)).await?
            }
        }
    }

    /// All that it has written into its log.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub async fn log(&self) -> Result<String> {
        match &self.place {
            Place::Container { id } => docker(&["logs", id]).await,
            Place::Native { folder, .. } => {
                Ok(fs::read_to_string(folder.join("log"))?)
            }
        }
    }

    /// See [`TestBroker::kill`].
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub async fn kill(&mut self) -> Result<()> {
        self.broker.kill().await
    }

    /// See [`TestBroker::restart`].
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn restart(&mut self) -> Result<()> {
        self.broker.restart().await
    }
}

async fn start_process(
    settings: &KafkaSettings,
    files: &[(String, Vec<u8>)],
) -> Result<(Place, Process)> {
    let (folder, guard) = files::folder("lab-kafka-", files)?;
    let (own, place) = (settings.clone(), folder.clone());
    let start = move || native::start_kafka(&own, &place);
    let server = spawn_blocking(start).await??;
    let place = Place::Native {
        folder,
        _guard: guard,
    };
    Ok((place, Process::Native(Box::new(server))))
}

async fn start_container(
    settings: &KafkaSettings,
    files: &[(String, Vec<u8>)],
) -> Result<(Place, Process)> {
    let (id, guard) = run_container(request(settings, files)?).await?;
    let place = Place::Container { id: id.clone() };
    Ok((place, Process::Container { id, _guard: guard }))
}

fn request(
    settings: &KafkaSettings,
    files: &[(String, Vec<u8>)],
) -> Result<ContainerRequest<GenericImage>> {
    let properties = settings.properties(Reach::Container, "/tmp/data");
    let in_folder = |path: &str| format!("{CONTAINER_FOLDER}/{path}");
    let mut request = image(Broker::Kafka)?
        .with_entrypoint("/bin/bash")
        .with_cmd(container_command(settings))
        // Files that are copied belong to root.
        .with_user("root")
        .with_startup_timeout(Duration::from_secs(90))
        .with_env_var("KAFKA_HEAP_OPTS", "-Xmx512m")
        .with_env_var("KAFKA_JVM_PERFORMANCE_OPTS", CONTAINER_JAVA)
        .with_env_var("KAFKA_LOG4J_OPTS", container_logging())
        .with_copy_to(in_folder("log4j2.properties"), LOGGING.as_bytes().to_vec())
        .with_copy_to(in_folder("server.properties"), properties.into_bytes());
    // The same number on both sides, as it is the one that Kafka tells its
    // clients.
    for port in settings.ports() {
        request = request.with_mapped_port(port, port.tcp());
    }
    for (path, data) in files {
        request = request.with_copy_to(in_folder(path), data.clone());
    }
    Ok(request)
}

async fn run_script(container: &str, mut words: Vec<String>) -> Result<String> {
    let Some(script) = words.first_mut() else {
        bail!("no command");
    };
    *script = format!("/opt/kafka/bin/{script}");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // The tools log to where the broker would: into what they print.
    let quiet = "KAFKA_LOG4J_OPTS=-Dlog4j2.level=error";
    let exec = ["exec", "--env", quiet, container];
    docker(&[&exec[..], &words[..]].concat()).await
}
