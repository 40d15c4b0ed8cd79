//! Request and reply: without a queue for the answers.
//!
//! Teaches: `amq.rabbitmq.reply-to` is no queue but a way back to this channel. So
//! nothing is declared, and an asker costs the broker nothing. Consume from it
//! first, without acknowledgements, and publish on the same channel; each other way
//! closes the channel.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_direct_reply_to
//! ```
//!
//! Expected output:
//!
//! ```text
//! answer:  sku-1 costs 9.90
//! refused: a consumer that would acknowledge (406)
//! refused: a request without a consumer on its channel (406)
//! ```
//!
//! Left out on purpose: several questions at a time, with ids, as `rabbitmq_rpc`
//! has them. An answer is lost if the asker's connection is: ask again.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const REQUESTS: &str = "direct.quotes";
const REPLY_TO: &str = "amq.rabbitmq.reply-to";

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
    // Two connections, as if they were two programs.
    let (at_server, at_client) = (connect().await?, connect().await?);
    let serving = at_server.create_channel().await?;
    queue(&serving, REQUESTS).await?;
    let requests = consume(&serving, REQUESTS, false).await?;
    let answering = tokio::spawn(answer_one(serving, requests));

    let channel = confirming(&at_client).await?;
    let mut answers = consume(&channel, REPLY_TO, true).await?;
    ask(&channel, "sku-1").await?;
    let answer = timeout(PATIENCE, answers.next()).await;
    let answer = answer.context("no answer came within 8 s")?;
    let answer = answer.context("the channel is closed")??;
    println!(
        "answer:  sku-1 costs {}",
        String::from_utf8_lossy(&answer.data)
    );
    answering.await??;

    // What is not allowed closes its channel, hence a new one for each.
    let channel = confirming(&at_client).await?;
    match consume(&channel, REPLY_TO, false).await {
        Err(error) if error.to_string().contains("PRECONDITION_FAILED") => {
            println!("refused: a consumer that would acknowledge (406)");
        }
        other => bail!("acknowledgements are allowed: {other:?}"),
    }
    let channel = confirming(&at_client).await?;
    match ask(&channel, "sku-1").await {
        Err(error) if error.to_string().contains("PRECONDITION_FAILED") => {
            println!("refused: a request without a consumer on its channel (406)");
        }
        other => bail!("no consumer is needed: {other:?}"),
    }
    at_client.close(200, "done".into()).await?;
    at_server.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: ask
async fn ask(channel: &Channel, sku: &str) -> Result<()> {
    // RabbitMQ puts a name in its place that leads back to this channel.
    let properties = BasicProperties::default().with_reply_to(REPLY_TO.into());
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let request = sku.as_bytes();
    let confirm = channel
        .basic_publish("".into(), REQUESTS.into(), options, request, properties)
        .await?;
    let confirm = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match confirm {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("no queue takes the request: {other:?}"),
    }
}
// ANCHOR_END: ask

// ANCHOR: answer
/// Answers as to any other queue: the server does not see the difference.
async fn answer_one(channel: Channel, mut requests: Consumer) -> Result<()> {
    let request = requests.next().await.context("the queue is gone")??;
    let reply_to = request.properties.reply_to().clone();
    let reply_to = reply_to.context("a request without reply_to")?;
    let options = BasicPublishOptions::default();
    let properties = BasicProperties::default();
    channel
        .basic_publish("".into(), reply_to, options, b"9.90", properties)
        .await?;
    request.ack(BasicAckOptions::default()).await?;
    Ok(())
}
// ANCHOR_END: answer

async fn consume(channel: &Channel, queue: &str, no_ack: bool) -> Result<Consumer> {
    let options = BasicConsumeOptions {
        no_ack,
        ..BasicConsumeOptions::default()
    };
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(queue.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

async fn confirming(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await?;
    Ok(channel)
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
