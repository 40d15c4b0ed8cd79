//! What `docker-compose.yml` says about each broker: its image and its ports.
//! They are read from there, so that no second list can differ from it.

use std::{env, net::TcpListener};

use anyhow::{Result, bail};

use crate::{
    broker::Broker,
    probe::{self, Endpoint, Listener},
};

/// Compiled in: it belongs to this program as much as a source file does.
const FILE: &str = include_str!("../../docker-compose.yml");

/// A port that a broker publishes on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The variable that moves it.
    pub variable: String,
    pub default: u16,
    /// The port inside the container.
    pub inside: u16,
}

impl Port {
    /// The number to use: the one in the environment, else the default.
    ///
    /// # Errors
    ///
    /// If the variable holds no port number.
    pub fn number(&self) -> Result<u16> {
        match env::var(&self.variable) {
            Ok(text) if !text.is_empty() => match text.parse() {
                Ok(number) if number != 0 => Ok(number),
                _ => bail!(
                    "{}={text} is no port number; a right one is {}",
                    self.variable,
                    self.default
                ),
            },
            _ => Ok(self.default),
        }
    }
}

/// The name of the official image.
pub fn image(broker: Broker) -> &'static str {
    section(broker)
        .lines()
        .find_map(|line| variable(line.trim().strip_prefix("image: ")?))
        .map_or("", |(_, default)| default)
}

/// The published ports, the one that clients use first.
pub fn ports(broker: Broker) -> Vec<Port> {
    section(broker).lines().filter_map(port).collect()
}

/// Reads `- "127.0.0.1:${KAFKA_PORT:-9092}:9092"`.
fn port(line: &str) -> Option<Port> {
    let line = line.trim().strip_prefix(r#"- "127.0.0.1:"#)?;
    let (name, default) = variable(line)?;
    let inside = line.trim_end_matches('"').rsplit(':').next()?;
    Some(Port {
        variable: name.to_owned(),
        default: default.parse().ok()?,
        inside: inside.parse().ok()?,
    })
}

/// The environment of the service, for a broker whose clients use `port`: the
/// tests start their containers with it.
pub fn environment(broker: Broker, port: u16) -> Vec<(String, String)> {
    let own_port = format!("${{{}:-{}}}", broker.port_var(), broker.default_port());
    let (_, rest) = section(broker)
        .split_once("    environment:\n")
        .unwrap_or_default();
    rest.lines()
        .take_while(|line| line.starts_with("      "))
        .filter(|line| !line.trim().starts_with('#'))
        .filter_map(|line| line.trim().split_once(": "))
        .map(|(name, value)| {
            let value = value
                .trim_matches('"')
                .replace(&own_port, &port.to_string());
            (name.to_owned(), value)
        })
        .collect()
}

/// Name and default of the first `${NAME:-default}`.
fn variable(text: &str) -> Option<(&str, &str)> {
    let (_, rest) = text.split_once("${")?;
    rest.split_once('}')?.0.split_once(":-")
}

/// The lines of one service.
fn section(broker: Broker) -> &'static str {
    let title = format!("\n  {}:\n", broker.name());
    let rest = FILE.split_once(&title).map_or("", |(_, rest)| rest);
    let end = rest
        .match_indices('\n')
        .find(|(at, _)| {
            let line = rest[at + 1..].lines().next().unwrap_or_default();
            !line.is_empty() && !line.starts_with("    ")
        })
        .map_or(rest.len(), |(at, _)| at);
    &rest[..end]
}

/// Fails unless a port of this broker is free.
///
/// # Errors
///
/// One line that says which port is taken, by whom as far as one can tell, and
/// which setting takes another one.
pub fn require_free(broker: Broker, port: &Port) -> Result<()> {
    let number = port.number()?;
    if is_free(number) {
        return Ok(());
    }
    let owner = owner(broker, number);
    let variable = &port.variable;
    let free = suggestion(number);
    bail!(
        "port {number} is taken ({owner}); set {variable} to a free one, for \
         example {variable}={free}"
    )
}

fn owner(broker: Broker, port: u16) -> String {
    let host = "127.0.0.1".to_owned();
    match probe::listener(broker, &Endpoint { host, port }) {
        Listener::Broker { .. } => format!("by a {broker} that is not ours"),
        Listener::Nothing | Listener::Other => "by another program".to_owned(),
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// The first free port of 10000 more, 20000 more, and so on.
fn suggestion(port: u16) -> u16 {
    (1..=5)
        .filter_map(|n: u16| port.checked_add(n * 10_000))
        .find(|port| is_free(*port))
        .unwrap_or(port.wrapping_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_read_from_the_compose_file() {
        assert!(image(Broker::Kafka).starts_with("apache/kafka:"));
        assert!(image(Broker::RabbitMq).starts_with("rabbitmq:"));
        assert!(image(Broker::Nats).starts_with("nats:"));
    }

    #[test]
    fn the_first_port_is_the_one_that_clients_use() {
        for broker in Broker::ALL {
            let first = &ports(broker)[0];
            assert_eq!(first.variable, broker.port_var());
            assert_eq!(first.default, broker.default_port());
            assert_eq!(first.inside, broker.default_port());
        }
    }

    #[test]
    fn the_environment_is_read_with_another_port() {
        let environment = environment(Broker::Kafka, 19092);
        let value = |wanted: &str| {
            let found = environment.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| value.as_str())
        };
        let advertised = value("KAFKA_ADVERTISED_LISTENERS");
        assert_eq!(
            advertised,
            Some("HOST://localhost:19092,DOCKER://kafka:19092")
        );
        assert_eq!(value("KAFKA_AUTO_CREATE_TOPICS_ENABLE"), Some("false"));
        assert_eq!(value("KAFKA_HEAP_OPTS"), Some("-Xmx512m"));
    }

    #[test]
    fn all_ports_are_found() {
        let variables: Vec<String> = Broker::ALL
            .into_iter()
            .flat_map(ports)
            .map(|port| port.variable)
            .collect();
        let expected = [
            "KAFKA_PORT",
            "RABBITMQ_PORT",
            "RABBITMQ_UI_PORT",
            "RABBITMQ_STREAM_PORT",
            "NATS_PORT",
            "NATS_MONITOR_PORT",
        ];
        assert_eq!(variables, expected);
    }
}
