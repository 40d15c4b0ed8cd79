//! Transactions: records in several topics, all of them or none.
//!
//! Teaches: an order and its entry in the ledger are written to two topics in one
//! transaction. After an abort, or when the writer dies, a reader with
//! `read_committed` sees neither; a reader with `read_uncommitted` sees both, as
//! they are in the log. A reader of committed records waits at the first open
//! transaction, so keep them short.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_transactions
//! ```
//!
//! Expected output:
//!
//! ```text
//! committed: order-1, in both topics
//! aborted:   order-2
//! committed: order-3, in both topics
//! read_committed:   orders order-1 order-3, ledger order-1 order-3
//! read_uncommitted: orders order-1 order-2 order-3, ledger order-1 order-2 order-3
//! ```
//!
//! Left out on purpose: to read, process and write in one transaction:
//! `kafka_exactly_once`.

use std::{
    env,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const ORDERS: &str = "transactions.orders";
const LEDGER: &str = "transactions.ledger";
const TOPICS: [&str; 2] = [ORDERS, LEDGER];
const PARTITIONS: i32 = 1;
/// One for each writer that runs at the same time, the same after a restart.
const WRITER: &str = "transactions-shop-1";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a transaction may take to be opened, committed or aborted.
const COMMIT: Duration = Duration::from_secs(30);

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
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // Idempotence and acks=all come with it.
        .set("transactional.id", WRITER)
        .create()?;
    let ready = producer.clone();
    // Ends what a dead writer of this name has left open. It blocks, as do all
    // calls about transactions, hence a thread of its own.
    spawn_blocking(move || ready.init_transactions(COMMIT)).await??;
    // The topics keep what earlier runs have left; this run looks at its own.
    let from = [
        end_of(&brokers, ORDERS).await?,
        end_of(&brokers, LEDGER).await?,
    ];

    write(&producer, "order-1", true).await?;
    println!("committed: order-1, in both topics");
    write(&producer, "order-2", false).await?;
    println!("aborted:   order-2");
    write(&producer, "order-3", true).await?;
    println!("committed: order-3, in both topics");

    for (isolation, expected) in [("read_committed", 2), ("read_uncommitted", 3)] {
        let mut read = Vec::new();
        for (topic, from) in TOPICS.into_iter().zip(from) {
            let orders = read_from(&brokers, topic, from, isolation, expected);
            read.push(orders.await?.join(" "));
        }
        let isolation = format!("{isolation}:");
        println!("{isolation:17} orders {}, ledger {}", read[0], read[1]);
    }
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: write
async fn write(producer: &FutureProducer, order: &str, commit: bool) -> Result<()> {
    producer.begin_transaction()?;
    for topic in TOPICS {
        let record = FutureRecord::to(topic).key(order).payload(order);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _record)| anyhow!("{topic}: {error}"))?;
    }
    let producer = producer.clone();
    let ended = spawn_blocking(move || match commit {
        true => match producer.commit_transaction(COMMIT) {
            // Three kinds of error: try again, abort, or (fatal) give up.
            Err(KafkaError::Transaction(error)) if error.is_retriable() => {
                producer.commit_transaction(COMMIT)
            }
            Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => {
                producer.abort_transaction(COMMIT)?;
                Err(KafkaError::Transaction(error))
            }
            other => other,
        },
        // The payment was declined.
        false => producer.abort_transaction(COMMIT),
    });
    ended.await?.context("the transaction has failed")
}
// ANCHOR_END: write

// ANCHOR: read
/// So many records from this offset on.
async fn read_from(
    brokers: &str,
    topic: &'static str,
    offset: i64,
    isolation: &str,
    expected: usize,
) -> Result<Vec<String>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "transactions-audit")
        .set("enable.auto.commit", "false")
        // `read_committed` is the default of librdkafka. Of Kafka's own clients
        // it is not.
        .set("isolation.level", isolation)
        .create()?;
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, 0, Offset::Offset(offset))?;
    reader.assign(&assignment)?;
    spawn_blocking(move || {
        let end = Instant::now() + PATIENCE;
        let mut orders = Vec::new();
        while orders.len() < expected {
            if let Some(order) = reader.poll(Duration::from_millis(100)) {
                let order = order?.detach();
                let order = order.payload().unwrap_or_default();
                orders.push(String::from_utf8_lossy(order).into_owned());
            }
            ensure!(Instant::now() < end, "only {orders:?} are in {topic}");
        }
        Ok(orders)
    })
    .await?
}
// ANCHOR_END: read

/// The offset of the next record.
async fn end_of(brokers: &str, topic: &'static str) -> Result<i64> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("isolation.level", "read_uncommitted")
        .create()?;
    let marks =
        spawn_blocking(move || reader.fetch_watermarks(topic, 0, PATIENCE)).await?;
    Ok(marks?.1)
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
