//! The end of a consumer: four ways, and what becomes of what it holds.
//!
//! Teaches: after `basic_cancel` what is on its way still comes, then the stream
//! ends; finish it, and nothing is lost or done twice. A consumer that is only
//! dropped keeps its messages from all others until the channel is closed. A queue
//! that is deleted ends the stream without an error, so the end of a stream is
//! something to report.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_consumer_cancel
//! ```
//!
//! Expected output:
//!
//! ```text
//! cancelled: job-1, job-2, job-3 still come, then the end
//! dropped:   0 are ready for others
//! closed:    its channel; 3 are ready for others
//! deleted:   the queue; the end, and no error
//! ```
//!
//! Left out on purpose: a lost connection, which is an `Err` and then the end.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "cancel.jobs";
const JOBS: [&str; 3] = ["job-1", "job-2", "job-3"];
/// All of them are handed out at once.
const PREFETCH: u16 = 10;

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

    // What a program does that is asked to stop.
    let (worker, jobs) = handed_out(&connection, &channel).await?;
    finish(&worker, jobs).await?;
    println!("cancelled: {} still come, then the end", JOBS.join(", "));

    let (worker, jobs) = handed_out(&connection, &channel).await?;
    drop(jobs);
    let count = ready(&channel).await?;
    println!("dropped:   {count} are ready for others");
    worker.close(200, "done".into()).await?;
    wait_for(&channel, 3).await?;
    println!("closed:    its channel; 3 are ready for others");

    queue(&channel, QUEUE).await?;
    let (_worker, mut jobs) = handed_out(&connection, &channel).await?;
    for job in JOBS {
        let job = next(&mut jobs, job).await?;
        job.ack(BasicAckOptions::default()).await?;
    }
    channel
        .queue_delete(QUEUE.into(), QueueDeleteOptions::default())
        .await?;
    let end = timeout(PATIENCE, jobs.next()).await;
    ensure!(end.context("no end within 8 s")?.is_none(), "no end");
    println!("deleted:   the queue; the end, and no error");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: finish
/// Takes no more, does what is on its way, and returns at the end of it.
async fn finish(worker: &Channel, mut jobs: Consumer) -> Result<()> {
    let options = BasicCancelOptions::default();
    worker.basic_cancel(jobs.tag(), options).await?;
    for job in JOBS {
        let job = next(&mut jobs, job).await?;
        job.ack(BasicAckOptions::default()).await?;
    }
    let end = timeout(PATIENCE, jobs.next()).await;
    ensure!(end.context("no end within 8 s")?.is_none(), "one too many");
    Ok(())
}
// ANCHOR_END: finish

/// A consumer, on a channel of its own, that has been handed all three jobs.
async fn handed_out(
    connection: &Connection,
    channel: &Channel,
) -> Result<(Channel, Consumer)> {
    let worker = connection.create_channel().await?;
    worker
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let jobs = worker
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    for job in JOBS {
        publish(channel, job).await?;
    }
    wait_for(channel, 0).await?;
    Ok((worker, jobs))
}

/// Returns when so many messages are in the queue, with no consumer.
async fn wait_for(channel: &Channel, count: u32) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let ready = ready(channel).await?;
        if ready == count {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{ready} messages are ready");
        sleep(Duration::from_millis(20)).await;
    }
}

/// How many messages are in the queue. Passive: it makes none.
async fn ready(channel: &Channel) -> Result<u32> {
    let options = QueueDeclareOptions::default().passive();
    let none = FieldTable::default();
    let queue = channel.queue_declare(QUEUE.into(), options, none).await?;
    Ok(queue.message_count())
}

async fn next(consumer: &mut Consumer, expected: &str) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, consumer.next()).await;
    let delivery =
        delivery.with_context(|| format!("{expected} did not come within 8 s"))?;
    let delivery = delivery.context("the queue is gone")??;
    let text = String::from_utf8_lossy(&delivery.data);
    ensure!(text == expected, "{text} came, and not {expected}");
    Ok(delivery)
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
