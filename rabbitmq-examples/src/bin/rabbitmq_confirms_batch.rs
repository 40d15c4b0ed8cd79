//! Confirms: many messages, then wait for all of their confirms.
//!
//! Teaches: keep the futures that `basic_publish` gives, and await them together:
//! the broker stores the whole batch in a few writes. `wait_for_confirms` looks
//! like the same in one call, but it returns with the last message and keeps
//! refusals to itself (lapin 4.12).
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_confirms_batch
//! ```
//!
//! Expected output:
//!
//! ```text
//! futures:           3 stored, 2 refused (payment-4, payment-5)
//! wait_for_confirms: no error, and 3 of 5 are in the queue
//! ```
//!
//! Left out on purpose: publishing while the batch is being confirmed, which is
//! the quickest: `rabbitmq_confirms_pipelined`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    PublisherConfirm,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "confirms.batch.payments";
const BATCH: usize = 5;
/// Room for fewer than the batch, so that some are refused.
const ROOM: i32 = 3;

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
    let confirms = publish_batch(&channel).await?;
    let (mut stored, mut refused) = (0, Vec::new());
    // In the order of the publishes: the answer of each message is at its place.
    for (number, answer) in (1..).zip(all(confirms).await?) {
        match answer {
            Confirmation::Ack(_) => stored += 1,
            _ => refused.push(format!("payment-{number}")),
        }
    }
    println!(
        "futures:           {stored} stored, {} refused ({})",
        refused.len(),
        refused.join(", ")
    );

    // The same once more, with the shortcut.
    declare(&channel).await?;
    drop(publish_batch(&channel).await?);
    let returned = timeout(PATIENCE, channel.wait_for_confirms()).await??;
    ensure!(returned.is_empty(), "{} came back", returned.len());
    let count = declare_passively(&channel).await?;
    println!("wait_for_confirms: no error, and {count} of {BATCH} are in the queue");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: batch
/// Hands the batch to the connection. Each future that comes back is the promise
/// of an answer for one message.
async fn publish_batch(channel: &Channel) -> Result<Vec<PublisherConfirm>> {
    let mut confirms = Vec::new();
    for number in 1..=BATCH {
        let confirm = channel
            .basic_publish(
                "".into(),
                QUEUE.into(),
                BasicPublishOptions::default(),
                format!("payment-{number}").as_bytes(),
                BasicProperties::default().with_delivery_mode(2),
            )
            .await?;
        confirms.push(confirm);
    }
    Ok(confirms)
}

async fn all(confirms: Vec<PublisherConfirm>) -> Result<Vec<Confirmation>> {
    timeout(PATIENCE, try_join_all(confirms))
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")?
        .map_err(Into::into)
}
// ANCHOR_END: batch

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

/// How many messages are ready in the queue. Passive: it makes no queue.
async fn declare_passively(channel: &Channel) -> Result<u32> {
    let options = QueueDeclareOptions::default().passive();
    let queue = channel
        .queue_declare(QUEUE.into(), options, FieldTable::default())
        .await?;
    Ok(queue.message_count())
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
