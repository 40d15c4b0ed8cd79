//! The rule decides the partition, and without a property of a topic the process dies:
//! the day this test fails, the pitfall is gone.

use anyhow::Result;
use rdkafka::Message as _;
use tests::{Example, observe};

use crate::{kafka, ran_twice};

const PARTITIONER: &str = env!("CARGO_BIN_EXE_kafka_custom_partitioner");
const TOPIC: &str = "partitioner.orders";

#[tokio::test]
async fn vips_are_alone_and_without_a_topic_property_it_crashes() -> Result<()> {
    let kafka = kafka().await?;
    ran_twice(PARTITIONER, &[TOPIC]).await?;
    let records = observe::kafka::read_all(kafka.1, TOPIC, 3, "read_committed");
    let records = records.await?;
    assert_eq!(records.len(), 2 * 23);
    for record in &records {
        let is_vip = record.key().unwrap_or_default().starts_with(b"vip-");
        assert_eq!(is_vip, record.partition() == 0);
    }

    let ended = Example::start(PARTITIONER, &["careless"], kafka)?
        .end()
        .await?;
    // Ended by a signal: no exit code.
    assert_eq!(ended.status.code(), None, "{}", ended.stdout);
    let later = observe::kafka::read_all(kafka.1, TOPIC, 3, "read_committed");
    assert_eq!(later.await?.len(), records.len());
    Ok(())
}
