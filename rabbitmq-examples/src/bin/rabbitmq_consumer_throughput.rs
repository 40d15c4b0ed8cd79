//! Consumer throughput: what an acknowledgement costs, and how to make it cost less.
//!
//! Teaches: a consumer that awaits each acknowledgement goes through lapin's loop, and
//! wakes its thread, for each message. The same acknowledgements handed over together
//! go in one turn: the guarantees are the same, the speed is not. One acknowledgement
//! for many, `multiple`, is less for the server too, and gives back all of them if the
//! program dies.
//!
//! Run, after `cargo lab up rabbitmq`; the queue is filled first:
//!
//! ```text
//! cargo run --bin rabbitmq_consumer_throughput                     # all three ways
//! cargo run --release --bin rabbitmq_consumer_throughput producer 200000 100
//! cargo run --release --bin rabbitmq_consumer_throughput joined 200000
//! ```
//!
//! The ways are `each`, `joined` and `multiple`.
//!
//! Expected output:
//!
//! ```text
//! stored:   3000 messages of 100 B
//! consumed: 1000 messages of 100 B in <time> s (<rate> msg/s), each
//! consumed: 1000 messages of 100 B in <time> s (<rate> msg/s), joined
//! consumed: 1000 messages of 100 B in <time> s (<rate> msg/s), multiple
//! ready:    0 messages are left
//! ```
//!
//! Left out on purpose: work. If a message takes a millisecond of it, none of this
//! matters.

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures_util::{StreamExt as _, future::try_join_all};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "throughput.readings";
/// How many messages may be on their way to the consumer, or unacknowledged.
const PREFETCH: u16 = 500;
/// How many acknowledgements are handed over at once, at most.
const GROUP: usize = 64;
const SIZE: usize = 100;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", count, size] => match (count.parse(), size.parse()) {
            (Ok(count), Ok(size)) => produce(count, size).await,
            _ => return usage(),
        },
        [way, count] => match (Way::parse(way), count.parse()) {
            (Some(way), Ok(count)) => consume(way, count).await,
            _ => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: rabbitmq_consumer_throughput [producer COUNT BYTES | each COUNT | \
         joined COUNT | multiple COUNT]"
    );
    ExitCode::from(2)
}

#[derive(Clone, Copy)]
enum Way {
    Each,
    Joined,
    Multiple,
}

impl Way {
    const ALL: [Self; 3] = [Self::Each, Self::Joined, Self::Multiple];

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Each => "each",
            Self::Joined => "joined",
            Self::Multiple => "multiple",
        }
    }
}

async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    fill(&channel, 3000, SIZE).await?;
    println!("stored:   3000 messages of {SIZE} B");
    for way in Way::ALL {
        consume_on(&connection, way, 1000).await?;
    }
    let left = channel
        .queue_purge(QUEUE.into(), QueuePurgeOptions::default())
        .await?;
    println!("ready:    {left} messages are left");
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn produce(count: usize, size: usize) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    fill(&channel, count, size).await?;
    println!("stored:   {count} messages of {size} B");
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn consume(way: Way, count: usize) -> Result<()> {
    let connection = connect().await?;
    consume_on(&connection, way, count).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: consume
async fn consume_on(connection: &Connection, way: Way, count: usize) -> Result<()> {
    let channel = connection.create_channel().await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    let tag = consumer.tag();
    // All that has come already, up to a limit; waits for the first only.
    let mut groups = consumer.ready_chunks(GROUP);

    let (mut done, mut bytes, mut start) = (0, 0, None);
    while done < count {
        let group = timeout(PATIENCE, groups.next()).await;
        let group = group.context("no message came within 8 s")?;
        let group: Result<Vec<Delivery>, _> =
            group.context("the queue is gone")?.into_iter().collect();
        let mut group = group?;
        // What is too much goes back when the channel is closed.
        group.truncate(count - done);
        start.get_or_insert_with(Instant::now);
        bytes = group.first().map_or(bytes, |message| message.data.len());
        done += group.len();
        acknowledge(way, &group).await?;
    }
    let seconds = start.context("asked for nothing")?.elapsed().as_secs_f64();
    println!(
        "consumed: {count} messages of {bytes} B in {seconds:.3} s ({:.0} msg/s), {}",
        count as f64 / seconds,
        way.name()
    );
    channel
        .basic_cancel(tag, BasicCancelOptions::default())
        .await?;
    channel.close(200, "".into()).await?;
    Ok(())
}
// ANCHOR_END: consume

// ANCHOR: acknowledge
async fn acknowledge(way: Way, group: &[Delivery]) -> Result<()> {
    match way {
        // One after the other: a turn of lapin's loop for each.
        Way::Each => {
            for message in group {
                message.ack(BasicAckOptions::default()).await?;
            }
        }
        // The same, all in one turn.
        Way::Joined => {
            let acks = group
                .iter()
                .map(|message| message.ack(BasicAckOptions::default()));
            try_join_all(acks).await?;
        }
        // One for all up to this one.
        Way::Multiple => {
            if let Some(last) = group.last() {
                last.ack(BasicAckOptions { multiple: true }).await?;
            }
        }
    }
    Ok(())
}
// ANCHOR_END: acknowledge

/// Empties the queue and fills it; returns when RabbitMQ has stored all of it.
async fn fill(channel: &Channel, count: usize, size: usize) -> Result<()> {
    queue(channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let payload = vec![b'x'; size];
    let mut left = count;
    while left > 0 {
        let group = left.min(1000);
        left -= group;
        let publishes = (0..group).map(|_| {
            channel.basic_publish(
                "".into(),
                QUEUE.into(),
                BasicPublishOptions::default(),
                &payload,
                BasicProperties::default().with_delivery_mode(2),
            )
        });
        let confirms = try_join_all(publishes).await?;
        let answers = timeout(PATIENCE, try_join_all(confirms)).await;
        let answers = answers.context("RabbitMQ has not confirmed within 8 s")??;
        if let Some(answer) = answers.iter().find(|answer| !answer.is_ack()) {
            bail!("RabbitMQ did not store it: {answer:?}");
        }
    }
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
