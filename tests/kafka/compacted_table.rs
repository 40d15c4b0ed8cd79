//! The table is the same before and after Kafka has thrown the old records away.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, ensure};
use rdkafka::Message as _;
use tests::{Example, observe, wait};

use crate::kafka;

const COMPACTED_TABLE: &str = env!("CARGO_BIN_EXE_kafka_compacted_table");
const TOPIC: &str = "table.prices";

#[tokio::test]
async fn the_table_is_the_last_record_of_each_key() -> Result<()> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, "none").await?;
    // Compacts as soon as it can, so that the test sees it.
    let eager = [
        ("cleanup.policy", "compact"),
        ("segment.ms", "100"),
        ("min.cleanable.dirty.ratio", "0.001"),
    ];
    observe::kafka::create_topic_with(kafka.1, TOPIC, 2, &eager).await?;
    let run = async || {
        let ended = Example::start(COMPACTED_TABLE, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()
    };
    run().await?;
    run().await?;

    let all =
        async || observe::kafka::read_all(kafka.1, TOPIC, 2, "read_committed").await;
    let mut last = BTreeMap::new();
    for record in all().await? {
        let (key, _) = observe::kafka::text(&record);
        last.insert(key, record.payload().map(<[u8]>::to_vec));
    }
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let expected = [
        ("kettle", text("27")),
        ("lamp", None),
        ("pot", text("")),
        ("toaster", text("35")),
    ];
    let expected = expected.map(|(key, value)| (key.to_owned(), value));
    assert_eq!(last, BTreeMap::from(expected));

    // Kafka looks every 15 s; a new record lets it close the segment before.
    wait::within(Duration::from_secs(150), "compaction", async || {
        run().await?;
        let records = all().await?;
        let kettles = records
            .iter()
            .filter(|record| record.key() == Some(b"kettle"))
            .count();
        let lowest = records.iter().map(|record| record.offset()).min();
        ensure!(
            lowest > Some(2),
            "{kettles} records of the kettle, from offset {lowest:?} on"
        );
        Ok(())
    })
    .await?;
    run().await
}
