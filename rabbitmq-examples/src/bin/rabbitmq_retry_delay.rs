//! Retry with delays: after a second, after three, then parked.
//!
//! Teaches: a queue without a consumer, with a limit of time and a dead letter
//! exchange that leads back, is a delay. One queue for each delay, as only the
//! first message of a queue is looked at. How often the work was tried stands in a
//! header that the worker writes: what a client says in `x-death`, RabbitMQ 4 does
//! not count on, so it begins at one again. Other messages go on meanwhile.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_retry_delay
//! ```
//!
//! Expected output:
//!
//! ```text
//! failed:  parcel-1, attempt 1, next after 1000 ms
//! shipped: parcel-2, attempt 1
//! failed:  parcel-1, attempt 2, next after 3000 ms
//! failed:  parcel-1, attempt 3, parked
//! pauses:  <first> ms, <second> ms
//! parked:  parcel-1 after 3 attempts; x-death knows of 1 delay
//! ```
//!
//! Left out on purpose: the delayed retry of quorum queues since RabbitMQ 4.3
//! (`x-delayed-retry-type`), which needs none of these queues; here each step can
//! be seen, and an older server can do it.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{Instant, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "retry.parcels";
const PARKED: &str = "retry.parked";
const ATTEMPTS: &str = "attempts";
/// The queues are named after them, so a change makes new queues, and is not
/// refused by the old ones. Delete those when they are empty.
const DELAYS: [u32; 2] = [1000, 3000];

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
    let none = FieldTable::default();
    for parcel in ["parcel-1", "parcel-2"] {
        publish(&channel, QUEUE, parcel.as_bytes(), none.clone()).await?;
    }

    let mut parcels = consume(&channel).await?;
    let mut attempts = Vec::new();
    while attempts.len() <= DELAYS.len() {
        let parcel = timeout(PATIENCE, parcels.next()).await;
        let parcel = parcel.context("no parcel came within 8 s")?;
        let parcel = parcel.context("the queue is gone")??;
        let mut headers = parcel.properties.headers().clone().unwrap_or_default();
        let failures = failures(&headers);
        let attempt = failures + 1;
        let name = String::from_utf8_lossy(&parcel.data);
        // The carrier does not know the address of this one.
        if name != "parcel-1" {
            println!("shipped: {name}, attempt {attempt}");
        } else {
            attempts.push(Instant::now());
            headers.insert(ATTEMPTS.into(), AMQPValue::LongUInt(attempt));
            let (next, what) = match DELAYS.get(failures as usize) {
                Some(delay) => {
                    (delay_queue(*delay), format!("next after {delay} ms"))
                }
                None => (PARKED.to_owned(), "parked".to_owned()),
            };
            println!("failed:  {name}, attempt {attempt}, {what}");
            // Confirmed there before it is deleted here: a worker that dies in
            // between leaves it twice, never not at all.
            publish(&channel, &next, &parcel.data, headers).await?;
        }
        parcel.ack(BasicAckOptions::default()).await?;
    }

    let pauses = attempts.windows(2).map(|pair| pair[1] - pair[0]);
    let pauses = pauses.map(|pause| format!("{} ms", pause.as_millis()));
    println!("pauses:  {}", Vec::from_iter(pauses).join(", "));
    println!("parked:  {}", parked(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    queue(channel, QUEUE, quorum()).await?;
    queue(channel, PARKED, quorum()).await?;
    for delay in DELAYS {
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut arguments = quorum();
        arguments.insert("x-message-ttl".into(), AMQPValue::LongUInt(delay));
        // The default exchange, back to where it came from.
        arguments.insert("x-dead-letter-exchange".into(), text(""));
        arguments.insert("x-dead-letter-routing-key".into(), text(QUEUE));
        // The message stays until its next queue has confirmed it.
        let strategy = text("at-least-once");
        arguments.insert("x-dead-letter-strategy".into(), strategy);
        // Without this, RabbitMQ falls back to `at-most-once`.
        arguments.insert("x-overflow".into(), text("reject-publish"));
        queue(channel, &delay_queue(delay), arguments).await?;
    }
    Ok(())
}

fn delay_queue(milliseconds: u32) -> String {
    format!("retry.delay-{milliseconds}")
}
// ANCHOR_END: declare

// ANCHOR: failures
/// How often it has failed: zero for what a publisher has sent.
fn failures(headers: &FieldTable) -> u32 {
    let attempts = headers.inner().get(ATTEMPTS);
    attempts.and_then(AMQPValue::as_long_uint).unwrap_or(0)
}
// ANCHOR_END: failures

/// The parked parcel, with what happened to it.
async fn parked(channel: &Channel) -> Result<String> {
    let parcel = channel
        .basic_get(PARKED.into(), BasicGetOptions::default())
        .await?
        .context("nothing is parked")?;
    parcel.ack(BasicAckOptions::default()).await?;
    let headers = parcel.properties.headers().clone().unwrap_or_default();
    let deaths = headers.inner().get("x-death");
    let deaths = deaths.and_then(AMQPValue::as_array).context("no x-death")?;
    Ok(format!(
        "{} after {} attempts; x-death knows of {} delay",
        String::from_utf8_lossy(&parcel.data),
        failures(&headers),
        deaths.as_slice().len(),
    ))
}

async fn consume(channel: &Channel) -> Result<Consumer> {
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

/// Publishes, and returns when RabbitMQ has it in the queue.
async fn publish(
    channel: &Channel,
    queue: &str,
    body: &[u8],
    headers: FieldTable,
) -> Result<()> {
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_headers(headers);
    let options = BasicPublishOptions::default();
    let confirm = channel
        .basic_publish("".into(), queue.into(), options, body, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store it in {queue}");
    Ok(())
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    arguments
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
