//! Static membership: who comes back in time gets its partitions back, unnoticed.
//!
//! Teaches: a member without a name of its own is a new one after each restart, and the
//! group divides twice. With a `group.instance.id` it leaves no word when it stops, and
//! is expected back: within `session.timeout.ms` nothing moves, and a crash counts as a
//! restart. The price: nobody reads its partitions meanwhile. Two with one name cannot
//! be; the second ends the first.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_static_membership                   # the whole story
//! cargo run --bin kafka_static_membership worker cache-1    # kill it, start it again
//! ```
//!
//! Expected output:
//!
//! ```text
//! dynamic: B restarts, A gives up 6 partitions
//! static:  B restarts, A gives up 0 partitions, and B has its 2 back
//! twice:   a second cache-2 ends the first: FencedInstanceId
//! ```
//!
//! Left out on purpose: what a member keeps on disk for its partitions, which is the
//! reason to want the same ones.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
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
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "static.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
/// The names of the members: those of the processes, as a host or a pod has one.
const NAMES: [&str; 2] = ["cache-1", "cache-2"];

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
        ["worker", name] => worker(name).await,
        _ => {
            eprintln!("usage: kafka_static_membership [worker NAME]");
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
/// Joins a group, with a name that outlives this process or without.
fn join(
    brokers: &str,
    group: &str,
    name: Option<&str>,
    diary: Diary,
) -> Result<StreamConsumer<Diary>> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        // As long as a restart may take, and as long as nobody reads the partitions
        // of one that is dead for good.
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "500");
    if let Some(name) = name {
        config.set("group.instance.id", name);
    }
    let consumer: StreamConsumer<Diary> = config.create_with_context(diary)?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}
// ANCHOR_END: member

/// How many partitions a member gave up since somebody last looked.
#[derive(Default)]
struct Diary {
    /// The story has its own words.
    talks: bool,
    given_up: AtomicUsize,
}

impl ClientContext for Diary {}

impl ConsumerContext for Diary {
    fn pre_rebalance(
        &self,
        _consumer: &BaseConsumer<Self>,
        rebalance: &Rebalance<'_>,
    ) {
        match rebalance {
            Rebalance::Revoke(partitions) => {
                self.say("gives up:", partitions);
                self.given_up
                    .fetch_add(partitions.count(), Ordering::Relaxed);
            }
            Rebalance::Assign(partitions) => self.say("gets:", partitions),
            // The client tries again.
            Rebalance::Error(_) => {}
        }
    }
}

impl Diary {
    fn take(&self) -> usize {
        self.given_up.swap(0, Ordering::Relaxed)
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

    let group = "static-none";
    let first = Member::join(&brokers, group, None)?;
    let second = Member::join(&brokers, group, None)?;
    divided(&[(&first, 2), (&second, 2)]).await?;
    first.consumer.context().take();
    second.leave().await?;
    divided(&[(&first, 4)]).await?;
    let second = Member::join(&brokers, group, None)?;
    divided(&[(&first, 2), (&second, 2)]).await?;
    let given_up = first.consumer.context().take();
    println!("dynamic: B restarts, A gives up {given_up} partitions");
    first.leave().await?;
    second.leave().await?;

    let group = "static-named";
    let [a, b] = NAMES.map(Some);
    let first = Member::join(&brokers, group, a)?;
    let second = Member::join(&brokers, group, b)?;
    divided(&[(&first, 2), (&second, 2)]).await?;
    first.consumer.context().take();
    second.leave().await?;
    let second = Member::join(&brokers, group, b)?;
    divided(&[(&second, 2)]).await?;
    let given_up = first.consumer.context().take();
    println!(
        "static:  B restarts, A gives up {given_up} partitions, and B has its 2 back"
    );

    let third = Member::join(&brokers, group, b)?;
    let end = timeout(REBALANCE, second.polls).await;
    let error = end.context("both cache-2 live")??;
    println!("twice:   a second cache-2 ends the first: {}", code(&error));
    // A member that was ended has nothing to leave.
    let ended = second.consumer;
    spawn_blocking(move || drop(ended)).await?;
    third.leave().await?;
    first.leave().await
}
// ANCHOR_END: story

/// A consumer, and the task that polls it: without that it takes part in nothing.
struct Member {
    consumer: Arc<StreamConsumer<Diary>>,
    /// Ends with an error only.
    polls: JoinHandle<KafkaError>,
}

impl Member {
    fn join(brokers: &str, group: &str, name: Option<&str>) -> Result<Self> {
        let diary = Diary::default();
        let consumer = Arc::new(join(brokers, group, name, diary)?);
        let polled = Arc::clone(&consumer);
        let polls = tokio::spawn(async move {
            loop {
                // What comes is of no interest here.
                if let Err(error) = polled.recv().await {
                    return error;
                }
            }
        });
        Ok(Self { consumer, polls })
    }

    /// Stops; without a name it leaves the group too. It blocks, hence a thread of its own.
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

/// Kafka's name of what went wrong.
fn code(error: &KafkaError) -> String {
    match error.rdkafka_error_code() {
        Some(code) => format!("{code:?}"),
        None => error.to_string(),
    }
}

/// Reads, and says what it gets and gives up.
async fn worker(name: &str) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let diary = Diary {
        talks: true,
        given_up: AtomicUsize::new(0),
    };
    let consumer = join(&brokers, "static-workers", Some(name), diary)?;
    println!("ready:    orders from {TOPIC}, Ctrl-C to stop");
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
            // Fatal: this client can do nothing any more.
            Err(KafkaError::MessageConsumptionFatal(
                RDKafkaErrorCode::FencedInstanceId,
            )) => bail!("another {name} has joined; each needs a name of its own"),
            Err(error) => return Err(error).context("cannot read on"),
        };
        lost = false;
        let order = String::from_utf8_lossy(record.payload().unwrap_or_default());
        println!("read:     {order} of partition {}", record.partition());
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
