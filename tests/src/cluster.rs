//! Three nodes of one Kafka or of one RabbitMQ, for lessons about what survives when
//! one of them dies. For NATS there is [`crate::nats::Servers`].

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    kafka_settings::{CLUSTER_ID, CONTAINER_JAVA, KafkaSettings, LOGGING, Reach},
    native, shell,
};
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    observe,
    several::{FOLDER, Node, Several},
    wait,
};

/// Three nodes of a test's own. Dropped, or when the test ends in whatever way, they
/// are gone with their data.
pub struct Cluster {
    several: Several,
    /// What RabbitMQ's nodes find each other by, where they are processes of this
    /// machine.
    _names: Option<native::Server>,
    /// More nodes at a time are too many for a small machine.
    _turn: MutexGuard<'static, ()>,
}

/// The nodes, by the names of the methods of [`Cluster`].
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];

static TURN: Mutex<()> = Mutex::const_new(());

/// What a Kafka of three nodes has beside what a single one has: what it knows is on
/// all of them, and a write needs two.
const KAFKA: &str = "\
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
min.insync.replicas=2
";

impl Cluster {
    /// Starts three nodes, each broker and controller, and returns when all of them
    /// can hold a replica.
    ///
    /// # Errors
    ///
    /// If one does not start; with the end of its log.
    pub async fn kafka() -> Result<Self> {
        let turn = TURN.lock().await;
        let settings: [_; 3] = KafkaSettings::cluster(KAFKA)?;
        let files = NODES.into_iter().zip(&settings).flat_map(|(name, node)| {
            let data = format!("{FOLDER}/{name}/data");
            let properties = node.properties(Reach::Container, &data);
            [
                (format!("{name}/server.properties"), properties.into()),
                (format!("{name}/log4j2.properties"), LOGGING.into()),
            ]
        });
        let files = files.collect();
        let nodes = NODES.into_iter().zip(settings).map(kafka_node).collect();
        let ready = "Kafka Server started";
        let several = Several::prepare(Broker::Kafka, ready, nodes, files).await?;
        let mut cluster = Self {
            several,
            _names: None,
            _turn: turn,
        };
        cluster.several.start_all().await?;
        let address = cluster.address()?;
        wait::until("three brokers", async || {
            observe::kafka::brokers(&address, 3).await
        })
        .await?;
        Ok(cluster)
    }

    /// Starts three nodes that know each other, and returns when all serve clients.
    ///
    /// # Errors
    ///
    /// If one does not start; with the end of its log.
    pub async fn rabbitmq() -> Result<Self> {
        let turn = TURN.lock().await;
        let ports: [u16; 3] = native::free_ports()?;
        let [names, distribution @ ..]: [u16; 4] = native::free_ports()?;
        let nodes = RABBITMQ.into_iter().zip(ports).zip(distribution);
        let nodes: Vec<_> = nodes
            .map(|((node, port), distribution)| {
                rabbitmq_node(node, [port, names, distribution])
            })
            .collect();
        let files = NODES.into_iter().zip(ports).map(|(name, port)| {
            let config =
                format!("listeners.tcp.default = 0.0.0.0:{port}\n{}", config());
            (format!("{name}.conf"), config.into_bytes())
        });
        let files = files.collect();
        let ready = "Server startup complete";
        let mut several =
            Several::prepare(Broker::RabbitMq, ready, nodes, files).await?;
        let service = match several.folder() {
            Some(folder) => {
                let folder = folder.join("names");
                fs::create_dir_all(&folder)?;
                let start = move || native::start_rabbitmq_names(&folder, names);
                Some(tokio::task::spawn_blocking(start).await??)
            }
            None => None,
        };
        several.start_all().await?;
        Ok(Self {
            several,
            _names: service,
            _turn: turn,
        })
    }

    /// The addresses of all nodes, with commas between them.
    ///
    /// # Errors
    ///
    /// Never, as all nodes are known.
    pub fn address(&self) -> Result<String> {
        let urls: Result<Vec<_>> =
            NODES.iter().map(|name| self.several.url(name)).collect();
        Ok(urls?.join(","))
    }

