//! Delayed message: a reminder that comes when it is due, unless it is cancelled.
//!
//! Teaches: Kafka hands out what it has, at once; it cannot wait. So a scheduler reads
//! the plans into a table by the time at which they are due, in one transaction with
//! how far it has read, and publishes what is due. The table is a file: a scheduler
//! that is killed goes on where it was. A plan is cancelled by a record without a
//! payload for the same key, and nothing is published before the scheduler has read
//! what was cancelled while it was down.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin delayed_message_kafka                        # the whole story
//! cargo run --bin delayed_message_kafka schedule reminders.db  # terminal 1
//! cargo run --bin delayed_message_kafka remind                 # terminal 2
//! cargo run --bin delayed_message_kafka plan 1 5 10            # 1 to 5, in 10 s
//! cargo run --bin delayed_message_kafka cancel 3
//! cargo run --bin delayed_message_kafka schedule --in-memory   # forgets when killed
//! ```
//!
//! Expected output:
//!
//! ```text
//! planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s
//! cancelled: invoice-3, which is paid
//! published: invoice-2
//! due:       invoice-2, not before its time
//! published: invoice-1
//! due:       invoice-1, not before its time
//! never:     invoice-3
//! ```
//!
//! Left out on purpose: a second scheduler, for the case that the first machine fails.
//! Two at a time publish everything twice; let a lease decide, as in nats_kv_lease.

use std::{
    collections::HashSet,
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
use patterns::delayed_message::{Entry, Reminder, Timetable, invoice, now};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
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
const SHOP: Place = Place {
    planned: "reminders-planned",
    due: "reminders-due",
};
/// The story has topics of its own: what it plans is no business of a scheduler that
/// runs beside it.
const STORY: Place = Place {
    planned: "reminders-story-planned",
    due: "reminders-story-due",
};
const TOPICS: [&str; 4] = [SHOP.planned, SHOP.due, STORY.planned, STORY.due];
const PARTITIONS: i32 = 4;
/// The group of those who send the mail.
const MAIL: &str = "reminder-mail";
const SCHEDULER: &str = "reminder-scheduler";
/// How many reminders the scheduler takes from its table at a time.
const BATCH: u32 = 100;
const USAGE: &str = "usage: delayed_message_kafka [plan FIRST LAST SECONDS | cancel \
                     NUMBER | schedule FILE | schedule --in-memory | remind]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a reminder may let wait for itself.
const LATEST: Duration = Duration::from_secs(30);

/// Where plans lie, and where they appear when they are due.
struct Place {
    planned: &'static str,
    due: &'static str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["plan", first, last, seconds] => {
            match (first.parse(), last.parse(), seconds.parse()) {
                (Ok(first), Ok(last), Ok(seconds)) if first <= last => {
                    plan_all(first, last, Duration::from_secs(seconds)).await
                }
                _ => return usage(),
            }
        }
        ["cancel", number] => match number.parse() {
            Ok(number) => cancel_one(number).await,
            Err(_no_number) => return usage(),
        },
        ["schedule", "--in-memory"] => schedule(":memory:", Table::Memory).await,
        ["schedule", file] => schedule(file, Table::File).await,
        ["remind"] => remind().await,
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

/// Where the scheduler keeps what it has read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    File,
    /// The mistake: Kafka remembers that the plans were read, and nobody the plans.
    Memory,
}

// ---- Plan and cancel -------------------------------------------------------

async fn plan_all(first: u64, last: u64, delay: Duration) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        let reminder = Reminder::after(number, now(), delay);
        publish(&producer, SHOP.planned, &reminder).await?;
        println!("planned:   {} in {} s", reminder.invoice, delay.as_secs());
    }
    Ok(())
}

async fn cancel_one(number: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let invoice = invoice(number);
    cancel(&producer, SHOP.planned, &invoice).await?;
    // Whether it was planned, or has been published by now, Kafka does not say.
    println!("cancelled: {invoice}");
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

// ANCHOR: plan
/// Returns when Kafka has stored the reminder: from now on it does not depend on this
/// program.
async fn publish(
    producer: &FutureProducer,
    topic: &str,
    reminder: &Reminder,
) -> Result<()> {
    let payload = serde_json::to_vec(reminder)?;
    let record = FutureRecord::to(topic)
        // What is said of one invoice stays in its order.
        .key(&reminder.invoice)
        .payload(&payload);
    let delivery = producer.send(record, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("Kafka did not store {}: {error}", reminder.invoice)
    })?;
    Ok(())
}

