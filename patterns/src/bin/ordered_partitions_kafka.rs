//! Ordered partitions: each order in its order, and many at the same time.
//!
//! Teaches: records with the same key go to the same partition, and a partition goes
//! to one worker of the group, which does one record after the other. So the changes
//! of an order stay in their order while other partitions are worked on beside it,
//! also when a worker is killed: the next one begins after the last commit, and what
//! was done already is known by the journal.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin ordered_partitions_kafka                   # the whole story
//! cargo run --bin ordered_partitions_kafka work shop.db 1    # terminal 1
//! cargo run --bin ordered_partitions_kafka work shop.db 2    # kill -9 it
//! cargo run --bin ordered_partitions_kafka publish 1 1000    # 200 orders
//! cargo run --bin ordered_partitions_kafka show shop.db
//! cargo run --bin ordered_partitions_kafka publish 1 1000 --unordered
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 5 changes of each of 4 orders
//! died:      worker 1, with a change written and not committed
//! known:     1 change came again
//! order-1:   placed, paid, packed, shipped, delivered
//! order-2:   placed, paid, packed, shipped, delivered
//! order-3:   placed, paid, packed, shipped, delivered
//! order-4:   placed, paid, packed, shipped, delivered
//! done:      20 changes, 0 of them late
//! ```
//!
//! Left out on purpose: several partitions of one worker at the same time; see
//! kafka_parallel_partitions.

use std::{
    collections::HashMap,
    env,
    future::Future,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::ordered_partitions::{Change, Journal, Outcome, PARTITIONS};
use rdkafka::{
    ClientConfig, Message,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "order-states";
const TOPICS: [&str; 1] = [TOPIC];
const GROUP: &str = "order-journal";
const STORY_GROUP: &str = "order-journal-story";
/// After this time without a sign of life the partitions of a worker go to others. It
/// is the shortest that Kafka takes by default.
const SESSION: &str = "6000";
const USAGE: &str = "usage: ordered_partitions_kafka [publish FIRST LAST \
                     [--unordered] | work FILE WORKER | show FILE]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first change may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let order = match words.last() {
        Some(&"--unordered") => Order::Lost,
        _ => Order::Kept,
    };
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] | ["publish", first, last, "--unordered"] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) => publish_all(first, last, order).await,
                _ => return usage(),
            }
        }
        ["work", file, worker] => match worker.parse() {
            Ok(worker) => work(file, worker).await,
            Err(_no_number) => return usage(),
        },
        ["show", file] => open(file).and_then(|journal| show(&journal)),
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Kept,
    /// The mistake, to see what it costs.
    Lost,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64, order: Order) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers, order)?;
    for number in first..=last {
        let change = Change::numbered(number);
        publish(&producer, &change).await?;
        println!("published: {} {}", change.order, change.state);
    }
    Ok(())
}

// ANCHOR: publish
fn producer(brokers: &str, order: Order) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // What is sent again by the client does not come after the next.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        // All that write to the topic have to agree on the partition of a key. This is
        // what Java's producer does, and not the default of this client.
        .set(
            "partitioner",
            match order {
                Order::Kept => "murmur2_random",
                Order::Lost => "random", // and the key is ignored
            },
        )
        .create()?;
    Ok(producer)
}

/// Returns the partition and the offset when Kafka has stored the change. After an
/// error it may have it or not: publish it again, before the next.
async fn publish(producer: &FutureProducer, change: &Change) -> Result<(i32, i64)> {
    let payload = serde_json::to_vec(change)?;
    let record = FutureRecord::to(TOPIC).key(&change.order).payload(&payload);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery.map_err(|(error, _record)| {
        let Change { order, state, .. } = change;
        anyhow!("Kafka did not store {order} {state}: {error}")
    })?;
    Ok((delivery.partition, delivery.offset))
}
// ANCHOR_END: publish

// ---- Worker ----------------------------------------------------------------

