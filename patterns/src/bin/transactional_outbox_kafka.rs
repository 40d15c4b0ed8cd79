//! Transactional outbox: an order and the event about it, both or none.
//!
//! Teaches: whoever writes to a database and then publishes loses the event when he
//! dies in between, and no order of the two is right. So the event is written into a
//! table of the same database, in the transaction of the order, and a relay
//! publishes from there. It crosses an event off when Kafka has stored it, so a
//! relay that dies publishes one again, with the same id. Kafka's own transactions
//! do not help: they span topics, and not your database.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin transactional_outbox_kafka                     # the whole story
//! cargo run --bin transactional_outbox_kafka relay shop.db       # terminal 1
//! cargo run --bin transactional_outbox_kafka place 1 100 shop.db # terminal 2
//! cargo run --bin transactional_outbox_kafka dual-write 1 100 shop.db
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:    order-10, order-20, order-30, each with its event
//! published: order-10.placed
//! published: order-20.placed, and the relay dies before it crosses it off
//! published: order-20.placed
//! published: order-30.placed
//! topic:     order-10.placed, order-20.placed, order-20.placed, order-30.placed
//! ```
//!
//! Left out on purpose: a second relay, for the case that the first machine fails.
//! Two at a time keep no order; let a lease decide, as in nats_kv_lease.

use std::{
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
use futures_lite::future::poll_once;
use patterns::transactional_outbox::{Event, Shop, order};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::RDKafkaErrorCode,
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "orders-placed";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
/// The header that holds the id of an event.
const ID: &str = "event-id";
/// How many events the relay takes from the database at a time.
const BATCH: usize = 100;
/// How often it looks when there was nothing to do: so late an event may be.
const POLL: Duration = Duration::from_millis(50);
const USAGE: &str = "usage: transactional_outbox_kafka [place FIRST LAST FILE | \
                     relay FILE | dual-write FIRST LAST FILE]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["relay", file] => relay(file).await,
        [way @ ("place" | "dual-write"), first, last, file] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if way == "place" => place(first, last, file),
                (Ok(first), Ok(last)) => dual_write(first, last, file).await,
                _ => return usage(),
            }
        }
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

// ---- The shop --------------------------------------------------------------

// ANCHOR: place
/// Places orders. No broker is needed for it, and none can be in the way.
fn place(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    for number in first..=last {
        let order = order(number);
        shop.place(&order)
            .with_context(|| format!("{} is not placed", order.order))?;
        println!("placed:    {}", order.order);
    }
    Ok(())
}
// ANCHOR_END: place

fn open(file: &str) -> Result<Shop> {
    Shop::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ANCHOR: dual_write
/// The mistake: two writes, and a program can die between them.
async fn dual_write(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        let order = order(number);
        block_in_place(|| shop.place_without_event(&order))?;
        // From here on the order is there. Who will publish its event?
        publish(&producer, &Event::about(&order)).await?;
        println!("placed:    {}", order.order);
    }
    Ok(())
}
// ANCHOR_END: dual_write

// ---- The relay -------------------------------------------------------------

// ANCHOR: relay
async fn relay(file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    println!("ready:     events from {file} to {TOPIC}, Ctrl-C to stop");
    'relay: loop {
        // A database blocks its thread.
        let events = block_in_place(|| shop.waiting(BATCH))?;
        if events.is_empty() {
            tokio::select! {
                () = &mut stop_signal => break,
                () = sleep(POLL) => continue,
            }
        }
        // One after the other: the order of the events is that of the transactions.
        for event in events {
            if poll_once(&mut stop_signal).await.is_some() {
                break 'relay;
            }
            publish(&producer, &event).await?;
            println!("published: {}", event.id);
            // If the program ends before this line, the event is published again.
            block_in_place(|| shop.cross_off(&event))?;
        }
    }
    println!("stopped");
    Ok(())
}
// ANCHOR_END: relay

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ANCHOR: publish
/// Returns when Kafka has stored the event, with where.
async fn publish(producer: &FutureProducer, event: &Event) -> Result<Delivery> {
    let headers = OwnedHeaders::new().insert(Header {
        key: ID,
        value: Some(&event.id),
    });
    let record = FutureRecord::to(TOPIC)
        // Events with one key stay in their order.
        .key(&event.key)
        .headers(headers)
        .payload(&event.payload);
    let delivery = producer.send(record, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("Kafka did not store {}: {error}", event.id)
    })
}
// ANCHOR_END: publish

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;

    let mut shop = open(":memory:")?;
    // Of one customer, so in one partition and in order.
    for number in [10, 20, 30] {
        shop.place(&order(number))?;
    }
    println!("placed:    order-10, order-20, order-30, each with its event");

    let mut begin = None;
    for event in shop.waiting(2)? {
        let delivery = publish(&producer, &event).await?;
        if event.position == 1 {
            begin = Some(delivery);
            shop.cross_off(&event)?;
            println!("published: {}", event.id);
        } else {
            let id = &event.id;
            println!("published: {id}, and the relay dies before it crosses it off");
        }
    }
    // The next relay knows no more than what stands in the database.
    for event in shop.waiting(BATCH)? {
        publish(&producer, &event).await?;
        println!("published: {}", event.id);
        shop.cross_off(&event)?;
    }

    let begin = begin.context("an empty outbox")?;
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // A consumer needs one; this one commits nothing.
        .set("group.id", "orders-placed-story")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut partition = TopicPartitionList::new();
    let offset = Offset::Offset(begin.offset);
    partition.add_partition_offset(TOPIC, begin.partition, offset)?;
    consumer.assign(&partition)?;
    let mut ids = Vec::new();
    for _event in 0..4 {
        let record = timeout(PATIENCE, consumer.recv()).await;
        let record = record.context("no event came within 5 s")??;
        ids.push(event_id(&record)?);
    }
    println!("topic:     {}", ids.join(", "));
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

fn event_id(record: &BorrowedMessage<'_>) -> Result<String> {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let id = headers.filter(|header| header.key == ID).last();
    let id = id.and_then(|header| header.value);
    let id = id.context("an event without an id")?;
    Ok(String::from_utf8_lossy(id).into_owned())
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

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
