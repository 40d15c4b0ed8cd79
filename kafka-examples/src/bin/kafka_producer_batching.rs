//! Batches: how many records go in one request, and how small they get.
//!
//! Teaches: a producer sends what has gathered for a partition as one batch, after
//! `linger.ms` or when it is full, and compresses the batch as a whole. To wait a
//! little makes requests few; only a batch of many records can be made small, for it
//! is what they have in common that is left out. What went over the wire, librdkafka
//! counts.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_producer_batching
//! ```
//!
//! Expected output:
//!
//! ```text
//! 1000 readings of about 80 bytes, one a millisecond at most
//! one by one            <n> in a request, <n> bytes each
//! linger 5 ms           <n> in a request, <n> bytes each
//! linger 100 ms         <n> in a request, <n> bytes each
//! one by one, gzip      <n> in a request, <n> bytes each
//! linger 100 ms, gzip   <n> in a request, <n> bytes each
//! linger 100 ms, snappy <n> in a request, <n> bytes each
//! linger 100 ms, lz4    <n> in a request, <n> bytes each
//! ```
//!
//! Left out on purpose: `batch.size`, which ends a batch by its bytes; the default, a
//! megabyte, is never reached here. And zstd, which needs rdkafka's feature `zstd`.

use std::{
    env,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Result, anyhow, bail, ensure};
use futures_util::future::try_join_all;
use rdkafka::{
    ClientConfig, ClientContext, Statistics,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "batching.readings";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
const READINGS: usize = 1000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a producer batches.
struct Way {
    name: &'static str,
    linger: &'static str,
    /// At most so many records in a batch.
    records: &'static str,
    codec: &'static str,
}

#[rustfmt::skip]
const WAYS: [Way; 7] = [
    Way { name: "one by one", linger: "0", records: "1", codec: "none" },
    Way { name: "linger 5 ms", linger: "5", records: "10000", codec: "none" },
    Way { name: "linger 100 ms", linger: "100", records: "10000", codec: "none" },
    Way { name: "one by one, gzip", linger: "0", records: "1", codec: "gzip" },
    Way { name: "linger 100 ms, gzip", linger: "100", records: "10000", codec: "gzip" },
    Way { name: "linger 100 ms, snappy", linger: "100", records: "10000", codec: "snappy" },
    Way { name: "linger 100 ms, lz4", linger: "100", records: "10000", codec: "lz4" },
];

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
    println!("{READINGS} readings of about 80 bytes, one a millisecond at most");
    for way in WAYS {
        let (requests, bytes) = measure(&brokers, &way).await?;
        println!(
            "{:<21} {} in a request, {} bytes each",
            way.name,
            READINGS as u64 / requests,
            bytes / READINGS as u64
        );
    }
    Ok(())
}

// ANCHOR: wire
/// Keeps the last of librdkafka's reports, which are sums since its beginning.
#[derive(Default)]
struct Wire(Arc<Mutex<Statistics>>);

impl ClientContext for Wire {
    fn stats(&self, statistics: Statistics) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = statistics;
    }
}

/// Sends all readings, and returns how many requests and bytes that took.
async fn measure(brokers: &str, way: &Way) -> Result<(u64, u64)> {
    let wire = Wire::default();
    let reports = Arc::clone(&wire.0);
    let producer: FutureProducer<Wire> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .set("linger.ms", way.linger)
        .set("batch.num.messages", way.records)
        .set("compression.type", way.codec)
        .set("statistics.interval.ms", "100")
        .create_with_context(wire)?;

    let mut arrival = interval(Duration::from_millis(1));
    // A late one does not make the next ones early.
    arrival.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deliveries = Vec::new();
    for number in 0..READINGS {
        arrival.tick().await;
        let reading = reading(number);
        let record = FutureRecord::<(), _>::to(TOPIC).payload(&reading);
        let queued = producer.send_result(record);
        deliveries.push(queued.map_err(|(error, _record)| error)?);
    }
    for delivery in try_join_all(deliveries).await? {
        delivery
            .map_err(|(error, _record)| anyhow!("a reading is lost: {error}"))?;
    }
    // The next report has it all.
    sleep(Duration::from_millis(300)).await;
    let reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
    let mut sums = (0, 0);
    for broker in reports.brokers.values() {
        let requests = broker.req.get("Produce").copied().unwrap_or_default();
        sums.0 += u64::try_from(requests)?;
        sums.1 += broker.txbytes;
    }
    ensure!(sums.0 > 0, "librdkafka has reported nothing");
    Ok(sums)
}
// ANCHOR_END: wire

/// Readings as they are: the names always the same, the figures never quite.
fn reading(number: usize) -> String {
    let celsius = 3.0 + (number * 7919 % 1000) as f64 / 500.0;
    format!(
        r#"{{"sensor":"cold-room-{}","celsius":{celsius:.3},"humidity":{},"at":{}}}"#,
        number % 20,
        40 + number * 31 % 17,
        1_764_147_600_000_u64 + number as u64 * 137,
    )
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
