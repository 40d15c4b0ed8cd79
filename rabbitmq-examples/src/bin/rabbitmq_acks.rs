//! Acknowledgements: done, again, or gone.
//!
//! Teaches: a delivery ends by one of four words. `ack` deletes it, `reject` and
//! `nack` give it back or delete it, and the default of both is to delete. `ack`
//! with `multiple` is for all that came before as well. To acknowledge twice is an
//! `Ok(false)`, no error. What was delivered and not acknowledged when the channel
//! closes comes again.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_acks
//! ```
//!
//! Expected output:
//!
//! ```text
//! ack:               return-1 is done; a second ack is Ok(false)
//! reject, requeue:   return-2 comes again, redelivered
//! reject:            return-2 is deleted
//! nack by default:   return-3 is deleted
//! ack with multiple: return-4, return-5 and return-6 are done
//! channel closed:    return-7 comes again, redelivered
//! left:              0 messages
//! ```
//!
//! Left out on purpose: a place for what is deleted (`rabbitmq_dead_letter`), and a
//! limit for what comes again and again (`rabbitmq_delivery_limit`).

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions,
        BasicQosOptions, BasicRejectOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "acks.returns";
/// Room for the three that are acknowledged together.
const PREFETCH: u16 = 3;

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
    // A channel of its own, as the end of it is a part of the story.
    let worker = connection.create_channel().await?;
    let mut returns = consume(&worker).await?;

    publish(&channel, "return-1").await?;
    let one = next(&mut returns, "return-1").await?;
    one.ack(BasicAckOptions::default()).await?;
    let second = one.ack(BasicAckOptions::default()).await?;
    ensure!(!second, "RabbitMQ was told a second time");
    println!("ack:               return-1 is done; a second ack is Ok(false)");

    publish(&channel, "return-2").await?;
    let two = next(&mut returns, "return-2").await?;
    two.reject(BasicRejectOptions { requeue: true }).await?;
    let two = next(&mut returns, "return-2").await?;
    ensure!(two.redelivered, "it is not marked");
    println!("reject, requeue:   return-2 comes again, redelivered");
    // Says `requeue: false`.
    two.reject(BasicRejectOptions::default()).await?;
    println!("reject:            return-2 is deleted");

    publish(&channel, "return-3").await?;
    let three = next(&mut returns, "return-3").await?;
    three.nack(BasicNackOptions::default()).await?;
    println!("nack by default:   return-3 is deleted");

    for name in ["return-4", "return-5", "return-6"] {
        publish(&channel, name).await?;
    }
    next(&mut returns, "return-4").await?;
    next(&mut returns, "return-5").await?;
    let six = next(&mut returns, "return-6").await?;
    six.ack(BasicAckOptions { multiple: true }).await?;
    println!("ack with multiple: return-4, return-5 and return-6 are done");

    publish(&channel, "return-7").await?;
    next(&mut returns, "return-7").await?;
    worker.close(200, "done".into()).await?;
    let worker = connection.create_channel().await?;
    let mut returns = consume(&worker).await?;
    let seven = next(&mut returns, "return-7").await?;
    ensure!(seven.redelivered, "it is not marked");
    seven.ack(BasicAckOptions::default()).await?;
    println!("channel closed:    return-7 comes again, redelivered");
    // What is with a consumer does not count; the end of the channel gives it back.
    worker.close(200, "done".into()).await?;
    println!("left:              {} messages", ready(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: consume
async fn consume(channel: &Channel) -> Result<Consumer> {
    // Before the consumer: it holds for those that come after it.
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}
// ANCHOR_END: consume

async fn next(returns: &mut Consumer, expected: &str) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, returns.next()).await;
    let delivery =
        delivery.with_context(|| format!("{expected} did not come within 8 s"))?;
    let delivery = delivery.context("the queue is gone")??;
    let text = String::from_utf8_lossy(&delivery.data);
    ensure!(text == expected, "{text} came, and not {expected}");
    Ok(delivery)
}

/// How many messages are in the queue. Passive: it makes none.
async fn ready(channel: &Channel) -> Result<u32> {
    let options = QueueDeclareOptions::default().passive();
    let none = FieldTable::default();
    let queue = channel.queue_declare(QUEUE.into(), options, none).await?;
    Ok(queue.message_count())
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
