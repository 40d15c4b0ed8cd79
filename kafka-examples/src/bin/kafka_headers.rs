//! Headers: what is about a record, beside what is in it.
//!
//! Teaches: a record carries a list of names and bytes beside its payload, which a
//! router or a tracer reads without decoding the payload. It is a list and not a
//! map: a name may be there twice, in the order in which it was added, and a header
//! without a value is something else than one with an empty value.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_headers
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:     1 kettle, with 6 headers
//! received: 1 kettle
//!   event-type  = OrderPlaced
//!   traceparent = 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
//!   attempt     = 1
//!   attempt     = 2
//!   coupon      is empty
//!   gift        has no value
//! last:     attempt 2, the first is 1
//! ```
//!
//! Left out on purpose: tracing itself, which fills and reads `traceparent` for you;
//! and numbers, for which both sides have to agree on their bytes.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::RDKafkaErrorCode,
    message::{BorrowedHeaders, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "headers.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
/// As W3C's Trace Context writes it: version, trace, span, flags.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

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

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let offset = send(&brokers).await?;
    receive(&brokers, offset).await
}

// ANCHOR: send
async fn send(brokers: &str) -> Result<i64> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let with = |key, value| Header {
        key,
        value: Some(value),
    };
    let headers = OwnedHeaders::new()
        .insert(with("event-type", "OrderPlaced"))
        .insert(with("traceparent", TRACE))
        .insert(with("attempt", "1"))
        // Not instead of the first: both are there.
        .insert(with("attempt", "2"))
        .insert(with("coupon", ""))
        .insert(Header {
            key: "gift",
            value: None::<&str>,
        });
    let count = headers.count();
    let record = FutureRecord::to(TOPIC)
        .key("order-1")
        .payload("1 kettle")
        .headers(headers);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    println!("sent:     1 kettle, with {count} headers");
    Ok(delivery.offset)
}
// ANCHOR_END: send

async fn receive(brokers: &str, offset: i64) -> Result<()> {
    // librdkafka wants a group even of a consumer that joins none.
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "headers-reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut there = TopicPartitionList::new();
    there.add_partition_offset(TOPIC, 0, Offset::Offset(offset))?;
    consumer.assign(&there)?;
    let record = timeout(PATIENCE, consumer.recv()).await;
    let record = record.context("no record came within 5 s")??;
    let payload = record.payload().unwrap_or_default();
    println!("received: {}", String::from_utf8_lossy(payload));
    let headers = record.headers().context("no headers came")?;
    show(headers);
    let first = find(headers.iter(), "attempt").context("no attempt")?;
    let last = find(headers_from_the_end(headers), "attempt");
    let last = last.context("no attempt")?;
    println!("last:     attempt {last}, the first is {first}");
    Ok(())
}

// ANCHOR: read
fn show(headers: &BorrowedHeaders) {
    for Header { key, value } in headers.iter() {
        match value {
            None => println!("  {key:<11} has no value"),
            Some(b"") => println!("  {key:<11} is empty"),
            // Bytes: nobody promises that they are text.
            Some(bytes) => {
                println!("  {key:<11} = {}", String::from_utf8_lossy(bytes));
            }
        }
    }
}

/// The first of this name. There is no index: this looks at one after the other.
fn find<'a>(
    mut headers: impl Iterator<Item = Header<'a, &'a [u8]>>,
    key: &str,
) -> Option<String> {
    let header = headers.find(|header| header.key == key)?;
    Some(String::from_utf8_lossy(header.value?).into_owned())
}

/// Whoever forwards a record adds to the end, so the last one counts.
fn headers_from_the_end(
    headers: &BorrowedHeaders,
) -> impl Iterator<Item = Header<'_, &[u8]>> {
    (0..headers.count())
        .rev()
        .filter_map(|index| headers.try_get(index))
}
// ANCHOR_END: read

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
