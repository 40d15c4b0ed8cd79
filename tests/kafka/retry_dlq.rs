//! No order is lost and none holds up the others, and a dead one says why it died.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    Message as _,
    message::{Headers as _, OwnedMessage},
};
use tests::{Example, observe, wait};

use crate::{kafka, ran_twice};

const RETRY_DLQ: &str = env!("CARGO_BIN_EXE_kafka_retry_dlq");
const GROUP: &str = "retry-booking";
const ORDERS: &str = "retry.orders";
const DEAD: &str = "retry.orders.dead";
const TOPICS: [&str; 4] = [ORDERS, "retry.orders.soon", "retry.orders.later", DEAD];

fn headers(record: &OwnedMessage) -> Result<BTreeMap<String, String>> {
    let headers = record.headers().context("no headers")?;
    let text = |bytes: Option<&[u8]>| {
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    };
    Ok(headers
        .iter()
        .map(|header| (header.key.to_owned(), text(header.value)))
        .collect())
}

/// One test, as there is one set of topics.
#[tokio::test]
async fn a_dead_order_tells_its_story_and_no_order_is_lost() -> Result<()> {
    let address = ran_twice(RETRY_DLQ, &TOPICS).await?;
    let dead = observe::kafka::records(address, DEAD).await?;
    assert_eq!(dead.len(), 2);
    let told = headers(&dead[1])?;
    assert_eq!(told["x-attempt"], "3");
    assert_eq!(told["x-error"], "no such address");
    assert_eq!(told["x-origin"], "retry.orders 0 8");
    assert_eq!(dead[1].payload(), Some(&b"order-3"[..]));
    let committed = observe::kafka::committed(address, ORDERS, GROUP).await?;
    assert_eq!(committed, Some(10));

    // What cannot be passed on is not committed either: the next topic takes nothing.
    let kafka = kafka().await?;
    let worker = || Example::start(RETRY_DLQ, &["worker"], kafka);
    let forget = async || {
        for topic in TOPICS {
            observe::kafka::forget(kafka.1, topic, GROUP).await?;
        }
        anyhow::Ok(())
    };
    forget().await?;
    let narrow = [("max.message.bytes", "1")];
    observe::kafka::create_topic_with(kafka.1, TOPICS[1], 1, &narrow).await?;
    let orders = Example::start(RETRY_DLQ, &["orders"], kafka)?;
    orders.end().await?.succeeded()?;
    let ended = worker()?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.contains("not delivered to retry.orders.soon"),
        "{line}"
    );
    let committed = observe::kafka::committed(kafka.1, ORDERS, GROUP).await?;
    assert_eq!(committed, Some(1));

    // Killed in the middle, twice, with what it has begun.
    wait::until("the group to be empty", async || {
        let members = observe::kafka::members(kafka.1, GROUP).await?;
        ensure!(members == 0, "it has {members} members");
        Ok(())
    })
    .await?;
    forget().await?;
    let mut first = worker()?;
    first.prints("ready:").await?;
    let orders = Example::start(RETRY_DLQ, &["orders"], kafka)?;
    orders.end().await?.succeeded()?;
    first.prints("order-1, attempt 1").await?;
    first.kill().await?;
    let mut second = worker()?;
    second.prints("order-3, attempt 2").await?;
    second.kill().await?;
    let mut third = worker()?;
    third.prints("dead:   order-3, attempt 3").await?;

    wait::until("all orders to be committed", async || {
        for (topic, at_least) in TOPICS.iter().zip([5, 2, 1]) {
            let next = observe::kafka::committed(kafka.1, topic, GROUP).await?;
            let records = observe::kafka::records(kafka.1, topic).await?.len();
            let all = next == i64::try_from(records).ok();
            ensure!(all && records >= at_least, "{topic}: {next:?} of {records}");
        }
        Ok(())
    })
    .await?;
    third.interrupt().await?;
    third.end().await?.succeeded()?;
    let dead = observe::kafka::records(kafka.1, DEAD).await?;
    ensure!(!dead.is_empty(), "the order without an address is lost");
    for record in dead {
        assert_eq!(record.payload(), Some(&b"order-3"[..]));
        assert_eq!(headers(&record)?["x-origin"], "retry.orders 0 3");
    }
    Ok(())
}
