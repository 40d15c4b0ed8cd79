//! Idempotence: a retry of the client stores nothing twice; one of yours does.
//!
//! Teaches: if the answer to a record is lost, the client sends the record again, and
//! the broker has it twice. With `enable.idempotence` each record has a number, by
//! which the broker knows it. librdkafka has it off by default, Java's client on. It
//! ends where the client ends: what your program sends again, or a restarted one, is
//! a new record.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_idempotent_producer            # with idempotence
//! cargo run --bin kafka_idempotent_producer default    # as librdkafka comes
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:   payment-1, payment-2, payment-3
//! stored: payment-1 payment-2 payment-3
//! again:  payment-1, by the program and not by the client
//! stored: payment-1 payment-2 payment-3 payment-1
//! ```
//!
//! Left out on purpose: how to lose an answer, which takes a proxy, see the test;
//! and how the receiver knows your own second one, by an id in the payment.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "idempotent.payments";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a record may take with all its retries.
const DELIVERY_MS: &str = "20000";

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(true).await,
        ["default"] => story(false).await,
        _ => {
            eprintln!("usage: kafka_idempotent_producer [default]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: producer
fn producer(brokers: &str, idempotent: bool) -> Result<FutureProducer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("message.timeout.ms", DELIVERY_MS);
    if idempotent {
        // Also waits for all replicas, and keeps the order of what is retried.
        config.set("enable.idempotence", "true");
    }
    Ok(config.create()?)
}
// ANCHOR_END: producer

// ANCHOR: story
async fn story(idempotent: bool) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers, idempotent)?;
    let first = send(&producer, "payment-1").await?;
    send(&producer, "payment-2").await?;
    send(&producer, "payment-3").await?;
    println!("sent:   payment-1, payment-2, payment-3");
    println!("stored: {}", stored(&brokers, first).await?);
    // For the broker this is another record, as it is for idempotence.
    send(&producer, "payment-1").await?;
    println!("again:  payment-1, by the program and not by the client");
    println!("stored: {}", stored(&brokers, first).await?);
    Ok(())
}

async fn send(producer: &FutureProducer, payment: &str) -> Result<i64> {
    let record = FutureRecord::to(TOPIC).key("customer-1").payload(payment);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    Ok(delivery.offset)
}
// ANCHOR_END: story

/// What is in the log from this offset on.
async fn stored(brokers: &str, first: i64) -> Result<String> {
    // librdkafka wants a group even of a consumer that joins none.
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "idempotent-reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let mut there = TopicPartitionList::new();
    there.add_partition_offset(TOPIC, 0, Offset::Offset(first))?;
    reader.assign(&there)?;
    spawn_blocking(move || {
        let mut payments = Vec::new();
        loop {
            match reader.poll(PATIENCE).context("no record and no end")? {
                Ok(record) => {
                    let payment = record.payload().unwrap_or_default();
                    payments.push(String::from_utf8_lossy(payment).into_owned());
                }
                Err(KafkaError::PartitionEOF(_)) => return Ok(payments.join(" ")),
                Err(error) => return Err(error.into()),
            }
        }
    })
    .await?
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
