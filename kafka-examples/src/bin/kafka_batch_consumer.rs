//! Batch consumer: many records in one database transaction, none of them twice.
//!
//! Teaches: a commit for each record, in a database as in Kafka, is what makes a
//! consumer slow. Gathered by number or time, a batch is one transaction. Kafka's
//! commit cannot be in it; but the offsets can be, in a table beside the facts. A
//! record below the offset in the table is in the table of facts already, however
//! often Kafka sends it again.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_batch_consumer                       # the whole story
//! cargo run --bin kafka_batch_consumer worker facts.db       # kill it, start it again
//! cargo run --bin kafka_batch_consumer careless facts.db     # without the table
//! cargo run --bin kafka_batch_consumer sales 1000
//! ```
//!
//! Expected output:
//!
//! ```text
//! sold:    1000 sales
//! worker:  1000 facts in <n> transactions
//! again:   all read a second time, 1000 facts
//! without: all read a second time, 2000 facts
//! ```
//!
//! Left out on purpose: several workers with a database each; the table says what this
//! database has, so it has to go where the partition goes.

use std::{
    env,
    future::Future,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::stream::{FuturesUnordered, TryStreamExt as _};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep, timeout, timeout_at},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "batch.sales";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 2;
const SALES: usize = 1000;
/// A batch has at most so many records,
const BATCH: usize = 200;
/// and is stored after this time, full or not.
const LINGER: Duration = Duration::from_millis(100);

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["worker", file] => worker(Path::new(file), Care::ByOffset).await,
        ["careless", file] => worker(Path::new(file), Care::None).await,
        ["sales", count] if let Ok(count) = count.parse() => sales(count).await,
        _ => {
            eprintln!(
                "usage: kafka_batch_consumer [worker FILE | careless FILE | sales COUNT]"
            );
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
    ByOffset,
    /// The control.
    None,
}

// ANCHOR: store
fn open(file: &Path) -> Result<Connection> {
    let database = Connection::open(file)
        .with_context(|| format!("cannot open {}", file.display()))?;
    // Waits for the one that is just being killed.
    database.busy_timeout(PATIENCE)?;
    database.execute_batch(
        "CREATE TABLE IF NOT EXISTS facts (sale BLOB NOT NULL);
         CREATE TABLE IF NOT EXISTS offsets (
             partition INTEGER PRIMARY KEY,
             next INTEGER NOT NULL
         );",
    )?;
    Ok(database)
}

/// Stores a batch and the offsets after it, or nothing.
fn store(
    database: &mut Connection,
    batch: &[OwnedMessage],
    care: Care,
) -> Result<usize> {
    let transaction = database.transaction()?;
    let mut stored = 0;
    for record in batch {
        let (partition, offset) = (record.partition(), record.offset());
        let next: Option<i64> = transaction
            .prepare_cached("SELECT next FROM offsets WHERE partition = ?")?
            .query_row([partition], |row| row.get(0))
            .optional()?;
        if care == Care::ByOffset && next.is_some_and(|next| offset < next) {
            // Kafka sends it again; its fact is there.
            continue;
        }
        // Byte for byte: what this program cannot read is a fact too.
        let sale = record.payload().unwrap_or_default();
        transaction
            .prepare_cached("INSERT INTO facts (sale) VALUES (?)")?
            .execute([sale])?;
        transaction
            .prepare_cached("REPLACE INTO offsets (partition, next) VALUES (?, ?)")?
            .execute(params![partition, offset + 1])?;
        stored += 1;
    }
    transaction.commit()?;
    Ok(stored)
}
// ANCHOR_END: store

// ANCHOR: gather
/// The next batch: at least one record, and what comes within [`LINGER`] of it.
async fn gather(consumer: &StreamConsumer) -> Result<Vec<OwnedMessage>, KafkaError> {
    let mut batch = vec![consumer.recv().await?.detach()];
    let end = Instant::now() + LINGER;
    // News of a lost connection is no reason to forget what was gathered.
    while batch.len() < BATCH
        && let Ok(Ok(record)) = timeout_at(end, consumer.recv()).await
    {
        batch.push(record.detach());
    }
    Ok(batch)
}

