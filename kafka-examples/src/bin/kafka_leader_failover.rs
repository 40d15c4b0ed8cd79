//! Cluster failover: a broker dies, and what three had acknowledged stays.
//!
//! Teaches: with `acks=all` and `min.insync.replicas=2` an acknowledgement means that
//! at least two brokers have the record, so one may die. With `acks=1` it means that
//! the leader has it: what the others have not fetched when it dies is gone, and the
//! producer was told that all is well. While a new leader is elected the client waits
//! and tries again, and idempotence keeps what it repeats from being there twice.
//!
//! Run, after `docker compose -f docker-compose.cluster.yml --profile kafka up -d
//! --wait`:
//!
//! ```text
//! cargo run --bin kafka_leader_failover              # kill the leader
//! cargo run --bin kafka_leader_failover acks=1       # the careless way
//! docker compose -f docker-compose.cluster.yml kill kafka2      # if 2 leads
//! ```
//!
//! Expected output:
//!
//! ```text
//! topic:     failover.payments, replicas 3, leader broker <broker>
//! publish:   300 payments, kill that broker meanwhile
//! acked:     50 payments
//! ...
//! acked:     300 payments
//! leader:    broker <leader>
//! stored:    300 different payments
//! lost:      0 acknowledged payments
//! twice:     0 payments
//! ```
//!
//! Left out on purpose: several records in flight at a time; consumers during the
//! election.

use std::{
    collections::BTreeMap, env, process::ExitCode, sync::Arc, time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    producer::{FutureProducer, FutureRecord},
    types::RDKafkaErrorCode,
};
use tokio::{task::spawn_blocking, time::sleep};

/// One that answers is enough: it tells the client all of them.
const DEFAULT_BROKERS: &str = "localhost:9092,localhost:9093,localhost:9094";
const TOPIC: &str = "failover.payments";
const REPLICAS: i32 = 3;
/// What the errors say.
const HOW: &str =
    "docker compose -f docker-compose.cluster.yml --profile kafka up -d --wait";
const USAGE: &str = "usage: kafka_leader_failover [acks=1]";

const PAYMENTS: usize = 300;
/// Slow enough to kill a broker in the middle.
const PAUSE: Duration = Duration::from_millis(50);
/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one payment may take with all repeats, an election among them: Kafka
/// notices after 9 s that a broker is dead, with its defaults.
const DELIVERY_MS: &str = "60000";

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story("all").await,
        ["acks=1"] => story("1").await,
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

// ANCHOR: story
async fn story(acks: &str) -> Result<()> {
    let brokers = brokers()?;
    let admin = ensure_topic(&brokers).await?;
    println!(
        "topic:     {TOPIC}, replicas {REPLICAS}, leader broker {}",
        leader(&admin).await?
    );
    let producer = producer(&brokers, acks)?;
    println!("publish:   {PAYMENTS} payments, kill that broker meanwhile");
    let mut first = None;
    for number in 0..PAYMENTS {
        let offset = send(&producer, number)
            .await
            .with_context(|| format!("{number} of {PAYMENTS} are acknowledged"))?;
        first.get_or_insert(offset);
        if (number + 1) % 50 == 0 {
            println!("acked:     {} payments", number + 1);
        }
        sleep(PAUSE).await;
    }

    println!("leader:    broker {}", leader(&admin).await?);
    let stored = stored(&brokers, first.unwrap_or_default()).await?;
    let lost = (0..PAYMENTS)
        .filter(|number| !stored.contains_key(&id(*number)))
        .count();
    let twice = stored.values().filter(|times| **times > 1).count();
    println!("stored:    {} different payments", stored.len());
    println!("lost:      {lost} acknowledged payments");
    println!("twice:     {twice} payments");
    ensure!(lost == 0, "{lost} payments that were acknowledged are gone");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: producer
fn producer(brokers: &str, acks: &str) -> Result<FutureProducer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("message.timeout.ms", DELIVERY_MS)
        .set("acks", acks);
    if acks == "all" {
        // The producer repeats a record whose answer it missed. The new leader knows
        // by its number that it has it. This needs `acks=all`.
        config.set("enable.idempotence", "true");
    }
    Ok(config.create()?)
}

