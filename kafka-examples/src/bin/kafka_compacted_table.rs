//! A table in a topic: the latest value of each key, and what a delete is.
//!
//! Teaches: with `cleanup.policy=compact` Kafka keeps the last record of each key,
//! so whoever reads the topic from its beginning has the table. A record without a
//! payload, a tombstone, deletes; an empty payload does not. When Kafka removes the
//! older records is its own business, so a reader never relies on it.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_compacted_table
//! ```
//!
//! Expected output:
//!
//! ```text
//! written:  5 prices, one of them empty, and a tombstone
//! rebuilt:  3 rows
//!   kettle  = 27
//!   pot     =
//!   toaster = 35
//! missing:  lamp, its last record is a tombstone
//! ```
//!
//! Left out on purpose: to follow the changes after the table is rebuilt; and that
//! a tombstone is removed as well in the end, by default a day later.

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::task::spawn_blocking;

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "table.prices";
const PARTITIONS: i32 = 2;

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
    ensure_table(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    put(&producer, "kettle", "29").await?;
    put(&producer, "toaster", "35").await?;
    put(&producer, "lamp", "12").await?;
    put(&producer, "kettle", "27").await?;
    // Looks like a delete, and is a price that is empty.
    put(&producer, "pot", "").await?;
    delete(&producer, "lamp").await?;
    println!("written:  5 prices, one of them empty, and a tombstone");

    let table = spawn_blocking(move || rebuild(&brokers)).await??;
    println!("rebuilt:  {} rows", table.len());
    for (product, price) in &table {
        println!("{}", format!("  {product:<7} = {price}").trim_end());
    }
    ensure!(!table.contains_key("lamp"), "the lamp is still there");
    println!("missing:  lamp, its last record is a tombstone");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: write
async fn put(producer: &FutureProducer, product: &str, price: &str) -> Result<()> {
    let record = FutureRecord::to(TOPIC).key(product).payload(price);
    let delivery = producer.send(record, PATIENCE).await;
    delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    Ok(())
}

/// A key and no payload. That has a type too, so one is named.
async fn delete(producer: &FutureProducer, product: &str) -> Result<()> {
    let tombstone = FutureRecord::<str, [u8]>::to(TOPIC).key(product);
    let delivery = producer.send(tombstone, PATIENCE).await;
    delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    Ok(())
}
// ANCHOR_END: write

// ANCHOR: rebuild
/// Reads the topic to its end. A key is always in the same partition, so the order
/// of its records is known. Blocks.
fn rebuild(brokers: &str) -> Result<BTreeMap<String, String>> {
    // librdkafka wants a group even of a consumer that joins none.
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "table-reader")
        .set("enable.auto.commit", "false")
        // Says where the end is. The watermark does not: the last offsets may be of
        // records that are gone.
        .set("enable.partition.eof", "true")
        .create()?;
    let mut everything = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        everything.add_partition_offset(TOPIC, partition, Offset::Beginning)?;
    }
    reader.assign(&everything)?;

    let mut table = BTreeMap::new();
    let mut ends = 0;
    while ends < PARTITIONS {
        let record = match reader.poll(PATIENCE).context("no record and no end")? {
            Ok(record) => record,
            Err(KafkaError::PartitionEOF(_partition)) => {
                ends += 1;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let product = text(record.key().context("a record without a key")?);
        match record.payload() {
            Some(price) => table.insert(product, text(price)),
            None => table.remove(&product),
        };
    }
    Ok(table)
}
// ANCHOR_END: rebuild

// ANCHOR: topic
/// Creates the topic as a table, unless it is there.
async fn ensure_table(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    // A blocking call, hence a thread of its own.
    let (admin, metadata) = spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(None, PATIENCE);
        (admin, metadata)
    })
    .await?;
    metadata.map_err(|error| {
        anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
    })?;
    let table = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(1))
        .set("cleanup.policy", "compact");
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    for result in admin.create_topics(&[table], &options).await? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                bail!("cannot create the topic {name} ({code}); ask who may")
            }
        }
    }
    Ok(())
}
// ANCHOR_END: topic

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
