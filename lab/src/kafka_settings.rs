//! A Kafka for one lesson: its own settings on top of those of a single node,
//! and the commands that make its users and permissions.

use anyhow::{Context as _, Result, ensure};

use crate::native;

/// What the data folder is formatted with. Any identifier does; a fixed one lets
/// all data folders start from one copy.
pub const CLUSTER_ID: &str = "5L6g3nShT-eMCtK--X86sw";

/// The text of Log4j's configuration: all to stdout.
pub const LOGGING: &str = "\
status=warn
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=[%d] %p %m (%c)%n
rootLogger.level=info
rootLogger.appenderRef.console.ref=console
";

/// One node that is broker and controller. A later line with the same name wins.
const SINGLE_NODE: &str = "\
process.roles=broker,controller
node.id=1
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
auto.create.topics.enable=false
# One node cannot hold three copies.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# The first consumer group waits until each of these exists; 50 by default.
offsets.topic.num.partitions=4
# A group starts at once, although more members may come.
group.initial.rebalance.delay.ms=0
# A killed broker may come back when its session is over, 9 s by default.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
";

/// Where settings and files are in a container.
pub const CONTAINER_FOLDER: &str = "/kafka";

/// In a container: formats the folder for data, unless a start before has done
/// that, and starts.
const START: &str = "\
set -e
/opt/kafka/bin/kafka-storage.sh format --ignore-formatted \
  --cluster-id \"$0\" --config server.properties \"$@\"
exec /opt/kafka/bin/kafka-server-start.sh server.properties";

/// The arguments of bash, as the entry point of a container of Kafka's image.
///
/// Not by the variables that the image knows: they cannot make users, and take no
/// text as it stands in a `server.properties`.
pub fn container_command(settings: &KafkaSettings) -> Vec<String> {
    let script = format!("cd {CONTAINER_FOLDER}\n{START}");
    let mut command = vec!["-c".to_owned(), script, CLUSTER_ID.to_owned()];
    command.extend(settings.format_arguments());
    command
}

/// What `KAFKA_LOG4J_OPTS` is in a container, with [`LOGGING`] in its folder.
pub fn container_logging() -> String {
    format!("-Dlog4j2.configurationFile={CONTAINER_FOLDER}/log4j2.properties")
}

/// What `KAFKA_JVM_PERFORMANCE_OPTS` is in a container that is soon gone again.
///
/// The quick compiler only, as optimised code pays off after minutes, and the garbage
/// collector that has no threads of its own: they save more than a third of the
/// processor's time for a start. And the class archive of the image, ours or the official
/// one, also where its own entry point is not what starts Kafka. If the file is missing,
/// Java says so and goes on.
pub const CONTAINER_JAVA: &str = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC \
                                  -XX:SharedArchiveFile=/opt/kafka/kafka.jsa";

/// Where the controller listens; every other listener is for brokers or clients.
const CONTROLLER: &str = "CONTROLLER";

/// Settings with a free port for each listener.
#[derive(Clone, Debug)]
pub struct KafkaSettings {
    text: String,
    /// In their order in `listeners=`.
    listeners: Vec<(String, u16)>,
    /// The name of the one between brokers.
    inside: String,
    /// The controllers of the cluster; none if it is one node alone. Not from the
    /// text, where a reader needs the ports of that text.
    voters: Option<String>,
}

/// Who may reach the listeners for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Programs of this machine.
    Machine,
    /// In a container: also from outside of it.
    Container,
}

impl KafkaSettings {
    /// Reads lines of a `server.properties`. Those that are missing, all of them
    /// if need be, are the ones of a single node without encryption.
    ///
    /// The ports in `listeners` are replaced by free ones. Advertised listeners
    /// follow, but for those that are there, as for a proxy; the folder for data
    /// need not be there.
    ///
    /// # Errors
    ///
    /// If `listeners` has no `CONTROLLER`, or there is no free port.
    pub fn new(text: &str) -> Result<Self> {
        let names = last(text, "listeners").unwrap_or("PLAINTEXT://,CONTROLLER://");
        let mut listeners = Vec::new();
        // All different, as all are held until the last one is chosen.
        let ports: [u16; 16] = native::free_ports()?;
        for (listener, port) in names.split(',').zip(ports) {
            let name = listener.split_once("://").context("NAME://host:port");
            let (name, _) =
                name.with_context(|| format!("not a list of listeners: {names}"))?;
            listeners.push((name.trim().to_owned(), port));
        }
        Self::with_ports(text, listeners)
    }

