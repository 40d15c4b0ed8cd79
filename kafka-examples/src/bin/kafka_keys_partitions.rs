//! Keys: what belongs together is in one partition, and stays in order.
//!
//! Teaches: a record's key chooses its partition, and only within a partition is
//! there an order. So the key is what the order is about: the id of an order, not
//! the kind of event. librdkafka hashes otherwise than Kafka's own clients: set
//! `partitioner` where both write to one topic.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_keys_partitions
//! ```
//!
//! Expected output:
//!
//! ```text
//! order-1: partition 4: placed, paid, shipped
//! order-2: partition 3: placed, paid, shipped
//! order-3: partition 3: placed, paid, shipped
//! without a key: 3 events, in whatever partitions
//! librdkafka's own hash: order-1 would be in partition 1
//! ```
//!
//! Left out on purpose: more partitions later. The hash is taken modulo their
//! number, so most keys move, and their order is broken once.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "keys.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 6;

const ORDERS: [&str; 3] = ["order-1", "order-2", "order-3"];
const EVENTS: [&str; 3] = ["placed", "paid", "shipped"];

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

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

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    // As Kafka's own clients hash.
    let producer = producer(&brokers, "murmur2_random")?;

    let mut partitions = ORDERS.map(|_| Vec::new());
    for event in EVENTS {
        for (order, partitions) in ORDERS.iter().zip(&mut partitions) {
            partitions.push(send(&producer, Some(order), event).await?);
        }
    }
    for (order, partitions) in ORDERS.iter().zip(partitions) {
        let partition = partitions.first().context("no event")?;
        ensure!(
            partitions.iter().all(|other| other == partition),
            "{order} is in {partitions:?}"
        );
        println!("{order}: partition {partition}: {}", EVENTS.join(", "));
    }

    for event in EVENTS {
        send(&producer, None, event).await?;
    }
    println!("without a key: 3 events, in whatever partitions");

    let other = self::producer(&brokers, "consistent_random")?;
    let partition = send(&other, Some("order-1"), "returned").await?;
    println!("librdkafka's own hash: order-1 would be in partition {partition}");
    for producer in [producer, other] {
        spawn_blocking(move || producer.flush(PATIENCE)).await??;
    }
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: producer
fn producer(brokers: &str, partitioner: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Or a retry may put an earlier event behind a later one.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .set("partitioner", partitioner)
        .create()?;
    Ok(producer)
}

/// Returns the partition that the event has got into.
async fn send(
    producer: &FutureProducer,
    order: Option<&str>,
    event: &str,
) -> Result<i32> {
    let mut record: FutureRecord<'_, str, str> =
        FutureRecord::to(TOPIC).payload(event);
    if let Some(order) = order {
        record = record.key(order);
    }
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    Ok(delivery.partition)
}
// ANCHOR_END: producer

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
