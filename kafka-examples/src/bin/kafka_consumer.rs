//! Consumer: reads a topic as a member of a group and goes on where it stopped.
//!
//! Teaches: the offset is stored after the work, so a crash repeats a record
//! and loses none ("at least once"). And a group that is new to the topic
//! starts at its end, unless `auto.offset.reset` says otherwise.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_consumer
//! cargo run --bin kafka_producer     # in a second terminal, again and again
//! ```
//!
//! Expected output:
//!
//! ```text
//! waiting for records in my-topic, Ctrl-C to stop
//! received: key1 = Hello, Kafka! (partition 0, offset <offset>)
//! stopped
//! ```
//!
//! Left out on purpose: what to do when partitions move to another member in
//! the middle of the work.

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
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};
use tokio::{sync::Notify, task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "my-topic";
const GROUP: &str = "my-group";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match consume().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: consume
async fn consume() -> Result<()> {
    let brokers = brokers()?;
    ensure_topic(&brokers).await?;

    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // Where a group without a committed offset starts. The default, the
        // end, would skip all that was produced before its first run.
        .set("auto.offset.reset", "earliest")
        // How long a member may be silent before its partitions go to another,
        // in milliseconds. The default, 45 s, is a long wait after a `kill -9`.
        .set("session.timeout.ms", "6000")
        // Every 5 s librdkafka commits the offsets that were stored. By default
        // it stores an offset when it hands out the record, that is, before the
        // work; here `process` is followed by a store of our own.
        .set("enable.auto.commit", "true")
        .set("enable.auto.offset.store", "false")
        .create()?;
    consumer.subscribe(&[TOPIC])?;

    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for records in {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            record = consumer.recv() => record,
        };
        match record {
            Ok(record) => {
                process(&record);
                consumer.store_offset_from_message(&record)?;
                lost = false;
            }
            // The client reconnects by itself, so this is news and not the end.
            // It comes with every attempt; to hear it once is enough.
            Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            )) => {
                if !lost {
                    eprintln!("lost Kafka at {brokers}, still trying ({code})");
                }
                lost = true;
            }
            Err(error) => return Err(error).context("cannot read on"),
        }
    }
    leave(consumer).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: consume

// ANCHOR: process
fn process(record: &BorrowedMessage<'_>) {
    let text = |bytes: Option<&[u8]>| match bytes {
        Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        // A key may be missing; a missing payload is a deletion ("tombstone").
        None => "nothing".to_owned(),
    };
    println!(
        "received: {} = {} (partition {}, offset {})",
        text(record.key()),
        text(record.payload()),
        record.partition(),
        record.offset()
    );
}
// ANCHOR_END: process

// ANCHOR: leave
/// Commits what was processed and leaves the group, so that its partitions go
/// to another member at once instead of after the session timeout.
async fn leave(consumer: StreamConsumer) -> Result<()> {
    // Commit and drop both block, hence a thread of its own.
    spawn_blocking(move || {
        match consumer.commit_consumer_state(CommitMode::Sync) {
            // Nothing was processed since the last commit.
            Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {
                Ok(())
            }
            Err(error) => Err(error)
                .context("stopped without a last commit; some records come again"),
        }
    })
    .await?
}
// ANCHOR_END: leave

// ANCHOR: stop
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
// ANCHOR_END: stop

/// Creates the topic, unless it is there, and waits until it is known.
///
/// Looks first: where somebody else keeps the topics, this program needs no
/// right to create any.
async fn ensure_topic(brokers: &str) -> Result<()> {
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
        if metadata.topics().iter().any(|topic| topic.name() == TOPIC) {
            return Ok(());
        }
        let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics([&topic], &options).await? {
            match result {
                // Created by the other half of this lesson, a moment ago.
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
    bail!("created, and Kafka does not show it: {TOPIC}; ask who may describe it")
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
