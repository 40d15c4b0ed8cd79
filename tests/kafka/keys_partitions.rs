//! The events of an order are in one partition, in their order.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use rdkafka::Message as _;
use tests::{Example, observe};

use crate::kafka;

const KEYS_PARTITIONS: &str = env!("CARGO_BIN_EXE_kafka_keys_partitions");
const TOPIC: &str = "keys.orders";

#[tokio::test]
async fn each_key_is_in_one_partition_unless_somebody_hashes_otherwise() -> Result<()>
{
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, "none").await?;
    for _run in 0..2 {
        let ended = Example::start(KEYS_PARTITIONS, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let records =
        observe::kafka::read_all(kafka.1, TOPIC, 6, "read_committed").await?;
    let mut events: BTreeMap<(String, i32), Vec<String>> = BTreeMap::new();
    for record in &records {
        let (key, event) = observe::kafka::text(record);
        let place = (key, record.partition());
        events.entry(place).or_default().push(event);
    }
    let life = ["placed", "paid", "shipped"].repeat(2);
    // As Kafka's own clients hash: murmur2 of the key, modulo six.
    for (order, partition) in [("order-1", 4), ("order-2", 3), ("order-3", 3)] {
        let place = (order.to_owned(), partition);
        assert_eq!(events.remove(&place).unwrap_or_default(), life, "{order}");
    }
    // The control: the same key by another hash is somewhere else, so nobody keeps
    // its order.
    let place = ("order-1".to_owned(), 1);
    assert_eq!(events.remove(&place).unwrap_or_default(), ["returned"; 2]);
    // What is left has no key.
    let keyless: usize = events.values().map(Vec::len).sum();
    ensure!(events.keys().all(|(key, _)| key.is_empty()), "{events:?}");
    assert_eq!(keyless, 6);
    Ok(())
}
