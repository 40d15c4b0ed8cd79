//! Task queue: each task goes to one worker, and outlives a worker that dies.
//!
//! Teaches: a stream with work-queue retention, stored in files, tasks with
//! acknowledged publishing, one task at a time for each worker, and the
//! acknowledgement after the work. NATS does not notice that a worker died: its
//! task goes to another when `ACK_WAIT` has passed, so it comes last here.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin task_queue_nats                       # the whole story
//! cargo run --bin task_queue_nats worker                # terminal 1, and 2
//! cargo run --bin task_queue_nats producer              # terminal 3
//! cargo run --bin task_queue_nats worker --ack-first    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued: 10 tasks in task_queue
//! worker 1 start: Task 0
//! worker 1 dies in the middle of Task 0
//! worker 2 start: Task 1
//! worker 2 done:  Task 1
//! ...
//! worker 2 start: Task 0 (again)
//! worker 2 done:  Task 0
//! ...
//! all 10 tasks are done
//! ```
//!
//! Left out on purpose: a limit on attempts (`max_deliver`), and work that takes
//! longer than `ACK_WAIT`, which has to send `AckKind::Progress` meanwhile.

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

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr, header,
    jetstream::{
        self, Message,
        consumer::{AckPolicy, pull},
        message::PublishMessage,
        stream,
    },
};
use bytes::Bytes;
use futures_lite::StreamExt as _;
use patterns::task_queue::{TASKS, Verdict, tasks, verdict};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "TASK_QUEUE";
const SUBJECT: &str = "task_queue";
/// Where tasks go that no worker can read: a stream and its subject.
const UNREADABLE_STREAM: &str = "TASK_QUEUE_UNREADABLE";
const UNREADABLE: &str = "task_queue_unreadable";
const CONSUMER: &str = "task-worker";
const USAGE: &str = "usage: task_queue_nats [producer | worker [--ack-first]]";

/// How long a task takes: long enough to kill its worker in the middle.
const WORK: Duration = Duration::from_millis(300);

/// How long NATS waits for an acknowledgement before it delivers a task again.
/// Short, so that you can watch it; the default is 30 s. Longer than any task
/// may take, or a task is done twice while its first worker is well.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// How long a task may let wait for itself in the story: longer than
/// [`ACK_WAIT`].
const PATIENCE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer().await,
        ["worker"] => worker(Acknowledge::AfterTheWork).await,
        ["worker", "--ack-first"] => worker(Acknowledge::First).await,
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
enum Acknowledge {
    AfterTheWork,
    /// The mistake, to see what it costs: the queue forgets the task before
    /// anything is done.
    First,
}

// ---- Producer --------------------------------------------------------------

async fn producer() -> Result<()> {
    let client = connect().await?;
    queue_tasks(&jetstream::new(client.clone())).await?;
    println!("queued: {TASKS} tasks in {SUBJECT}");
    client.drain().await?;
    Ok(())
}

// ANCHOR: producer
/// Queues all tasks and returns their message ids, once every one is stored.
async fn queue_tasks(jetstream: &jetstream::Context) -> Result<HashSet<String>> {
    declare(jetstream, STREAM, SUBJECT).await?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let mut ids = HashSet::new();
    for (number, task) in tasks().enumerate() {
        // A task may be delivered twice; by its id a worker can tell. And one
        // that is published twice with the same id is stored once.
        let id = format!("{run}-{number}");
        publish(jetstream, SUBJECT, task.into(), &id).await?;
        ids.insert(id);
    }
    Ok(ids)
}

