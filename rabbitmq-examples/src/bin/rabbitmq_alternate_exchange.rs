//! Unroutable messages: caught by the broker, whoever publishes.
//!
//! Teaches: an exchange with an `alternate-exchange` hands on what none of its
//! bindings takes. So nothing is lost, also of publishers that do not insist. But
//! what is caught counts as routed: `mandatory` returns it to nobody any more.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_alternate_exchange
//! ```
//!
//! Expected output:
//!
//! ```text
//! confirmed: order-1 for europe, order-2 for mars; mandatory, none came back
//! europe:    order-1
//! unknown:   order-2 (for mars)
//! ```
//!
//! Left out on purpose: a policy, which does the same for exchanges that are there
//! already, as their arguments cannot be changed.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind,
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
const EXCHANGE: &str = "alternate.orders";
const EUROPE: &str = "alternate.orders.europe";
/// The exchange that gets what is left over, and the queue that keeps it.
const UNROUTED: &str = "alternate.unrouted";
const UNKNOWN: &str = "alternate.orders.unknown";

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

    publish(&channel, "europe", "order-1").await?;
    publish(&channel, "mars", "order-2").await?;
    println!(
        "confirmed: order-1 for europe, order-2 for mars; mandatory, none came back"
    );
    for (order, _key) in take_all(&channel, EUROPE).await? {
        println!("europe:    {order}");
    }
    // The routing key is still the publisher's: it says what was wrong.
    for (order, key) in take_all(&channel, UNKNOWN).await? {
        println!("unknown:   {order} (for {key})");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    // Internal: only other exchanges publish to it. A fanout, so that no key is
    // left over a second time.
    let internal = ExchangeDeclareOptions {
        internal: true,
        ..durable
    };
    let none = FieldTable::default;
    channel
        .exchange_declare(UNROUTED.into(), ExchangeKind::Fanout, internal, none())
        .await?;
    let mut arguments = FieldTable::default();
    arguments.insert(
        "alternate-exchange".into(),
        AMQPValue::LongString(UNROUTED.into()),
    );
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Direct, durable, arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the exchange {EXCHANGE} ({error}); if it was made \
                 with other arguments, delete it first"
            )
        })?;
    let queues = [(EUROPE, EXCHANGE, "europe"), (UNKNOWN, UNROUTED, "")];
    for (name, exchange, key) in queues {
        queue(channel, name).await?;
        let options = QueueBindOptions::default();
        channel
            .queue_bind(name.into(), exchange.into(), key.into(), options, none())
            .await?;
    }
    Ok(())
}
// ANCHOR_END: declare

/// Publishes, insisting on a queue that takes it.
async fn publish(channel: &Channel, key: &str, message: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            EXCHANGE.into(),
            key.into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            message.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
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

/// What lies in a queue now, each with its routing key. For a look this will do; a
/// service that waits for messages consumes them, as in `rabbitmq_consumer`.
async fn take_all(channel: &Channel, queue: &str) -> Result<Vec<(String, String)>> {
    let mut taken = Vec::new();
    let options = BasicGetOptions::default();
    while let Some(message) = channel.basic_get(queue.into(), options).await? {
        let text = String::from_utf8_lossy(&message.data).into_owned();
        taken.push((text, message.routing_key.to_string()));
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
