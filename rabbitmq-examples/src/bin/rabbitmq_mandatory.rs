//! Unroutable messages: returned to a publisher that insists.
//!
//! Teaches: RabbitMQ confirms a message that no queue wants, as there is nothing
//! to store, and drops it. With `mandatory` it sends the message back; lapin hands
//! it over inside of the confirmation. A missing exchange is another case: it
//! closes the channel.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_mandatory
//! ```
//!
//! Expected output:
//!
//! ```text
//! careless:  order-1 for mars is confirmed, and nowhere
//! mandatory: order-2 for mars came back (312 NO_ROUTE)
//! mandatory: order-3 for europe is confirmed, and in the queue
//! no such exchange: order-4 closes the channel (404 NOT_FOUND)
//! the connection is open, and a new channel works
//! ```
//!
//! Left out on purpose: several publishes in flight. Then a returned message may
//! hang on another's confirmation: `rabbitmq_confirms_pipelined`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
        QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "mandatory.orders";
const QUEUE: &str = "mandatory.orders.europe";
/// The key that is bound, and one that is not.
const EUROPE: &str = "europe";
const MARS: &str = "mars";

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
    let channel = confirming(&connection).await?;
    declare(&channel).await?;

    let answer = publish(&channel, EXCHANGE, MARS, "order-1", false).await?;
    ensure!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    println!("careless:  order-1 for {MARS} is confirmed, and nowhere");

    match publish(&channel, EXCHANGE, MARS, "order-2", true).await? {
        Confirmation::Ack(Some(returned)) => {
            let order = String::from_utf8_lossy(&returned.delivery.data);
            println!(
                "mandatory: {order} for {MARS} came back ({} {})",
                returned.reply_code, returned.reply_text
            );
        }
        answer => bail!("somebody has bound {MARS}: {answer:?}"),
    }
    let answer = publish(&channel, EXCHANGE, EUROPE, "order-3", true).await?;
    ensure!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    println!("mandatory: order-3 for {EUROPE} is confirmed, and in the queue");

    match publish(&channel, "mandatory.nowhere", MARS, "order-4", true).await {
        Err(error) if error.to_string().contains("NOT_FOUND") => {
            println!("no such exchange: order-4 closes the channel (404 NOT_FOUND)");
        }
        answer => bail!("there is an exchange mandatory.nowhere: {answer:?}"),
    }
    ensure!(!channel.status().connected(), "the channel is open");
    let another = confirming(&connection).await?;
    publish(&another, EXCHANGE, EUROPE, "order-5", true).await?;
    println!("the connection is open, and a new channel works");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: publish
async fn publish(
    channel: &Channel,
    exchange: &str,
    key: &str,
    message: &str,
    mandatory: bool,
) -> Result<Confirmation> {
    let confirm = channel
        .basic_publish(
            exchange.into(),
            key.into(),
            BasicPublishOptions {
                mandatory,
                // Not `immediate`: RabbitMQ does not know it, and closes the
                // connection.
                ..BasicPublishOptions::default()
            },
            message.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    Ok(answer)
}
// ANCHOR_END: publish

/// Without confirms, a returned message would be seen by nobody.
async fn confirming(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await?;
    Ok(channel)
}

async fn declare(channel: &Channel) -> Result<()> {
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
    queue(channel, QUEUE).await?;
    channel
        .queue_bind(
            QUEUE.into(),
            EXCHANGE.into(),
            EUROPE.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
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
