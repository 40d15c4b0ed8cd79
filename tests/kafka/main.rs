//! Tests of the Kafka examples, by their binaries, against a real Kafka.

mod absent;
mod consumer;
mod mock_cluster;
mod producer;

use anyhow::Result;
use lab::broker::Broker;
use tests::broker;

const PRODUCER: &str = env!("CARGO_BIN_EXE_kafka_producer");
const CONSUMER: &str = env!("CARGO_BIN_EXE_kafka_consumer");
const MOCK_CLUSTER: &str = env!("CARGO_BIN_EXE_kafka_mock_cluster");

/// The shared Kafka, with the variable in which an example finds its address.
async fn kafka() -> Result<(&'static str, &'static str)> {
    Ok(("KAFKA_BROKERS", broker::shared(Broker::Kafka).await?))
}

/// Producer and consumer share topic and group, so their tests take turns.
static FIRST_STEPS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const TOPIC: &str = "my-topic";
const GROUP: &str = "my-group";
