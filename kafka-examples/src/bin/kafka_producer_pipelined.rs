//! Many in flight: a window of records without a report, and no loss.
//!
//! Teaches: to await each delivery before the next record costs a round trip each.
//! `send_result` only queues the record and gives a future for its report. A bounded
//! number of futures keeps memory bounded; a full local queue is not an error of
//! Kafka but a word to wait.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_producer_pipelined
//! cargo run --release --bin kafka_producer_pipelined 1000000 100
//! ```
//!
//! The second sends that many records of that many bytes, and says how fast.
//!
//! Expected output:
//!
//! ```text
//! delivered: 10000 readings, at most 1000 at a time without a report
//! lost:      0 readings
//! ```
//!
//! Left out on purpose: what to do with a record that Kafka refuses. The first such
//! record ends this program; a service would keep it aside.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "pipelined.readings";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;

const READINGS: usize = 10_000;
/// How many may wait for their reports.
const WINDOW: usize = 1000;
/// With more in flight the client can fill larger batches: for the measurement.
const WIDE: usize = 50_000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let numbers: Option<Vec<usize>> =
        words.iter().map(|word| word.parse().ok()).collect();
    let result = match numbers.as_deref() {
        Some([]) => story().await,
        Some([count, size]) if *count > 0 => measure(*count, *size).await,
        _ => {
            eprintln!("usage: kafka_producer_pipelined [COUNT BYTES]");
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

// ANCHOR: story
async fn story() -> Result<()> {
    let producer = producer().await?;
    let reading = |number| format!("reading-{number}").into_bytes();
    let delivered = send_all(&producer, READINGS, WINDOW, reading).await?;
    println!(
        "delivered: {delivered} readings, at most {WINDOW} at a time without a report"
    );
    println!("lost:      {} readings", READINGS - delivered);
    close(producer).await
}
// ANCHOR_END: story

async fn measure(count: usize, size: usize) -> Result<()> {
    let producer = producer().await?;
    let started = Instant::now();
    let reading = |_number| vec![b'x'; size];
    let delivered = send_all(&producer, count, WIDE, reading).await?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(delivered == count, "{delivered} are delivered");
    println!(
        "published: {count} messages of {size} B in {seconds:.3} s ({:.0} msg/s)",
        count as f64 / seconds
    );
    close(producer).await
}

// ANCHOR: window
/// Returns how many are delivered, which are all, or fails.
async fn send_all(
    producer: &FutureProducer,
    count: usize,
    window: usize,
    reading: impl Fn(usize) -> Vec<u8>,
) -> Result<usize> {
    let mut in_flight = FuturesUnordered::new();
    let mut delivered = 0;
    for number in 0..count {
        in_flight.push(send(producer, &reading(number)).await?);
        if in_flight.len() >= window {
            settle(&mut in_flight).await?;
            delivered += 1;
        }
    }
    while !in_flight.is_empty() {
        settle(&mut in_flight).await?;
        delivered += 1;
    }
    Ok(delivered)
}

/// Queues a record. The future need not be polled for it to be sent, and to drop
/// it does not take the record back.
async fn send(producer: &FutureProducer, reading: &[u8]) -> Result<DeliveryFuture> {
    loop {
        let record: FutureRecord<'_, [u8], [u8]> =
            FutureRecord::to(TOPIC).payload(reading);
        match producer.send_result(record) {
            Ok(report) => return Ok(report),
            // The local queue is full (`queue.buffering.max.messages`, 100,000 by
            // default): Kafka is slower than this program, so wait.
            Err((
                KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull),
                _record,
            )) => sleep(Duration::from_millis(5)).await,
            Err((error, _record)) => return Err(not_sent(&error)),
        }
    }
}

/// Waits for a report, whichever comes first.
async fn settle(in_flight: &mut FuturesUnordered<DeliveryFuture>) -> Result<()> {
    let report = in_flight.next().await.context("nothing is in flight")?;
    // The first error would mean that the producer is gone.
    let report = report.context("the producer was dropped")?;
    report.map_err(|(error, _record)| not_sent(&error))?;
    Ok(())
}

fn not_sent(error: &KafkaError) -> anyhow::Error {
    let hint = match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
            "; the limits are message.max.bytes of the client and max.message.bytes \
             of the topic"
        }
        Some(RDKafkaErrorCode::MessageTimedOut) => {
            "; Kafka has not stored it within message.timeout.ms"
        }
        _ => "",
    };
    anyhow!("not delivered to {TOPIC}: {error}{hint}")
}
// ANCHOR_END: window

// ANCHOR: producer
async fn producer() -> Result<FutureProducer> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // Stored by all replicas that are in step, and neither twice nor out of
        // order when the client tries again.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "10000")
        // How long to wait for more records that go to the same place, in
        // milliseconds.
        .set("linger.ms", "5")
        .set("batch.size", "1000000")
        .create()?;
    Ok(producer)
}
// ANCHOR_END: producer

async fn close(producer: FutureProducer) -> Result<()> {
    spawn_blocking(move || producer.flush(PATIENCE)).await??;
    Ok(())
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