// ANCHOR: work
async fn work(file: &str, worker: u32) -> Result<()> {
    let mut journal = open(file)?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = take_changes(&brokers, GROUP, worker)?;
    println!("ready:     worker {worker}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
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
        // To begin with the next one meanwhile would be quicker, and out of order.
        say(&handle(&mut journal, worker, &record).await?);
        done(&consumer, &record)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}

async fn handle(
    journal: &mut Journal,
    worker: u32,
    record: &BorrowedMessage<'_>,
) -> Result<Outcome> {
    let payload = record.payload().unwrap_or_default();
    if let Some(change) = Change::read(payload) {
        sleep(change.work()).await;
    }
    // A database blocks its thread.
    block_in_place(|| journal.write(worker, payload))
        .context("cannot write; what is not committed will come again")
}
// ANCHOR_END: work

/// Stores the offset, after the work. The client commits in the background what is
/// stored.
fn done(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<()> {
    match consumer.store_offset_from_message(record) {
        // The partition went to another worker meanwhile, which does it again and
        // finds it known.
        Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => Ok(()),
        stored => Ok(stored?),
    }
}

fn say(outcome: &Outcome) {
    match outcome {
        Outcome::Changed(Change { order, state, .. }) => {
            println!("changed:   {order} {state}");
        }
        Outcome::Known(Change { order, state, .. }) => {
            println!("known:     {order} {state}, written before");
        }
        Outcome::Late(Change { order, state, .. }) => {
            println!("late:      {order} {state}, after a later one");
        }
        Outcome::SetAside => eprintln!("not a change, set aside"),
    }
}

// ANCHOR: take
fn take_changes(brokers: &str, group: &str, worker: u32) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted worker takes its old partitions at once. If it does not come,
        // others take them when its session is over.
        .set("group.instance.id", format!("worker-{worker}"))
        .set("session.timeout.ms", SESSION)
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is done.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}
// ANCHOR_END: take

/// Commits what is stored, and stops. It blocks, hence a thread of its own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

fn open(file: &str) -> Result<Journal> {
    Journal::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

fn show(journal: &Journal) -> Result<()> {
    for line in journal.show()? {
        println!("{line}");
    }
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers, Order::Kept)?;
    // Where this run begins. What others have left is no part of the story.
    let mut begin = HashMap::new();
    for number in 1..=20 {
        let change = Change::numbered(number);
        let (partition, offset) = publish(&producer, &change).await?;
        begin.entry(partition).or_insert(offset);
    }
    println!("published: 5 changes of each of 4 orders");

    let mut journal = open(":memory:")?;
    let first = take_changes(&brokers, STORY_GROUP, 1)?;
    let record = loop {
        let record = next(&first).await?;
        if is_of_the_story(&record, &begin) {
            break record;
        }
    };
    handle(&mut journal, 1, &record).await?;
    // A record that is held would keep the consumer from ending.
    drop(record);
    close(first).await?;
    println!("died:      worker 1, with a change written and not committed");

    let first = take_changes(&brokers, STORY_GROUP, 1)?;
    let second = take_changes(&brokers, STORY_GROUP, 2)?;
    let (mut changed, mut known) = (1, 0);
    while changed < 20 {
        let (consumer, worker, record) = tokio::select! {
            record = next(&first) => (&first, 1, record?),
            record = next(&second) => (&second, 2, record?),
        };
        if is_of_the_story(&record, &begin) {
            match handle(&mut journal, worker, &record).await? {
                Outcome::Changed(_) => changed += 1,
                Outcome::Known(_) => known += 1,
                wrong => bail!("{wrong:?}"),
            }
        }
        done(consumer, &record)?;
    }
    println!("known:     {known} change came again");
    close(first).await?;
    close(second).await?;
    show(&journal)
}

async fn next(consumer: &StreamConsumer) -> Result<BorrowedMessage<'_>> {
    let record = timeout(FIRST, consumer.recv()).await;
    Ok(record.context("no change came within 30 s")??)
}

fn is_of_the_story(record: &BorrowedMessage<'_>, begin: &HashMap<i32, i64>) -> bool {
    let begin = begin.get(&record.partition());
    begin.is_some_and(|begin| record.offset() >= *begin)
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    let partitions = i32::try_from(PARTITIONS)?;
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
            .map(|name| NewTopic::new(name, partitions, TopicReplication::Fixed(1)));
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
