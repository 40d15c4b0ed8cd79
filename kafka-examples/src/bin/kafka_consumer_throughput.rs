//! Consumer throughput: the pause of the fetcher, and how to shorten it.
//!
//! Teaches: a consumer fetches ahead, into a queue in memory. When that has what
//! `queued.min.messages` asks for, it stops fetching and looks again after a second,
//! by default: a reader that is quicker empties the queue and waits. A pause of a few
//! milliseconds makes it quick. A larger queue does so too, at several times the
//! memory; larger fetches alone make it slower.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_consumer_throughput
//! cargo run --release --bin kafka_consumer_throughput fill 1000000 100
//! cargo run --release --bin kafka_consumer_throughput tuned 1000000 100
//! cargo run --release --bin kafka_consumer_throughput defaults 1000000 100
//! ```
//!
//! `fill` sees to it that the topic has that many records of that many bytes; the
//! others read them, and say how fast.
//!
//! Expected output:
//!
//! ```text
//! defaults: 20000 of 20000 readings, each once and in order
//! tuned:    20000 of 20000 readings, each once and in order
//! ```
//!
//! Left out on purpose: several partitions and several members, which is how a group
//! grows; and the work, which is what takes the time in a service.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
/// With the size of its records behind it.
const TOPIC: &str = "throughput.readings";
const READINGS: usize = 20_000;
const BYTES: usize = 64;
/// How many may wait for their reports, while the topic is filled.
const WINDOW: usize = 50_000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy)]
enum Settings {
    Defaults,
    Tuned,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        [word, count, size] => match (word, count.parse(), size.parse()) {
            ("fill", Ok(count), Ok(size)) => fill_only(count, size).await,
            ("tuned", Ok(count), Ok(size)) if count > 0 => {
                measure(Settings::Tuned, count, size).await
            }
            ("defaults", Ok(count), Ok(size)) if count > 0 => {
                measure(Settings::Defaults, count, size).await
            }
            _ => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: kafka_consumer_throughput [fill COUNT BYTES | tuned COUNT BYTES | \
         defaults COUNT BYTES]"
    );
    ExitCode::from(2)
}

async fn story() -> Result<()> {
    let brokers = brokers()?;
    let topic = topic(BYTES);
    ensure_topic(&brokers, &topic).await?;
    fill(&brokers, &topic, READINGS, BYTES).await?;
    for (label, settings) in [
        ("defaults:", Settings::Defaults),
        ("tuned:", Settings::Tuned),
    ] {
        let consumer = consumer(&brokers, settings, &topic)?;
        for number in 0..READINGS {
            let record = timeout(PATIENCE, consumer.recv()).await;
            let record = record.context("no reading came within 5 s")??;
            let offset = usize::try_from(record.offset())?;
            ensure!(offset == number, "{offset} came instead of {number}");
            let size = record.payload_len();
            ensure!(size == BYTES, "a reading of {size} bytes");
        }
        println!(
            "{label:<9} {READINGS} of {READINGS} readings, each once and in order"
        );
        leave(consumer).await?;
    }
    Ok(())
}

// ANCHOR: settings
fn consumer(
    brokers: &str,
    settings: Settings,
    topic: &str,
) -> Result<StreamConsumer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        // Never committed to; librdkafka wants a name even of one that joins nothing.
        .set("group.id", "throughput")
        .set("enable.auto.commit", "false")
        // Both are the defaults, and here to be seen: fetch until so many wait,
        .set("queued.min.messages", "100000")
        // and never more KiB of records than this; what each takes besides is not
        // counted.
        .set("queued.max.messages.kbytes", "65536");
    if let Settings::Tuned = settings {
        // When enough wait, look again after so many milliseconds, not 1000.
        config.set("fetch.queue.backoff.ms", "5");
    }
    let consumer: StreamConsumer = config.create()?;
    let mut everything = TopicPartitionList::new();
    everything.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&everything)?;
    Ok(consumer)
}
// ANCHOR_END: settings

