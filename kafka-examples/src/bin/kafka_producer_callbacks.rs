//! Callbacks: each delivery is told to a function, with what you gave along.
//!
//! Teaches: a future for each record costs memory and wake-ups. `ThreadedProducer` has
//! a thread that calls `delivery` for each report instead, with a value that went along
//! with the record. There one notes what happened and nothing more: as long as it runs
//! no other report is heard. It is the quickest way to send, and the one in which it
//! is easiest to forget an error.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_producer_callbacks
//! cargo run --release --bin kafka_producer_callbacks 1000000 100
//! ```
//!
//! The second sends that many records of that many bytes, and says how fast.
//!
//! Expected output:
//!
//! ```text
//! called back: 10000 of 10000 readings, none twice
//! failed:      0 readings
//! ```
//!
//! Left out on purpose: what to do with a reading that failed. Its number is known, and
//! the record comes with the error.

use std::{
    env,
    process::ExitCode,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer},
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "callbacks.readings";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
const READINGS: usize = 10_000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long all that is queued may take until it is reported.
const REPORTS: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let numbers: Option<Vec<usize>> =
        words.iter().map(|word| word.parse().ok()).collect();
    let result = match numbers.as_deref() {
        Some([]) => story().await,
        Some([count, size]) if *count > 0 => measure(*count, *size).await,
        _ => {
            eprintln!("usage: kafka_producer_callbacks [COUNT BYTES]");
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

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let reading = |number| format!("reading-{number}").into_bytes();
    let send = move || send_all(&brokers, READINGS, reading);
    let reports = spawn_blocking(send).await??;
    let once = reports
        .delivered
        .iter()
        .filter(|times| **times == 1)
        .count();
    let twice = reports.delivered.iter().filter(|times| **times > 1).count();
    ensure!(twice == 0, "{twice} readings were called back twice");
    println!("called back: {once} of {READINGS} readings, none twice");
    println!("failed:      {} readings", reports.failed);
    Ok(())
}

async fn measure(count: usize, size: usize) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let reading = move |_number| vec![b'x'; size];
    let send = move || send_all(&brokers, count, reading);
    let reports = spawn_blocking(send).await??;
    let seconds = reports.took.as_secs_f64();
    let delivered = reports
        .delivered
        .iter()
        .filter(|times| **times == 1)
        .count();
    ensure!(delivered == count, "{delivered} are delivered");
    println!(
        "published: {count} messages of {size} B in {seconds:.3} s ({:.0} msg/s)",
        count as f64 / seconds
    );
    Ok(())
}

// ANCHOR: context
/// What the reports say.
#[derive(Default)]
struct Reports {
    /// How often each reading was reported as delivered.
    delivered: Vec<u8>,
    failed: usize,
    first_error: Option<KafkaError>,
    /// How many are still to come.
    left: usize,
    /// From the first reading to the last report.
    took: Duration,
}

#[derive(Default)]
struct Shared {
    reports: Mutex<Reports>,
    complete: Condvar,
}

struct Callbacks(Arc<Shared>);

impl ClientContext for Callbacks {}

impl ProducerContext for Callbacks {
    /// The number of the reading. A `Box` of anything goes too.
    type DeliveryOpaque = usize;

    /// In the producer's own thread, one after the other.
    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let mut reports = lock(&self.0.reports);
        match result {
            Ok(_record) => reports.delivered[number] += 1,
            Err((error, _record)) => {
                reports.failed += 1;
                reports.first_error.get_or_insert_with(|| error.clone());
            }
        }
        // A second report of one reading would come in vain, and is counted above.
        reports.left = reports.left.saturating_sub(1);
        if reports.left == 0 {
            self.0.complete.notify_one();
        }
    }
}
// ANCHOR_END: context

// ANCHOR: send
/// Sends, and waits until each reading has its report. Blocks.
fn send_all(
    brokers: &str,
    count: usize,
    reading: impl Fn(usize) -> Vec<u8>,
) -> Result<Reports> {
    let started = Instant::now();
    let shared = Arc::new(Shared::default());
    {
        let mut reports = lock(&shared.reports);
        reports.delivered = vec![0; count];
        reports.left = count;
    }
    let producer: ThreadedProducer<Callbacks> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "10000")
        .set("linger.ms", "5")
        // Larger ones are no quicker, and Java takes what is larger than half a region of
        // its memory for a burden.
        .set("batch.size", "500000")
        .create_with_context(Callbacks(Arc::clone(&shared)))?;
    for number in 0..count {
        let reading = reading(number);
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(TOPIC, number).payload(&reading);
        loop {
            match producer.send(record) {
                Ok(()) => break,
                // The local queue is full (`queue.buffering.max.messages`, 100,000 by
                // default): Kafka is slower than this program, so wait.
                Err((
                    KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull),
                    same,
                )) => record = same,
                Err((error, _record)) => {
                    return Err(anyhow!("not sent to {TOPIC}: {error}"));
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    // Not `flush`: it and the producer's thread wait for the same reports, and when the
    // other one has taken the last, `flush` sleeps on for up to 100 ms.
    let (mut reports, late) = shared
        .complete
        .wait_timeout_while(lock(&shared.reports), REPORTS, |reports| {
            reports.left > 0
        })
        .unwrap_or_else(PoisonError::into_inner);
    let left = reports.left;
    ensure!(
        !late.timed_out(),
        "{left} readings have no report after 60 s"
    );
    reports.took = started.elapsed();
    let reports = std::mem::take(&mut *reports);
    match reports.first_error {
        Some(error) => Err(anyhow!(
            "{} readings are not delivered to {TOPIC}: {error}",
            reports.failed
        )),
        None => Ok(reports),
    }
}
// ANCHOR_END: send

fn lock(reports: &Mutex<Reports>) -> MutexGuard<'_, Reports> {
    reports.lock().unwrap_or_else(PoisonError::into_inner)
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
