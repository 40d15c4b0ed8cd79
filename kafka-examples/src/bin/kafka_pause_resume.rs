//! Slow work: paused partitions, and what happens without.
//!
//! Teaches: a member that does not poll for `max.poll.interval.ms` is taken out of its
//! group, however alive it is: the next poll says `PollExceeded`, and its work comes
//! again. So the work is done beside the loop that polls. And for the work not to pile
//! up in memory, the partitions are paused: the member stays, and nothing comes.
//!
//! Run, after `cargo lab up kafka`; takes about half a minute:
//!
//! ```text
//! cargo run --bin kafka_pause_resume
//! ```
//!
//! Expected output:
//!
//! ```text
//! inline:   8 s of work between two polls, no commit: UnknownMemberId
//! inline:   then PollExceeded, and the picking came again
//! beside:   40 picked, 0 of them again, at most 10 in memory
//! unpaused: 40 picked, 0 of them again, at most 40 in memory
//! ```
//!
//! Left out on purpose: several pickings at a time, see kafka_parallel_partitions.

use std::{
    collections::{BTreeSet, VecDeque},
    env,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "pause.pickings";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 2;
const PICKINGS: usize = 40;
/// So many may wait in memory; then the partitions are paused.
const FULL: usize = 10;
/// So few, and they are resumed.
const LOW: usize = 5;
/// How long one picking takes.
const WORK: Duration = Duration::from_millis(20);
/// How long the warehouse is closed: longer than a member may go without a poll.
const CLOSED: Duration = Duration::from_secs(8);

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a group may take to hand out its partitions.
const REBALANCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let first = request(&brokers).await?;
    begin(&brokers, "pause-inline", first).await?;
    inline(&brokers, "pause-inline").await?;
    for (way, pauses) in [("beside", true), ("unpaused", false)] {
        let group = format!("pause-{way}");
        begin(&brokers, &group, first).await?;
        beside(&brokers, &group, &format!("{way}:"), pauses).await?;
    }
    Ok(())
}

fn member(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("enable.auto.offset.store", "false")
        // How long a member may go without a poll; the default is five minutes.
        .set("max.poll.interval.ms", "6000")
        .set("session.timeout.ms", "6000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

// ANCHOR: inline
/// Does the work between two polls.
async fn inline(brokers: &str, group: &str) -> Result<()> {
    let consumer = Arc::new(member(brokers, group)?);
    let picking = next(&consumer).await??;
    sleep(CLOSED).await;
    let position = after(&picking)?;
    let committing = Arc::clone(&consumer);
    let commit = move || committing.commit(&position, CommitMode::Sync);
    match spawn_blocking(commit).await? {
        Err(KafkaError::ConsumerCommit(code)) => {
            println!("inline:   8 s of work between two polls, no commit: {code:?}");
        }
        other => bail!("it was not too late: {other:?}"),
    }
    match next(&consumer).await? {
        Err(KafkaError::MessageConsumption(RDKafkaErrorCode::PollExceeded)) => {}
        other => bail!("it is still a member: {:?}", other.map(|it| it.offset())),
    }
    // It has joined again by itself.
    let again = loop {
        let again = next(&consumer).await??;
        if again.partition() == picking.partition() {
            break again;
        }
    };
    ensure!(again.offset() == picking.offset(), "another one came");
    println!("inline:   then PollExceeded, and the picking came again");
    leave(consumer).await
}
// ANCHOR_END: inline

// ANCHOR: beside
/// Polls all the time, and does the work beside that.
async fn beside(
    brokers: &str,
    group: &str,
    label: &str,
    pauses: bool,
) -> Result<()> {
    let consumer = Arc::new(member(brokers, group)?);
    let mut waiting: VecDeque<OwnedMessage> = VecDeque::new();
    let mut picked = Vec::new();
    let (mut most, mut paused) = (0, false);
    // The warehouse opens then, and is free for the next picking.
    let mut free = Instant::now() + CLOSED;
    while picked.len() < PICKINGS {
        tokio::select! {
            // Also while paused, and then nothing comes: to poll is to be a member.
            record = consumer.recv() => {
                waiting.push_back(record?.detach());
                most = most.max(waiting.len());
                // Each time, because a rebalance ends every pause.
                if pauses && waiting.len() >= FULL {
                    consumer.pause(&consumer.assignment()?)?;
                    paused = true;
                }
            }
            () = sleep_until(free), if !waiting.is_empty() => {
                let picking = waiting.pop_front().context("nothing waits")?;
                consumer.store_offsets(&after(&picking)?)?;
                picked.push(text(&picking));
                free = Instant::now() + WORK;
                if paused && waiting.len() <= LOW {
                    consumer.resume(&consumer.assignment()?)?;
                    paused = false;
                }
            }
        }
    }
    let different = picked.iter().collect::<BTreeSet<_>>().len();
    let again = PICKINGS - different;
    println!(
        "{label:<9} {PICKINGS} picked, {again} of them again, at most {most} in memory"
    );
    leave(consumer).await
}
// ANCHOR_END: beside

/// What comes next, which may take as long as the group needs.
async fn next(
    consumer: &StreamConsumer,
) -> Result<Result<OwnedMessage, KafkaError>> {
    let record = timeout(REBALANCE, consumer.recv()).await;
    let record = record.context("no picking came within 30 s")?;
    Ok(record.map(|record| record.detach()))
}

/// The position after a record, as a commit wants it.
fn after(record: &OwnedMessage) -> Result<TopicPartitionList> {
    let mut position = TopicPartitionList::new();
    let offset = Offset::Offset(record.offset() + 1);
    position.add_partition_offset(record.topic(), record.partition(), offset)?;
    Ok(position)
}

fn text(record: &OwnedMessage) -> String {
    String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned()
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its own.
async fn leave(consumer: Arc<StreamConsumer>) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// Lets a group without members begin at these offsets.
async fn begin(brokers: &str, group: &str, first: [i64; 2]) -> Result<()> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .create()?;
    let client = Arc::new(client);
    let start = Instant::now();
    loop {
        let mut position = TopicPartitionList::new();
        for (partition, offset) in (0..PARTITIONS).zip(first) {
            position.add_partition_offset(
                TOPIC,
                partition,
                Offset::Offset(offset),
            )?;
        }
        let client = Arc::clone(&client);
        let commit = move || client.commit(&position, CommitMode::Sync);
        match spawn_blocking(commit).await? {
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

/// Requests the pickings, and returns the offset of the first in each partition.
async fn request(brokers: &str) -> Result<[i64; 2]> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut first = [i64::MAX; 2];
    for (number, partition) in (0..PICKINGS).zip((0..PARTITIONS).cycle()) {
        let picking = format!("picking-{number}");
        let record = FutureRecord::<(), _>::to(TOPIC)
            .partition(partition)
            .payload(&picking);
        let delivery = producer.send(record, PATIENCE).await;
        let delivery = delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        let first = &mut first[partition as usize];
        *first = delivery.offset.min(*first);
    }
    Ok(first)
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
