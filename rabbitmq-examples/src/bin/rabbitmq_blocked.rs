//! Blocked: RabbitMQ is short of memory or disk, and takes nothing from publishers.
//!
//! Teaches: a broker in need does not refuse, it stops reading from each connection
//! that publishes. Nothing fails: the publish is Ok, and the confirm does not come.
//! So a confirm is waited for with a limit, the event of the connection says why, and
//! publishers have a connection of their own: on a shared one the acknowledgements of
//! the consumers would be stuck too, and with them what would make room.
//!
//! Run, with a RabbitMQ of its own, or as rabbitmq-examples/config/rabbitmq_blocked.conf
//! says; the number is how many seconds to wait for it to get well:
//!
//! ```text
//! cargo lab run rabbitmq_blocked     # starts it, runs:
//! cargo run --bin rabbitmq_blocked 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: reading-1, the call is Ok
//! blocked:   low on memory
//! consumer:  works, on a connection of its own
//! in doubt:  reading-1 has no confirm after 3 s more
//! closed:    not in order, as nothing is read from it
//! ```
//!
//! Left out on purpose: what to do with the readings meanwhile, keep them on a disk
//! or refuse them yourself; that is what the waiting is for.

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Event,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "blocked.readings";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a confirm may take before somebody wonders.
const SOON: Duration = Duration::from_secs(1);
/// How long to wait, if nothing is said, for RabbitMQ to get well.
const WAIT_SECONDS: u64 = 3;

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let seconds = match &words[..] {
        [] => Some(WAIT_SECONDS),
        [seconds] => seconds.parse().ok(),
        _ => None,
    };
    let Some(seconds) = seconds else {
        eprintln!("usage: rabbitmq_blocked [SECONDS]");
        return ExitCode::from(2);
    };
    match story(Duration::from_secs(seconds)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story(wait: Duration) -> Result<()> {
    let publisher = connect().await?;
    let mut events = publisher.events_listener();
    let channel = publisher.create_channel().await?;
    queue(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;

    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            b"reading-1",
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    println!("published: reading-1, the call is Ok");
    tokio::pin!(confirm);
    if let Ok(answer) = timeout(SOON, &mut confirm).await {
        stored(answer?)?;
        println!("confirmed: this RabbitMQ is well");
        publisher.close(200, "done".into()).await?;
        return Ok(());
    }

    let blocked = async {
        loop {
            match events.next().await {
                Some(Event::ConnectionBlocked(reason)) => return Ok(reason),
                Some(_other) => {}
                None => return Err(anyhow!("the connection is gone")),
            }
        }
    };
    let reason = timeout(PATIENCE, blocked).await;
    let reason = reason.context("no confirm, and RabbitMQ does not say why")??;
    println!("blocked:   {reason}");
    consume_one().await?;
    println!("consumer:  works, on a connection of its own");

    let start = Instant::now();
    match timeout(wait, &mut confirm).await {
        Ok(answer) => {
            stored(answer?)?;
            println!("unblocked: after all, reading-1 is confirmed");
        }
        // Neither stored nor refused: it is in the buffers on the way.
        Err(_elapsed) => println!(
            "in doubt:  reading-1 has no confirm after {} s more",
            start.elapsed().as_secs()
        ),
    }
    close(publisher).await
}
// ANCHOR_END: story

fn stored(answer: Confirmation) -> Result<()> {
    ensure!(answer.is_ack(), "RabbitMQ did not store it: {answer:?}");
    Ok(())
}

// ANCHOR: close
/// Closing is a question too, which a blocked connection does not get through.
async fn close(connection: Connection) -> Result<()> {
    match timeout(SOON, connection.close(200, "done".into())).await {
        Ok(closed) => {
            closed?;
            println!("closed:    in order");
        }
        Err(_elapsed) => {
            println!("closed:    not in order, as nothing is read from it");
        }
    }
    Ok(())
}
// ANCHOR_END: close

/// Looks for a message on another connection, and acknowledges it.
async fn consume_one() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let get = channel.basic_get(QUEUE.into(), BasicGetOptions::default());
    let reading = timeout(PATIENCE, get).await;
    let reading = reading.context("the consumer is blocked too")??;
    if let Some(reading) = reading {
        reading.ack(BasicAckOptions::default()).await?;
    }
    connection.close(200, "done".into()).await?;
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
