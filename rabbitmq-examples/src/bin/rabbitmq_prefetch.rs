//! Prefetch: how many messages a consumer may hold without an acknowledgement.
//!
//! Teaches: without a limit the first consumer gets all that the queue has. The
//! limit is each consumer's own, and is set on the channel before the consumer. A
//! limit of one shares fairly and waits for the broker after each message; tens or
//! hundreds keep the worker busy. The old limit for a whole channel, `global`, is
//! no more: RabbitMQ 4.3 takes it, and applies it to each consumer.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_prefetch
//! ```
//!
//! Expected output:
//!
//! ```text
//! limit 3:     3 of 20 labels with the consumer, 17 wait
//! then 10:     still 3, and 10 with the next consumer, 7 wait
//! no limit:    20 with the consumer, 0 wait
//! at a time 1: 500 labels in <milliseconds> ms
//!          10: 500 labels in <milliseconds> ms
//!         250: 500 labels in <milliseconds> ms
//! global 3:    3 with each of two consumers, 14 of 20 wait
//! ```
//!
//! Left out on purpose: to share work between a quick and a slow worker, which is
//! `task_queue_rabbitmq`, and to work on several messages at once, which is
//! `rabbitmq_concurrent_consumer`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "prefetch.labels";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

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

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    queue(&channel, QUEUE).await?;
    publish_all(&channel, 20).await?;

    let worker = connection.create_channel().await?;
    let _three = consume(&worker, 3).await?;
    let left = ready(&channel, 17).await?;
    println!("limit 3:     3 of 20 labels with the consumer, {left} wait");
    // For the consumers to come; the one that is there keeps its limit.
    let _ten = consume(&worker, 10).await?;
    let left = ready(&channel, 7).await?;
    println!("then 10:     still 3, and 10 with the next consumer, {left} wait");
    // What they held goes back.
    worker.close(200, "done".into()).await?;

    let worker = connection.create_channel().await?;
    let _all = consume(&worker, 0).await?;
    let left = ready(&channel, 0).await?;
    println!("no limit:    20 with the consumer, {left} wait");
    worker.close(200, "done".into()).await?;
    // They come back a moment later, and a purge takes only what is there.
    ready(&channel, 20).await?;
    queue(&channel, QUEUE).await?;

    // An ack is sent and not answered, and one that is on its way when its channel is
    // closed can be lost: the channels stay open for a while.
    let mut open = Vec::new();
    for (begin, limit) in [("at a time", 1), ("", 10), ("", 250)] {
        publish_all(&channel, 500).await?;
        let worker = connection.create_channel().await?;
        let mut labels = consume(&worker, limit).await?;
        let milliseconds = print_all(&mut labels, 500).await?.as_millis();
        let width = 11 - begin.len();
        println!("{begin}{limit:>width$}: 500 labels in {milliseconds} ms");
        // It must not take what comes next.
        let options = BasicCancelOptions::default();
        worker.basic_cancel(labels.tag(), options).await?;
        open.push(worker);
    }
    let left = global(&channel, &connection).await?;
    println!("global 3:    3 with each of two consumers, {left} of 20 wait");
    // Nothing stays behind.
    queue(&channel, QUEUE).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: consume
async fn consume(channel: &Channel, limit: u16) -> Result<Consumer> {
    // Before the consumer. Zero is no limit.
    let each = BasicQosOptions::default();
    channel.basic_qos(limit, each).await?;
    subscribe(channel).await
}

async fn subscribe(channel: &Channel) -> Result<Consumer> {
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let labels = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(labels)
}

/// Acknowledges each label after it is printed, which takes no time here.
async fn print_all(labels: &mut Consumer, count: usize) -> Result<Duration> {
    let started = Instant::now();
    for _label in 0..count {
        let label = timeout(PATIENCE, labels.next()).await;
        let label = label.context("no label came within 8 s")?;
        let label = label.context("the queue is gone")??;
        label.ack(BasicAckOptions::default()).await?;
    }
    Ok(started.elapsed())
}
// ANCHOR_END: consume

// ANCHOR: global
/// One limit for two consumers together, as it was meant, leaves 17 of 20 waiting.
async fn global(channel: &Channel, connection: &Connection) -> Result<u32> {
    publish_all(channel, 20).await?;
    let worker = connection.create_channel().await?;
    let global = BasicQosOptions { global: true };
    worker.basic_qos(3, global).await?;
    let _first = subscribe(&worker).await?;
    let _second = subscribe(&worker).await?;
    let left = ready(channel, 14).await?;
    worker.close(200, "done".into()).await?;
    ready(channel, 20).await?;
    Ok(left)
}
// ANCHOR_END: global

/// Waits until so many messages are with nobody. Passive: it makes no queue.
async fn ready(channel: &Channel, expected: u32) -> Result<u32> {
    let mut count = 0;
    let look = async {
        loop {
            let options = QueueDeclareOptions::default().passive();
            let none = FieldTable::default();
            let queue = channel.queue_declare(QUEUE.into(), options, none).await?;
            count = queue.message_count();
            // A consumer is given its messages a moment after it is there.
            if count == expected {
                return anyhow::Ok(expected);
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let ready = timeout(PATIENCE, look).await;
    ready
        .map_err(|_elapsed| anyhow!("{count} wait after 8 s, and not {expected}"))?
}

async fn publish_all(channel: &Channel, count: usize) -> Result<()> {
    let labels: Vec<String> = (1..=count).map(|n| format!("label-{n}")).collect();
    try_join_all(labels.iter().map(|label| publish(channel, label))).await?;
    Ok(())
}

/// Publishes, and returns when RabbitMQ has it in the queue.
async fn publish(channel: &Channel, message: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            message.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {message}");
    Ok(())
}

/// A durable, replicated queue, without what an earlier run may have left in it.
async fn queue(channel: &Channel, name: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(name.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {name} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    channel
        .queue_purge(name.into(), QueuePurgeOptions::default())
        .await?;
    Ok(())
}

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
