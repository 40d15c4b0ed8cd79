//! Retry: what fails waits in another topic, and ends in a dead-letter topic.
//!
//! Teaches: a partition is a queue without a way around: what is retried in place
//! holds up all that is behind it. So a record that fails goes to a topic of those
//! that are tried again later, then to one that waits longer, and at last to one for
//! people, with the reason and its origin in its headers. Only when Kafka has it
//! there is it committed here. The price is the order.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_retry_dlq            # the whole story
//! cargo run --bin kafka_retry_dlq worker     # kill it wherever you like
//! cargo run --bin kafka_retry_dlq orders     # five of them, one with no address
//! ```
//!
//! Expected output:
//!
//! ```text
//! booked: order-0
//! failed: order-1, attempt 1 (the courier does not answer), again in 3 s
//! booked: order-2
//! failed: order-3, attempt 1 (no such address), again in 3 s
//! booked: order-4
//! booked: order-1, attempt 2
//! failed: order-3, attempt 2 (no such address), again in 4 s
//! dead:   order-3, attempt 3 (no such address)
//! origin: retry.orders, partition 0, offset <n>
//! ```
//!
//! Left out on purpose: who looks at the dead letters and sends them back; and
//! records that cannot be decoded, which no retry mends: they go to the last topic at
//! once.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::{Notify, mpsc},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const DEAD: &str = "retry.orders.dead";
const TOPICS: [&str; 4] = [
    "retry.orders",
    "retry.orders.soon",
    "retry.orders.later",
    DEAD,
];
const PARTITIONS: i32 = 1;
const GROUP: &str = "retry-booking";
const ORDERS: usize = 5;

// ANCHOR: tiers
/// A topic, where what fails in it goes, and how long it waits there.
struct Tier {
    topic: &'static str,
    next: &'static str,
    wait: Duration,
}

const TIERS: [Tier; 3] = [
    Tier {
        topic: TOPICS[0],
        next: TOPICS[1],
        wait: Duration::from_secs(3),
    },
    Tier {
        topic: TOPICS[1],
        next: TOPICS[2],
        wait: Duration::from_secs(4),
    },
    Tier {
        topic: TOPICS[2],
        next: DEAD,
        wait: Duration::ZERO,
    },
];
// ANCHOR_END: tiers

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the story may take.
const STORY: Duration = Duration::from_secs(40);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["worker"] => worker().await,
        ["orders"] => place().await,
        _ => {
            eprintln!("usage: kafka_retry_dlq [worker | orders]");
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

// ANCHOR: book
/// The work: one address does not exist, and one courier is asleep at first.
fn book(order: &str, attempt: u32) -> Result<(), &'static str> {
    match order {
        "order-1" if attempt == 1 => Err("the courier does not answer"),
        "order-3" => Err("no such address"),
        _ => Ok(()),
    }
}

/// Works on one record to its end: booked, or in the next topic. Then, and not
/// before, it is committed.
async fn handle(
    consumer: &Arc<StreamConsumer>,
    producer: &FutureProducer,
    tier: &Tier,
    record: &BorrowedMessage<'_>,
) -> Result<Event> {
    let order = text(record.payload());
    let attempt = header(record, "x-attempt").map_or(Ok(1), |text| text.parse())?;
    let event = match book(&order, attempt) {
        Ok(()) => Event::Booked { order, attempt },
        Err(reason) => {
            // With the answer of Kafka: a record that is in neither topic is lost.
            pass_on(producer, tier, record, attempt, reason).await?;
            Event::Failed {
                order,
                attempt,
                reason,
            }
        }
    };
    // Killed before this line, the record is handled once more: at least once.
    let mut done = TopicPartitionList::new();
    let offset = Offset::Offset(record.offset() + 1);
    done.add_partition_offset(tier.topic, record.partition(), offset)?;
    let consumer = Arc::clone(consumer);
    spawn_blocking(move || consumer.commit(&done, CommitMode::Sync)).await??;
    Ok(event)
}
// ANCHOR_END: book

