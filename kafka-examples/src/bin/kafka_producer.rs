//! Producer: a record is sent when Kafka has said where it stored it.
//!
//! Teaches: `send` waits for the delivery report, with partition and offset.
//! Idempotence is off by default in librdkafka; switched on, a retry can
//! neither repeat nor reorder a record.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_producer
//! cargo run --bin kafka_consumer     # before or after, as you like
//! ```
//!
//! Expected output:
//!
//! ```text
//! delivered: key1 = Hello, Kafka! (partition 0, offset <offset>)
//! ```
//!
//! Left out on purpose: many records in flight at once. Awaiting one report
//! after the other, as here, costs a round trip for each record.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord, Producer as _},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "my-topic";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match produce().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: produce
async fn produce() -> Result<()> {
    let brokers = brokers()?;
    ensure_topic(&brokers).await?;

    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        // How long a record may take, retries included, in milliseconds. Then
        // its delivery report is an error.
        .set("message.timeout.ms", "5000")
        .create()?;

    let record = FutureRecord::to(TOPIC).key("key1").payload("Hello, Kafka!");
    // The second argument is not a time limit for the delivery: it is how long
    // to wait for room in the local queue, if that is full.
    let delivery = producer
        .send(record, Duration::from_secs(1))
        .await
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    println!(
        "delivered: key1 = Hello, Kafka! (partition {}, offset {})",
        delivery.partition, delivery.offset
    );

    // Nothing is left to send here, as the one record has been awaited. But a
    // producer that is dropped throws away what it has not sent, so make this a
    // habit. It blocks, hence a thread of its own.
    tokio::task::spawn_blocking(move || producer.flush(PATIENCE)).await??;
    Ok(())
}
// ANCHOR_END: produce

// ANCHOR: topic
/// Creates the topic, unless it is there.
///
/// Looks first: where somebody else keeps the topics, this program needs no
/// right to create any.
async fn ensure_topic(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;

    // A blocking call, hence a thread of its own.
    let (admin, metadata) = tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(Some(TOPIC), PATIENCE);
        (admin, metadata)
    })
    .await?;
    let metadata = metadata.map_err(|error| {
        anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
    })?;
    let known = |topic: &rdkafka::metadata::MetadataTopic| {
        topic.name() == TOPIC && topic.error().is_none()
    };
    if metadata.topics().iter().any(known) {
        return Ok(());
    }

    let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    for result in admin.create_topics([&topic], &options).await? {
        match result {
            // Created by the other half of this lesson, a moment ago.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                bail!("cannot create the topic {name} ({code}); ask who may")
            }
        }
    }
    Ok(())
}
// ANCHOR_END: topic

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
