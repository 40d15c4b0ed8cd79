//! Replay: a group goes back to a moment.
//!
//! Teaches: Kafka keeps what was read, so a group can read it again, from an offset or
//! from a moment: `offsets_for_times` says for each partition which record is the first
//! that is not older. The time of a record is that of its producer's clock. A record of
//! a slow clock is found late or not at all, and after the first one all come, old or
//! not: a moment becomes a place in the log.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_replay_by_time                            # the whole story
//! cargo run --bin kafka_replay_by_time $(date -d 09:00 +%s%3N)    # since nine o'clock
//! ```
//!
//! Expected output:
//!
//! ```text
//! priced:  order-1 order-2 order-3 order-4 order-5 order-6 order-7
//! moment:  no order of partition 2 is as new
//! again:   order-4 order-6 order-7
//! missed:  order-5, whose clock is an hour behind
//! ```
//!
//! Left out on purpose: going back while other members are at work, each of which has
//! to do it for its own partitions; see kafka_consumer_groups for who has which.

use std::{
    collections::BTreeSet,
    env,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "replay.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 3;
const GROUP: &str = "replay-pricing";
const HOUR: i64 = 3_600_000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the group may take to hand out its partitions.
const REBALANCE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let result = match &words[..] {
        [] => story().await,
        [moment] if let Ok(moment) = moment.parse() => since(moment).await,
        _ => {
            eprintln!("usage: kafka_replay_by_time [MILLISECONDS SINCE 1970]");
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
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let first = [
        place(&producer, "order-1", 0, now()?).await?,
        place(&producer, "order-2", 1, now()?).await?,
        place(&producer, "order-3", 2, now()?).await?,
    ];
    sleep(Duration::from_millis(10)).await;
    // From here on a price was wrong.
    let moment = now()?;
    let later = ["order-4", "order-5", "order-6", "order-7"];
    place(&producer, later[0], 0, now()?).await?;
    place(&producer, later[1], 1, now()? - HOUR).await?;
    place(&producer, later[2], 1, now()?).await?;
    place(&producer, later[3], 0, now()? - HOUR).await?;

    let consumer = Arc::new(pricing(&brokers)?);
    let mut all = price_to_the_end(&consumer).await?;
    // Orders that an earlier run has left are not of this story.
    all.retain(|order| order.offset >= first[order.partition as usize]);
    println!("priced:  {}", names(&all));

    let end = go_back(&consumer, moment).await?;
    println!("moment:  no order of {end} is as new");
    let again = price_to_the_end(&consumer).await?;
    println!("again:   {}", names(&again));
    for name in later {
        if !again.iter().any(|order| order.name == name) {
            println!("missed:  {name}, whose clock is an hour behind");
        }
    }
    leave(consumer).await
}
// ANCHOR_END: story

async fn since(moment: i64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let consumer = Arc::new(pricing(&brokers)?);
    // Waits for its share too: a member without one cannot go back in it.
    let new = price_to_the_end(&consumer).await?;
    println!("new:     {} orders", new.len());
    go_back(&consumer, moment).await?;
    for Order {
        name, partition, ..
    } in price_to_the_end(&consumer).await?
    {
        println!("again:   {name} of partition {partition}");
    }
    leave(consumer).await
}

// ANCHOR: go_back
/// Goes back to the first record of each partition that is not older, and returns the
/// partitions that have none.
async fn go_back(consumer: &Arc<StreamConsumer>, moment: i64) -> Result<String> {
    let mut moments = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        // In this question a place in the log stands for a time, in milliseconds.
        moments.add_partition_offset(TOPIC, partition, Offset::Offset(moment))?;
    }
    let asking = Arc::clone(consumer);
    spawn_blocking(move || {
        let places = asking.offsets_for_times(moments, PATIENCE)?;
        let mut none = Vec::new();
        for place in places.elements() {
            place.error()?;
            // Nothing is as new: that is no error, and the place is the end.
            if place.offset() == Offset::End {
                none.push(format!("partition {}", place.partition()));
            }
        }
        let sought = asking.seek_partitions(places, PATIENCE)?;
        for place in sought.elements() {
            place.error()?;
        }
        Ok(none.join(", "))
    })
    .await?
}
// ANCHOR_END: go_back

/// A member of the group. What it has read is committed in the background.
fn pricing(brokers: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        // To be told of each end.
        .set("enable.partition.eof", "true")
        // A run that was killed is forgotten after this time.
        .set("session.timeout.ms", "6000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

struct Order {
    name: String,
    partition: i32,
    offset: i64,
}

fn names(orders: &[Order]) -> String {
    let mut names: Vec<_> = orders.iter().map(|order| &*order.name).collect();
    // Between partitions there is no order.
    names.sort_unstable();
    names.join(" ")
}

/// Reads until each partition has told its end.
async fn price_to_the_end(consumer: &StreamConsumer) -> Result<Vec<Order>> {
    let mut orders = Vec::new();
    let mut ended = BTreeSet::new();
    while ended.len() < PARTITIONS as usize {
        let record = timeout(REBALANCE, consumer.recv()).await;
        let record = record.context("no record and no end within 15 s")?;
        match record {
            Ok(record) => {
                let name = record.payload().unwrap_or_default();
                let name = String::from_utf8_lossy(name).into_owned();
                orders.push(Order {
                    name,
                    partition: record.partition(),
                    offset: record.offset(),
                });
            }
            Err(KafkaError::PartitionEOF(partition)) => {
                ended.insert(partition);
            }
            Err(error) => return Err(error).context("cannot read on"),
        }
    }
    Ok(orders)
}

/// Commits, and leaves the group. It blocks, hence a thread of its own.
async fn leave(consumer: Arc<StreamConsumer>) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// Milliseconds since 1970.
fn now() -> Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_millis())?)
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?)
}

/// Places an order by somebody whose clock shows this time, and returns its offset.
async fn place(
    producer: &FutureProducer,
    name: &str,
    partition: i32,
    clock: i64,
) -> Result<i64> {
    let record = FutureRecord::<(), _>::to(TOPIC)
        .partition(partition)
        .payload(name)
        // Left out, it is the time of `send`.
        .timestamp(clock);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("{name} is not delivered: {error}"))?;
    Ok(delivery.offset)
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