    /// As [`Self::new`], with these listeners and ports.
    pub(crate) fn with_ports(
        text: &str,
        listeners: Vec<(String, u16)>,
    ) -> Result<Self> {
        let has = |wanted: &str| listeners.iter().any(|(name, _)| name == wanted);
        let inside = last(text, "inter.broker.listener.name");
        let inside = inside.unwrap_or("PLAINTEXT").to_owned();
        for name in [CONTROLLER, &inside] {
            ensure!(has(name), "no listener is named {name}");
        }
        Ok(Self {
            text: text.to_owned(),
            listeners,
            inside,
            voters: None,
        })
    }

    /// Settings for nodes of one cluster, with the ids from 1: these lines on top of
    /// those of a single node, which know only one replica of each of Kafka's own
    /// topics.
    ///
    /// # Errors
    ///
    /// If there are not enough free ports.
    pub fn cluster<const NODES: usize>(text: &str) -> Result<[Self; NODES]> {
        let ports: [u16; NODES] = native::free_ports()?;
        let controllers: [u16; NODES] = native::free_ports()?;
        let voters: Vec<_> = (1..)
            .zip(controllers)
            .map(|(id, port)| format!("{id}@127.0.0.1:{port}"))
            .collect();
        let voters = voters.join(",");
        let nodes = std::array::from_fn(|at| Self {
            text: format!("{text}\nnode.id={}\n", at + 1),
            listeners: vec![
                ("PLAINTEXT".to_owned(), ports[at]),
                (CONTROLLER.to_owned(), controllers[at]),
            ],
            inside: "PLAINTEXT".to_owned(),
            voters: Some(voters.clone()),
        });
        Ok(nodes)
    }

    /// Is it the first node of a cluster, or the only one?
    pub(crate) fn is_first(&self) -> bool {
        last(&self.text, "node.id").is_none_or(|id| id == "1")
    }

    /// The complete `server.properties`.
    pub fn properties(&self, reach: Reach, data: &str) -> String {
        let (host, mut bound, mut told) = (reach.host(), Vec::new(), Vec::new());
        for (name, port) in &self.listeners {
            match name == CONTROLLER {
                true => bound.push(format!("{name}://127.0.0.1:{port}")),
                false => {
                    bound.push(format!("{name}://{host}:{port}"));
                    let here = format!("{name}://localhost:{port}");
                    told.push(self.told_for(name).unwrap_or(here));
                }
            }
        }
        let controller = self.port_of(CONTROLLER).unwrap_or_default();
        let alone = format!("1@127.0.0.1:{controller}");
        let voters = self.voters.as_ref();
        format!(
            "{SINGLE_NODE}\n{}\n# What this start decides.\nlisteners={}\n\
             advertised.listeners={}\ncontroller.quorum.voters={}\n\
             log.dirs={data}\n",
            self.text,
            bound.join(","),
            told.join(","),
            voters.unwrap_or(&alone),
        )
    }

    /// Where clients find this listener, if the settings say it themselves: behind
    /// a proxy, for example.
    fn told_for(&self, listener: &str) -> Option<String> {
        let told = last(&self.text, "advertised.listeners")?;
        let start = format!("{listener}://");
        let found = told.split(',').find(|one| one.starts_with(&start))?;
        Some(found.to_owned())
    }

    /// The port of a listener, if there is one of this name.
    pub fn port_of(&self, listener: &str) -> Option<u16> {
        let mut listeners = self.listeners.iter();
        let (_, port) = listeners.find(|(name, _)| name == listener)?;
        Some(*port)
    }

    /// The port of the first listener: the one that an example uses.
    pub fn port(&self) -> u16 {
        self.listeners.first().map_or(0, |(_, port)| *port)
    }

