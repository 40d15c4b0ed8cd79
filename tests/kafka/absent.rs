//! Without a broker, or with a wrong address: one line that helps, soon.

use anyhow::Result;
use tests::{
    Example,
    example::{fail_with_one_line, siblings},
};

use crate::{MOCK_CLUSTER, PRODUCER};

/// Every Kafka example but the one that is its own cluster.
fn clients() -> Result<Vec<String>> {
    let mut clients = siblings(PRODUCER)?;
    clients.retain(|binary| binary != MOCK_CLUSTER);
    Ok(clients)
}

#[tokio::test]
async fn no_kafka_is_one_line_with_the_way_out() -> Result<()> {
    let parts = ["no Kafka at localhost:1", "cargo lab up kafka"];
    let nowhere = ("KAFKA_BROKERS", "localhost:1");
    fail_with_one_line(&clients()?, nowhere, &parts).await?;
    let producer = Example::start(PRODUCER, &[], nowhere)?;
    producer.end().await?.printed_what_the_book_shows("absent")
}

#[tokio::test]
async fn a_broken_address_is_named_with_a_right_one() -> Result<()> {
    for broken in ["", "localhost", "kafka://localhost:9092", "localhost:many"] {
        let parts = ["KAFKA_BROKERS", "localhost:9092"];
        fail_with_one_line(&clients()?, ("KAFKA_BROKERS", broken), &parts).await?;
    }
    Ok(())
}
