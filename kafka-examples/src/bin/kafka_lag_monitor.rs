//! Lag: how far a group is behind, seen from outside of it.
//!
//! Teaches: the lag of a partition is where its log ends less where the group goes
//! on. Both can be asked without joining the group, which would take partitions from
//! its members. A group that has not committed has no offset, and not offset 0: where
//! it would begin is a setting of its consumers.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_lag_monitor                      # the whole story
//! cargo run --bin kafka_lag_monitor my-topic my-group    # any topic and group
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed: 10 orders, 6 and 4
//! lag:    partition 0: 6, partition 1: 4, together 10
//! billed: 4 orders of partition 0, 1 of partition 1
//! lag:    partition 0: 2, partition 1: 3, together 5
//! billed: the rest
//! lag:    partition 0: 0, partition 1: 0, together 0
//! nobody: has committed nothing, which is not a lag of 0
//! ```
//!
//! Left out on purpose: the time that the lag stands for, which is what a customer
//! feels; and transactions, whose markers count in the end of the log but are never
//! read.

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use tokio::task::spawn_blocking;

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "lag.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 2;
const GROUP: &str = "lag-billing";
/// A group that never was.
const NOBODY: &str = "lag-nobody";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        [topic, group] => monitor(topic, group).await,
        _ => {
            eprintln!("usage: kafka_lag_monitor [TOPIC GROUP]");
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

/// Of one partition.
struct Lag {
    partition: i32,
    end: i64,
    /// Where the group goes on, if it has ever committed.
    committed: Option<i64>,
}

impl Lag {
    fn records(&self) -> Option<i64> {
        self.committed.map(|next| self.end - next)
    }
}

// ANCHOR: lag
/// The lag of each partition. Blocks for as long as Kafka takes to answer.
fn lag(client: &BaseConsumer, topic: &str) -> Result<Vec<Lag>> {
    // As the group whose name the client has, which it has not joined.
    let mut partitions = TopicPartitionList::new();
    for partition in 0..partitions_of(client, topic)? {
        partitions.add_partition(topic, partition);
    }
    let committed = client.committed_offsets(partitions, PATIENCE)?;
    let lags = committed.elements().into_iter().map(|element| {
        let partition = element.partition();
        // The offset that the next record will get; the first that is still kept is
        // the other one.
        let (_first, end) = client.fetch_watermarks(topic, partition, PATIENCE)?;
        let committed = match element.offset() {
            Offset::Offset(next) => Some(next),
            // `Offset::Invalid`: no commit, or one that has expired.
            _none => None,
        };
        Ok(Lag {
            partition,
            end,
            committed,
        })
    });
    lags.collect()
}

fn partitions_of(client: &BaseConsumer, topic: &str) -> Result<i32> {
    let metadata = client.fetch_metadata(None, PATIENCE)?;
    let found = metadata.topics().iter().find(|one| one.name() == topic);
    let found = found.with_context(|| format!("there is no topic {topic}"))?;
    Ok(i32::try_from(found.partitions().len())?)
}

/// A client that asks in the name of a group. It never subscribes.
fn client(brokers: &str, group: &str) -> Result<Arc<BaseConsumer>> {
    let client = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .create()?;
    Ok(Arc::new(client))
}
// ANCHOR_END: lag

async fn monitor(topic: &str, group: &str) -> Result<()> {
    let brokers = brokers()?;
    connect(&brokers).await?;
    let client = client(&brokers, group)?;
    let topic = topic.to_owned();
    let lags = spawn_blocking(move || lag(&client, &topic)).await??;
    println!("partition       end committed       lag");
    let text = |number: Option<i64>| match number {
        Some(number) => number.to_string(),
        None => "none".to_owned(),
    };
    for one in &lags {
        println!(
            "{:>9} {:>9} {:>9} {:>9}",
            one.partition,
            one.end,
            text(one.committed),
            text(one.records()),
        );
    }
    // None, if one is not known.
    let together: Option<i64> = lags.iter().map(Lag::records).sum();
    println!("{:>39}", format!("together {}", text(together)));
    Ok(())
}

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let billing = client(&brokers, GROUP)?;
    // Of earlier runs nothing is left to bill.
    bill(&billing, [i64::MAX; 2]).await?;
    place(&brokers, [6, 4]).await?;
    println!("placed: 10 orders, 6 and 4");
    print_lag(&billing).await?;
    bill(&billing, [4, 1]).await?;
    println!("billed: 4 orders of partition 0, 1 of partition 1");
    print_lag(&billing).await?;
    bill(&billing, [i64::MAX; 2]).await?;
    println!("billed: the rest");
    print_lag(&billing).await?;

    let nobody = client(&brokers, NOBODY)?;
    let lags = spawn_blocking(move || lag(&nobody, TOPIC)).await??;
    ensure!(
        lags.iter().all(|one| one.records().is_none()),
        "{NOBODY} has committed"
    );
    println!("nobody: has committed nothing, which is not a lag of 0");
    Ok(())
}
// ANCHOR_END: story

async fn print_lag(client: &Arc<BaseConsumer>) -> Result<()> {
    let client = Arc::clone(client);
    let lags = spawn_blocking(move || lag(&client, TOPIC)).await??;
    let mut text = String::new();
    let mut together = 0;
    for one in lags {
        let records = one.records().context("nothing is committed")?;
        together += records;
        text += &format!("partition {}: {records}, ", one.partition);
    }
    println!("lag:    {text}together {together}");
    Ok(())
}

/// Stands for the group: commits so many orders of each partition, or all that there
/// are. A group without members accepts it from anybody.
async fn bill(client: &Arc<BaseConsumer>, orders: [i64; 2]) -> Result<()> {
    let client = Arc::clone(client);
    spawn_blocking(move || {
        let mut next = TopicPartitionList::new();
        for one in lag(&client, TOPIC)? {
            let done = orders[usize::try_from(one.partition)?];
            // A new group begins at the end here.
            let from = one.committed.unwrap_or(one.end);
            let offset = one.end.min(from.saturating_add(done));
            let offset = Offset::Offset(offset);
            next.add_partition_offset(TOPIC, one.partition, offset)?;
        }
        Ok(client.commit(&next, CommitMode::Sync)?)
    })
    .await?
}

/// So many orders into each partition.
async fn place(brokers: &str, orders: [usize; 2]) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for (partition, orders) in (0..).zip(orders) {
        for _order in 0..orders {
            let record = FutureRecord::<(), _>::to(TOPIC)
                .partition(partition)
                .payload("1 kettle");
            let delivery = producer.send(record, PATIENCE).await;
            delivery.map_err(|(error, _record)| {
                anyhow!("not delivered to {TOPIC}: {error}")
            })?;
        }
    }
    Ok(())
}

/// A client for administration, if Kafka answers.
async fn connect(brokers: &str) -> Result<AdminClient<DefaultClientContext>> {
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
    Ok(admin)
}

/// Creates the topics, unless they are there.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let admin = connect(brokers).await?;
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
    Ok(())
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