/// Returns when the record is acknowledged, as the client tries again by itself until
/// `message.timeout.ms` is over.
async fn send(producer: &FutureProducer, number: usize) -> Result<i64> {
    let id = id(number);
    let record = FutureRecord::to(TOPIC).key(&id).payload("9.90");
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery.map_err(|(error, _record)| {
        anyhow!("payment {number} is not acknowledged: {error}")
    })?;
    Ok(delivery.offset)
}
// ANCHOR_END: producer

/// The number of the payment in the books.
fn id(number: usize) -> String {
    format!("payment-{number}")
}

/// Each payment that the new leader has, and how often, from this offset on: what lies
/// before is of an earlier run.
async fn stored(brokers: &str, first: i64) -> Result<BTreeMap<String, usize>> {
    // librdkafka wants a group even of a consumer that joins none.
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "failover-reader")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let mut there = TopicPartitionList::new();
    there.add_partition_offset(TOPIC, 0, Offset::Offset(first))?;
    reader.assign(&there)?;
    spawn_blocking(move || {
        let mut stored = BTreeMap::new();
        loop {
            match reader.poll(PATIENCE * 2).context("no record and no end")? {
                Ok(record) => {
                    let id = record.key().context("a payment without an id")?;
                    let id = String::from_utf8_lossy(id).into_owned();
                    *stored.entry(id).or_default() += 1;
                }
                Err(KafkaError::PartitionEOF(_)) => return Ok(stored),
                // The broker that died is one of those it was told of.
                Err(KafkaError::MessageConsumption(
                    RDKafkaErrorCode::BrokerTransportFailure,
                )) => {}
                Err(error) => return Err(error.into()),
            }
        }
    })
    .await?
}

type Admin = Arc<AdminClient<DefaultClientContext>>;

// ANCHOR: topic
/// Creates the topic, unless it is there, and waits until it is known.
async fn ensure_topic(brokers: &str) -> Result<Admin> {
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
            anyhow!(
                "no Kafka at {brokers} ({error}); it needs three brokers, and cargo \
                 lab up kafka starts one: {HOW}"
            )
        })?;
        let found = metadata.topics().iter().find(|it| it.name() == TOPIC);
        if let Some(partition) = found.and_then(|it| it.partitions().first()) {
            let replicas = partition.replicas().len();
            ensure!(
                i32::try_from(replicas) == Ok(REPLICAS),
                "{TOPIC} is there with {replicas} replicas; delete it first"
            );
            return Ok(admin);
        }
        let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(REPLICAS))
            // A write with `acks=all` needs two, the leader and one more. With the
            // default, 1, it would be content with a leader that is left alone.
            .set("min.insync.replicas", "2");
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics([&topic], &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => bail!(
                    "cannot create {name} with {REPLICAS} replicas ({code}); it needs \
                     three brokers: {HOW}"
                ),
            }
        }
        // A broker hears of a new topic a moment later.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {TOPIC}; ask who may describe it")
}
// ANCHOR_END: topic

/// The broker through which all writes go. While one is elected there is none.
async fn leader(admin: &Admin) -> Result<i32> {
    for _look in 0..200 {
        let asking = Arc::clone(admin);
        let ask = move || asking.inner().fetch_metadata(Some(TOPIC), PATIENCE);
        let metadata = spawn_blocking(ask).await??;
        let topic = metadata.topics().first();
        let partition = topic.and_then(|topic| topic.partitions().first());
        match partition.map(|partition| partition.leader()) {
            Some(leader) if leader >= 0 => return Ok(leader),
            _ => sleep(Duration::from_millis(100)).await,
        }
    }
    bail!("no broker leads {TOPIC}")
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
