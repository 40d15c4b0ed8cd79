//! Backpressure: a worker holds no more labels than it can print soon.
//!
//! Teaches: between the one that takes and the one that prints is a bounded channel.
//! Kafka does not ask what a worker holds, so the worker pauses the partition at a high
//! mark and resumes it at a low one, and polls on. What the client fetches ahead has
//! bounds of its own. The producer meets a full queue, and waits for the oldest label
//! in it. A label is committed when it is printed.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin backpressure_kafka                               # the whole story
//! cargo run --bin backpressure_kafka worker printed.db             # terminal 1
//! cargo run --bin backpressure_kafka producer 1 3000               # terminal 2
//! cargo run --bin backpressure_kafka worker printed.db --rate 200  # a quicker printer
//! cargo run --bin backpressure_kafka worker printed.db --unbounded # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels-due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  set, held no more than 16
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels-due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  none, held more than 16
//! ```
//!
//! Left out on purpose: a bound for the topic. Kafka has none that makes a producer
//! wait; it deletes by age or size (`retention`), read or not.

use std::{
    collections::VecDeque,
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
use patterns::backpressure::{HIGH, Held, Printer, Turn, Valve, label, name};
use rdkafka::{
    ClientConfig, Message, Offset,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, OwnedMessage},
    producer::{DeliveryFuture, FutureProducer, FutureRecord},
};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::{block_in_place, spawn_blocking},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "labels-due";
const TOPICS: [&str; 1] = [TOPIC];
/// One printer.
const PARTITIONS: i32 = 1;
const GROUP: &str = "label-printer";
const STORY_GROUP: &str = "label-printer-story";
const USAGE: &str = "usage: backpressure_kafka [producer FIRST LAST | worker FILE \
                     [--rate LABELS_A_SECOND] [--unbounded]]";

/// How many labels the printer prints in a second.
const RATE: u32 = 10;
/// The same in the story, which has to end.
const STORY_RATE: u32 = 50;
/// How many labels the story sends, each time.
const STORY_LABELS: u64 = 60;
/// How many labels a producer has on their way, at most.
const WINDOW: usize = 32;

/// What the client may have fetched ahead, in kB.
const QUEUED_KB: u32 = 1024;
/// What Kafka may send in one answer, in bytes.
const ANSWER: u32 = 512 * 1024;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the labels of the story may take: a new group has to find its members.
const STORY: Duration = Duration::from_secs(40);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => producer(first, last).await,
            _ => return usage(),
        },
        ["worker", file, ref flags @ ..] => {
            let (rate, bounds) = match flags {
                [] => (RATE, Bounds::Set),
                ["--unbounded"] => (RATE, Bounds::None),
                ["--rate", rate] => (rate.parse().unwrap_or(0), Bounds::Set),
                ["--rate", rate, "--unbounded"] => {
                    (rate.parse().unwrap_or(0), Bounds::None)
                }
                _ => return usage(),
            };
            if rate == 0 || rate > 1000 {
                return usage();
            }
            worker_until_signal(file, rate, bounds).await
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bounds {
    Set,
    /// The mistake, to see what it costs.
    None,
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let (_offset, waits) = send(&brokers, first, last).await?;
    println!(
        "sent:    label-{first} to label-{last}, waited {waits} times for room"
    );
    Ok(())
}

// ANCHOR: send
/// Sends labels as fast as Kafka takes them. Returns the offset of the first, and how
/// often it waited for room.
async fn send(brokers: &str, first: u64, last: u64) -> Result<(i64, u32)> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        // 100,000 labels and 1 GB by default: that is no bound for labels like these.
        .set("queue.buffering.max.messages", WINDOW.to_string())
        .create()?;
    let mut on_their_way = VecDeque::new();
    let (mut begin, mut waits) = (i64::MAX, 0);
    for number in first..=last {
        // Most of these are stored by now, and nobody has looked.
        if on_their_way.len() == 2 * WINDOW {
            begin = begin.min(settle(&mut on_their_way).await?);
        }
        let payload = label(number);
        let mut record = FutureRecord::<(), _>::to(TOPIC).payload(&payload);
        let queued = loop {
            match producer.send_result(record) {
                Ok(queued) => break queued,
                // Not an error: Kafka is slower than this program. Wait for the oldest
                // one to make room, and try the same label again.
                Err((
                    KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull),
                    same,
                )) => {
                    record = same;
                    waits += 1;
                    begin = begin.min(settle(&mut on_their_way).await?);
                }
                Err((error, _record)) => bail!("not sent to {TOPIC}: {error}"),
            }
        };
        on_their_way.push_back(queued);
    }
    while !on_their_way.is_empty() {
        begin = begin.min(settle(&mut on_their_way).await?);
    }
    Ok((begin, waits))
}

