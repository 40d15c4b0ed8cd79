//! Poison message: one bad order does not stop the line.
//!
//! Teaches: bytes that are no order are written to a topic for bad messages, with
//! their origin, and then the offset is committed. Kafka does not count deliveries, so
//! for an order that kills its worker the workers count themselves: before the work
//! begins, the number of the attempt is committed as the note of the offset.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin poison_message_kafka                     # the whole story
//! cargo run --bin poison_message_kafka producer
//! cargo run --bin poison_message_kafka worker --careless   # as often as you like
//! cargo run --bin poison_message_kafka worker              # until it stays alive
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:  order-1, noise, order-2, order-3, order-4
//! done:  order-1
//! aside: 11 bytes, no order: expected value at line 1 column 1
//! done:  order-2
//! start: order-3, attempt 1, and the worker dies
//! start: order-3, attempt 2, and the worker dies
//! start: order-3, attempt 3, and the worker dies
//! aside: order-3, killed 3 workers
//! done:  order-4
//! kept:  11 bytes from line-orders 0 <offset>: no order: expected value at line 1 column 1
//! kept:  29 bytes from line-orders 0 <offset>: killed 3 workers
//! ```
//!
//! Left out on purpose: the way back, when the bug is mended; see retry_dlq_kafka.

use std::{
    env,
    future::Future,
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::poison_message::{Reason, Verdict, decode, kills, line, verdict};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "line-orders";
const ASIDE: &str = "line-aside";
const TOPICS: [&str; 2] = [TOPIC, ASIDE];
/// A line: orders of one partition, one after the other.
const PARTITIONS: i32 = 1;
const GROUP: &str = "packer";
const STORY_GROUP: &str = "packer-story";
const USAGE: &str = "usage: poison_message_kafka [producer | worker [--careless]]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first order may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => produce().await,
        ["worker"] => worker(Care::Taken).await,
        ["worker", "--careless"] => worker(Care::None).await,
        _ => {
            eprintln!("{USAGE}");
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Care {
    Taken,
    /// The mistake, to see what it costs.
    None,
}

// ---- Producer --------------------------------------------------------------

async fn produce() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    send(&producer(&brokers)?).await?;
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

/// Returns the offset of the first order.
async fn send(producer: &FutureProducer) -> Result<i64> {
    let mut begin = None;
    for payload in line()? {
        let record = FutureRecord::to(TOPIC).key("line").payload(&payload);
        let stored = producer.send(record, PATIENCE).await;
        let stored = stored.map_err(|(error, _record)| {
            anyhow!("Kafka did not store an order: {error}")
        })?;
        begin.get_or_insert(stored.offset);
    }
    println!("sent:  order-1, noise, order-2, order-3, order-4");
    begin.context("an empty line")
}

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(care: Care) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let producer = producer(&brokers)?;
    let consumer = take_orders(&brokers, GROUP)?;
    println!("ready: orders from {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            record = consumer.recv() => record,
        };
        let record = match record {
            Ok(record) => record,
            // The client connects again by itself; it says so with each attempt, and
            // to hear it once is enough.
            Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            )) => {
                if !lost {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                lost = true;
                continue;
            }
            Err(error) => return Err(error).context("cannot read on"),
        };
        lost = false;
        if care == Care::None {
            // Ends here, and has decided nothing.
            let payload = record.payload().unwrap_or_default();
            if let Err(error) = decode(payload) {
                drop(record);
                close(consumer).await?;
                return Err(error).context("cannot decode an order");
            }
        }
        match step(&consumer, &record)? {
            Step::Next => {}
            Step::Aside(reason) => {
                set_aside(&consumer, &producer, &record, &reason).await?;
            }
            // Nothing of this program runs after this line.
            Step::Dies => process::abort(),
        }
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

enum Step {
    Next,
    Aside(Reason),
    Dies,
}

// ANCHOR: step
fn step(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<Step> {
    let offset = record.offset();
    let payload = record.payload().unwrap_or_default();
    let attempt = earlier_attempts(consumer, record)? + 1;
    match verdict(payload, attempt) {
        Verdict::Work(order) => {
            // Before the work; after it there may be nobody left to count.
            commit(consumer, record, offset, &attempt.to_string())?;
            if kills(&order) {
                println!(
                    "start: {}, attempt {attempt}, and the worker dies",
                    order.id
                );
                return Ok(Step::Dies);
            }
            commit(consumer, record, offset + 1, "")?;
            println!("done:  {}", order.id);
            Ok(Step::Next)
        }
        Verdict::SetAside(reason) => Ok(Step::Aside(reason)),
    }
}

/// How many workers have begun this record: the note of the offset, if the group
/// stands at it.
fn earlier_attempts(
    consumer: &StreamConsumer,
    record: &BorrowedMessage<'_>,
) -> Result<u32> {
    let mut partition = TopicPartitionList::new();
    partition.add_partition(record.topic(), record.partition());
    let ask = || consumer.committed_offsets(partition, PATIENCE);
    let committed = block_in_place(ask).context("cannot read the count")?;
    let stands = committed.find_partition(record.topic(), record.partition());
    let stands = stands.filter(|at| at.offset() == Offset::Offset(record.offset()));
    Ok(stands.map_or(0, |at| at.metadata().parse().unwrap_or(0)))
}

fn commit(
    consumer: &StreamConsumer,
    record: &BorrowedMessage<'_>,
    next: i64,
    note: &str,
) -> Result<()> {
    let mut position = TopicPartitionList::new();
    let mut element = position.add_partition(record.topic(), record.partition());
    element.set_offset(Offset::Offset(next))?;
    element.set_metadata(note);
    block_in_place(|| consumer.commit(&position, CommitMode::Sync))
        .context("cannot commit; the order will come again")
}
// ANCHOR_END: step

// ANCHOR: set_aside
/// Stored first, then committed. Killed in between, the next worker stores it once
/// more; the origin tells that the two are one.
async fn set_aside(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    record: &BorrowedMessage<'_>,
    reason: &Reason,
) -> Result<()> {
    // What the producer wrote, then ours.
    let headers = record
        .headers()
        .map_or_else(OwnedHeaders::new, |headers| headers.detach());
    let headers = [
        ("origin-topic", record.topic().to_owned()),
        ("origin-partition", record.partition().to_string()),
        ("origin-offset", record.offset().to_string()),
        ("reason", reason.to_string()),
    ]
    .iter()
    .fold(headers, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    });
    // The bytes as they came: what was not understood is not written anew.
    let payload = record.payload().unwrap_or_default();
    let key = record.key().unwrap_or_default();
    let copy = FutureRecord::to(ASIDE)
        .key(key)
        .payload(payload)
        .headers(headers);
    producer
        .send(copy, PATIENCE)
        .await
        .map_err(|(error, _record)| {
            anyhow!("cannot set aside, the message stays in the line: {error}")
        })?;
    commit(consumer, record, record.offset() + 1, "")?;
    println!("aside: {}, {reason}", name(payload));
    Ok(())
}
// ANCHOR_END: set_aside

fn name(payload: &[u8]) -> String {
    let order = decode(payload);
    order.map_or_else(|_| format!("{} bytes", payload.len()), |order| order.id)
}

fn take_orders(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted worker takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", "packer-1")
        .set("auto.offset.reset", "earliest")
        // Each commit here has its note.
        .set("enable.auto.commit", "false")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// Leaves the group. It blocks, hence a thread of its own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let begin = send(&producer).await?;

    let mut left = line()?.len();
    while left > 0 {
        let consumer = take_orders(&brokers, STORY_GROUP)?;
        while left > 0 {
            let record = next(&consumer, begin).await?;
            match step(&consumer, &record)? {
                Step::Next => left -= 1,
                Step::Aside(reason) => {
                    set_aside(&consumer, &producer, &record, &reason).await?;
                    left -= 1;
                }
                Step::Dies => break,
            }
        }
        close(consumer).await?;
    }
    show(&brokers, begin).await
}

/// The next order of this run. What others have left is no part of the story.
async fn next(consumer: &StreamConsumer, begin: i64) -> Result<BorrowedMessage<'_>> {
    loop {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no order came within 30 s")??;
        if record.offset() >= begin {
            return Ok(record);
        }
    }
}

/// Shows what this run has set aside.
async fn show(brokers: &str, begin: i64) -> Result<()> {
    let reader: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Wanted by the client also of a reader that joins no group.
        .set("group.id", "packer-reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut all = TopicPartitionList::new();
    all.add_partition_offset(ASIDE, 0, Offset::Beginning)?;
    reader.assign(&all)?;
    let mut left = 2;
    while left > 0 {
        let kept = timeout(FIRST, reader.recv()).await;
        let kept = kept.context("nothing was set aside")??;
        let header = |name| {
            let all = kept.headers().into_iter().flat_map(|all| all.iter());
            let value = all.filter(|header| header.key == name).last()?.value?;
            str::from_utf8(value).ok()
        };
        let offset = header("origin-offset").unwrap_or("?");
        if offset.parse::<i64>().is_ok_and(|offset| offset >= begin) {
            println!(
                "kept:  {} bytes from {} {} {offset}: {}",
                kept.payload().unwrap_or_default().len(),
                header("origin-topic").unwrap_or("?"),
                header("origin-partition").unwrap_or("?"),
                header("reason").unwrap_or("?"),
            );
            left -= 1;
        }
    }
    close(reader).await
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

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

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
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