    /// The address of one node.
    ///
    /// # Errors
    ///
    /// If there is none of this name.
    pub fn url(&self, name: &str) -> Result<String> {
        self.several.url(name)
    }

    /// SIGKILL; the node's data stay.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.several.kill(name).await
    }

    /// Starts a node again after [`Self::kill`], with its data.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        self.several.start(name).await
    }

    /// Stops a node where it is: it answers nobody, and its connections stay open.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn freeze(&self, name: &str) -> Result<()> {
        self.several.signal(name, "STOP").await
    }

    /// Lets it go on after [`Self::freeze`].
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn thaw(&self, name: &str) -> Result<()> {
        self.several.signal(name, "CONT").await
    }
}

fn kafka_node((name, settings): (&'static str, KafkaSettings)) -> Node {
    // The tool's log goes where its output goes; the second start finds all done.
    let command = format!(
        "cd {name} && export KAFKA_HEAP_OPTS=-Xmx400m && \
         export KAFKA_JVM_PERFORMANCE_OPTS='{CONTAINER_JAVA}' && \
         export KAFKA_LOG4J_OPTS=-Dlog4j2.configurationFile={FOLDER}/{name}/log4j2.properties && \
         /opt/kafka/bin/kafka-storage.sh format --ignore-formatted \
         --cluster-id {CLUSTER_ID} --config server.properties && \
         exec /opt/kafka/bin/kafka-server-start.sh server.properties"
    );
    Node {
        name: name.to_owned(),
        port: settings.port(),
        command,
        start: Box::new(move |folder| {
            native::start_kafka(&settings, &made(&folder.join(name))?)
        }),
    }
}

/// RabbitMQ's names for [`NODES`]: `rabbit1@localhost`, and so on.
const RABBITMQ: [(&str, &str); 3] = [
    ("n1", "rabbit1@localhost"),
    ("n2", "rabbit2@localhost"),
    ("n3", "rabbit3@localhost"),
];

/// Each node lists all nodes, and guest may come from everywhere: the port is open on
/// this machine only.
fn config() -> String {
    let nodes = (1..).zip(RABBITMQ).map(|(number, (_, node))| {
        format!("cluster_formation.classic_config.nodes.{number} = {node}\n")
    });
    let nodes: String = nodes.collect();
    format!(
        "loopback_users = none\n\
         cluster_formation.peer_discovery_backend = classic_config\n{nodes}"
    )
}

/// What nodes have to have in common to talk to each other.
const COOKIE: &str = "shop";

fn rabbitmq_node(
    (name, node): (&'static str, &'static str),
    ports: [u16; 3],
) -> Node {
    let [port, names, distribution] = ports;
    let home = format!("{FOLDER}/{name}.home");
    // A cookie that others may read is refused.
    let command = format!(
        "mkdir -p {home} && rm -f {home}/.erlang.cookie && \
         echo {COOKIE} > {home}/.erlang.cookie && \
         chmod 400 {home}/.erlang.cookie && export HOME={home} && \
         export ERL_EPMD_PORT={names} && epmd -daemon && \
         export RABBITMQ_NODENAME={node} RABBITMQ_DIST_PORT={distribution} && \
         export RABBITMQ_CONFIG_FILE={FOLDER}/{name}.conf && \
         export RABBITMQ_MNESIA_BASE={home}/data RABBITMQ_LOGS=- && \
         export RABBITMQ_ENABLED_PLUGINS_FILE={home}/plugins && \
         echo '[].' > {home}/plugins && exec rabbitmq-server"
    );
    Node {
        name: name.to_owned(),
        port,
        command,
        start: Box::new(move |folder| {
            let folder = made(&folder.join(name))?;
            let cookie = folder.join(".erlang.cookie");
            fs::write(&cookie, COOKIE)?;
            let cookie = cookie.to_string_lossy();
            shell::output(
                std::process::Command::new("chmod").args(["400", &cookie]),
            )?;
            native::start_rabbitmq_node(node, ports, &config(), &folder)
        }),
    }
}

fn made(folder: &Path) -> Result<std::path::PathBuf> {
    fs::create_dir_all(folder).context("no folder for a node")?;
    Ok(folder.to_owned())
}
