//! At least once: an offset is committed after the work, never before.
//!
//! Teaches: librdkafka stores the offset of a record for the next commit when it
//! hands the record out. A worker that dies over it has lost it: the group goes on
//! behind it. With `enable.auto.offset.store` off, the worker stores the offset when
//! it is done; the commits in the background then are right, and cost nothing.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_at_least_once              # the whole story
//! cargo run --bin kafka_at_least_once orders       # ten more orders
//! cargo run --bin kafka_at_least_once worker       # kill it in the middle of one
//! cargo run --bin kafka_at_least_once careless     # the same with the defaults
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed: 10 orders
//! done:   10 orders, none is missing
//! next:   the offset after the last is committed
//! ```
//!
//! Left out on purpose: to keep an effect from being done twice, as an order over
//! which a worker dies comes again.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "at-least-once.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
const GROUP: &str = "at-least-once-billing";
const ORDERS: usize = 10;
/// What an order takes.
const WORK: Duration = Duration::from_millis(500);

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first record may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["orders"] => place().await.map(drop),
        ["worker"] => worker(false).await,
        ["careless"] => worker(true).await,
        _ => {
            eprintln!("usage: kafka_at_least_once [orders | worker | careless]");
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

// ANCHOR: consumer
fn consumer(brokers: &str, careless: bool) -> Result<StreamConsumer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        // A restarted worker takes its old place at once, and does not wait for
        // the end of the dead one's session.
        .set("group.instance.id", "at-least-once-billing-1")
        .set("auto.offset.reset", "earliest")
        // In the background, every so many milliseconds.
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "50");
    if !careless {
        // The background commits what is stored. By default that is each record
        // that was handed out.
        config.set("enable.auto.offset.store", "false");
    }
    Ok(config.create()?)
}

/// Works on an order, then says that it may be committed.
async fn bill(
    consumer: &StreamConsumer,
    record: &BorrowedMessage<'_>,
    careless: bool,
) -> Result<()> {
    sleep(WORK).await;
    if !careless {
        // Only now. Whatever ends the program before this line leaves the order to
        // the next worker.
        consumer.store_offset_from_message(record)?;
    }
    Ok(())
}
// ANCHOR_END: consumer

// ANCHOR: worker
async fn worker(careless: bool) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = consumer(&brokers, careless)?;
    consumer.subscribe(&[TOPIC])?;
    println!("ready:  bills from {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        // `recv` can be given up without losing a record; the work is finished.
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would bill another order after it was asked to stop.
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
        let order = text(&record);
        println!("begun:  {order}");
        bill(&consumer, &record, careless).await?;
        println!("done:   {order}");
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its
/// own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: story
async fn story() -> Result<()> {
    let last = place().await?;
    println!("placed: {ORDERS} orders");
    let brokers = brokers()?;
    let consumer = consumer(&brokers, false)?;
    consumer.subscribe(&[TOPIC])?;
    let mut done = 0;
    loop {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no order came within 30 s")??;
        bill(&consumer, &record, false).await?;
        // What an earlier run has left is done as well.
        if record.offset() > last - ORDERS as i64 {
            done += 1;
        }
        if record.offset() == last {
            break;
        }
    }
    println!("done:   {done} orders, none is missing");
    close(consumer).await?;
    let committed = committed(&brokers).await?;
    ensure!(committed == Some(last + 1), "committed is {committed:?}");
    println!("next:   the offset after the last is committed");
    Ok(())
}
// ANCHOR_END: story

fn text(record: &BorrowedMessage<'_>) -> String {
    String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned()
}

/// Places ten orders, and returns the offset of the last.
async fn place() -> Result<i64> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut last = None;
    for number in 0..ORDERS {
        let order = format!("order-{number}");
        let record = FutureRecord::to(TOPIC).key(&order).payload(&order);
        let delivery = producer.send(record, PATIENCE).await;
        let delivery = delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        last = Some(delivery.offset);
    }
    last.context("no order to place")
}

/// Where the group would go on.
async fn committed(brokers: &str) -> Result<Option<i64>> {
    // Asks as the group, and does not join it.
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .create()?;
    let mut partition = TopicPartitionList::new();
    partition.add_partition(TOPIC, 0);
    let offsets =
        spawn_blocking(move || client.committed_offsets(partition, PATIENCE))
            .await??;
    let offset = offsets
        .find_partition(TOPIC, 0)
        .map(|element| element.offset());
    Ok(offset.and_then(|offset| offset.to_raw()))
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
