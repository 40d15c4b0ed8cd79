//! Events in JSON: several kinds in one topic, and kinds that came later.
//!
//! Teaches: serde's tagged enum is the list of events that a program knows. What a
//! newer producer adds must not stop an older reader: a new field is ignored or has
//! a default, and a new kind of event, or bytes that are no JSON, go as they are to a
//! topic of their own instead of into the bin.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_json_events
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:  order-1, 1 kettle, coupon none        (written by version 1)
//! placed:  order-2, 1 lamp, coupon SPRING        (written by version 2)
//! paid:    order-1, 2990 cents
//! kept:    an event of a kind that is not known, GiftWrapped
//! kept:    bytes that are no event
//! old:     version 1 reads order-2 too, without its coupon
//! ```
//!
//! Left out on purpose: a registry of schemas, which tells a producer before, and
//! not a reader after, that it may not write this.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use serde::{Deserialize, Serialize};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "json.orders";
/// What cannot be read, byte for byte.
const KEPT: &str = "json.orders.kept";
const TOPICS: [&str; 2] = [TOPIC, KEPT];
const PARTITIONS: i32 = 1;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

// ANCHOR: events
/// What this program knows, and what it writes.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "type")]
enum Event {
    OrderPlaced {
        order: String,
        item: String,
        /// Since version 2; what version 1 has written has none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        coupon: Option<String>,
    },
    OrderPaid {
        order: String,
        cents: u64,
    },
}

/// The same as a program of last year knows it. Fields that it does not know are
/// passed over; `deny_unknown_fields` would forbid every change.
#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum OldEvent {
    OrderPlaced { order: String, item: String },
}

/// Enough of an event to say what kind it is.
#[derive(Deserialize)]
struct AnyEvent {
    #[serde(rename = "type")]
    kind: String,
}
// ANCHOR_END: events

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let (first, count) = write(&producer).await?;

    // librdkafka wants a group even of a consumer that joins none.
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "json-reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut there = TopicPartitionList::new();
    there.add_partition_offset(TOPIC, 0, Offset::Offset(first))?;
    consumer.assign(&there)?;
    let mut with_coupon = None;
    for _event in 0..count {
        let record = timeout(PATIENCE, consumer.recv()).await;
        let record = record.context("no record came within 5 s")??;
        let bytes = record.payload().unwrap_or_default();
        handle(&producer, bytes).await?;
        if String::from_utf8_lossy(bytes).contains("SPRING") {
            with_coupon = Some(bytes.to_vec());
        }
    }
    let bytes = with_coupon.context("no event has a coupon")?;
    let OldEvent::OrderPlaced { order, item } = serde_json::from_slice(&bytes)?;
    ensure!(item == "1 lamp", "it reads {item}");
    println!("old:     version 1 reads {order} too, without its coupon");
    Ok(())
}

// ANCHOR: read
async fn handle(producer: &FutureProducer, bytes: &[u8]) -> Result<()> {
    match serde_json::from_slice(bytes) {
        Ok(Event::OrderPlaced {
            order,
            item,
            coupon,
        }) => {
            let version = if coupon.is_none() { 1 } else { 2 };
            let coupon = coupon.as_deref().unwrap_or("none");
            let text = format!("{order}, {item}, coupon {coupon}");
            println!("placed:  {text:<37} (written by version {version})");
        }
        Ok(Event::OrderPaid { order, cents }) => {
            println!("paid:    {order}, {cents} cents");
        }
        Err(_not_ours) => {
            // As it is: whoever knows it later can still read it.
            send(producer, KEPT, bytes).await?;
            match serde_json::from_slice::<AnyEvent>(bytes) {
                Ok(event) => println!(
                    "kept:    an event of a kind that is not known, {}",
                    event.kind
                ),
                Err(_no_event) => println!("kept:    bytes that are no event"),
            }
        }
    }
    Ok(())
}
// ANCHOR_END: read

/// Writes events of all sorts, and returns the first offset and their number.
async fn write(producer: &FutureProducer) -> Result<(i64, usize)> {
    let placed = Event::OrderPlaced {
        order: "order-2".to_owned(),
        item: "1 lamp".to_owned(),
        coupon: Some("SPRING".to_owned()),
    };
    let paid = Event::OrderPaid {
        order: "order-1".to_owned(),
        cents: 2990,
    };
    let events = [
        // As version 1 has written it.
        br#"{"type":"OrderPlaced","order":"order-1","item":"1 kettle"}"#.to_vec(),
        serde_json::to_vec(&placed)?,
        serde_json::to_vec(&paid)?,
        br#"{"type":"GiftWrapped","order":"order-1","paper":"red"}"#.to_vec(),
        b"\xff{not JSON".to_vec(),
    ];
    let mut first = None;
    for event in &events {
        let offset = send(producer, TOPIC, event).await?;
        first.get_or_insert(offset);
    }
    Ok((first.context("no event to write")?, events.len()))
}

async fn send(producer: &FutureProducer, topic: &str, bytes: &[u8]) -> Result<i64> {
    let record = FutureRecord::to(topic).key("order-1").payload(bytes);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {topic}: {error}"))?;
    Ok(delivery.offset)
}

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        let known = |name: &_| metadata.topics().iter().any(|it| it.name() == *name);
        if TOPICS.iter().all(known) {
            return Ok(());
        }
        let topics = TOPICS
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&topics, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before is
        // told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {TOPICS:?}; ask who may describe it")
}

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