// ANCHOR: pass_on
async fn pass_on(
    producer: &FutureProducer,
    tier: &Tier,
    record: &BorrowedMessage<'_>,
    attempt: u32,
    reason: &str,
) -> Result<()> {
    let last = tier.next == DEAD;
    let attempt = if last { attempt } else { attempt + 1 };
    let not_before = now()? + tier.wait.as_millis();
    // Where it was in the beginning: what it has from there, else its place now.
    let origin = header(record, "x-origin").unwrap_or_else(|| {
        format!("{} {} {}", tier.topic, record.partition(), record.offset())
    });
    let with = |headers: OwnedHeaders, key, value: &str| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    };
    let headers = OwnedHeaders::new();
    let headers = with(headers, "x-attempt", &attempt.to_string());
    let headers = with(headers, "x-not-before", &not_before.to_string());
    let headers = with(headers, "x-error", reason);
    let headers = with(headers, "x-origin", &origin);
    let failed = FutureRecord::to(tier.next)
        .key(record.key().unwrap_or_default())
        // As it came, whatever is in it.
        .payload(record.payload().unwrap_or_default())
        .headers(headers);
    let delivery = producer.send(failed, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("not delivered to {}: {error}", tier.next)
    })?;
    Ok(())
}
// ANCHOR_END: pass_on

// ANCHOR: wait
/// Waits until a record may be tried again. The partition is paused and polled: a
/// consumer that just sleeps is taken for dead after `max.poll.interval.ms`.
async fn wait_for(
    consumer: &StreamConsumer,
    record: &BorrowedMessage<'_>,
) -> Result<()> {
    let Some(not_before) = header(record, "x-not-before") else {
        return Ok(());
    };
    let due: u128 = not_before.parse()?;
    let wait = due.saturating_sub(now()?);
    let wait = Duration::from_millis(u64::try_from(wait)?);
    let mut partition = TopicPartitionList::new();
    partition.add_partition(record.topic(), record.partition());
    consumer.pause(&partition)?;
    tokio::select! {
        () = sleep(wait) => {}
        // There is no other partition: only an error can come.
        other = consumer.recv() => bail!("came in a pause: {:?}", other?.offset()),
    }
    Ok(consumer.resume(&partition)?)
}
// ANCHOR_END: wait

/// What happened to a record.
enum Event {
    Booked {
        order: String,
        attempt: u32,
    },
    Failed {
        order: String,
        attempt: u32,
        reason: &'static str,
    },
}

fn show(tier: &Tier, event: &Event) {
    match event {
        Event::Booked { order, attempt: 1 } => println!("booked: {order}"),
        Event::Booked { order, attempt } => {
            println!("booked: {order}, attempt {attempt}");
        }
        Event::Failed {
            order,
            attempt,
            reason,
        } if tier.next == DEAD => {
            println!("dead:   {order}, attempt {attempt} ({reason})");
        }
        Event::Failed {
            order,
            attempt,
            reason,
        } => {
            let wait = tier.wait.as_secs();
            println!(
                "failed: {order}, attempt {attempt} ({reason}), again in {wait} s"
            );
        }
    }
}

