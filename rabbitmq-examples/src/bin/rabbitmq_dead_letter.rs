//! Dead letters: what a queue gives up goes to another, with the reason.
//!
//! Teaches: three ways to die. A consumer rejects a message without requeueing, its
//! time is over, or the queue is full and drops its oldest. With a dead letter
//! exchange none of them is lost, and `x-death` says which queue gave it up, why,
//! and how often. Without one all three are silent losses.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_dead_letter
//! ```
//!
//! Expected output:
//!
//! ```text
//! rejected: shipment-1, 1 time by dead.shipments, carrier dhl
//! expired:  shipment-2, 1 time by dead.shipments, carrier dhl
//! maxlen:   shipment-3, 1 time by dead.shipments, carrier dhl
//! left:     shipment-4 in dead.shipments
//! ```
//!
//! Left out on purpose: the strategy `at-least-once`, with which a quorum queue
//! keeps a message until its dead letter is confirmed; a queue with it refuses
//! publishes when it is full, and drops none.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    ExchangeKind,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        BasicQosOptions, BasicRejectOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "dead.shipments";
/// The exchange for dead letters, and the queue that keeps them.
const EXCHANGE: &str = "dead.letters";
const LETTERS: &str = "dead.letters.kept";
const ROOM: i32 = 1;

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
    let mut letters = letters(&channel).await?;

    publish(&channel, "shipment-1", None).await?;
    let shipment = channel
        .basic_get(QUEUE.into(), BasicGetOptions::default())
        .await?
        .context("shipment-1 is not there")?;
    // `requeue: false` is also the default of `BasicNackOptions`: without a dead
    // letter exchange, a careless nack deletes.
    let reject = BasicRejectOptions { requeue: false };
    shipment.reject(reject).await?;
    println!("{}", obituary(&mut letters).await?);

    publish(&channel, "shipment-2", Some("50")).await?;
    println!("{}", obituary(&mut letters).await?);

    // The queue has room for one, and makes it by dropping the oldest.
    publish(&channel, "shipment-3", None).await?;
    publish(&channel, "shipment-4", None).await?;
    println!("{}", obituary(&mut letters).await?);

    let left = channel
        .basic_get(QUEUE.into(), BasicGetOptions::default())
        .await?
        .context("shipment-4 is not there")?;
    left.ack(BasicAckOptions::default()).await?;
    println!(
        "left:     {} in {QUEUE}",
        String::from_utf8_lossy(&left.data)
    );
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    // If this exchange is missing when a message dies, the message is lost, and
    // nobody says so.
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Fanout, durable, none)
        .await?;
    let mut kept = FieldTable::default();
    kept.insert("x-queue-type".into(), text("quorum"));
    queue(channel, LETTERS, kept).await?;
    channel
        .queue_bind(
            LETTERS.into(),
            EXCHANGE.into(),
            "".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;

    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-dead-letter-exchange".into(), text(EXCHANGE));
    arguments.insert("x-max-length".into(), ROOM.into());
    queue(channel, QUEUE, arguments).await
}
// ANCHOR_END: declare

// ANCHOR: obituary
/// Waits for the next dead letter, and tells what RabbitMQ says about it.
async fn obituary(letters: &mut Consumer) -> Result<String> {
    let letter = timeout(PATIENCE, letters.next()).await;
    let letter = letter.context("no dead letter came within 8 s")?;
    let letter = letter.context("the queue of dead letters is gone")??;
    let line = describe(&letter).context("a letter that did not die")?;
    letter.ack(BasicAckOptions::default()).await?;
    Ok(line)
}

fn describe(letter: &Delivery) -> Option<String> {
    let shipment = String::from_utf8_lossy(&letter.data);
    let headers = letter.properties.headers().as_ref()?.inner();
    // What the publisher said is still there.
    let carrier = headers.get("carrier")?.as_long_string()?;
    // One entry for each queue and reason, the newest first.
    let deaths = headers.get("x-death")?.as_array()?;
    let death = deaths.as_slice().first()?.as_field_table()?.inner();
    let reason = death.get("reason")?.as_long_string()?;
    let queue = death.get("queue")?.as_long_string()?;
    let count = death.get("count")?.as_long_long_int()?;
    let reason = format!("{reason}:");
    Some(format!(
        "{reason:9} {shipment}, {count} time by {queue}, carrier {carrier}"
    ))
}
// ANCHOR_END: obituary

async fn letters(channel: &Channel) -> Result<Consumer> {
    // One at a time: what is handed out in advance is not in the queue.
    let qos = BasicQosOptions::default();
    channel.basic_qos(1, qos).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let letters = channel
        .basic_consume(LETTERS.into(), "".into(), options, none)
        .await?;
    Ok(letters)
}

/// Publishes a shipment that may live for so many milliseconds in a queue.
async fn publish(
    channel: &Channel,
    shipment: &str,
    milliseconds: Option<&str>,
) -> Result<()> {
    let mut headers = FieldTable::default();
    headers.insert("carrier".into(), AMQPValue::LongString("dhl".into()));
    let mut properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_headers(headers);
    if let Some(milliseconds) = milliseconds {
        properties = properties.with_expiration(milliseconds.into());
    }
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            shipment.as_bytes(),
            properties,
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {shipment}");
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
