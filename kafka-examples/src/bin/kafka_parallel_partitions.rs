//! Parallel partitions: one task for each partition, each in its own order.
//!
//! Teaches: one loop over `recv` works on one record after the other, whatever the
//! partition, and a slow one holds up all. `split_partition_queue` gives each
//! partition a queue of its own, so that a task can work on each; the order within a
//! partition stays. The main queue has to be polled all the same: it serves the
//! group.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_parallel_partitions
//! ```
//!
//! Expected output:
//!
//! ```text
//! partition 1: 10 orders in their order
//! partition 2: 10 orders in their order
//! partition 0: 10 orders in their order, slow ones
//! at once:     3 orders were worked on
//! main queue:  0 records
//! ```
//!
//! Left out on purpose: members that come and go, after which the queues have to be
//! split again; and parallel work within a partition.

use std::{
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{
        CommitMode, Consumer as _, DefaultConsumerContext, StreamConsumer,
        stream_consumer::StreamPartitionQueue,
    },
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "parallel.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 3;
const GROUP: &str = "parallel-billing";
/// In each partition.
const ORDERS: usize = 10;
/// What an order takes: those of partition 0 are of a customer abroad.
const WORK: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(40),
    Duration::from_millis(120),
];
/// How many orders are worked on now, and how many were at the same time.
static AT_WORK: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

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

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .create()?;
    let consumer = Arc::new(consumer);
    consumer.assign(&place(&brokers).await?)?;

    // Before the first `recv`: what is in the main queue by then stays there.
    let mut tasks = JoinSet::new();
    for partition in 0..PARTITIONS {
        let queue = consumer
            .split_partition_queue(TOPIC, partition)
            .with_context(|| format!("no queue of partition {partition}"))?;
        tasks.spawn(work(Arc::clone(&consumer), queue, partition));
    }
    let main_queue = Arc::clone(&consumer);
    let main_queue = tokio::spawn(async move {
        // Only what no partition queue takes: errors, and here nothing.
        let record = main_queue.recv().await;
        record.map(|record| (record.partition(), record.offset()))
    });

    while let Some(result) = tasks.join_next().await {
        println!("{}", result??);
    }
    let most = MOST.load(Ordering::Relaxed);
    println!("at once:     {most} orders were worked on");
    if main_queue.is_finished() {
        bail!("in the main queue: {:?}", main_queue.await?);
    }
    main_queue.abort();
    println!("main queue:  0 records");
    let commit = move || consumer.commit_consumer_state(CommitMode::Sync);
    spawn_blocking(commit).await??;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: work
/// The orders of one partition, in their order, beside the other partitions.
async fn work(
    consumer: Arc<StreamConsumer>,
    queue: StreamPartitionQueue<DefaultConsumerContext>,
    partition: i32,
) -> Result<String> {
    let work = WORK[usize::try_from(partition)?];
    for number in 0..ORDERS {
        let order = timeout(PATIENCE, queue.recv()).await;
        let order = order.context("no order came within 5 s")??;
        let expected = format!("order-{number}");
        ensure!(
            order.payload() == Some(expected.as_bytes()),
            "partition {partition}: not {expected}"
        );
        MOST.fetch_max(
            1 + AT_WORK.fetch_add(1, Ordering::Relaxed),
            Ordering::Relaxed,
        );
        sleep(work).await;
        AT_WORK.fetch_sub(1, Ordering::Relaxed);
        // For the commit of all partitions at the end.
        consumer.store_offset_from_message(&order)?;
    }
    let slow = if partition == 0 { ", slow ones" } else { "" };
    Ok(format!(
        "partition {partition}: {ORDERS} orders in their order{slow}"
    ))
}
// ANCHOR_END: work

/// Ten orders into each partition; returns where the first of each is.
async fn place(brokers: &str) -> Result<TopicPartitionList> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut first = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        for number in 0..ORDERS {
            let order = format!("order-{number}");
            let record = FutureRecord::<(), _>::to(TOPIC)
                .partition(partition)
                .payload(&order);
            let delivery = producer.send(record, PATIENCE).await;
            let delivery = delivery.map_err(|(error, _record)| {
                anyhow!("not delivered to {TOPIC}: {error}")
            })?;
            if number == 0 {
                let offset = Offset::Offset(delivery.offset);
                first.add_partition_offset(TOPIC, partition, offset)?;
            }
        }
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