/// Waits for the oldest, and returns its offset.
async fn settle(on_their_way: &mut VecDeque<DeliveryFuture>) -> Result<i64> {
    let oldest = on_their_way
        .pop_front()
        .context("full, and nothing in it")?;
    let stored = oldest.await.context("the producer has ended")?;
    let stored = stored.map_err(|(error, _label)| {
        anyhow!("Kafka did not store a label: {error}")
    })?;
    Ok(stored.offset)
}
// ANCHOR_END: send

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(file: &str, rate: u32, bounds: Bounds) -> Result<()> {
    let stop = stop_signal()?;
    let printer = Printer::open(Path::new(file));
    let printer = printer.with_context(|| format!("cannot print to {file}"))?;
    let held = Arc::new(Held::default());
    worker(GROUP, printer, rate, bounds, &held, 0, stop).await
}

// ANCHOR: worker
/// Works until it is told to stop. `begin` is the first offset of the story: what
/// others have left is no part of it.
async fn worker(
    group: &str,
    printer: Printer,
    rate: u32,
    bounds: Bounds,
    held: &Arc<Held>,
    begin: i64,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let consumer = take_labels(&brokers, group, bounds)?;
    println!("ready:   labels from {TOPIC}, Ctrl-C to stop");
    let room = match bounds {
        Bounds::Set => HIGH,
        // As good as none.
        Bounds::None => Semaphore::MAX_PERMITS,
    };
    let (labels, to_print) = mpsc::channel(room);
    let (done, mut printed) = mpsc::channel(room);
    let (stop_printer, stopping) = oneshot::channel();
    let printing = tokio::spawn(print(printer, rate, to_print, done, stopping));
    let mut valve = Valve::default();
    let (mut count, mut next, mut lost) = (0, 0, false);
    tokio::pin!(stop);
    loop {
        tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            label = printed.recv() => {
                // It ends by itself when it cannot print.
                let Some(label) = label else { break };
                store(&consumer, &label)?;
                count += 1;
                let now = held.release();
                // About once a second.
                if count % u64::from(rate) == 0 {
                    println!("print:   {count} printed, {now} held");
                }
                if bounds == Bounds::Set && valve.turn(now) == Some(Turn::Resume) {
                    resume(&consumer, next)?;
                }
            }
            // Also while it is closed: to poll is to be a member.
            record = consumer.recv() => {
                let Some(record) = readable(record, &mut lost)? else { continue };
                if record.offset() < begin {
                    continue;
                }
                if valve.is_closed() {
                    // A rebalance has ended the pause.
                    give_back(&consumer, &record)?;
                    continue;
                }
                next = record.offset() + 1;
                labels.try_send(record.detach()).context("no room")?;
                let now = held.take();
                if bounds == Bounds::Set && valve.turn(now) == Some(Turn::Pause) {
                    consumer.pause(&consumer.assignment()?)?;
                }
            }
        }
    }
    // The printer finishes the label that it has begun. The rest is not committed.
    drop(stop_printer);
    while let Some(label) = printed.recv().await {
        store(&consumer, &label)?;
        held.release();
        count += 1;
    }
    printing.await??;
    // Commits what is stored, and leaves the group. It blocks, hence a thread.
    spawn_blocking(move || {
        let committed = consumer.commit_consumer_state(CommitMode::Sync);
        match committed {
            // There was nothing to commit.
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
            other => other.context("not committed, so labels may be printed again"),
        }
    })
    .await??;
    let (most, back) = (held.most(), held.now());
    println!("stopped: {count} printed, at most {most} held, {back} given back");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: print
/// The printer takes a label when it is ready for one, and no sooner.
async fn print(
    printer: Printer,
    rate: u32,
    mut to_print: mpsc::Receiver<OwnedMessage>,
    done: mpsc::Sender<OwnedMessage>,
    mut stopping: oneshot::Receiver<()>,
) -> Result<()> {
    let mut ready = interval(Duration::from_secs(1) / rate);
    // It does not print faster because it had nothing to do for a while.
    ready.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let label = tokio::select! {
            biased;
            _dropped = &mut stopping => break,
            label = async {
                ready.tick().await;
                to_print.recv().await
            } => label,
        };
        let Some(label) = label else { break };
        let name = name(label.payload().unwrap_or_default());
        block_in_place(|| printer.print(&name)).context("cannot print")?;
        // Nobody waits for it any more when the worker has failed.
        let _told = done.send(label).await;
    }
    Ok(())
}
// ANCHOR_END: print