/// A record with the key of the plan and no payload at all, a tombstone. So it lies in
/// the same partition, after the plan.
async fn cancel(
    producer: &FutureProducer,
    topic: &str,
    invoice: &str,
) -> Result<()> {
    let tombstone = FutureRecord::<str, [u8]>::to(topic).key(invoice);
    let delivery = producer.send(tombstone, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("{invoice} is not cancelled, Kafka did not store it: {error}")
    })?;
    Ok(())
}
// ANCHOR_END: plan

// ---- Wait ------------------------------------------------------------------

// ANCHOR: schedule
async fn schedule(file: &str, table: Table) -> Result<()> {
    let mut timetable = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let (plans, mut unread) =
        take_plans(&brokers, SHOP.planned, &timetable, table).await?;
    let Place { planned, due } = SHOP;
    println!("ready:     from {planned} to {due}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        // A database blocks its thread.
        let first = block_in_place(|| timetable.first())?;
        // What was cancelled while this program was down stands behind the plans that
        // it knows. Until it has read all that, nothing is published.
        let first = first.filter(|_first| unread.is_empty());
        let wait = first.map_or(Duration::MAX, |first| first.wait(now()));
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would publish what the next record cancels.
            biased;
            () = &mut stop_signal => break,
            record = plans.recv() => Some(record),
            () = sleep(wait) => None,
        };
        match record {
            None => {}
            Some(Ok(record)) => {
                lost = false;
                let invoice = key(&record);
                match enter(&mut timetable, &record)? {
                    Entry::Planned => println!("planned:   {invoice}"),
                    Entry::Cancelled => println!("cancelled: {invoice}"),
                    Entry::SetAside => {
                        eprintln!("not a reminder, set aside: {invoice:?}");
                    }
                }
                if table == Table::Memory {
                    let commit = || plans.commit_message(&record, CommitMode::Sync);
                    block_in_place(commit)?;
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unread.remove(&partition);
            }
            // The client connects again by itself; it says so with each attempt, and
            // to hear it once is enough.
            Some(Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            ))) => {
                if !lost {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                lost = true;
            }
            Some(Err(error)) => return Err(error).context("cannot read on"),
        }
        if unread.is_empty() {
            publish_due(&producer, SHOP.due, &mut timetable).await?;
        }
    }
    spawn_blocking(move || drop(plans)).await?;
    println!("stopped");
    Ok(())
}

async fn publish_due(
    producer: &FutureProducer,
    topic: &str,
    timetable: &mut Timetable,
) -> Result<()> {
    for reminder in block_in_place(|| timetable.due(now(), BATCH))? {
        publish(producer, topic, &reminder).await?;
        println!("published: {}", reminder.invoice);
        // If the program ends before this line, the reminder is published again.
        block_in_place(|| timetable.cross_off(&reminder))?;
    }
    Ok(())
}
// ANCHOR_END: schedule

fn enter(timetable: &mut Timetable, record: &BorrowedMessage<'_>) -> Result<Entry> {
    let place = (record.partition(), record.offset());
    let invoice = key(record);
    // A database blocks its thread.
    let entry = block_in_place(|| timetable.enter(place, invoice, record.payload()));
    entry.with_context(|| format!("cannot enter {invoice}, which is read again"))
}

fn key<'a>(record: &'a BorrowedMessage<'_>) -> &'a str {
    str::from_utf8(record.key().unwrap_or_default()).unwrap_or_default()
}

// ANCHOR: take_plans
/// A consumer that goes on where the table is, and the partitions whose ends it has not
/// seen yet. It is a member of no group: to share the partitions out, the table would
/// have to be shared as well.
async fn take_plans(
    brokers: &str,
    topic: &'static str,
    timetable: &Timetable,
    table: Table,
) -> Result<(StreamConsumer, HashSet<i32>)> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", SCHEDULER)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .create()?;
    let (consumer, metadata) = spawn_blocking(move || {
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE);
        (consumer, metadata)
    })
    .await?;
    // All that there are: a plan in one that nobody reads would never be due.
    let partitions: HashSet<i32> = metadata?
        .topics()
        .iter()
        .flat_map(|topic| topic.partitions())
        .map(|partition| partition.id())
        .collect();
    let mut positions = TopicPartitionList::new();
    for partition in &partitions {
        let next = match (table, timetable.position(*partition)?) {
            (Table::File, Some(next)) => Offset::Offset(next),
            (Table::File, None) => Offset::Beginning,
            (Table::Memory, _) => Offset::Stored,
        };
        positions.add_partition_offset(topic, *partition, next)?;
    }
    consumer.assign(&positions)?;
    Ok((consumer, partitions))
}
// ANCHOR_END: take_plans

