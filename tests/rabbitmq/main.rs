//! Tests of the RabbitMQ examples, by their binaries, against a real RabbitMQ.

mod absent;
mod consumer;
mod publisher;

use anyhow::Result;
use lab::broker::Broker;
use tests::broker;

const PUBLISHER: &str = env!("CARGO_BIN_EXE_rabbitmq_publisher");
const CONSUMER: &str = env!("CARGO_BIN_EXE_rabbitmq_consumer");

/// The shared RabbitMQ, with the variable in which an example finds its address.
async fn rabbitmq() -> Result<(&'static str, &'static str)> {
    Ok(("AMQP_URL", broker::shared(Broker::RabbitMq).await?))
}

/// Publisher and consumer share a queue, so their tests take turns.
static FIRST_STEPS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const QUEUE: &str = "hello";
