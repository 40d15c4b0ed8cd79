//! Publish/subscribe: every service gets its own copy of each message.
//!
//! Teaches: a publisher knows an exchange and no queue. A fanout exchange copies
//! each message into every queue that is bound to it at that moment. A durable
//! queue of its own keeps a service's copies while the service is away; a queue
//! that is bound later has missed what came before.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_fanout
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: order-1, then a dashboard comes, then order-2
//! billing:   order-1, order-2
//! stock:     order-1, order-2
//! dashboard: order-2
//! ```
//!
//! Left out on purpose: services that wait for their messages; each would consume
//! its queue as `rabbitmq_consumer` does.

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
const EXCHANGE: &str = "fanout.orders";
const BILLING: &str = "fanout.orders.billing";
const STOCK: &str = "fanout.orders.stock";

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
            ExchangeKind::Fanout,
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    for name in [BILLING, STOCK] {
        queue(&channel, name).await?;
        subscribe(&channel, name).await?;
    }

    publish(&channel, "", "order-1").await?;
    // Exclusive: for this connection alone, and gone with it. A dashboard that is
    // closed wants no copies. RabbitMQ makes up the name.
    let dashboard = channel
        .queue_declare(
            "".into(),
            QueueDeclareOptions::exclusive(),
            FieldTable::default(),
        )
        .await?;
    let dashboard = dashboard.name().to_string();
    subscribe(&channel, &dashboard).await?;
    publish(&channel, "", "order-2").await?;
    println!("published: order-1, then a dashboard comes, then order-2");

    for (who, queue) in [
        ("billing:  ", BILLING),
        ("stock:    ", STOCK),
        ("dashboard:", &dashboard),
    ] {
        println!("{who} {}", take_all(&channel, queue).await?.join(", "));
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: subscribe
/// From now on the queue gets a copy of each message. A fanout exchange looks at
/// no routing key.
async fn subscribe(channel: &Channel, queue: &str) -> Result<()> {
    channel
        .queue_bind(
            queue.into(),
            EXCHANGE.into(),
            "".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(())
}
// ANCHOR_END: subscribe

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
