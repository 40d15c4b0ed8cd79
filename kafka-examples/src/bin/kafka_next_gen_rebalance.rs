//! Cooperative rebalance: the broker divides, with the protocol of KIP-848.
//!
//! Teaches: with `group.protocol=consumer` no member divides the partitions for the
//! others. The broker does it, tells each member what changes, and never stops all of
//! them at once. What the broker decides now, the client refuses to be told: the
//! time after which a member counts as dead, and the strategy.
//!
//! Run, after `cargo lab up kafka`; needs Kafka 4.0 or newer:
//!
//! ```text
//! cargo run --bin kafka_next_gen_rebalance             # the whole story
//! cargo run --bin kafka_next_gen_rebalance worker      # start several
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused: session.timeout.ms is the broker's business now
//! B joins, A gives up 2 of 4 partitions and gets 0
//! B leaves, A gives up 0 of 2 partitions and gets 2
//! ```
//!
//! Left out on purpose: the change of a group from the old protocol to the new one,
//! which Kafka can do while its members are replaced one by one.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{
        BaseConsumer, Consumer as _, ConsumerContext, Rebalance, StreamConsumer,
    },
    error::{KafkaError, RDKafkaErrorCode},
};
use tokio::{
    sync::Notify,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "next-gen.readings";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;

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
        _ => {
            eprintln!("usage: kafka_next_gen_rebalance [worker]");
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

// ANCHOR: member
fn config(brokers: &str, group: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("group.protocol", "consumer")
        // What the broker divides by; left out, it takes the first that it knows.
        .set("group.remote.assignor", "uniform")
        .set("auto.offset.reset", "earliest");
    config
}

fn join(brokers: &str, group: &str, diary: Diary) -> Result<StreamConsumer<Diary>> {
    let consumer: StreamConsumer<Diary> =
        config(brokers, group).create_with_context(diary)?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// What a member got and gave up since somebody last looked.
#[derive(Default)]
struct Diary {
    /// The story has its own words.
    talks: bool,
    changes: Mutex<Changes>,
}

#[derive(Default)]
struct Changes {
    given_up: usize,
    got: usize,
}

impl ClientContext for Diary {}

impl ConsumerContext for Diary {
    /// `partitions` is all that the member has, or what changes: that is the
    /// difference.
    fn pre_rebalance(
        &self,
        _consumer: &BaseConsumer<Self>,
        rebalance: &Rebalance<'_>,
    ) {
        match rebalance {
            Rebalance::Revoke(partitions) => {
                self.say("gives up:", partitions);
                self.changes().given_up += partitions.count();
            }
            Rebalance::Assign(partitions) => {
                self.say("gets:", partitions);
                self.changes().got += partitions.count();
            }
            // The client tries again.
            Rebalance::Error(_) => {}
        }
    }
}
// ANCHOR_END: member

impl Diary {
    /// What has changed since it was last asked.
    fn take(&self) -> Changes {
        std::mem::take(&mut *self.changes())
    }

    fn changes(&self) -> std::sync::MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, what: &str, partitions: &TopicPartitionList) {
        // A round in which nothing changes for this member is an empty list.
        if self.talks && partitions.count() > 0 {
            let elements = partitions.elements();
            let numbers = elements.iter().map(|it| it.partition().to_string());
            let numbers: Vec<_> = numbers.collect();
            println!("{what:<9} partitions {}", numbers.join(" "));
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    refused(&brokers)?;

    let first = Member::join(&brokers)?;
    divided(&[(&first, 4)]).await?;
    first.consumer.context().take();

    let second = Member::join(&brokers)?;
    divided(&[(&first, 2), (&second, 2)]).await?;
    let Changes { given_up, got } = first.consumer.context().take();
    println!("B joins, A gives up {given_up} of 4 partitions and gets {got}");

    second.leave().await?;
    divided(&[(&first, 4)]).await?;
    let Changes { given_up, got } = first.consumer.context().take();
    println!("B leaves, A gives up {given_up} of 2 partitions and gets {got}");
    first.leave().await
}

/// The group's settings on the broker say it: `consumer.session.timeout.ms`.
fn refused(brokers: &str) -> Result<()> {
    let mut config = config(brokers, "next-gen-story");
    config.set("session.timeout.ms", "6000");
    let consumer: Result<StreamConsumer, KafkaError> = config.create();
    match consumer {
        Err(KafkaError::ClientCreation(reason))
            if reason.contains("session.timeout.ms") =>
        {
            println!("refused: session.timeout.ms is the broker's business now");
            Ok(())
        }
        Err(error) => Err(error.into()),
        Ok(_) => bail!("session.timeout.ms is accepted"),
    }
}
// ANCHOR_END: story

/// A consumer, and the task that polls it: without that it takes part in nothing.
struct Member {
    consumer: Arc<StreamConsumer<Diary>>,
    polls: JoinHandle<()>,
}

impl Member {
    fn join(brokers: &str) -> Result<Self> {
        let diary = Diary::default();
        let consumer = Arc::new(join(brokers, "next-gen-story", diary)?);
        let polled = Arc::clone(&consumer);
        let polls = tokio::spawn(async move {
            // What comes is of no interest here.
            while polled.recv().await.is_ok() {}
        });
        Ok(Self { consumer, polls })
    }

    /// Leaves the group. It blocks, hence a thread of its own.
    async fn leave(self) -> Result<()> {
        self.polls.abort();
        // Ended by us.
        let _aborted = self.polls.await;
        let consumer = self.consumer;
        spawn_blocking(move || drop(consumer)).await?;
        Ok(())
    }
}

/// Waits until each member has so many partitions.
async fn divided(members: &[(&Member, usize)]) -> Result<()> {
    let start = Instant::now();
    loop {
        let mut done = true;
        for (member, wanted) in members {
            let has = member.consumer.assignment()?.count();
            done &= has == *wanted;
        }
        if done {
            return Ok(());
        }
        ensure!(
            start.elapsed() < REBALANCE,
            "the group does not divide; is another one running?"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

/// Reads, and says what it gets and gives up.
async fn worker() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let diary = Diary {
        talks: true,
        changes: Mutex::default(),
    };
    let consumer = join(&brokers, "next-gen-workers", diary)?;
    println!("ready:    readings from {TOPIC}, Ctrl-C to stop");
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
        let reading = String::from_utf8_lossy(record.payload().unwrap_or_default());
        println!("read:     {reading} of partition {}", record.partition());
    }
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
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
