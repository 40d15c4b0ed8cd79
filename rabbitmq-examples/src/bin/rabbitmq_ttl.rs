//! Expiry: a message has its time, and is only looked at when it is first.
//!
//! Teaches: a time limit may be on the message (`expiration`) or on the queue
//! (`x-message-ttl`). The first is checked when the message is at the head: behind
//! one that may live longer it stays, counts and takes room. In a queue with one
//! limit for all, the oldest is always the next to go, so they go in time.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_ttl
//! ```
//!
//! Expected output:
//!
//! ```text
//! on the message: offer-2 is over, and the queue still holds 2
//! on the message: offer-1 is taken, and offer-2 never comes
//! on the queue:   both are over, and the queue holds 0
//! ```
//!
//! Left out on purpose: what becomes of them; with a dead letter exchange they are
//! kept, see `rabbitmq_dead_letter`. And `x-expires`, which deletes unused queues.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const BY_MESSAGE: &str = "ttl.offers.by-message";
const BY_QUEUE: &str = "ttl.offers.by-queue";
/// How long an offer stands, in milliseconds.
const MILLISECONDS: i32 = 200;
/// When it is certainly over.
const LATER: Duration = Duration::from_secs(1);

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

    // Milliseconds, as text. Without it, no end.
    let limit = MILLISECONDS.to_string();
    publish(&channel, BY_MESSAGE, "offer-1", None).await?;
    publish(&channel, BY_MESSAGE, "offer-2", Some(&limit)).await?;
    publish(&channel, BY_QUEUE, "offer-3", None).await?;
    publish(&channel, BY_QUEUE, "offer-4", None).await?;

    sleep(LATER).await;
    let count = ready(&channel, BY_MESSAGE).await?;
    println!("on the message: offer-2 is over, and the queue still holds {count}");
    let first = take(&channel, BY_MESSAGE).await?;
    let first = first.context("offer-1 is not there")?;
    let second = take(&channel, BY_MESSAGE).await?;
    ensure!(second.is_none(), "{second:?} came, which is over");
    println!("on the message: {first} is taken, and offer-2 never comes");

    let count = ready(&channel, BY_QUEUE).await?;
    println!("on the queue:   both are over, and the queue holds {count}");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let quorum = AMQPValue::LongString("quorum".into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), quorum);
    queue(channel, BY_MESSAGE, arguments.clone()).await?;
    // If a message has a limit as well, the shorter one holds.
    arguments.insert("x-message-ttl".into(), MILLISECONDS.into());
    queue(channel, BY_QUEUE, arguments).await
}
// ANCHOR_END: declare

async fn take(channel: &Channel, queue: &str) -> Result<Option<String>> {
    let options = BasicGetOptions::default();
    let Some(message) = channel.basic_get(queue.into(), options).await? else {
        return Ok(None);
    };
    message.ack(BasicAckOptions::default()).await?;
    Ok(Some(String::from_utf8_lossy(&message.data).into_owned()))
}

/// How many messages the queue would hand out. Passive: it makes no queue.
async fn ready(channel: &Channel, queue: &str) -> Result<u32> {
    let options = QueueDeclareOptions::default().passive();
    let none = FieldTable::default();
    let queue = channel.queue_declare(queue.into(), options, none).await?;
    Ok(queue.message_count())
}

async fn publish(
    channel: &Channel,
    queue: &str,
    offer: &str,
    milliseconds: Option<&str>,
) -> Result<()> {
    let mut properties = BasicProperties::default().with_delivery_mode(2);
    if let Some(milliseconds) = milliseconds {
        properties = properties.with_expiration(milliseconds.into());
    }
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            offer.as_bytes(),
            properties,
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {offer}");
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
