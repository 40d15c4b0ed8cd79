//! Routing: by patterns, in which `*` is one word and `#` any number.
//!
//! Teaches: with a topic exchange a routing key has words with dots between, and a
//! binding is a pattern. `#` also stands for no word at all, which NATS's `>` does
//! not. Two patterns of one queue that both match are one copy.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_topics
//! ```
//!
//! Expected output:
//!
//! ```text
//! order.eu.*:              order.eu.placed, order.eu.paid
//! order.#:                 order, order.eu.placed, order.eu.paid, order.us.paid.late
//! *.*.paid:                order.eu.paid
//! order.eu.* and *.*.paid: order.eu.placed, order.eu.paid
//! ```
//!
//! Left out on purpose: a message that no pattern matches, which is dropped; see
//! `rabbitmq_mandatory`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "topics.orders";

/// Queue, and the patterns that are bound to it.
const QUEUES: [(&str, &[&str]); 4] = [
    ("topics.orders.europe", &["order.eu.*"]),
    ("topics.orders.audit", &["order.#"]),
    ("topics.orders.payments", &["*.*.paid"]),
    ("topics.orders.both", &["order.eu.*", "*.*.paid"]),
];

const KEYS: [&str; 4] = [
    "order",
    "order.eu.placed",
    "order.eu.paid",
    "order.us.paid.late",
];

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
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Topic,
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    for (name, patterns) in QUEUES {
        queue(&channel, name).await?;
        for pattern in patterns {
            bind(&channel, name, pattern).await?;
        }
    }

    for key in KEYS {
        // The message is its key, to see which arrive.
        publish(&channel, key, key).await?;
    }
    for (name, patterns) in QUEUES {
        let patterns = format!("{}:", patterns.join(" and "));
        let taken = take_all(&channel, name).await?.join(", ");
        println!("{patterns:24} {taken}");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: bind
/// One more pattern for this queue.
async fn bind(channel: &Channel, queue: &str, pattern: &str) -> Result<()> {
    channel
        .queue_bind(
            queue.into(),
            EXCHANGE.into(),
            pattern.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(())
}
// ANCHOR_END: bind

/// Publishes, and returns when RabbitMQ has it in all queues that it goes to.
async fn publish(channel: &Channel, key: &str, message: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            EXCHANGE.into(),
            key.into(),
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

/// What lies in a queue now. For a look this will do; a service that waits for
/// messages consumes them, as in `rabbitmq_consumer`.
async fn take_all(channel: &Channel, queue: &str) -> Result<Vec<String>> {
    let mut taken = Vec::new();
    let options = BasicGetOptions::default();
    while let Some(message) = channel.basic_get(queue.into(), options).await? {
        taken.push(String::from_utf8_lossy(&message.data).into_owned());
        message.ack(BasicAckOptions::default()).await?;
    }
    Ok(taken)
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