// ANCHOR: measure
/// Reads so many, and says how fast, from the first one on.
async fn measure(settings: Settings, count: usize, size: usize) -> Result<()> {
    let brokers = brokers()?;
    let topic = topic(size);
    ensure_topic(&brokers, &topic).await?;
    let consumer = consumer(&brokers, settings, &topic)?;
    let first = timeout(PATIENCE, consumer.recv()).await;
    let first =
        first.with_context(|| format!("{topic} is empty; fill it before"))??;
    let started = Instant::now();
    let mut bytes = first.payload_len();
    // Not held any longer: the consumer's own drop waits for every record that is, and
    // the compiler does not see it.
    drop(first);
    for read in 1..count {
        // A timer only where there is something to wait for: one for each record takes
        // a tenth of the time.
        let record = match consumer.recv().now_or_never() {
            Some(record) => record,
            None => timeout(PATIENCE, consumer.recv()).await.with_context(|| {
                format!("{topic} has {read} records; fill it before")
            })?,
        }?;
        bytes += record.payload_len();
    }
    let seconds = started.elapsed().as_secs_f64();
    ensure!(bytes == count * size, "{bytes} bytes are read");
    println!(
        "consumed: {count} messages of {size} B in {seconds:.3} s ({:.0} msg/s)",
        count as f64 / seconds
    );
    leave(consumer).await
}
// ANCHOR_END: measure

fn topic(size: usize) -> String {
    format!("{TOPIC}-{size}")
}

async fn leave(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

async fn fill_only(count: usize, size: usize) -> Result<()> {
    let brokers = brokers()?;
    let topic = topic(size);
    ensure_topic(&brokers, &topic).await?;
    fill(&brokers, &topic, count, size).await?;
    println!("filled: {topic} has {count} records or more");
    Ok(())
}

/// Sends what is missing for the topic to have so many records.
async fn fill(brokers: &str, topic: &str, count: usize, size: usize) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "10000")
        .create()?;
    let (asking, name) = (producer.clone(), topic.to_owned());
    let ask = move || asking.client().fetch_watermarks(&name, 0, PATIENCE);
    let (_first, end) = spawn_blocking(ask).await??;
    let missing = count.saturating_sub(usize::try_from(end)?);
    let reading = vec![b'x'; size];
    let mut in_flight = FuturesUnordered::new();
    for _reading in 0..missing {
        in_flight.push(send(&producer, topic, &reading).await?);
        if in_flight.len() >= WINDOW {
            settle(&mut in_flight).await?;
        }
    }
    while !in_flight.is_empty() {
        settle(&mut in_flight).await?;
    }
    Ok(())
}

async fn send(
    producer: &FutureProducer,
    topic: &str,
    reading: &[u8],
) -> Result<DeliveryFuture> {
    loop {
        let record = FutureRecord::<(), [u8]>::to(topic).payload(reading);
        match producer.send_result(record) {
            Ok(report) => return Ok(report),
            Err((
                KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull),
                _record,
            )) => sleep(Duration::from_millis(5)).await,
            Err((error, _record)) => return Err(error.into()),
        }
    }
}

async fn settle(in_flight: &mut FuturesUnordered<DeliveryFuture>) -> Result<()> {
    let report = in_flight.next().await.context("nothing is in flight")?;
    let report = report.context("the producer was dropped")?;
    report.map_err(|(error, _record)| anyhow!("not delivered: {error}"))?;
    Ok(())
}

/// Creates the topic, unless it is there, and waits until it is known.
async fn ensure_topic(brokers: &str, topic: &str) -> Result<()> {
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
        if metadata.topics().iter().any(|it| it.name() == topic) {
            return Ok(());
        }
        let new = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics([&new], &options).await? {
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
    bail!("created, and Kafka does not show it: {topic}; ask who may describe it")
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
