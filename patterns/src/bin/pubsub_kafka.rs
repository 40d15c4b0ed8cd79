//! Publish and subscribe: each service hears of each order, also after it was down.
//!
//! Teaches: a topic keeps what is written, whether somebody reads or not. Each
//! service is a group, and a group is a place in the topic that is committed: it
//! goes on there when it was down, for as long as the topic keeps its records. One
//! that comes for the first time begins where `auto.offset.reset` says, at the end
//! by default.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin pubsub_kafka                      # the whole story
//! cargo run --bin pubsub_kafka subscribe billing    # terminal 1
//! cargo run --bin pubsub_kafka subscribe stock      # terminal 2, mail is the third
//! cargo run --bin pubsub_kafka publish 1 9          # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! billing:   order-1, order-2, order-3
//! stock:     order-1, order-2, order-3
//! mail:      order-1, order-2, order-3, which came while it was down
//! analytics: order-1, order-2, order-3, older than its group
//! ```
//!
//! Left out on purpose: several instances of one service, which share its
//! partitions, see kafka_consumer_groups; and how long a topic keeps,
//! `retention.ms`.

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
use patterns::pubsub::{Heard, SERVICES, event, heard};
use rdkafka::{
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "orders-events";
const TOPICS: [&str; 1] = [TOPIC];
/// One, so that each service hears of the orders in their order.
const PARTITIONS: i32 = 1;
const USAGE: &str = "usage: pubsub_kafka [publish FIRST LAST | subscribe billing | \
                     subscribe stock | subscribe mail]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first event may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => publish_all(first, last).await,
            _ => return usage(),
        },
        ["subscribe", service] if SERVICES.contains(&service) => {
            subscribe(service).await
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

/// The group of a service.
fn group(service: &str) -> String {
    format!("{TOPIC}-{service}")
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        publish(&producer, number).await?;
        println!("published: order-{number}");
    }
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ANCHOR: publish
/// Returns when Kafka has stored the event, with its offset.
async fn publish(producer: &FutureProducer, number: u64) -> Result<i64> {
    let event = event(number);
    let payload = serde_json::to_vec(&event)?;
    let record = FutureRecord::to(TOPIC).key(&event.order).payload(&payload);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery.map_err(|(error, _record)| {
        anyhow!("Kafka did not store order-{number}: {error}")
    })?;
    Ok(delivery.offset)
}
// ANCHOR_END: publish

// ---- Subscriber ------------------------------------------------------------

// ANCHOR: subscribe
async fn subscribe(service: &str) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = take_events(&brokers, service)?;
    println!("ready:     {service} listens to {TOPIC}, Ctrl-C to stop");
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
        show(record.payload().unwrap_or_default());
        consumer.store_offset_from_message(&record)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}

/// The service's own place in the topic, which stays when the service goes.
fn take_events(brokers: &str, service: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group(service))
        // A restarted service takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", format!("{service}-1"))
        // Where a group begins that has committed nothing; by default at the end.
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is done.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}
// ANCHOR_END: subscribe

/// What a service does with an event: here, to say that it has heard it.
fn show(payload: &[u8]) {
    match heard(payload) {
        Heard::Order(order) => println!("heard:     {order}"),
        Heard::Noise => eprintln!("not an event: {} bytes", payload.len()),
    }
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its
/// own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let begin = publish(&producer, 1).await?;
    publish(&producer, 2).await?;
    publish(&producer, 3).await?;
    for service in ["billing", "stock", "mail", "analytics"] {
        let note = match service {
            "mail" => ", which came while it was down",
            "analytics" => ", older than its group",
            _ => "",
        };
        let consumer = take_events(&brokers, service)?;
        let mut orders = Vec::new();
        while orders.len() < 3 {
            let record = timeout(FIRST, consumer.recv()).await;
            let record = record.context("no event came within 30 s")??;
            // What an earlier run has left is no part of the story.
            if record.offset() >= begin {
                orders.push(order(record.payload().unwrap_or_default())?);
            }
            // One that commits nothing comes for the first time, each time.
            if service != "analytics" {
                consumer.store_offset_from_message(&record)?;
            }
        }
        close(consumer).await?;
        println!("{:10} {}{note}", format!("{service}:"), orders.join(", "));
    }
    Ok(())
}

fn order(payload: &[u8]) -> Result<String> {
    match heard(payload) {
        Heard::Order(order) => Ok(order),
        Heard::Noise => bail!("not an event"),
    }
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
