//! Rebalance: what is done is committed before a partition goes to another member.
//!
//! Teaches: when a member joins, partitions move, and their new owner begins at the
//! last commit. What the old one has done since then is done again, unless it commits
//! in `pre_rebalance`, the last moment in which the partition is still its own. If it
//! was taken for dead, the partitions are lost already: then there is nothing to
//! commit, and somebody else is at it.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_rebalance_commit             # the whole story
//! cargo run --bin kafka_rebalance_commit worker      # pause it: kill -STOP, -CONT
//! cargo run --bin kafka_rebalance_commit payments
//! ```
//!
//! Expected output:
//!
//! ```text
//! with the commit:    40 captured, another joins, 0 of them again
//! without the commit: 40 captured, another joins, 40 of them again
//! ```
//!
//! Left out on purpose: cooperative rebalancing, which takes only what moves; and
//! what to do with a payment that is half captured when its partition goes.

use std::{
    collections::BTreeMap,
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
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{
        BaseConsumer, CommitMode, Consumer as _, ConsumerContext, Rebalance,
        StreamConsumer,
    },
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "rebalance.payments";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
const PAYMENTS: usize = 40;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a group may take to divide anew.
const REBALANCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["worker"] => worker().await,
        ["payments"] => payments().await,
        _ => {
            eprintln!("usage: kafka_rebalance_commit [worker | payments]");
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

// ANCHOR: hook
/// What a member does when partitions come and go.
struct Handover {
    commits: bool,
    /// The story has its own words.
    talks: bool,
}

impl ClientContext for Handover {}

impl ConsumerContext for Handover {
    /// In the thread that polls, while the whole group waits: no long work here.
    fn pre_rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        rebalance: &Rebalance<'_>,
    ) {
        let Rebalance::Revoke(partitions) = rebalance else {
            return;
        };
        let count = partitions.count();
        if consumer.assignment_lost() {
            // Too late: a commit would be refused, and somebody else works on it.
            self.say(&format!("lost:     {count} partitions, nothing to commit"));
            return;
        }
        if !self.commits {
            return;
        }
        match consumer.commit_consumer_state(CommitMode::Sync) {
            Ok(()) => self.say(&format!("handed:   {count} partitions, committed")),
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {
                self.say(&format!("handed:   {count} partitions, nothing new"));
            }
            // Nobody to return it to. The new owner does some work again.
            Err(error) => self.say(&format!("handed:   no commit ({error})")),
        }
    }
}
// ANCHOR_END: hook

impl Handover {
    fn say(&self, text: &str) {
        if self.talks {
            println!("{text}");
        }
    }
}

fn member(
    brokers: &str,
    group: &str,
    handover: Handover,
) -> Result<StreamConsumer<Handover>> {
    let consumer: StreamConsumer<Handover> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        // No commits but those in the hook, and those of the worker.
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // After this time without a sign of life a member counts as dead.
        .set("session.timeout.ms", "6000")
        .set("heartbeat.interval.ms", "500")
        .create_with_context(handover)?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

// ANCHOR: worker
/// Captures payments, and commits when a partition goes or it is stopped.
async fn worker() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let handover = Handover {
        commits: true,
        talks: true,
    };
    let consumer = member(&brokers, "rebalance-workers", handover)?;
    println!("ready:    payments from {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
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
        let payment = record.payload().unwrap_or_default();
        println!("captured: {}", String::from_utf8_lossy(payment));
        match consumer.store_offset_from_message(&record) {
            // The partition has gone meanwhile.
            Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {}
            stored => stored?,
        }
    }
    // To leave is a rebalance too: the hook commits.
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

async fn payments() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    pay(&brokers).await?;
    println!("paid:     {PAYMENTS} payments");
    Ok(())
}

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    for commits in [true, false] {
        let label = if commits { "with" } else { "without" };
        let group = format!("rebalance-{label}");
        begin_here(&brokers, &group).await?;
        pay(&brokers).await?;
        let again = captured_again(&brokers, &group, commits).await?;
        let label = format!("{label} the commit:");
        println!(
            "{label:<19} {PAYMENTS} captured, another joins, {again} of them again"
        );
    }
    Ok(())
}

/// Captures all payments with one member, then lets another join, and counts what
/// the two of them capture once more.
async fn captured_again(brokers: &str, group: &str, commits: bool) -> Result<usize> {
    let handover = || Handover {
        commits,
        talks: false,
    };
    let first = member(brokers, group, handover())?;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    while seen.len() < PAYMENTS {
        let record = timeout(REBALANCE, first.recv()).await;
        let record = record.context("no payment came within 30 s")??;
        *seen.entry(text(&record)).or_default() += 1;
        first.store_offset_from_message(&record)?;
    }

    let second = member(brokers, group, handover())?;
    // Both have to poll for the group to divide. Then they wait for what may come,
    // until each has its half and nothing came for three seconds.
    let mut again = 0;
    let (mut quiet, start) = (Instant::now(), Instant::now());
    loop {
        let record = tokio::select! {
            record = first.recv() => Some(record?),
            record = second.recv() => Some(record?),
            () = sleep(Duration::from_millis(100)) => None,
        };
        if record.is_some() {
            again += 1;
            quiet = Instant::now();
        }
        let shares = [first.assignment()?.count(), second.assignment()?.count()];
        if shares != [2, 2] {
            quiet = Instant::now();
        }
        if quiet.elapsed() > Duration::from_secs(3) {
            break;
        }
        ensure!(start.elapsed() < REBALANCE, "the group does not divide");
    }
    spawn_blocking(move || drop((first, second))).await?;
    Ok(again)
}
// ANCHOR_END: story

/// Lets a group without members go on at the end: payments of earlier runs are not
/// captured.
async fn begin_here(brokers: &str, group: &str) -> Result<()> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .create()?;
    let begin = move || {
        let mut ends = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            let (_first, end) =
                client.fetch_watermarks(TOPIC, partition, PATIENCE)?;
            ends.add_partition_offset(TOPIC, partition, Offset::Offset(end))?;
        }
        client.commit(&ends, CommitMode::Sync)
    };
    let begin = Arc::new(begin);
    let start = Instant::now();
    loop {
        let begin = Arc::clone(&begin);
        match spawn_blocking(move || begin()).await? {
            Ok(()) => return Ok(()),
            // Members of a run that was killed are there for six seconds more.
            Err(_not_yet) if start.elapsed() < Duration::from_secs(8) => {
                sleep(Duration::from_millis(500)).await;
            }
            Err(error) => {
                bail!("{group} cannot begin anew ({error}); is another one running?")
            }
        }
    }
}

fn text(record: &rdkafka::message::BorrowedMessage<'_>) -> String {
    String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned()
}

/// Ten payments into each partition.
async fn pay(brokers: &str) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for (number, partition) in (0..PAYMENTS).zip((0..PARTITIONS).cycle()) {
        let payment = format!("payment-{number}");
        let record = FutureRecord::<(), _>::to(TOPIC)
            .partition(partition)
            .payload(&payment);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
    }
    Ok(())
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