/// Puts one message into a stream and waits until NATS has stored it.
async fn publish(
    jetstream: &jetstream::Context,
    subject: &'static str,
    payload: Bytes,
    id: &str,
) -> Result<()> {
    let message = PublishMessage::build().payload(payload).message_id(id);
    // Two awaits: the first hands the message to the connection, the second
    // waits for the answer of the stream.
    jetstream
        .send_publish(subject, message)
        .await?
        .await
        .with_context(|| format!("{subject} did not take it"))?;
    Ok(())
}
// ANCHOR_END: producer

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(acknowledge: Acknowledge) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_tasks(&jetstream).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for tasks in {SUBJECT}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .context("NATS ended the deliveries")?
            .context("cannot take tasks; is the stream or its consumer deleted?")?;
        match verdict(&delivery.payload) {
            Verdict::Work(task) => {
                if acknowledge == Acknowledge::First {
                    done_with(&delivery).await?;
                }
                println!("start: {task}{}", again(&delivery)?);
                work().await;
                println!("done:  {task}");
                if acknowledge == Acknowledge::AfterTheWork {
                    done_with(&delivery).await?;
                }
            }
            Verdict::SetAside => set_aside(&jetstream, &delivery).await?,
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Acknowledges, and waits until the server says that it knows. A plain `ack`
/// only queues the answer in the client, and is lost with it.
async fn done_with(delivery: &Message) -> Result<()> {
    delivery
        .double_ack()
        .await
        .map_err(Error::from_boxed)
        .context("cannot acknowledge; the task will come again")
}
// ANCHOR_END: worker

// ANCHOR: take
/// Starts to take tasks, one at a time.
async fn take_tasks(jetstream: &jetstream::Context) -> Result<pull::Stream> {
    let stream = declare(jetstream, STREAM, SUBJECT).await?;
    // Durable and shared: all workers together are one consumer, and each task
    // goes to one of them.
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the workers")?;
    // One task at a time: a worker asks for the next when it is free. By default
    // it asks for 200, and the clock of `ACK_WAIT` runs for each of them.
    let deliveries = consumer.stream().max_messages_per_batch(1).messages();
    Ok(deliveries.await?)
}
// ANCHOR_END: take

// ANCHOR: set_aside
/// Moves a message that nobody can read out of the way, without losing it:
/// stored elsewhere first, then acknowledged.
async fn set_aside(
    jetstream: &jetstream::Context,
    delivery: &Message,
) -> Result<()> {
    declare(jetstream, UNREADABLE_STREAM, UNREADABLE).await?;
    // The place in the queue as its id: moved twice, it is stored once.
    let place = delivery.info().map_err(Error::from_boxed)?.stream_sequence;
    let id = format!("{STREAM}-{place}");
    publish(jetstream, UNREADABLE, delivery.payload.clone(), &id).await?;
    done_with(delivery).await?;
    eprintln!(
        "not a task: {} bytes, kept in {UNREADABLE}",
        delivery.payload.len()
    );
    Ok(())
}
// ANCHOR_END: set_aside

async fn work() {
    sleep(WORK).await;
}

fn again(delivery: &Message) -> Result<&'static str> {
    let deliveries = delivery.info().map_err(Error::from_boxed)?.delivered;
    Ok(if deliveries > 1 { " (again)" } else { "" })
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut open = queue_tasks(&jetstream).await?;
    println!("queued: {TASKS} tasks in {SUBJECT}");

    // Worker 1 has a connection of its own, because that is what dies with it.
    let first = connect().await?;
    let mut deliveries = take_tasks(&jetstream::new(first.clone())).await?;
    let (_delivery, task) = next_task(&mut deliveries).await?;
    println!("worker 1 start: {task}");
    println!("worker 1 dies in the middle of {task}");
    drop(deliveries);
    first.drain().await?;

    let mut deliveries = take_tasks(&jetstream).await?;
    while !open.is_empty() {
        let (delivery, task) = next_task(&mut deliveries).await?;
        println!("worker 2 start: {task}{}", again(&delivery)?);
        work().await;
        done_with(&delivery).await?;
        println!("worker 2 done:  {task}");
        let headers = delivery.headers.as_ref();
        if let Some(id) = headers.and_then(|h| h.get(header::NATS_MESSAGE_ID)) {
            open.remove(id.as_str());
        }
    }
    println!("all {TASKS} tasks are done");
    client.drain().await?;
    Ok(())
}

async fn next_task(deliveries: &mut pull::Stream) -> Result<(Message, String)> {
    let delivery = timeout(PATIENCE, deliveries.next())
        .await
        .context("no task came within 15 s; has another worker taken it?")?
        .context("NATS ended the deliveries")??;
    let task = String::from_utf8_lossy(&delivery.payload).into_owned();
    Ok((delivery, task))
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

// ANCHOR: declare
/// Declares a queue that outlives a restart of the broker.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // A task is removed when it is acknowledged.
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
}
// ANCHOR_END: declare

async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