/// Is committed in the background, and at the end.
fn store(consumer: &StreamConsumer, label: &OwnedMessage) -> Result<()> {
    let stored =
        consumer.store_offset(label.topic(), label.partition(), label.offset());
    if let Err(error) = stored {
        // Another has the partition now, and will print it again.
        eprintln!("printed, and not ours any more: {error}");
    }
    Ok(())
}

// ANCHOR: resume
/// Goes on where the pause began. The client does not wake up for a resume: it would
/// look again within a second, and the printer would wait. A seek wakes it.
fn resume(consumer: &StreamConsumer, next: i64) -> Result<()> {
    let assignment = consumer.assignment()?;
    consumer.resume(&assignment)?;
    if assignment.find_partition(TOPIC, 0).is_some() {
        let seek = || consumer.seek(TOPIC, 0, Offset::Offset(next), PATIENCE);
        block_in_place(seek).context("cannot go on after the pause")?;
    }
    Ok(())
}
// ANCHOR_END: resume

/// Nothing comes until the partition is resumed, and this label comes first then.
fn give_back(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<()> {
    let offset = Offset::Offset(record.offset());
    let seek =
        || consumer.seek(record.topic(), record.partition(), offset, PATIENCE);
    block_in_place(seek).context("cannot go back; it will come again")?;
    consumer.pause(&consumer.assignment()?)?;
    Ok(())
}

/// The record, if there is one. The client connects again by itself; it says so with
/// each attempt, and to hear it once is enough.
fn readable<'a>(
    record: Result<BorrowedMessage<'a>, KafkaError>,
    lost: &mut bool,
) -> Result<Option<BorrowedMessage<'a>>> {
    match record {
        Ok(record) => {
            *lost = false;
            Ok(Some(record))
        }
        Err(KafkaError::MessageConsumption(
            code @ (RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::BrokerTransportFailure),
        )) => {
            if !*lost {
                eprintln!("lost Kafka, still trying ({code})");
            }
            *lost = true;
            Ok(None)
        }
        Err(error) => Err(error).context("cannot read on"),
    }
}

// ANCHOR: take
fn take_labels(
    brokers: &str,
    group: &str,
    bounds: Bounds,
) -> Result<StreamConsumer> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        // Committed in the background is what is stored, and stored what is printed.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .set("session.timeout.ms", "6000");
    if bounds == Bounds::Set {
        // What the client fetches ahead: 64 MB by default, in answers of 1 MB for each
        // partition. A pause throws it away, and it is fetched again.
        config
            .set("queued.max.messages.kbytes", QUEUED_KB.to_string())
            .set("fetch.message.max.bytes", ANSWER.to_string())
            // How long it waits when that is full; 1 s by default.
            .set("fetch.queue.backoff.ms", "20");
    }
    let consumer: StreamConsumer = config.create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}
// ANCHOR_END: take

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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    for bounds in [Bounds::Set, Bounds::None] {
        let (begin, waits) = send(&brokers, 1, STORY_LABELS).await?;
        println!("sent:    {STORY_LABELS} labels, waited {waits} times for room");
        let printer = Printer::open(Path::new(":memory:"))?;
        let held = Arc::new(Held::default());
        let all = async {
            // All have come and none is held; what has not come is missed below.
            let empty = async {
                while held.taken() < STORY_LABELS as usize || held.now() > 0 {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            let _came = timeout(STORY, empty).await;
        };
        worker(STORY_GROUP, printer, STORY_RATE, bounds, &held, begin, all).await?;
        ensure!(
            held.taken() == STORY_LABELS as usize,
            "not all have come; has another worker the partition?"
        );
        judge(bounds, &held);
    }
    Ok(())
}
// ANCHOR_END: story

fn judge(bounds: Bounds, held: &Held) {
    let set = match bounds {
        Bounds::Set => "set",
        Bounds::None => "none",
    };
    let than = if held.most() > HIGH {
        "more"
    } else {
        "no more"
    };
    println!("bounds:  {set}, held {than} than {HIGH}");
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
