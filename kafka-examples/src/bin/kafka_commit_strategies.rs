//! Commits: after each record, without waiting, once for many, with a note.
//!
//! Teaches: a commit is the number of the next record, not of the last. To wait for
//! it after each record is slow and exact; not to wait is fast, and a program that
//! dies does the last records again; once for many is both, with more of them again.
//! Nothing new to commit is an error code and no failure. And a commit has room for
//! a note.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_commit_strategies
//! ```
//!
//! Expected output:
//!
//! ```text
//! each:   3 orders, 3 commits, the next is 3
//! async:  3 orders, 3 commits not waited for, the next is 6
//! batch:  3 orders, 1 commit, the next is 9
//! again:  nothing new is NoOffset, which is no failure
//! noted:  3 orders, 1 commit, the next is 12, with the note "invoice 17"
//! ```
//!
//! Left out on purpose: commits in the background, see kafka_at_least_once; and those
//! inside of a transaction, see kafka_exactly_once.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "commits.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
const GROUP: &str = "commits-billing";
/// For each way of committing.
const ORDERS: i64 = 3;

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
    let first = place(&brokers, 4 * ORDERS).await?;
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .create()?;
    // One partition, without sharing it with a group; the commits are the same.
    let mut orders = TopicPartitionList::new();
    orders.add_partition_offset(TOPIC, 0, Offset::Offset(first))?;
    consumer.assign(&orders)?;
    // Shared with the threads in which a commit is waited for.
    let consumer = Arc::new(consumer);

    each(&consumer).await?;
    let next = committed(&consumer).await?.0 - first;
    println!("each:   {ORDERS} orders, {ORDERS} commits, the next is {next}");

    not_waited_for(&consumer).await?;
    let next = until(&consumer, first + 2 * ORDERS).await? - first;
    println!(
        "async:  {ORDERS} orders, {ORDERS} commits not waited for, the next is {next}"
    );

    batch(&consumer).await?;
    let next = committed(&consumer).await?.0 - first;
    println!("batch:  {ORDERS} orders, 1 commit, the next is {next}");
    nothing_new(&consumer).await?;
    println!("again:  nothing new is NoOffset, which is no failure");

    noted(&consumer, "invoice 17").await?;
    let (next, note) = committed(&consumer).await?;
    let next = next - first;
    println!(
        "noted:  {ORDERS} orders, 1 commit, the next is {next}, with the note {note:?}"
    );
    Ok(())
}

// ANCHOR: each
/// After each record, and waited for: at most one is done again.
async fn each(consumer: &Arc<StreamConsumer>) -> Result<()> {
    for _order in 0..ORDERS {
        let order = next(consumer).await?;
        bill(&order);
        // The next to read: the offset of this one, plus one.
        let mut position = TopicPartitionList::new();
        let offset = Offset::Offset(order.offset() + 1);
        position.add_partition_offset(TOPIC, order.partition(), offset)?;
        commit(consumer, position).await?;
    }
    Ok(())
}

/// Waits for Kafka, in a thread that may be blocked; a task of tokio may not.
async fn commit(
    consumer: &Arc<StreamConsumer>,
    position: TopicPartitionList,
) -> Result<()> {
    let consumer = Arc::clone(consumer);
    spawn_blocking(move || consumer.commit(&position, CommitMode::Sync)).await??;
    Ok(())
}
// ANCHOR_END: each

// ANCHOR: async
/// Sent and not waited for. An error is not told: `commit_callback` is called for
/// commits in the background only.
async fn not_waited_for(consumer: &Arc<StreamConsumer>) -> Result<()> {
    for _order in 0..ORDERS {
        let order = next(consumer).await?;
        bill(&order);
        consumer.commit_message(&order, CommitMode::Async)?;
    }
    Ok(())
}
// ANCHOR_END: async

// ANCHOR: batch
/// Remembers each, and commits once.
async fn batch(consumer: &Arc<StreamConsumer>) -> Result<()> {
    for _order in 0..ORDERS {
        let order = next(consumer).await?;
        bill(&order);
        consumer.store_offset_from_message(&order)?;
    }
    let consumer = Arc::clone(consumer);
    spawn_blocking(move || consumer.commit_consumer_state(CommitMode::Sync))
        .await??;
    Ok(())
}

async fn nothing_new(consumer: &Arc<StreamConsumer>) -> Result<()> {
    let consumer = Arc::clone(consumer);
    let commit = move || consumer.commit_consumer_state(CommitMode::Sync);
    match spawn_blocking(commit).await? {
        Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
        other => bail!("there was something to commit: {other:?}"),
    }
}
// ANCHOR_END: batch

// ANCHOR: noted
/// The note comes back with the offset, to whoever asks for it.
async fn noted(consumer: &Arc<StreamConsumer>, note: &str) -> Result<()> {
    let mut position = TopicPartitionList::new();
    for _order in 0..ORDERS {
        let order = next(consumer).await?;
        bill(&order);
        position = TopicPartitionList::new();
        let mut element = position.add_partition(TOPIC, order.partition());
        element.set_offset(Offset::Offset(order.offset() + 1))?;
        element.set_metadata(note);
    }
    commit(consumer, position).await
}
// ANCHOR_END: noted

async fn next(consumer: &StreamConsumer) -> Result<BorrowedMessage<'_>> {
    let order = timeout(PATIENCE, consumer.recv()).await;
    Ok(order.context("no order came within 5 s")??)
}

/// The work that must not be lost.
fn bill(_order: &BorrowedMessage<'_>) {}

/// Where the group would go on, and the note.
async fn committed(consumer: &Arc<StreamConsumer>) -> Result<(i64, String)> {
    let consumer = Arc::clone(consumer);
    let mut partition = TopicPartitionList::new();
    partition.add_partition(TOPIC, 0);
    let offsets =
        spawn_blocking(move || consumer.committed_offsets(partition, PATIENCE))
            .await??;
    let element = offsets.find_partition(TOPIC, 0).context("no partition")?;
    let next = element.offset().to_raw().context("no offset")?;
    Ok((next, element.metadata().to_owned()))
}

async fn until(consumer: &Arc<StreamConsumer>, wanted: i64) -> Result<i64> {
    let start = Instant::now();
    loop {
        let (next, _note) = committed(consumer).await?;
        if next == wanted {
            return Ok(next);
        }
        ensure!(start.elapsed() < PATIENCE, "the next is {next} after 5 s");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Places so many orders, and returns the offset of the first.
async fn place(brokers: &str, orders: i64) -> Result<i64> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut first = None;
    for number in 0..orders {
        let order = format!("order-{number}");
        let record = FutureRecord::to(TOPIC).key(&order).payload(&order);
        let delivery = producer.send(record, PATIENCE).await;
        let delivery = delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        first.get_or_insert(delivery.offset);
    }
    first.context("no order to place")
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