/// Stores a batch, and lets Kafka know in the background.
async fn process(
    consumer: &StreamConsumer,
    database: Connection,
    batch: Vec<OwnedMessage>,
    care: Care,
) -> Result<(Connection, usize)> {
    let mut position = TopicPartitionList::new();
    for record in &batch {
        let (partition, next) = (record.partition(), record.offset() + 1);
        let mut element = match position.find_partition(TOPIC, partition) {
            Some(element) => element,
            None => position.add_partition(TOPIC, partition),
        };
        element.set_offset(Offset::Offset(next))?;
    }
    // The database blocks, hence a thread of its own.
    let (database, stored) = spawn_blocking(move || {
        let mut database = database;
        store(&mut database, &batch, care).map(|stored| (database, stored))
    })
    .await??;
    // Only now: it says where to go on, and what is stored need not come again.
    match consumer.store_offsets(&position) {
        // A partition went to another member meanwhile; that one skips what is stored.
        Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {}
        told => told?,
    }
    Ok((database, stored))
}
// ANCHOR_END: gather

fn consumer(brokers: &str, group: &str) -> Result<StreamConsumer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false")
        // A worker that was killed counts as dead after this time.
        .set("session.timeout.ms", "6000")
        .create()?)
}

async fn worker(file: &Path, care: Care) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let mut database = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = consumer(&brokers, "batch-facts")?;
    consumer.subscribe(&[TOPIC])?;
    println!("ready:   sales from {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let batch = tokio::select! {
            biased;
            // What is gathered and not stored comes again.
            () = &mut stop_signal => break,
            batch = gather(&consumer) => batch,
        };
        let batch = match batch {
            Ok(batch) => batch,
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
        let records = batch.len();
        let (same, stored) = process(&consumer, database, batch, care).await?;
        database = same;
        println!("stored:  {stored} of {records}");
    }
    // Commits, and leaves the group. It blocks, hence a thread of its own.
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
    Ok(())
}

async fn sales(count: usize) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    sell(&brokers, count).await?;
    println!("sold:    {count} sales");
    Ok(())
}

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let first = sell(&brokers, SALES).await?;
    println!("sold:    {SALES} sales");
    let consumer = consumer(&brokers, "batch-story")?;
    for care in [Care::ByOffset, Care::None] {
        let mut database = open(Path::new(":memory:"))?;
        let batches;
        (database, batches) = read_all(&consumer, database, &first, care).await?;
        if care == Care::ByOffset {
            let facts = facts(&database)?;
            println!("worker:  {facts} facts in {batches} transactions");
        }
        // As after a kill, when Kafka does not know yet what is stored.
        (database, _) = read_all(&consumer, database, &first, care).await?;
        let label = match care {
            Care::ByOffset => "again:",
            Care::None => "without:",
        };
        let facts = facts(&database)?;
        println!("{label:<8} all read a second time, {facts} facts");
    }
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}
// ANCHOR_END: story

/// Stores all sales from these offsets on, and returns in how many batches.
async fn read_all(
    consumer: &StreamConsumer,
    mut database: Connection,
    first: &TopicPartitionList,
    care: Care,
) -> Result<(Connection, usize)> {
    consumer.assign(first)?;
    let (mut read, mut batches) = (0, 0);
    while read < SALES {
        let batch = timeout(PATIENCE, gather(consumer)).await;
        let batch = batch.context("no sale came within 5 s")??;
        read += batch.len();
        batches += 1;
        (database, _) = process(consumer, database, batch, care).await?;
    }
    Ok((database, batches))
}

fn facts(database: &Connection) -> Result<i64> {
    let count = "SELECT count(*) FROM facts";
    Ok(database.query_row(count, [], |row| row.get(0))?)
}

/// Sells, and returns where the sales begin.
async fn sell(brokers: &str, count: usize) -> Result<TopicPartitionList> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    // Different in each run.
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let mut deliveries = FuturesUnordered::new();
    for (number, partition) in (0..count).zip((0..PARTITIONS).cycle()) {
        let sale = format!("sale-{run}-{number}");
        let record = FutureRecord::<(), _>::to(TOPIC)
            .partition(partition)
            .payload(&sale);
        let queued = producer.send_result(record);
        deliveries.push(queued.map_err(|(error, _record)| error)?);
    }
    let mut begins = [i64::MAX; PARTITIONS as usize];
    while let Some(delivery) = deliveries.try_next().await? {
        let delivery = delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        let begin = &mut begins[delivery.partition as usize];
        *begin = delivery.offset.min(*begin);
    }
    let mut first = TopicPartitionList::new();
    for (partition, begin) in (0..PARTITIONS).zip(begins) {
        first.add_partition_offset(TOPIC, partition, Offset::Offset(begin))?;
    }
    Ok(first)
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
