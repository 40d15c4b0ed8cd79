//! Routing: by an exact key, with several keys for one queue.
//!
//! Teaches: a direct exchange compares the routing key of a message with the keys
//! of its bindings. A queue may have several bindings, several queues may have the
//! same key, and a message whose key nobody has bound is dropped, confirmed all
//! the same.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_direct_routing
//! ```
//!
//! Expected output:
//!
//! ```text
//! ledger:  captured payment-1, refunded payment-2, declined payment-3
//! support: refunded payment-2, declined payment-3
//! nobody:  disputed payment-4
//! ```
//!
//! Left out on purpose: to notice that nobody wants a message, as
//! `rabbitmq_mandatory` and `rabbitmq_alternate_exchange` do.

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
const EXCHANGE: &str = "direct.payments";
/// Queue and the keys that it wants.
const LEDGER: (&str, &[&str]) = (
    "direct.payments.ledger",
    &["captured", "refunded", "declined"],
);
const SUPPORT: (&str, &[&str]) =
    ("direct.payments.support", &["refunded", "declined"]);

/// Routing key and message.
const PAYMENTS: [(&str, &str); 4] = [
    ("captured", "payment-1"),
    ("refunded", "payment-2"),
    ("declined", "payment-3"),
    ("disputed", "payment-4"),
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
            ExchangeKind::Direct,
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    for (name, keys) in [LEDGER, SUPPORT] {
        queue(&channel, name).await?;
        for key in keys {
            bind(&channel, name, key).await?;
        }
    }

    for (key, payment) in PAYMENTS {
        publish(&channel, key, payment).await?;
    }
    let ledger = take_all(&channel, LEDGER.0).await?;
    let support = take_all(&channel, SUPPORT.0).await?;
    println!("ledger:  {}", ledger.join(", "));
    println!("support: {}", support.join(", "));
    for (key, payment) in PAYMENTS {
        let one = format!("{key} {payment}");
        if !ledger.contains(&one) && !support.contains(&one) {
            println!("nobody:  {one}");
        }
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: bind
/// One more key for this queue. To bind twice is to bind once.
async fn bind(channel: &Channel, queue: &str, key: &str) -> Result<()> {
    channel
        .queue_bind(
            queue.into(),
            EXCHANGE.into(),
            key.into(),
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

/// What lies in a queue now, with its routing keys. For a look this will do; a
/// service that waits for messages consumes them, as in `rabbitmq_consumer`.
async fn take_all(channel: &Channel, queue: &str) -> Result<Vec<String>> {
    let mut taken = Vec::new();
    let options = BasicGetOptions::default();
    while let Some(message) = channel.basic_get(queue.into(), options).await? {
        let text = String::from_utf8_lossy(&message.data);
        taken.push(format!("{} {text}", message.routing_key));
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
