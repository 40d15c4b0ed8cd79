//! One module for each command, with its arguments and `run`.

pub mod bench;
pub mod book;
pub mod check;
pub mod demo;
pub mod doctor;
pub mod down;
pub mod index;
pub mod list;
pub mod logs;
pub mod record;
pub mod run;
pub mod status;
pub mod test;
pub mod up;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use lab::broker::Broker;

/// The brokers that a command is for.
#[derive(clap::Args)]
pub struct Brokers {
    /// kafka, rabbitmq or nats; all three if none is named
    #[arg(
        value_name = "BROKER",
        hide_possible_values = true,
        // A list of values has clap suggest the near one for a misspelled name.
        value_parser = PossibleValuesParser::new(Broker::ALL.map(Broker::name))
            .try_map(|name| name.parse::<Broker>())
    )]
    named: Vec<Broker>,
}

impl Brokers {
    /// Those that were named, each once, or all.
    pub fn or_all(&self) -> Vec<Broker> {
        Broker::ALL
            .into_iter()
            .filter(|broker| self.named.is_empty() || self.named.contains(broker))
            .collect()
    }
}
