//! Stream: a queue that keeps its messages, to be read again from anywhere.
//!
//! Teaches: reading takes nothing away. Each consumer says where to begin: with
//! the first message, at an offset, at a time, or with what comes next. Each
//! message carries its offset, for the next start. Acknowledgements delete nothing,
//! but they are the credit for more, and without a prefetch limit RabbitMQ refuses
//! the consumer.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_stream
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:  order-0 to order-9
//! first:   10 messages, order-0 at offset 0
//! offset:  3 messages, order-7 at offset 7
//! again:   10 messages, order-0 at offset 0
//! next:    1 message, order-10 at offset 10
//! refused: a consumer without prefetch (PRECONDITION_FAILED)
//! ```
//!
//! Left out on purpose: to keep the offset over a restart, in the database beside
//! the effect; and the stream protocol, which is quicker and another crate.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "stream.orders";
/// How many messages may be on their way to a consumer.
const PREFETCH: u16 = 100;

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
    for number in 0..10 {
        publish(&channel, &format!("order-{number}")).await?;
    }
    println!("stored:  order-0 to order-9");

    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let from = |name: &str| AMQPValue::LongString(name.into());
    let first = read(&channel, from("first"), 10).await?;
    println!("first:   {first}");
    let seventh = read(&channel, AMQPValue::LongLongInt(7), 3).await?;
    println!("offset:  {seventh}");
    println!("again:   {}", read(&channel, from("first"), 10).await?);

    // Only what comes from now on; hence begun before it is published.
    let mut next = consume(&channel, from("next")).await?;
    publish(&channel, "order-10").await?;
    println!("next:    {}", take(&mut next, 1).await?);

    let careless = connection.create_channel().await?;
    match consume(&careless, from("first")).await {
        Err(error) if error.to_string().contains("PRECONDITION_FAILED") => {
            println!("refused: a consumer without prefetch (PRECONDITION_FAILED)");
        }
        other => bail!("no prefetch is needed: {other:?}"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: consume
async fn consume(channel: &Channel, offset: AMQPValue) -> Result<Consumer> {
    let mut arguments = FieldTable::default();
    // `first`, `next`, an offset, a timestamp, or an interval such as `1h`. `last`
    // is the last chunk, which may hold many messages.
    arguments.insert("x-stream-offset".into(), offset);
    let options = BasicConsumeOptions::default();
    let consumer = channel
        .basic_consume(STREAM.into(), "".into(), options, arguments)
        .await?;
    Ok(consumer)
}

/// Takes so many messages, and tells their number and the first of them.
async fn take(consumer: &mut Consumer, count: usize) -> Result<String> {
    let mut first = None;
    for _ in 0..count {
        let message = timeout(PATIENCE, consumer.next()).await;
        let message = message.context("no message came within 8 s")?;
        let message = message.context("the stream is gone")??;
        // Not "done with it": room for the next.
        message.ack(BasicAckOptions::default()).await?;
        let offset = offset(&message).context("a message without an offset")?;
        let text = String::from_utf8_lossy(&message.data).into_owned();
        first.get_or_insert((text, offset));
    }
    let (text, offset) = first.context("asked for nothing")?;
    let messages = if count == 1 { "message" } else { "messages" };
    Ok(format!("{count} {messages}, {text} at offset {offset}"))
}

/// Where this message is, and where to go on: at the one after it.
fn offset(message: &Delivery) -> Option<i64> {
    let headers = message.properties.headers().as_ref()?.inner();
    headers.get("x-stream-offset")?.as_long_long_int()
}
// ANCHOR_END: consume

async fn read(channel: &Channel, from: AMQPValue, count: usize) -> Result<String> {
    let mut consumer = consume(channel, from).await?;
    let read = take(&mut consumer, count).await?;
    channel
        .basic_cancel(consumer.tag(), BasicCancelOptions::default())
        .await?;
    Ok(read)
}

// ANCHOR: declare
/// Makes the stream anew: nothing else empties one but its limits.
async fn declare(channel: &Channel) -> Result<()> {
    channel
        .queue_delete(STREAM.into(), QueueDeleteOptions::default())
        .await?;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    // Without a limit it grows for ever. By whole segments, so some are kept for
    // longer.
    arguments.insert("x-max-age".into(), text("7D"));
    channel
        .queue_declare(STREAM.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| anyhow!("cannot declare the stream {STREAM} ({error})"))?;
    Ok(())
}
// ANCHOR_END: declare

async fn publish(channel: &Channel, order: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            STREAM.into(),
            BasicPublishOptions::default(),
            order.as_bytes(),
            BasicProperties::default(),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {order}");
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
