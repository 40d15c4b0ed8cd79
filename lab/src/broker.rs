//! The three brokers: names, addresses, and the settings that change them.

use std::fmt;

/// A message broker that the examples talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broker {
    Kafka,
    RabbitMq,
    Nats,
}

impl Broker {
    pub const ALL: [Self; 3] = [Self::Kafka, Self::RabbitMq, Self::Nats];

    /// The name in commands, in folder names and as a Compose service.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::RabbitMq => "rabbitmq",
            Self::Nats => "nats",
        }
    }

    /// The name in sentences.
    pub fn title(self) -> &'static str {
        match self {
            Self::Kafka => "Kafka",
            Self::RabbitMq => "RabbitMQ",
            Self::Nats => "NATS",
        }
    }

    /// The environment variable that every example reads its address from.
    pub fn address_var(self) -> &'static str {
        match self {
            Self::Kafka => "KAFKA_BROKERS",
            Self::RabbitMq => "AMQP_URL",
            Self::Nats => "NATS_URL",
        }
    }

    /// The variable that moves the port on which `docker-compose.yml` and
    /// `cargo lab up` publish the broker.
    pub fn port_var(self) -> &'static str {
        match self {
            Self::Kafka => "KAFKA_PORT",
            Self::RabbitMq => "RABBITMQ_PORT",
            Self::Nats => "NATS_PORT",
        }
    }

    /// The port that everybody uses, and the examples' default.
    pub fn default_port(self) -> u16 {
        match self {
            Self::Kafka => 9092,
            Self::RabbitMq => 5672,
            Self::Nats => 4222,
        }
    }

    /// What [`Self::address_var`] must hold for a broker of ours on this port.
    pub fn address(self, port: u16) -> String {
        match self {
            Self::Kafka => format!("localhost:{port}"),
            Self::RabbitMq => format!("amqp://guest:guest@localhost:{port}/%2f"),
            Self::Nats => format!("nats://localhost:{port}"),
        }
    }

    /// The variable that replaces the official image.
    pub fn image_var(self) -> &'static str {
        match self {
            Self::Kafka => "KAFKA_IMAGE",
            Self::RabbitMq => "RABBITMQ_IMAGE",
            Self::Nats => "NATS_IMAGE",
        }
    }

    /// The broker of an example or pattern by its name: `kafka_producer` and
    /// `task_queue_kafka` are both Kafka's.
    pub fn of_example(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|broker| {
            name.split('_').next() == Some(broker.name())
                || name.split('_').next_back() == Some(broker.name())
        })
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

impl std::str::FromStr for Broker {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|broker| broker.name() == text)
            .ok_or_else(|| {
                format!(
                    "no broker is named {text}; there are kafka, rabbitmq and nats"
                )
            })
    }
}
