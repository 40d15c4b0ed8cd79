//! Quorum queue: copies on several nodes, and stored before it is confirmed.
//!
//! Teaches: a quorum queue is durable and replicated, whatever its messages say; a
//! majority of its nodes has a message when the confirm comes. What it cannot be is
//! refused: exclusive, or gone with a restart. The kind of a queue is fixed when it is
//! made; to declare it as another closes the channel.
//!
//! Run, after `cargo lab up rabbitmq`; kill and restart RabbitMQ between the two:
//!
//! ```text
//! cargo run --bin rabbitmq_quorum_queue                # the whole story
//! cargo run --bin rabbitmq_quorum_queue publish 1000
//! cargo run --bin rabbitmq_quorum_queue count
//! ```
//!
//! Expected output:
//!
//! ```text
//! declared:   quorum.payments, and again, which changes nothing
//! classic:    refused, it is a quorum queue already (PRECONDITION_FAILED)
//! exclusive:  refused, it would belong to one connection (PRECONDITION_FAILED)
//! transient:  refused, it would not outlive a restart (PRECONDITION_FAILED)
//! stored:     10 payments that ask for nothing, all confirmed
//! counted:    10 payments
//! ```
//!
//! Left out on purpose: more than one node, which is the lesson of
//! `rabbitmq_quorum_failover`; on one it is as safe as its disk.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "quorum.payments";
/// Of these no queue comes to be.
const REFUSED: &str = "quorum.refused";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let count = words.last().and_then(|word| word.parse().ok());
    let result = match (&words[..], count) {
        ([], _) => story().await,
        (["publish", _], Some(count)) => publish_many(count).await,
        (["count"], _) => print_count().await,
        _ => {
            eprintln!("usage: rabbitmq_quorum_queue [publish COUNT | count]");
            return ExitCode::from(2);
        }
    };
    match result {
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
    let durable = QueueDeclareOptions::durable();
    declare(&channel, QUEUE, "quorum", durable).await?;
    declare(&channel, QUEUE, "quorum", durable).await?;
    println!("declared:   {QUEUE}, and again, which changes nothing");

    refused(&connection, QUEUE, "classic", durable).await?;
    println!(
        "classic:    refused, it is a quorum queue already (PRECONDITION_FAILED)"
    );
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..durable
    };
    refused(&connection, REFUSED, "quorum", exclusive).await?;
    println!(
        "exclusive:  refused, it would belong to one connection (PRECONDITION_FAILED)"
    );
    let transient = QueueDeclareOptions::default();
    refused(&connection, REFUSED, "quorum", transient).await?;
    println!(
        "transient:  refused, it would not outlive a restart (PRECONDITION_FAILED)"
    );

    channel
        .queue_purge(QUEUE.into(), QueuePurgeOptions::default())
        .await?;
    publish(&channel, 10).await?;
    println!("stored:     10 payments that ask for nothing, all confirmed");
    println!("counted:    {} payments", count(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(
    channel: &Channel,
    queue: &str,
    kind: &str,
    options: QueueDeclareOptions,
) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    channel
        .queue_declare(queue.into(), options, arguments)
        .await?;
    Ok(())
}

/// On a channel of its own, which the refusal closes.
async fn refused(
    connection: &Connection,
    queue: &str,
    kind: &str,
    options: QueueDeclareOptions,
) -> Result<()> {
    let channel = connection.create_channel().await?;
    match declare(&channel, queue, kind, options).await {
        Err(error) if error.to_string().contains("PRECONDITION_FAILED") => Ok(()),
        other => bail!("{queue} as {kind}: {other:?}"),
    }
}
// ANCHOR_END: declare

// ANCHOR: publish
/// Without a delivery mode, which a quorum queue does not ask for. All are confirmed
/// in the end.
async fn publish(channel: &Channel, count: usize) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let publishes = (0..count).map(|_| {
        channel.basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            b"1 kettle",
            BasicProperties::default(),
        )
    });
    let confirms = try_join_all(publishes).await?;
    let answers = timeout(PATIENCE, try_join_all(confirms))
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(
        answers.iter().all(|answer| answer.is_ack()),
        "RabbitMQ did not store a payment"
    );
    Ok(())
}
// ANCHOR_END: publish

async fn publish_many(count: usize) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let durable = QueueDeclareOptions::durable();
    declare(&channel, QUEUE, "quorum", durable).await?;
    publish(&channel, count).await?;
    println!("stored:     {count} payments, all confirmed");
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn print_count() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    println!("counted:    {} payments", count(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// How many lie in the queue. A passive declaration makes nothing, and needs no
/// arguments. RabbitMQ brings the number up to date now and then: right after a start
/// it may be 0.
async fn count(channel: &Channel) -> Result<u32> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel
        .queue_declare(QUEUE.into(), passive, FieldTable::default())
        .await
        .with_context(|| format!("there is no queue {QUEUE}"))?;
    Ok(queue.message_count())
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
