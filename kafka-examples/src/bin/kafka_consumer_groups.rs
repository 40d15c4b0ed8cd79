//! Consumer groups: members share the partitions, and each group gets everything.
//!
//! Teaches: a partition has one member at a time, so a group has at most as many
//! workers as the topic has partitions; one more has nothing to do and waits for
//! another to leave. Members come and go without a word to the others: the group
//! divides anew. A group of another name has its own offsets and loses nothing to
//! the first.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_consumer_groups            # the whole story
//! cargo run --bin kafka_consumer_groups worker     # in several terminals
//! cargo run --bin kafka_consumer_groups payments   # sixty of them
//! ```
//!
//! Expected output:
//!
//! ```text
//! one:      1 member has 6 of 6 partitions
//! three:    3 members have 2, 2, 2
//! left:     2 members have 3, 3
//! seven:    7 members have 1, 1, 1, 1, 1, 1, 0
//! workers:  60 payments together, none twice
//! analysts: 60 payments, as a group of their own
//! ```
//!
//! Left out on purpose: who gets which partition, which is the assignor's choice; and
//! what happens to work that is under way when a partition moves, see
//! kafka_rebalance_commit.

use std::{
    collections::BTreeMap,
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{
        BaseConsumer, Consumer as _, ConsumerContext, Rebalance, StreamConsumer,
    },
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "groups.payments";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 6;
const PAYMENTS: usize = 60;

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
            eprintln!("usage: kafka_consumer_groups [worker | payments]");
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
/// A member of a group. That it is one is a name in its configuration; nothing else
/// says how many there are.
fn member(
    brokers: &str,
    group: &str,
    report: Report,
) -> Result<StreamConsumer<Report>> {
    let consumer: StreamConsumer<Report> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        // After this time without a sign of life a member counts as dead.
        .set("session.timeout.ms", "6000")
        // How soon a member hears that the group divides anew.
        .set("heartbeat.interval.ms", "500")
        .create_with_context(report)?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// Is told what the group has decided.
struct Report {
    /// The story counts by itself.
    talks: bool,
}

impl ClientContext for Report {}

impl ConsumerContext for Report {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance
            && self.talks
        {
            let partitions = partitions.elements();
            let mut numbers: Vec<_> =
                partitions.iter().map(|one| one.partition()).collect();
            numbers.sort_unstable();
            println!("has:    partitions {numbers:?}");
        }
    }
}
// ANCHOR_END: member

async fn worker() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = member(&brokers, "groups-workers", Report { talks: true })?;
    println!("ready:  payments from {TOPIC}, Ctrl-C to stop");
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
        let payment = String::from_utf8_lossy(record.payload().unwrap_or_default());
        println!("got:    {payment} from partition {}", record.partition());
    }
    // Leaves the group at once, or the others would wait for its session to end. It
    // blocks, hence a thread of its own.
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
    Ok(())
}

async fn payments() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    pay(&brokers, "payment").await?;
    println!("paid:   {PAYMENTS} payments");
    Ok(())
}

/// A member at work in the background, and what it has got.
struct Worker {
    consumer: Arc<StreamConsumer<Report>>,
    task: JoinHandle<Result<()>>,
}

/// How often each payment came, to all members of a group.
type Seen = Arc<Mutex<BTreeMap<String, usize>>>;

impl Worker {
    fn start(brokers: &str, group: &str, seen: &Seen) -> Result<Self> {
        let consumer = Arc::new(member(brokers, group, Report { talks: false })?);
        let (reader, seen) = (Arc::clone(&consumer), Arc::clone(seen));
        let task = tokio::spawn(async move {
            loop {
                let record = reader.recv().await?;
                let payment = record.payload().unwrap_or_default();
                let payment = String::from_utf8_lossy(payment).into_owned();
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                *seen.entry(payment).or_default() += 1;
            }
        });
        Ok(Self { consumer, task })
    }

    fn partitions(&self) -> Result<usize> {
        Ok(self.consumer.assignment()?.count())
    }

    async fn leave(self) -> Result<()> {
        self.task.abort();
        // Whatever it ended with.
        let _aborted = self.task.await;
        spawn_blocking(move || drop(self.consumer)).await?;
        Ok(())
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let (seen, all_seen) = (Seen::default(), Seen::default());
    let join = || Worker::start(&brokers, "groups-workers", &seen);
    let mut workers = vec![join()?];
    divided(&workers, &[6]).await?;
    println!("one:      1 member has 6 of 6 partitions");

    workers.extend([join()?, join()?]);
    let shares = divided(&workers, &[2, 2, 2]).await?;
    println!("three:    3 members have {shares}");
    workers.remove(0).leave().await?;
    let shares = divided(&workers, &[3, 3]).await?;
    println!("left:     2 members have {shares}");
    for _more in 0..5 {
        workers.push(join()?);
    }
    let shares = divided(&workers, &[1, 1, 1, 1, 1, 1, 0]).await?;
    println!("seven:    7 members have {shares}");

    let analyst = Worker::start(&brokers, "groups-analysts", &all_seen)?;
    // So that payments of other runs are not counted.
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let run = format!("payment-{run}");
    pay(&brokers, &run).await?;
    let twice = collected(&seen, &run).await?;
    ensure!(twice == 0, "{twice} payments came twice");
    println!("workers:  {PAYMENTS} payments together, none twice");
    collected(&all_seen, &run).await?;
    println!("analysts: {PAYMENTS} payments, as a group of their own");
    for worker in workers {
        worker.leave().await?;
    }
    analyst.leave().await
}
// ANCHOR_END: story

/// Waits until the members have these numbers of partitions, in any order.
async fn divided(workers: &[Worker], shares: &[usize]) -> Result<String> {
    let start = Instant::now();
    loop {
        let found: Result<Vec<_>> = workers.iter().map(Worker::partitions).collect();
        let mut found = found?;
        found.sort_unstable_by(|a, b| b.cmp(a));
        let text: Vec<_> = found.iter().map(usize::to_string).collect();
        let text = text.join(", ");
        if found == shares {
            return Ok(text);
        }
        ensure!(
            start.elapsed() < REBALANCE,
            "after 30 s the members have {text} partitions; is another \
             kafka_consumer_groups running?"
        );
        sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for all payments of this run, and says how many came more than once.
async fn collected(seen: &Seen, run: &str) -> Result<usize> {
    let start = Instant::now();
    loop {
        let counts: Vec<usize> = {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let ours = seen.iter().filter(|(payment, _)| payment.starts_with(run));
            ours.map(|(_, count)| *count).collect()
        };
        if counts.len() == PAYMENTS {
            return Ok(counts.iter().filter(|count| **count > 1).count());
        }
        ensure!(
            start.elapsed() < REBALANCE,
            "{} of {PAYMENTS} payments came within 30 s",
            counts.len()
        );
        sleep(Duration::from_millis(50)).await;
    }
}

async fn pay(brokers: &str, name: &str) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for number in 0..PAYMENTS {
        let payment = format!("{name}-{number}");
        let record = FutureRecord::to(TOPIC).key(&payment).payload(&payment);
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
