//! Task queue: each task goes to one worker, and outlives a worker that dies.
//!
//! Teaches: Kafka has no queue, but a topic that the workers of one group share by
//! partitions. A task is done when its offset is committed, after the work; a killed
//! worker's partitions go to another, from the last commit on. So there are as many
//! workers as partitions at most, and a slow task holds up those behind it in its
//! partition.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin task_queue_kafka                       # the whole story
//! cargo run --bin task_queue_kafka worker                # terminal 1, and 2
//! cargo run --bin task_queue_kafka producer              # terminal 3
//! cargo run --bin task_queue_kafka worker --commit-first # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued: 10 tasks in task-queue
//! worker 1 start: Task <n>
//! worker 1 dies in the middle of Task <n>
//! worker 2 start: Task <n>
//! worker 2 done:  Task <n>
//! ...
//! all 10 tasks are done
//! ```
//!
//! Left out on purpose: what fails and is tried again, see kafka_retry_dlq. Kafka
//! does not say that a task was handed out before; its id has to.

use std::{
    collections::HashSet,
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
use patterns::task_queue::{TASKS, Verdict, tasks, verdict};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, OwnedMessage},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "task-queue";
/// Where tasks go that no worker can read.
const UNREADABLE: &str = "task-queue.unreadable";
const TOPICS: [&str; 2] = [TOPIC, UNREADABLE];
/// As many workers can work at the same time.
const PARTITIONS: i32 = 4;
const GROUP: &str = "task-workers";
const USAGE: &str = "usage: task_queue_kafka [producer | worker [--commit-first]]";

/// How long a task takes: long enough to kill its worker in the middle.
const WORK: Duration = Duration::from_millis(300);

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a task may take to come: as long as a killed worker's session, and more.
const TASK: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer().await,
        ["worker"] => worker(Commit::AfterTheWork).await,
        ["worker", "--commit-first"] => worker(Commit::First).await,
        _ => {
            eprintln!("{USAGE}");
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Commit {
    AfterTheWork,
    /// The mistake, to see what it costs: the group goes on behind the task before
    /// anything is done.
    First,
}

// ---- Producer --------------------------------------------------------------

async fn producer() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    queue_tasks(&brokers).await?;
    println!("queued: {TASKS} tasks in {TOPIC}");
    Ok(())
}

fn client(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ANCHOR: producer
/// Queues all tasks and returns their ids, once every one is delivered.
async fn queue_tasks(brokers: &str) -> Result<HashSet<String>> {
    let producer = client(brokers)?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let mut ids = HashSet::new();
    for ((number, task), partition) in
        tasks().enumerate().zip((0..PARTITIONS).cycle())
    {
        // A task may be handed out twice; by its id a worker can tell.
        let id = format!("{run}-{number}");
        let record = FutureRecord::to(TOPIC)
            .key(&id)
            .payload(&task)
            // In turns. By the key, one partition could get most of ten tasks.
            .partition(partition);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        ids.insert(id);
    }
    Ok(ids)
}
// ANCHOR_END: producer

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(commit: Commit) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let consumer = take_tasks(&brokers)?;
    println!("waiting for tasks in {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
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
        match verdict(record.payload().unwrap_or_default()) {
            Verdict::Work(task) => {
                if commit == Commit::First {
                    done(&consumer, &record).await?;
                }
                println!("start: {task}");
                work().await;
                println!("done:  {task}");
                if commit == Commit::AfterTheWork
                    && let Err(error) = done(&consumer, &record).await
                {
                    // No broker, or it was taken for dead and joins anew.
                    eprintln!("{task}: {error:#}");
                }
            }
            Verdict::SetAside => set_aside(&brokers, &consumer, &record).await?,
        }
    }
    // Leaves the group, so that others have its partitions at once. It blocks, hence
    // a thread of its own.
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: take
/// Joins the workers. While this one works and does not poll, no partition is taken
/// from it: the group waits for `max.poll.interval.ms`, five minutes.
fn take_tasks(brokers: &str) -> Result<Arc<StreamConsumer>> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        // After this time without a sign of life a worker counts as dead, and its
        // tasks go to another. 45 s by default.
        .set("session.timeout.ms", "6000")
        .set("heartbeat.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(Arc::new(consumer))
}

/// Tells the group that this task, and with it all before it in its partition, need
/// not come again.
async fn done(consumer: &Arc<StreamConsumer>, record: &impl Message) -> Result<()> {
    let mut next = TopicPartitionList::new();
    let offset = Offset::Offset(record.offset() + 1);
    next.add_partition_offset(TOPIC, record.partition(), offset)?;
    let consumer = Arc::clone(consumer);
    // Waits for the answer.
    let commit = move || consumer.commit(&next, CommitMode::Sync);
    spawn_blocking(commit).await?.map_err(|error| {
        anyhow!("not committed ({error}), so this task may come again")
    })
}
// ANCHOR_END: take

// ANCHOR: set_aside
/// Moves a message that nobody can read out of the way, without losing it: stored
/// elsewhere first, then committed.
async fn set_aside(
    brokers: &str,
    consumer: &Arc<StreamConsumer>,
    record: &BorrowedMessage<'_>,
) -> Result<()> {
    let payload = record.payload().unwrap_or_default();
    let copy = FutureRecord::to(UNREADABLE)
        .key(record.key().unwrap_or_default())
        .payload(payload);
    let delivery = client(brokers)?.send(copy, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("not delivered to {UNREADABLE}: {error}")
    })?;
    done(consumer, record).await?;
    eprintln!("not a task: {} bytes, kept in {UNREADABLE}", payload.len());
    Ok(())
}
// ANCHOR_END: set_aside

async fn work() {
    sleep(WORK).await;
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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let mut open = queue_tasks(&brokers).await?;
    println!("queued: {TASKS} tasks in {TOPIC}");

    let first = take_tasks(&brokers)?;
    let task = text(&next_task(&first).await?);
    println!("worker 1 start: {task}");
    println!("worker 1 dies in the middle of {task}");
    // Without a commit. It says goodbye here, which a killed one cannot.
    spawn_blocking(move || drop(first)).await?;

    let second = take_tasks(&brokers)?;
    while !open.is_empty() {
        let record = next_task(&second).await?;
        let task = text(&record);
        println!("worker 2 start: {task}");
        work().await;
        println!("worker 2 done:  {task}");
        let id = String::from_utf8_lossy(record.key().unwrap_or_default());
        open.remove(&*id);
        done(&second, &record).await?;
    }
    println!("all {TASKS} tasks are done");
    spawn_blocking(move || drop(second)).await?;
    Ok(())
}

async fn next_task(consumer: &StreamConsumer) -> Result<OwnedMessage> {
    let record = timeout(TASK, consumer.recv()).await;
    let record = record
        .context("no task came within 30 s; has another worker taken it?")??;
    Ok(record.detach())
}

fn text(record: &OwnedMessage) -> String {
    String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned()
}
// ANCHOR_END: story

// ---- Topics and brokers ----------------------------------------------------

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
