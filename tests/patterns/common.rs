//! What the tests of the patterns share: a clean place on each broker, the story, and
//! what each program says of wrong words and of a broker that is not there.

use anyhow::{Result, ensure};
use lab::broker::Broker;
use tests::{Example, Supervised, broker, example::fail_with_one_line, observe};
use tokio::join;

/// A pattern with a binary for each broker, and the places that belong to it.
pub struct Pattern {
    pub kafka: &'static str,
    pub rabbitmq: &'static str,
    pub nats: &'static str,
    /// Each topic with a group that reads it.
    pub topics: &'static [(&'static str, &'static str)],
    pub queues: &'static [&'static str],
    pub streams: &'static [&'static str],
}

impl Pattern {
    pub fn binaries(&self) -> [(Broker, &'static str); 3] {
        [
            (Broker::Kafka, self.kafka),
            (Broker::RabbitMq, self.rabbitmq),
            (Broker::Nats, self.nats),
        ]
    }

    pub fn binary(&self, broker: Broker) -> &'static str {
        match broker {
            Broker::Kafka => self.kafka,
            Broker::RabbitMq => self.rabbitmq,
            Broker::Nats => self.nats,
        }
    }

    /// The variable and the address of the shared broker, without what an earlier test
    /// has left there.
    pub async fn fresh(
        &self,
        broker: Broker,
    ) -> Result<(&'static str, &'static str)> {
        let address = broker::shared(broker).await?;
        match broker {
            Broker::Kafka => {
                for (topic, group) in self.topics {
                    observe::kafka::forget(address, topic, group).await?;
                }
            }
            Broker::RabbitMq => {
                observe::rabbitmq::delete_queues(address, self.queues).await?;
            }
            Broker::Nats => {
                for stream in self.streams {
                    observe::nats::forget_stream(address, stream).await?;
                }
            }
        }
        Ok((broker.address_var(), address))
    }

    /// Each story prints what its header says, twice in a row.
    pub async fn stories(&self) -> Result<()> {
        on_each(async |broker| {
            let variable = self.fresh(broker).await?;
            for _time in 0..2 {
                let story = Example::start(self.binary(broker), &[], variable)?;
                story
                    .end()
                    .await?
                    .succeeded()?
                    .printed_what_its_header_says()?;
            }
            Ok(())
        })
        .await
    }

    /// Wrong words get the usage, before anybody looks for a broker; without a broker
    /// there is one line that says how to start one.
    pub async fn says_what_is_wrong(&self, wrong: &[&[&str]]) -> Result<()> {
        for (broker, binary) in self.binaries() {
            let variable = (broker.address_var(), nowhere(broker));
            for words in wrong {
                let ended = Example::start(binary, words, variable)?.end().await?;
                assert_eq!(ended.status.code(), Some(2), "{words:?}");
                ensure!(ended.stderr.starts_with("usage: "), "{}", ended.stderr);
            }
            let way_out = format!("cargo lab up {}", broker.name());
            let parts = ["localhost:1", way_out.as_str()];
            fail_with_one_line(&[binary], variable, &parts).await?;
        }
        Ok(())
    }
}

/// Does it on the three brokers at the same time. Each goes on to its end, so that two
/// failures are told at once.
///
/// # Errors
///
/// All that have failed, each with its broker.
pub async fn on_each(test: impl AsyncFn(Broker) -> Result<()>) -> Result<()> {
    let told = async |broker: Broker| {
        let failure = test(broker).await.err()?;
        Some(format!("{}: {failure:?}", broker.name()))
    };
    let (kafka, rabbitmq, nats) = join!(
        told(Broker::Kafka),
        told(Broker::RabbitMq),
        told(Broker::Nats)
    );
    let failed: Vec<String> =
        [kafka, rabbitmq, nats].into_iter().flatten().collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// Tells each of them to stop. None has ended before, and each says goodbye.
pub async fn stop(programs: impl IntoIterator<Item = Supervised>) -> Result<()> {
    for program in programs {
        let (said, errors) = program.stop().await?;
        ensure!(errors.is_empty(), "{errors:?}");
        ensure!(said.ends_with("stopped\n"), "{said}");
    }
    Ok(())
}

/// Where messages wait for the workers, on each broker.
pub struct Place {
    pub topic: &'static str,
    pub partitions: i32,
    /// The group that reads the topic.
    pub group: &'static str,
    pub queue: &'static str,
    /// Removes what is acknowledged.
    pub stream: &'static str,
}

impl Place {
    /// How many messages the broker still has to hand out or to hear of. On RabbitMQ
    /// without those that somebody holds.
    pub async fn left(&self, broker: Broker, address: &str) -> Result<u64> {
        Ok(match broker {
            Broker::Kafka => {
                let (topic, group) = (self.topic, self.group);
                let lag =
                    observe::kafka::lag(address, topic, self.partitions, group);
                u64::try_from(lag.await?)?
            }
            Broker::RabbitMq => {
                observe::rabbitmq::ready(address, self.queue).await?.into()
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let stream = jetstream.get_stream(self.stream).await?;
                stream.get_info().await?.state.messages
            }
        })
    }
}

/// An address with a password, where nobody listens.
pub fn nowhere(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => "localhost:1",
        Broker::RabbitMq => "amqp://app:secret@localhost:1/%2f",
        Broker::Nats => "nats://app:secret@localhost:1",
    }
}
