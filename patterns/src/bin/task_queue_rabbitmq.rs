//! Task queue: each task goes to one worker, and outlives a worker that dies.
//!
//! Teaches: a durable queue, persistent tasks with confirms, one task at a time
//! for each worker (prefetch 1), and the acknowledgement after the work. A
//! killed worker's task goes to another; acknowledge first, and it is lost.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin task_queue_rabbitmq                       # the whole story
//! cargo run --bin task_queue_rabbitmq worker                # terminal 1, and 2
//! cargo run --bin task_queue_rabbitmq producer              # terminal 3
//! cargo run --bin task_queue_rabbitmq worker --ack-first    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued: 10 tasks in task_queue
//! worker 1 start: Task 0
//! worker 1 dies in the middle of Task 0
//! worker 2 start: Task 0 (again)
//! worker 2 done:  Task 0
//! ...
//! worker 2 start: Task 9
//! worker 2 done:  Task 9
//! all 10 tasks are done
//! ```
//!
//! Left out on purpose: reconnecting, and a limit of our own on attempts. A
//! quorum queue drops a task after 20 failed deliveries, unless a dead-letter
//! exchange catches it.

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

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::task_queue::{TASKS, Verdict, tasks, verdict};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "task_queue";
/// Where tasks go that no worker can read.
const UNREADABLE: &str = "task_queue_unreadable";
const CONSUMER_TAG: &str = "task-worker";
const USAGE: &str = "usage: task_queue_rabbitmq [producer | worker [--ack-first]]";

/// How long a task takes: long enough to kill its worker in the middle.
const WORK: Duration = Duration::from_millis(300);

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

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
    let connection = connect().await?;
    // Lives until the connection is closed: a channel that is dropped closes in
    // the background, and `close` fails while that is going on.
    let channel = connection.create_channel().await?;
    queue_tasks(&channel).await?;
    println!("queued: {TASKS} tasks in {QUEUE}");
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: producer
/// Queues all tasks and returns their message ids, once every one is confirmed.
async fn queue_tasks(channel: &Channel) -> Result<HashSet<String>> {
    declare(channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;

    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let mut ids = HashSet::new();
    for (number, task) in tasks().enumerate() {
        // A task may be delivered twice; by its id a worker can tell.
        let id = format!("{run}-{number}");
        let properties =
            BasicProperties::default().with_message_id(id.clone().into());
        publish(channel, QUEUE, task.as_bytes(), properties).await?;
        ids.insert(id);
    }
    Ok(ids)
}

/// Puts one message into a queue and waits until RabbitMQ has stored it.
async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions {
                mandatory: true, // return it if no queue takes it
                ..BasicPublishOptions::default()
            },
            payload,
            properties.with_delivery_mode(2), // persistent
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => {
            bail!("{queue} did not take it: {}", returned.reply_text)
        }
        Confirmation::Nack(_) => bail!("{queue} refused it"),
        Confirmation::NotRequested => bail!("confirm_select was not called"),
    }
}
// ANCHOR_END: producer

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(acknowledge: Acknowledge) -> Result<()> {
    let connection = connect().await?;
    let (channel, mut deliveries) = take_tasks(&connection).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for tasks in {QUEUE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ; the task in hand will go to another worker")?;
        match verdict(&delivery.data) {
            Verdict::Work(task) => {
                if acknowledge == Acknowledge::First {
                    delivery.ack(BasicAckOptions::default()).await?;
                }
                println!("start: {task}{}", again(&delivery));
                work().await;
                println!("done:  {task}");
                if acknowledge == Acknowledge::AfterTheWork {
                    delivery.ack(BasicAckOptions::default()).await?;
                }
            }
            Verdict::SetAside => set_aside(&channel, &delivery).await?,
        }
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: take
/// Starts to consume, one task at a time.
async fn take_tasks(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    // For the tasks that are set aside.
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    // One task at a time: a worker that is busy gets no second one, which goes
    // to a worker that is free. Without it RabbitMQ deals out in turns.
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
}
// ANCHOR_END: take

// ANCHOR: set_aside
/// Moves a message that nobody can read out of the way, without losing it:
/// stored elsewhere first, then acknowledged.
async fn set_aside(channel: &Channel, delivery: &Delivery) -> Result<()> {
    declare(channel, UNREADABLE).await?;
    let properties = delivery.properties.clone();
    publish(channel, UNREADABLE, &delivery.data, properties).await?;
    delivery.ack(BasicAckOptions::default()).await?;
    eprintln!(
        "not a task: {} bytes, kept in {UNREADABLE}",
        delivery.data.len()
    );
    Ok(())
}
// ANCHOR_END: set_aside

async fn work() {
    sleep(WORK).await;
}

fn again(delivery: &Delivery) -> &'static str {
    if delivery.redelivered { " (again)" } else { "" }
}

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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let mut open = queue_tasks(&channel).await?;
    println!("queued: {TASKS} tasks in {QUEUE}");

    // Worker 1 has a connection of its own, because that is what dies with it.
    let first = connect().await?;
    let (_channel, mut deliveries) = take_tasks(&first).await?;
    let (_delivery, task) = next_task(&mut deliveries).await?;
    println!("worker 1 start: {task}");
    println!("worker 1 dies in the middle of {task}");
    first.close(200, "worker 1 dies".into()).await?;

    let (_channel, mut deliveries) = take_tasks(&connection).await?;
    while !open.is_empty() {
        let (delivery, task) = next_task(&mut deliveries).await?;
        println!("worker 2 start: {task}{}", again(&delivery));
        work().await;
        delivery.ack(BasicAckOptions::default()).await?;
        println!("worker 2 done:  {task}");
        if let Some(id) = delivery.properties.message_id() {
            open.remove(id.as_str());
        }
    }
    println!("all {TASKS} tasks are done");
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn next_task(deliveries: &mut Consumer) -> Result<(Delivery, String)> {
    let delivery = timeout(PATIENCE, deliveries.next())
        .await
        .context("no task came within 8 s; has another worker taken it?")?
        .context("RabbitMQ ended the consumer")??;
    let task = String::from_utf8_lossy(&delivery.data).into_owned();
    Ok((delivery, task))
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

// ANCHOR: declare
/// Declares a queue that outlives a restart of the broker.
async fn declare(channel: &Channel, queue: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {queue} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
}
// ANCHOR_END: declare

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
