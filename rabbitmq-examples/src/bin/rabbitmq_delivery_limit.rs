//! Dead letters: a poison message is given up after so many attempts.
//!
//! Teaches: a message that makes each worker fail comes again at once, for ever,
//! and keeps the worker from all others. A quorum queue counts: what has been
//! rejected more often than `x-delivery-limit` becomes a dead letter. Reject, do
//! not nack: since RabbitMQ 4.3 a nack with `requeue` does not count.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_delivery_limit
//! ```
//!
//! Expected output:
//!
//! ```text
//! attempt 1: invoice-1 cannot be read
//! attempt 2: invoice-1 cannot be read
//! attempt 3: invoice-1 cannot be read
//! done:      invoice-2
//! dead:      invoice-1 (delivery_limit)
//! ```
//!
//! Left out on purpose: a pause between the attempts. What fails because another
//! service is down needs one, and this limit is used up in milliseconds.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "limit.invoices";
const DEAD: &str = "limit.invoices.dead";
/// How often a message may come again: it is delivered once more than that. 20 if
/// nothing is said (since RabbitMQ 4.0).
const LIMIT: i32 = 2;

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
    publish(&channel, "invoice-1", b"\xff\xff").await?;
    publish(&channel, "invoice-2", b"9.90").await?;

    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let mut invoices = consume(&channel, QUEUE).await?;
    loop {
        let invoice = next(&mut invoices).await?;
        let id = id(&invoice);
        if std::str::from_utf8(&invoice.data).is_ok() {
            println!("done:      {id}");
            invoice.ack(BasicAckOptions::default()).await?;
            break;
        }
        println!("attempt {}: {id} cannot be read", earlier(&invoice) + 1);
        // A crash, or a lost connection, counts as well.
        let again = BasicRejectOptions { requeue: true };
        invoice.reject(again).await?;
    }

    let mut letters = consume(&channel, DEAD).await?;
    let letter = next(&mut letters).await?;
    let reason = reason(&letter).context("a letter that did not die")?;
    println!("dead:      {} ({reason})", id(&letter));
    letter.ack(BasicAckOptions::default()).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: earlier
/// How often the queue has delivered this message in vain.
fn earlier(invoice: &Delivery) -> i64 {
    let headers = invoice.properties.headers().as_ref();
    // Not there the first time.
    let count = headers.and_then(|headers| headers.inner().get("x-delivery-count"));
    count.and_then(AMQPValue::as_long_long_int).unwrap_or(0)
}
// ANCHOR_END: earlier

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut dead = FieldTable::default();
    dead.insert("x-queue-type".into(), text("quorum"));
    queue(channel, DEAD, dead).await?;

    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-delivery-limit".into(), LIMIT.into());
    // Through the default exchange, to the queue of that name. Without these two
    // lines a message beyond the limit is deleted.
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(DEAD));
    queue(channel, QUEUE, arguments).await
}
// ANCHOR_END: declare

async fn consume(channel: &Channel, queue: &str) -> Result<Consumer> {
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(queue.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

async fn next(consumer: &mut Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, consumer.next()).await;
    let delivery = delivery.context("no message came within 8 s")?;
    Ok(delivery.context("the queue is gone")??)
}

fn id(message: &Delivery) -> &str {
    let id = message.properties.message_id().as_ref();
    id.map_or("?", |id| id.as_str())
}

fn reason(letter: &Delivery) -> Option<String> {
    let headers = letter.properties.headers().as_ref()?.inner();
    let deaths = headers.get("x-death")?.as_array()?;
    let death = deaths.as_slice().first()?.as_field_table()?.inner();
    Some(death.get("reason")?.as_long_string()?.to_string())
}

async fn publish(channel: &Channel, id: &str, invoice: &[u8]) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            invoice,
            BasicProperties::default()
                .with_delivery_mode(2)
                .with_message_id(id.into()),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {id}");
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
