//! Single active consumer: one works, the others stand by.
//!
//! Teaches: a ledger must be written in order, so one consumer at a time, and still
//! somebody must take over. With `x-single-active-consumer` the queue sends all to
//! one and turns to the next when that one is gone. An exclusive consumer is the
//! harder way: a second is refused, and has to try again by itself.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_single_active_consumer
//! ```
//!
//! Expected output:
//!
//! ```text
//! both consume: A gets entry-1, entry-2, entry-3; B gets none
//! A is gone:    B gets entry-3 (again), entry-4
//! exclusive:    a second consumer is refused (ACCESS_REFUSED)
//! ```
//!
//! Left out on purpose: fencing. A that is only slow, and taken for gone, may write
//! once more after B has begun; what it writes to must refuse that.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::{StreamExt as _, future::poll_once};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "single.ledger";
const EXCLUSIVE: &str = "single.ledger.exclusive";
/// One at a time: what the active one holds comes again to the next, before what it
/// has not seen.
const PREFETCH: u16 = 1;

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
    declare(&channel).await?;
    // Channels of their own, as if they were two programs.
    let (at_a, at_b) = (
        connection.create_channel().await?,
        connection.create_channel().await?,
    );
    let shared = BasicConsumeOptions::default();
    let mut a = consume(&at_a, QUEUE, shared).await?;
    let mut b = consume(&at_b, QUEUE, shared).await?;

    for entry in ["entry-1", "entry-2", "entry-3", "entry-4"] {
        publish(&channel, entry).await?;
    }
    for entry in ["entry-1", "entry-2"] {
        let delivery = next(&mut a, entry).await?;
        delivery.ack(BasicAckOptions::default()).await?;
    }
    // Not acknowledged, as if A died over it.
    next(&mut a, "entry-3").await?;
    ensure!(poll_once(b.next()).await.is_none(), "B has got something");
    println!("both consume: A gets entry-1, entry-2, entry-3; B gets none");

    at_a.close(200, "gone".into()).await?;
    let third = next(&mut b, "entry-3").await?;
    ensure!(third.redelivered, "it is not marked");
    third.ack(BasicAckOptions::default()).await?;
    let fourth = next(&mut b, "entry-4").await?;
    fourth.ack(BasicAckOptions::default()).await?;
    println!("A is gone:    B gets entry-3 (again), entry-4");

    let alone = BasicConsumeOptions {
        exclusive: true,
        ..BasicConsumeOptions::default()
    };
    let first = consume(&at_b, EXCLUSIVE, alone).await?;
    let other = connection.create_channel().await?;
    match consume(&other, EXCLUSIVE, alone).await {
        Err(error) if error.to_string().contains("ACCESS_REFUSED") => {
            println!("exclusive:    a second consumer is refused (ACCESS_REFUSED)");
        }
        other => bail!("two consumers at a time: {other:?}"),
    }
    drop(first);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    // Classic, for a quorum queue lets a second exclusive consumer in.
    arguments.insert("x-queue-type".into(), text("classic"));
    queue(channel, EXCLUSIVE, arguments).await?;

    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    // Of the queue, so no consumer can forget it.
    arguments.insert("x-single-active-consumer".into(), true.into());
    queue(channel, QUEUE, arguments).await
}
// ANCHOR_END: declare

async fn consume(
    channel: &Channel,
    queue: &str,
    options: BasicConsumeOptions,
) -> Result<Consumer> {
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(queue.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
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

/// A durable queue, without what an earlier run may have left in it.
async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> Result<()> {
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