    /// The port between brokers, for tools and observers.
    pub fn inside_port(&self) -> u16 {
        self.port_of(&self.inside).unwrap_or_default()
    }

    /// The ports of all listeners for clients and brokers.
    pub fn ports(&self) -> impl Iterator<Item = u16> {
        let listeners = self.listeners.iter();
        let open = listeners.filter(|(name, _)| name != CONTROLLER);
        open.map(|(_, port)| *port)
    }

    /// The arguments of `kafka-storage.sh format` beside cluster and settings:
    /// the users, `--add-scram` and its value, as the comments of the settings
    /// tell a reader to make them by hand.
    pub fn format_arguments(&self) -> Vec<String> {
        let commands = commands(&self.text);
        let formats = commands
            .iter()
            .filter(|words| words[0] == "kafka-storage.sh");
        formats
            .flat_map(|words| words.windows(2))
            .filter(|pair| pair[0] == "--add-scram")
            .flatten()
            .cloned()
            .collect()
    }

    /// The other commands in the comments of the settings, to be run once after
    /// the first start, each a script of Kafka and its arguments. Their
    /// `--bootstrap-server` is the listener between brokers.
    pub fn commands(&self) -> Vec<Vec<String>> {
        let mut commands = commands(&self.text);
        commands.retain(|words| words.iter().any(|word| word == SERVER));
        for words in &mut commands {
            self.to_this_broker(words);
        }
        commands
    }

    /// Lets a command of Kafka's, a script and its arguments, ask this broker.
    pub fn to_this_broker(&self, words: &mut Vec<String>) {
        let address = format!("localhost:{}", self.inside_port());
        match words.iter().position(|word| word == SERVER) {
            Some(at) if at + 1 < words.len() => words[at + 1] = address,
            _ => words.extend([SERVER.to_owned(), address]),
        }
    }
}

const SERVER: &str = "--bootstrap-server";

impl Reach {
    fn host(self) -> &'static str {
        match self {
            Self::Machine => "127.0.0.1",
            Self::Container => "0.0.0.0",
        }
    }
}

/// The last value of a property, which is the one that counts.
fn last<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut values = text.lines().filter_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == name).then(|| value.trim())
    });
    values.next_back()
}

/// The commands of Kafka's that stand in the comments, as words; a backslash at
/// the end continues a line.
fn commands(text: &str) -> Vec<Vec<String>> {
    let comments = text.lines().filter_map(|line| line.strip_prefix('#'));
    let joined = comments.fold(String::new(), |joined, line| {
        match joined.strip_suffix('\\') {
            Some(begun) => format!("{begun} {line}"),
            None => format!("{joined}\n{line}"),
        }
    });
    let lines = joined.lines().map(words);
    let is_script = |word: &String| word.starts_with("kafka-");
    lines
        .filter(|words| {
            words.first().is_some_and(is_script) && words[0].ends_with(".sh")
        })
        .collect()
}