/// Reads one topic, and shows and tells what happens, until told to stop. A record
/// that it has begun is finished.
async fn serve(
    brokers: String,
    tier: &'static Tier,
    stop: Arc<Notify>,
    events: mpsc::UnboundedSender<Event>,
) -> Result<()> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // How soon a killed one is noticed, and another has its partition.
        .set("session.timeout.ms", "6000")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .create()?;
    let consumer = Arc::new(consumer);
    let producer = producer(&brokers)?;
    consumer.subscribe(&[tier.topic])?;
    let mut lost = false;
    loop {
        let record = tokio::select! {
            biased;
            () = stop.notified() => break,
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
        tokio::select! {
            biased;
            // Not begun: it waits for the next worker.
            () = stop.notified() => break,
            waited = wait_for(&consumer, &record) => waited?,
        }
        let event = handle(&consumer, &producer, tier, &record).await?;
        show(tier, &event);
        // Nobody listens in a worker.
        let _unheard = events.send(event);
    }
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// All three topics, until it is stopped or one of them has an error.
async fn serve_all(
    stop: impl Future<Output = Result<()>>,
    events: mpsc::UnboundedSender<Event>,
) -> Result<()> {
    let brokers = brokers()?;
    let mut tasks = JoinSet::new();
    let stops: Vec<_> = TIERS.iter().map(|_| Arc::new(Notify::new())).collect();
    for (tier, stop) in TIERS.iter().zip(&stops) {
        let stop = Arc::clone(stop);
        tasks.spawn(serve(brokers.clone(), tier, stop, events.clone()));
    }
    let stopped = tokio::select! {
        biased;
        stopped = stop => stopped,
        Some(ended) = tasks.join_next() => ended?,
    };
    for stop in &stops {
        stop.notify_one();
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    stopped
}

async fn worker() -> Result<()> {
    ensure_topics(&brokers()?).await?;
    let stop_signal = stop_signal()?;
    println!("ready:  orders from {}, Ctrl-C to stop", TOPICS[0]);
    let (events, _nobody) = mpsc::unbounded_channel();
    let stop = async {
        stop_signal.await;
        Ok(())
    };
    serve_all(stop, events).await?;
    println!("stopped");
    Ok(())
}

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    begin_here(&brokers).await?;
    place().await?;
    let (events, mut heard) = mpsc::unbounded_channel();
    let dead = async {
        let died = async {
            let mut failures = 0;
            while let Some(event) = heard.recv().await {
                // Of the order without an address, once for each topic.
                if let Event::Failed { order, .. } = event
                    && order == "order-3"
                {
                    failures += 1;
                    if failures == TIERS.len() {
                        break;
                    }
                }
            }
        };
        let died = timeout(STORY, died).await;
        died.context("the order is not dead after 40 s")
    };
    serve_all(dead, events).await?;
    println!("origin: {}", origin_of_the_last(&brokers).await?);
    Ok(())
}

/// Lets the group go on at the end of each topic: what an earlier run has left is
/// not this story's.
async fn begin_here(brokers: &str) -> Result<()> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .create()?;
    let begin = move || {
        let mut ends = TopicPartitionList::new();
        for tier in &TIERS {
            let (_first, end) = client.fetch_watermarks(tier.topic, 0, PATIENCE)?;
            ends.add_partition_offset(tier.topic, 0, Offset::Offset(end))?;
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
                bail!("cannot begin anew ({error}); is another one running?")
            }
        }
    }
}

/// What the last dead letter says of where it comes from.
async fn origin_of_the_last(brokers: &str) -> Result<String> {
    let reader: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "retry-reader")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut last = TopicPartitionList::new();
    last.add_partition_offset(DEAD, 0, Offset::OffsetTail(1))?;
    reader.assign(&last)?;
    let record = timeout(PATIENCE, reader.recv()).await;
    let record = record.context("no dead letter within 5 s")??;
    let origin = header(&record, "x-origin").context("no origin")?;
    match origin.split(' ').collect::<Vec<_>>()[..] {
        [topic, partition, offset] => {
            Ok(format!("{topic}, partition {partition}, offset {offset}"))
        }
        _ => bail!("not an origin: {origin}"),
    }
}

async fn place() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in 0..ORDERS {
        let order = format!("order-{number}");
        let record = FutureRecord::to(TOPICS[0]).key(&order).payload(&order);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {}: {error}", TOPICS[0])
        })?;
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

fn header(record: &BorrowedMessage<'_>, key: &str) -> Option<String> {
    let headers = record.headers()?;
    let mut headers = headers.iter();
    Some(text(headers.find(|header| header.key == key)?.value))
}

fn text(bytes: Option<&[u8]>) -> String {
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

/// In milliseconds since 1970, as Kafka counts.
fn now() -> Result<u128> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())
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
