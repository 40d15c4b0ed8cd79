//! Idempotent consumer: delivered more than once, charged once.
//!
//! Teaches: with at-least-once reading, what was charged after the last commit comes
//! again when the consumer is killed; and a producer without an answer sends again.
//! `enable.idempotence` covers the repeats within the client, not those of a program
//! that was started again. So the payment's id, in a header, and the charge are
//! written in one transaction, and the offset is stored after it.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin idempotent_consumer_kafka                    # the whole story
//! cargo run --bin idempotent_consumer_kafka publish 1 1000     # and once more
//! cargo run --bin idempotent_consumer_kafka consume ledger.db  # kill -9 it
//! cargo run --bin idempotent_consumer_kafka consume ledger.db --no-inbox
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: payment-10, payment-20, payment-20 once more, payment-30
//! charged:   payment-10, and the consumer dies before it commits
//! known:     payment-10, not charged again
//! charged:   payment-20
//! known:     payment-20, not charged again
//! charged:   payment-30
//! total:     60 cents, as 10 + 20 + 30
//! ```
//!
//! Left out on purpose: the other way, the offset in the database, in the same
//! transaction. It needs no inbox, and leaves what is sent twice charged twice; see
//! kafka_batch_consumer.

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
use patterns::idempotent_consumer::{Ledger, Outcome, id, payment};
use rdkafka::{
    ClientConfig, Message,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "payments-due";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
const GROUP: &str = "ledger";
const STORY_GROUP: &str = "ledger-story";
/// The header that holds the id of a payment.
const ID: &str = "payment-id";
const USAGE: &str = "usage: idempotent_consumer_kafka [publish FIRST LAST | consume \
                     FILE [--no-inbox]]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first payment may take: a new group has to find its members.
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
        ["consume", file] => consume(file, Inbox::Used).await,
        ["consume", file, "--no-inbox"] => consume(file, Inbox::Missing).await,
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
enum Inbox {
    Used,
    /// The mistake, to see what it costs.
    Missing,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        publish(&producer, number).await?;
        println!("published: {}", id(number));
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
/// Returns the offset when Kafka has stored the payment. After an error it may have it
/// or not: publish it again, with the same id.
async fn publish(producer: &FutureProducer, number: u64) -> Result<i64> {
    let payment = payment(number);
    let payload = serde_json::to_vec(&payment)?;
    let id = id(number);
    let headers = OwnedHeaders::new().insert(Header {
        key: ID,
        value: Some(&id),
    });
    let record = FutureRecord::to(TOPIC)
        // Payments of an account stay in their order.
        .key(&payment.account)
        .headers(headers)
        .payload(&payload);
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("Kafka did not store {id}: {error}"))?;
    Ok(delivery.offset)
}
// ANCHOR_END: publish

// ---- Consumer --------------------------------------------------------------

// ANCHOR: consume
async fn consume(file: &str, inbox: Inbox) -> Result<()> {
    let mut ledger = open(file)?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = take_payments(&brokers, GROUP)?;
    println!("ready:     payments from {TOPIC}, Ctrl-C to stop");
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
        let id = payment_id(&record);
        match charge(&mut ledger, inbox, &record)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => eprintln!("not a payment, set aside: {id:?}"),
        }
        // After the transaction. If the program ends before this offset is committed,
        // the payment comes again, and is known.
        consumer.store_offset_from_message(&record)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}

fn charge(
    ledger: &mut Ledger,
    inbox: Inbox,
    record: &BorrowedMessage<'_>,
) -> Result<Outcome> {
    let id = payment_id(record);
    let payload = record.payload().unwrap_or_default();
    // A database blocks its thread.
    let outcome = block_in_place(|| match inbox {
        Inbox::Used => ledger.charge(id, payload),
        Inbox::Missing => ledger.charge_each_time(id, payload),
    });
    outcome.with_context(|| format!("cannot charge {id}, which will come again"))
}

fn payment_id<'a>(record: &'a BorrowedMessage<'_>) -> &'a str {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let id = headers.filter(|header| header.key == ID).last();
    let id = id.and_then(|header| header.value).unwrap_or_default();
    str::from_utf8(id).unwrap_or_default()
}
// ANCHOR_END: consume

fn take_payments(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted consumer takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", "ledger-1")
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is charged.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its
/// own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

fn open(file: &str) -> Result<Ledger> {
    Ledger::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    // Of one account, so in one partition and in order. The second as one sends it
    // again that has heard no answer.
    let begin = publish(&producer, 10).await?;
    for number in [20, 20, 30] {
        publish(&producer, number).await?;
    }
    println!("published: payment-10, payment-20, payment-20 once more, payment-30");

    let mut ledger = open(":memory:")?;
    let first = take_payments(&brokers, STORY_GROUP)?;
    let record = next(&first, begin).await?;
    charge(&mut ledger, Inbox::Used, &record)?;
    let id = payment_id(&record);
    println!("charged:   {id}, and the consumer dies before it commits");
    // A record that is held would keep the consumer from ending.
    drop(record);
    close(first).await?;

    let second = take_payments(&brokers, STORY_GROUP)?;
    for _record in 0..4 {
        let record = next(&second, begin).await?;
        let id = payment_id(&record);
        match charge(&mut ledger, Inbox::Used, &record)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => bail!("cannot read {id:?}"),
        }
        second.store_offset_from_message(&record)?;
    }
    close(second).await?;
    println!("total:     {} cents, as 10 + 20 + 30", ledger.total()?);
    Ok(())
}

/// The next payment of this run. What others have left is no part of the story.
async fn next(consumer: &StreamConsumer, begin: i64) -> Result<BorrowedMessage<'_>> {
    loop {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no payment came within 30 s")??;
        let of_the_story = payment(10).account;
        if record.offset() >= begin && record.key() == Some(of_the_story.as_bytes())
        {
            return Ok(record);
        }
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