/// Splits at blanks, but not between single quotes.
pub fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for (index, part) in line.split('\'').enumerate() {
        let quoted = index % 2 == 1;
        for (index, piece) in part.split(|c: char| c == ' ' && !quoted).enumerate() {
            if index > 0 {
                words.push(String::new());
            }
            if let Some(word) = words.last_mut() {
                word.push_str(piece);
            }
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# A Kafka with users. By hand:
#
#   kafka-storage.sh format --cluster-id 1 \\
#     --add-scram 'SCRAM-SHA-512=[name=a b,password=p]' --add-scram x
#   kafka-server-start.sh server.properties
#   kafka-acls.sh --bootstrap-server localhost:1 --add --topic '*'
listeners=CLIENTS://localhost:9094,INSIDE://localhost:9092,CONTROLLER://:9093
inter.broker.listener.name=INSIDE
controller.quorum.voters=1@localhost:9093
ssl.client.auth=required
";

    #[test]
    fn each_listener_has_a_port_and_is_advertised_with_it() -> Result<()> {
        let settings = KafkaSettings::new(TEXT)?;
        let port = |name| settings.port_of(name).context("no port");
        let (clients, inside) = (port("CLIENTS")?, port("INSIDE")?);
        assert_eq!((settings.port(), settings.inside_port()), (clients, inside));
        assert_eq!(settings.ports().collect::<Vec<_>>(), [clients, inside]);

        let text = settings.properties(Reach::Container, "/data");
        let controller = port("CONTROLLER")?;
        let expected = format!(
            "CLIENTS://0.0.0.0:{clients},INSIDE://0.0.0.0:{inside},\
             CONTROLLER://127.0.0.1:{controller}"
        );
        assert_eq!(last(&text, "listeners"), Some(expected.as_str()));
        let told =
            format!("CLIENTS://localhost:{clients},INSIDE://localhost:{inside}");
        assert_eq!(last(&text, "advertised.listeners"), Some(told.as_str()));
        let voters = format!("1@127.0.0.1:{controller}");
        assert_eq!(last(&text, "controller.quorum.voters"), Some(&*voters));
        assert_eq!(last(&text, "ssl.client.auth"), Some("required"));
        assert_eq!(last(&text, "node.id"), Some("1"));
        Ok(())
    }

    #[test]
    fn a_listener_behind_a_proxy_is_advertised_as_the_settings_say() -> Result<()> {
        let text = format!("{TEXT}advertised.listeners=CLIENTS://localhost:7\n");
        let settings = KafkaSettings::new(&text)?;
        let text = settings.properties(Reach::Machine, "/data");
        let inside = settings.inside_port();
        let told = format!("CLIENTS://localhost:7,INSIDE://localhost:{inside}");
        assert_eq!(last(&text, "advertised.listeners"), Some(told.as_str()));
        Ok(())
    }

    #[test]
    fn the_nodes_of_a_cluster_know_each_other() -> Result<()> {
        let nodes: [_; 3] = KafkaSettings::cluster("min.insync.replicas=2")?;
        let texts = nodes
            .each_ref()
            .map(|node| node.properties(Reach::Machine, "/data"));
        let ids = texts.each_ref().map(|text| last(text, "node.id"));
        assert_eq!(ids, [Some("1"), Some("2"), Some("3")]);
        let voters: Vec<_> = (1..)
            .zip(&nodes)
            .filter_map(|(id, node)| Some((id, node.port_of(CONTROLLER)?)))
            .map(|(id, port)| format!("{id}@127.0.0.1:{port}"))
            .collect();
        let voters = voters.join(",");
        for text in &texts {
            assert_eq!(last(text, "min.insync.replicas"), Some("2"));
            let known = last(text, "controller.quorum.voters");
            assert_eq!(known, Some(voters.as_str()));
        }
        Ok(())
    }

    #[test]
    fn without_listeners_it_is_one_for_everybody() -> Result<()> {
        let settings = KafkaSettings::new("group.max.size=2")?;
        assert_eq!(settings.port(), settings.inside_port());
        assert_eq!(settings.port_of("PLAINTEXT"), Some(settings.port()));
        assert!(settings.format_arguments().is_empty());
        assert!(settings.commands().is_empty());
        Ok(())
    }

    #[test]
    fn a_listener_that_is_needed_is_missed() {
        for text in [
            "listeners=PLAINTEXT://:1",
            "listeners=A://:1,CONTROLLER://:2",
            "listeners=9092",
        ] {
            assert!(KafkaSettings::new(text).is_err(), "{text}");
        }
    }

    #[test]
    fn users_and_permissions_come_from_the_comments() -> Result<()> {
        let settings = KafkaSettings::new(TEXT)?;
        let users = ["--add-scram", "SCRAM-SHA-512=[name=a b,password=p]"];
        assert_eq!(
            settings.format_arguments(),
            [&users[..], &["--add-scram", "x"]].concat()
        );
        let address = format!("localhost:{}", settings.inside_port());
        let expected = [
            "kafka-acls.sh",
            "--bootstrap-server",
            &address,
            "--add",
            "--topic",
            "*",
        ];
        assert_eq!(settings.commands(), [expected.map(str::to_owned)]);
        let mut question = words("kafka-acls.sh --list");
        settings.to_this_broker(&mut question);
        assert_eq!(question[2..], [SERVER.to_owned(), address]);
        Ok(())
    }
}
