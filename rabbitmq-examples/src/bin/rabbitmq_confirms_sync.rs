//! Confirms: one message at a time, and the four answers that there are.
//!
//! Teaches: the second await of a publish has four outcomes, and only one of them
//! is "stored". None of them is an `Err`, so `?` sees nothing: match on the
//! `Confirmation`. An `Err` means that nobody knows, as the channel is gone.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_confirms_sync
//! ```
//!
//! Expected output:
//!
//! ```text
//! not requested: payment-1, on a channel without confirms
//! stored:        payment-2
//! refused:       payment-3, the queue is full
//! returned:      payment-4, no queue has this name
//! ```
//!
//! Left out on purpose: speed. One message at a time waits for the broker's disk
//! each time; see `rabbitmq_confirms_batch` and `rabbitmq_confirms_pipelined`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "confirms.sync.payments";
/// Room for two, so that the third is refused.
const ROOM: i32 = 2;

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
    declare(&channel).await?;

    // It is in the queue. Nobody has said so.
    publish(&channel, QUEUE, "payment-1").await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, QUEUE, "payment-2").await?;
    publish(&channel, QUEUE, "payment-3").await?;
    publish(&channel, "confirms.sync.nobody", "payment-4").await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: publish
async fn publish(channel: &Channel, queue: &str, payment: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            payment.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => println!("stored:        {payment}"),
        Confirmation::Ack(Some(_returned)) => {
            println!("returned:      {payment}, no queue has this name");
        }
        Confirmation::Nack(_) => {
            println!("refused:       {payment}, the queue is full");
        }
        Confirmation::NotRequested => {
            println!("not requested: {payment}, on a channel without confirms");
        }
    }
    Ok(())
}
// ANCHOR_END: publish

/// A queue that refuses what it has no room for. Classic, because a quorum queue
/// may let some more in before it refuses.
async fn declare(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments.insert("x-max-length".into(), ROOM.into());
    arguments.insert("x-overflow".into(), text("reject-publish"));
    channel
        .queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {QUEUE} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    // What an earlier run has left takes room.
    channel
        .queue_purge(QUEUE.into(), QueuePurgeOptions::default())
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
