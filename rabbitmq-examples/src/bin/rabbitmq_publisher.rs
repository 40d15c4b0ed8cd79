//! Publisher: a message is sent when the broker has confirmed it.
//!
//! Teaches: two awaits. The first hands the message to the connection, the
//! second waits until RabbitMQ has stored it. `mandatory` adds the case that a
//! confirm alone hides: no queue wanted the message.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_publisher
//! cargo run --bin rabbitmq_consumer     # before or after, as you like
//! ```
//!
//! Expected output:
//!
//! ```text
//! confirmed: Hello, RabbitMQ! (stored in the queue hello)
//! ```
//!
//! Left out on purpose: reconnecting, and many messages in flight at once.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "hello";
const MESSAGE: &str = "Hello, RabbitMQ!";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    match publish().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: publish
async fn publish() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    // Without this, the second await below answers at once and means nothing.
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;

    let confirm = channel
        .basic_publish(
            "".into(), // the default exchange: the routing key names the queue
            QUEUE.into(),
            BasicPublishOptions {
                mandatory: true, // return the message if no queue takes it
                ..BasicPublishOptions::default()
            },
            MESSAGE.as_bytes(),
            // 2 is "persistent". A quorum queue stores every message, a classic
            // one only these.
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    // A broker that is short of memory or disk stops reading, and the confirm
    // does not come.
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => {
            println!("confirmed: {MESSAGE} (stored in the queue {QUEUE})");
        }
        Confirmation::Ack(Some(returned)) => {
            bail!("returned: no queue took it ({})", returned.reply_text)
        }
        Confirmation::Nack(_) => bail!("refused: RabbitMQ did not store it"),
        Confirmation::NotRequested => bail!("confirm_select was not called"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: publish

// ANCHOR: declare
/// Declares the queue, which changes nothing if it is there already.
///
/// Durable and replicated ("quorum"): it outlives a restart of the broker. What
/// `QueueDeclareOptions::default()` makes does not.
async fn declare(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {QUEUE} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
}
// ANCHOR_END: declare

// ANCHOR: connect
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
// ANCHOR_END: connect
