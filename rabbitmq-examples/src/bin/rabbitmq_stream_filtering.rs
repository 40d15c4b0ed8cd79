//! Stream filters: the server leaves out what a reader does not want, more or less.
//!
//! Teaches: a publisher gives each message a filter value, and a reader says which
//! ones it wants. RabbitMQ remembers for each chunk of the stream which values may be
//! in it, and skips the others: it saves most of the traffic, and is not exact. A
//! chunk with one message that is wanted comes whole, so the reader looks again.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_stream_filtering
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:  100 orders of eu, 100 of us, 100 of nowhere
//! all:     300 delivered
//! eu:      100 delivered, 100 of them of eu
//! nowhere: 200 delivered to who wants eu and those without a region
//! mixed:   a chunk with both comes whole; after our own look 10 more are of eu
//! ```
//!
//! Left out on purpose: filters that RabbitMQ applies to each message, which need AMQP
//! 1.0.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "stream.regions";
/// How many messages may be on their way to a consumer.
const PREFETCH: u16 = 100;
/// Without a message for so long, a reader has all that there is.
const QUIET: Duration = Duration::from_secs(1);

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
    declare(&channel).await?;
    // Each hundred is confirmed before the next begins, so none shares a chunk.
    publish(&channel, &[Some("eu"); 100]).await?;
    publish(&channel, &[Some("us"); 100]).await?;
    publish(&channel, &[None; 100]).await?;
    println!("stored:  100 orders of eu, 100 of us, 100 of nowhere");

    let all = read(&connection, None, false).await?;
    println!("all:     {} delivered", all.len());
    let eu = read(&connection, Some("eu"), false).await?;
    let count = of_eu(&eu);
    println!("eu:      {} delivered, {count} of them of eu", eu.len());
    let more = read(&connection, Some("eu"), true).await?;
    println!(
        "nowhere: {} delivered to who wants eu and those without a region",
        more.len()
    );

    publish(&channel, &[Some("eu"), Some("us")].repeat(10)).await?;
    let mixed = read(&connection, Some("eu"), false).await?;
    let more = of_eu(&mixed) - count;
    println!(
        "mixed:   a chunk with both comes whole; after our own look {more} more are \
         of eu"
    );
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// The look that the filter does not spare.
fn of_eu(orders: &[String]) -> usize {
    orders.iter().filter(|region| *region == "eu").count()
}
// ANCHOR_END: story

// ANCHOR: publish
/// An order for each region, all confirmed in the end.
async fn publish(channel: &Channel, regions: &[Option<&str>]) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut confirms = Vec::new();
    for region in regions {
        let mut headers = FieldTable::default();
        if let Some(region) = region {
            let value = AMQPValue::LongString((*region).into());
            headers.insert("x-stream-filter-value".into(), value);
        }
        let confirm = channel.basic_publish(
            "".into(),
            STREAM.into(),
            BasicPublishOptions::default(),
            region.unwrap_or("nowhere").as_bytes(),
            BasicProperties::default().with_headers(headers),
        );
        confirms.push(confirm.await?);
    }
    for confirm in confirms {
        let answer = timeout(PATIENCE, confirm)
            .await
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
        ensure!(answer.is_ack(), "RabbitMQ did not store an order");
    }
    Ok(())
}
// ANCHOR_END: publish

// ANCHOR: read
/// What is delivered of the whole stream, with this filter.
async fn read(
    connection: &Connection,
    region: Option<&str>,
    unfiltered: bool,
) -> Result<Vec<String>> {
    let channel = connection.create_channel().await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), text("first"));
    if let Some(region) = region {
        arguments.insert("x-stream-filter".into(), text(region));
        // Those without a value too; by default they are left out.
        let both = AMQPValue::Boolean(unfiltered);
        arguments.insert("x-stream-match-unfiltered".into(), both);
    }
    let options = BasicConsumeOptions::default();
    let mut orders = channel
        .basic_consume(STREAM.into(), "".into(), options, arguments)
        .await?;
    let mut delivered = Vec::new();
    // Nobody says where a stream ends: a while without a message is the end here.
    while let Ok(Some(order)) = timeout(QUIET, orders.next()).await {
        let order = order?;
        order.ack(BasicAckOptions::default()).await?;
        delivered.push(String::from_utf8_lossy(&order.data).into_owned());
    }
    channel.close(200, "".into()).await?;
    Ok(delivered)
}
// ANCHOR_END: read

/// Makes the stream anew: nothing else empties one but its limits.
async fn declare(channel: &Channel) -> Result<()> {
    channel
        .queue_delete(STREAM.into(), QueueDeleteOptions::default())
        .await?;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    arguments.insert("x-max-age".into(), text("7D"));
    channel
        .queue_declare(STREAM.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| anyhow!("cannot declare the stream {STREAM} ({error})"))?;
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
