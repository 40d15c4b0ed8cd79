//! More routing: from exchange to exchange.
//!
//! Teaches: an exchange can be bound to another one, as a queue can. One entrance
//! for publishers, an exchange for each team, which binds its own queues and asks
//! nobody. The destination comes first in `exchange_bind`. A queue that a message
//! reaches on two ways gets it once.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_exchange_to_exchange
//! ```
//!
//! Expected output:
//!
//! ```text
//! order.placed:    entrance.audit 1, entrance.stock.picking 1
//! payment.settled: entrance.audit 1, entrance.billing.ledger 1
//! two ways:        entrance.audit 1, entrance.stock.picking 1
//! stock unbound:   entrance.audit 1
//! ```
//!
//! Left out on purpose: exchanges of another broker, which take federation or a
//! shovel.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions,
        ExchangeDeclareOptions, ExchangeUnbindOptions, QueueBindOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const ENTRANCE: &str = "entrance";
const STOCK: &str = "entrance.stock";
const BILLING: &str = "entrance.billing";
const AUDIT_QUEUE: &str = "entrance.audit";
const LEDGER: &str = "entrance.billing.ledger";
const PICKING: &str = "entrance.stock.picking";

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
    for key in ["order.placed", "payment.settled"] {
        let counts = publish(&channel, key).await?;
        println!("{:16} {counts}", format!("{key}:"));
    }

    // The same messages, by a second binding.
    bind(&channel, STOCK, "*.placed").await?;
    let counts = publish(&channel, "order.placed").await?;
    println!("two ways:        {counts}");

    for key in ["order.#", "*.placed"] {
        unbind(&channel, STOCK, key).await?;
    }
    let counts = publish(&channel, "order.placed").await?;
    println!("stock unbound:   {counts}");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    exchange(channel, ENTRANCE, ExchangeKind::Topic).await?;
    // What each team does behind its own exchange is its own business.
    exchange(channel, STOCK, ExchangeKind::Fanout).await?;
    exchange(channel, BILLING, ExchangeKind::Fanout).await?;
    bind(channel, STOCK, "order.#").await?;
    bind(channel, BILLING, "payment.#").await?;
    for (name, source, key) in [
        (PICKING, STOCK, ""),
        (LEDGER, BILLING, ""),
        // Queues and exchanges side by side.
        (AUDIT_QUEUE, ENTRANCE, "#"),
    ] {
        queue(channel, name).await?;
        let options = QueueBindOptions::default();
        let none = FieldTable::default();
        channel
            .queue_bind(name.into(), source.into(), key.into(), options, none)
            .await?;
    }
    Ok(())
}

/// From the entrance to a team's exchange.
async fn bind(channel: &Channel, team: &str, key: &str) -> Result<()> {
    let (destination, source) = (team.into(), ENTRANCE.into());
    let options = ExchangeBindOptions::default();
    let none = FieldTable::default();
    channel
        .exchange_bind(destination, source, key.into(), options, none)
        .await?;
    Ok(())
}

async fn unbind(channel: &Channel, team: &str, key: &str) -> Result<()> {
    let (destination, source) = (team.into(), ENTRANCE.into());
    let options = ExchangeUnbindOptions::default();
    let none = FieldTable::default();
    channel
        .exchange_unbind(destination, source, key.into(), options, none)
        .await?;
    Ok(())
}
// ANCHOR_END: declare

async fn exchange(channel: &Channel, name: &str, kind: ExchangeKind) -> Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    channel
        .exchange_declare(name.into(), kind, durable, none)
        .await?;
    Ok(())
}

/// Publishes one message, and counts it in each queue.
async fn publish(channel: &Channel, key: &str) -> Result<String> {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let (options, body) = (BasicPublishOptions::default(), key.as_bytes());
    let confirm = channel
        .basic_publish(ENTRANCE.into(), key.into(), options, body, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {key}");
    let mut counts = Vec::new();
    for queue in [AUDIT_QUEUE, LEDGER, PICKING] {
        let options = QueuePurgeOptions::default();
        let count = channel.queue_purge(queue.into(), options).await?;
        if count > 0 {
            counts.push(format!("{queue} {count}"));
        }
    }
    Ok(counts.join(", "))
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
