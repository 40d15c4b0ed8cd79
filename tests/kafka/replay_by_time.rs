//! A group that goes back to a moment gets what is behind it in the log, as another
//! reader works out from the records' times.

use std::{
    collections::BTreeSet,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use rdkafka::Message as _;
use tests::{Example, observe};

use crate::ran_twice;

const REPLAY: &str = env!("CARGO_BIN_EXE_kafka_replay_by_time");
const TOPIC: &str = "replay.orders";
const HOUR: i64 = 3_600_000;

#[tokio::test]
async fn the_first_that_is_not_older_and_all_after_it() -> Result<()> {
    let address = ran_twice(REPLAY, &[TOPIC]).await?;
    observe::kafka::forget(address, TOPIC, "none").await?;
    observe::kafka::create_topic_with(address, TOPIC, 3, &[]).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let moment = i64::try_from(now)? - HOUR;
    // From the moment on; the second partition has a clock that goes back.
    let orders = [
        (0, vec![-HOUR, -1, 0, 1]),
        (1, vec![-HOUR, 5, -3 * HOUR, 6]),
        (2, vec![-1]),
    ];
    for (partition, times) in orders {
        for time in times {
            let order = format!("order-{partition}{time:+}");
            let time = Some(moment + time);
            observe::kafka::produce_to(address, TOPIC, partition, &order, time)
                .await?;
        }
    }

    let mut expected = BTreeSet::new();
    let mut begun = [false; 3];
    let all = observe::kafka::read_all(address, TOPIC, 3, "read_committed").await?;
    for record in &all {
        let partition = record.partition();
        let begun = &mut begun[usize::try_from(partition)?];
        *begun |= record.timestamp().to_millis() >= Some(moment);
        if *begun {
            let (_key, order) = observe::kafka::text(record);
            expected.insert(format!("again:   {order} of partition {partition}"));
        }
    }
    assert_eq!(expected.len(), 5, "{expected:?}");

    let words = [moment.to_string()];
    let words = words.each_ref().map(String::as_str);
    let kafka = ("KAFKA_BROKERS", address);
    let ended = Example::start(REPLAY, &words, kafka)?.end().await?;
    let ended = ended.succeeded()?;
    let lines = ended.stdout.lines();
    let again: BTreeSet<_> = lines
        .filter(|line| line.starts_with("again:"))
        .map(str::to_owned)
        .collect();
    assert_eq!(again, expected);
    Ok(())
}