fn open(file: &str) -> Result<Timetable> {
    Timetable::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ---- Remind ----------------------------------------------------------------

// ANCHOR: remind
async fn remind() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let reminders = take_due(&brokers, SHOP.due, MAIL)?;
    println!("ready:     reminders from {}, Ctrl-C to stop", SHOP.due);
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            record = reminders.recv() => record,
        };
        let record = match record {
            Ok(record) => record,
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
        match Reminder::read(record.payload().unwrap_or_default()) {
            Some(reminder) => {
                // The clocks of two machines differ: who is early, waits.
                sleep(reminder.wait(now())).await;
                println!("due:       {}", reminder.invoice);
            }
            // It stays in the topic, for a person to look at.
            None => eprintln!(
                "not a reminder: partition {}, offset {}",
                record.partition(),
                record.offset()
            ),
        }
        // If the program ends before this line, the customer is reminded twice.
        reminders.store_offset_from_message(&record)?;
    }
    // Commits what is stored, and leaves the group.
    spawn_blocking(move || drop(reminders)).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: remind

fn take_due(brokers: &str, topic: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted consumer takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", "reminder-mail-1")
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is done.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[topic])?;
    Ok(consumer)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    // What an earlier run has left is no part of the story.
    let mut timetable = open(":memory:")?;
    let plans = at_the_end(&brokers, STORY.planned).await?;
    let reminders = at_the_end(&brokers, STORY.due).await?;

    for (number, seconds) in [(1, 4), (2, 1), (3, 2)] {
        let delay = Duration::from_secs(seconds);
        let reminder = Reminder::after(number, now(), delay);
        publish(&producer, STORY.planned, &reminder).await?;
    }
    println!("planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s");
    cancel(&producer, STORY.planned, "invoice-3").await?;
    println!("cancelled: invoice-3, which is paid");

    for _record in 0..4 {
        let record = timeout(PATIENCE, plans.recv()).await;
        enter(&mut timetable, &record.context("no plan came within 5 s")??)?;
    }
    while let Some(first) = timetable.first()? {
        sleep(first.wait(now())).await;
        publish_due(&producer, STORY.due, &mut timetable).await?;
        let record = timeout(LATEST, reminders.recv()).await;
        let record = record.context("no reminder came within 30 s")??;
        let reminder = Reminder::read(record.payload().unwrap_or_default());
        let reminder = reminder.context("not a reminder")?;
        let (invoice, early) = (&reminder.invoice, reminder.wait(now()));
        ensure!(early.is_zero(), "{invoice} came {early:?} before its time");
        println!("due:       {invoice}, not before its time");
    }
    // It was due before the last one that came.
    println!("never:     invoice-3");
    spawn_blocking(move || drop((plans, reminders))).await?;
    Ok(())
}
// ANCHOR_END: story

/// A consumer of what is written from this moment on. Fixed here and not by
/// `Offset::End`, which the client would look up later.
async fn at_the_end(
    brokers: &str,
    topic: &'static str,
) -> Result<Arc<StreamConsumer>> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // A consumer needs one; this one commits nothing.
        .set("group.id", "reminders-story")
        .set("enable.auto.commit", "false")
        .create()?;
    let consumer = Arc::new(consumer);
    let mut ends = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        // Not for ever. A broker that has just got a partition does not answer for it
        // at once.
        let mut looks = 0..100;
        let end = loop {
            let asking = Arc::clone(&consumer);
            let ask = move || asking.fetch_watermarks(topic, partition, PATIENCE);
            match spawn_blocking(ask).await? {
                Ok((_first, end)) => break end,
                Err(error) if looks.next().is_none() => return Err(error.into()),
                Err(_not_yet) => sleep(Duration::from_millis(50)).await,
            }
        };
        ends.add_partition_offset(topic, partition, Offset::Offset(end))?;
    }
    consumer.assign(&ends)?;
    Ok(consumer)
}

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
