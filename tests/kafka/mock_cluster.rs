//! The mock cluster serves the examples as far as they need it, and is gone
//! when it ends.

use anyhow::{Context as _, Result};
use tests::{Example, example::fail_with_one_line};

use crate::{CONSUMER, MOCK_CLUSTER, PRODUCER};

#[tokio::test]
async fn producer_and_consumer_work_on_the_mock_cluster() -> Result<()> {
    let mut mock = Example::start(MOCK_CLUSTER, &[], ("RUST_BACKTRACE", "0"))?;
    let ready = mock.prints("mock cluster ready").await?;
    let (_, address) = ready.split_once("KAFKA_BROKERS=").context("the address")?;
    let kafka = ("KAFKA_BROKERS", address);

    let producer = Example::start(PRODUCER, &[], kafka)?.end().await?;
    producer.succeeded()?.printed_what_its_header_says()?;
    let mut consumer = Example::start(CONSUMER, &[], kafka)?;
    consumer.prints("received: key1 = Hello, Kafka!").await?;
    consumer.interrupt().await?;
    consumer.end().await?.succeeded()?;

    mock.terminate().await?;
    let ended = mock.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    fail_with_one_line(&[PRODUCER], kafka, &["no Kafka at", address]).await
}
