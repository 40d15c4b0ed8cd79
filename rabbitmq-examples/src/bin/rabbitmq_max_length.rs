//! Full queues: who loses when there is no room.
//!
//! Teaches: a limit of length needs an answer to the question what to do beyond it.
//! The default drops the oldest message and tells nobody. `reject-publish` refuses
//! the newest, which only a publisher with confirms hears of. A dead letter exchange
//! keeps what is dropped, or with `reject-publish-dlx` what is refused.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_max_length
//! ```
//!
//! Expected output:
//!
//! ```text
//! drop-head:          5 confirmed, 0 refused; kept 4, 5; dead none
//! with dead letters:  5 confirmed, 0 refused; kept 4, 5; dead 1, 2, 3
//! reject-publish:     2 confirmed, 3 refused; kept 1, 2; dead none
//! reject-publish-dlx: 2 confirmed, 3 refused; kept 1, 2; dead 3, 4, 5
//! 20 bytes:           5 confirmed, 0 refused; kept 4, 5; dead none
//! ```
//!
//! Left out on purpose: quorum queues, which know no `reject-publish-dlx`, and take
//! a few messages beyond the limit before they refuse.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const LETTERS: &str = "length.dead";
const READINGS: usize = 5;
const ROOM: i32 = 2;

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
    queue(&channel, LETTERS, classic()).await?;
    let length = || ("x-max-length", ROOM.into());
    // Bodies only: two readings of ten bytes.
    let bytes = ("x-max-length-bytes", 20.into());
    let overflow = |what: &str| ("x-overflow", text(what));
    // To the queue of dead letters, by the default exchange.
    let dead = || [("x-dead-letter-exchange", text("")), key()];
    let [exchange, key] = dead();
    fill(&channel, "drop-head", vec![length()]).await?;
    let arguments = vec![length(), exchange, key];
    fill(&channel, "with dead letters", arguments).await?;
    let arguments = vec![length(), overflow("reject-publish")];
    fill(&channel, "reject-publish", arguments).await?;
    let [exchange, key] = dead();
    let arguments = vec![length(), overflow("reject-publish-dlx"), exchange, key];
    fill(&channel, "reject-publish-dlx", arguments).await?;
    fill(&channel, "20 bytes", vec![bytes]).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

fn key() -> (&'static str, AMQPValue) {
    ("x-dead-letter-routing-key", text(LETTERS))
}
// ANCHOR_END: story

// ANCHOR: fill
/// Publishes five readings to a queue with room for two, and tells what became of
/// them.
async fn fill(
    channel: &Channel,
    name: &str,
    limits: Vec<(&str, AMQPValue)>,
) -> Result<()> {
    let readings = format!("length.{}", name.replace(' ', "-"));
    let mut arguments = classic();
    let with_letters = limits.iter().any(|(name, _)| name.contains("dead-letter"));
    for (argument, value) in limits {
        arguments.insert(argument.into(), value);
    }
    queue(channel, &readings, arguments).await?;
    let (mut confirmed, mut refused) = (0, 0);
    for number in 1..=READINGS {
        match publish(channel, &readings, number).await? {
            // Stored at that moment. It may be the next to be dropped.
            Confirmation::Ack(_) => confirmed += 1,
            // Not stored: the publisher still has it, and decides.
            Confirmation::Nack(_) => refused += 1,
            Confirmation::NotRequested => bail!("confirm_select was not called"),
        }
    }
    let kept = take_all(channel, &readings).await?;
    if with_letters {
        arrived(channel, LETTERS, READINGS - kept.len()).await?;
    }
    let dead = take_all(channel, LETTERS).await?;
    println!(
        "{:19} {confirmed} confirmed, {refused} refused; kept {}; dead {}",
        format!("{name}:"),
        list(&kept),
        list(&dead)
    );
    Ok(())
}
// ANCHOR_END: fill

async fn publish(
    channel: &Channel,
    queue: &str,
    number: usize,
) -> Result<Confirmation> {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let body = format!("{number:<10}");
    let options = BasicPublishOptions::default();
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            options,
            body.as_bytes(),
            properties,
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    Ok(answer)
}

/// Waits for so many messages: a dead letter of a classic queue may still be on its
/// way when the publish is confirmed.
async fn arrived(channel: &Channel, queue: &str, count: usize) -> Result<()> {
    let arriving = async {
        loop {
            let options = QueueDeclareOptions::default().passive();
            let none = FieldTable::default();
            let found = channel.queue_declare(queue.into(), options, none).await?;
            if found.message_count() as usize >= count {
                return Ok(());
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let arrived = timeout(PATIENCE, arriving).await;
    arrived.with_context(|| format!("{queue} has no {count} messages after 8 s"))?
}

/// The numbers of all readings in a queue.
async fn take_all(channel: &Channel, queue: &str) -> Result<Vec<String>> {
    let mut numbers = Vec::new();
    while let Some(reading) = channel
        .basic_get(queue.into(), BasicGetOptions::default())
        .await?
    {
        reading.ack(BasicAckOptions::default()).await?;
        let text = String::from_utf8_lossy(&reading.data);
        numbers.push(text.trim().to_owned());
    }
    Ok(numbers)
}

fn list(numbers: &[String]) -> String {
    match numbers {
        [] => "none".to_owned(),
        numbers => numbers.join(", "),
    }
}

fn classic() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
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
