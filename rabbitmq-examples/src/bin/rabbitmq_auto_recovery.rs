//! Recovery: the connection is lost, and the program goes on.
//!
//! Teaches: with `enable_auto_recover` lapin connects again, and opens channels,
//! declares queues and starts consumers anew; a consumer's stream goes on as if
//! nothing had happened. What it cannot know is yours: a publish without an answer
//! is published again, an acknowledgement for a delivery of the old connection is
//! an `Ok(false)`, and that delivery comes again. So each message is there at least
//! once, and here and there twice. And a recovery may never end: then the program
//! does, for whoever started it to start it again.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_auto_recovery                # the whole story
//! cargo run --bin rabbitmq_auto_recovery publish 1000   # restart RabbitMQ meanwhile
//! cargo run --bin rabbitmq_auto_recovery consume        # Ctrl-C to stop
//! ```
//!
//! Expected output:
//!
//! ```text
//! consumed:  reading-1, not acknowledged yet
//! broken:    RabbitMQ has closed the connection, lapin has a new one
//! published: reading-2, on the same channel
//! old ack:   Ok(false), it was of the old connection
//! consumed:  reading-1, redelivered to the same stream
//! consumed:  reading-2
//! ```
//!
//! Left out on purpose: errors of a channel, a refused declaration for example,
//! which are not recovered; and queues that the server names, after which recovery
//! ends with ACCESS_REFUSED.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::{
    net::TcpStream,
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "recovery.readings";
/// How often lapin tries to connect again, with pauses that grow to a second.
const ATTEMPTS: usize = 30;
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a recovery may take, which is more than all attempts do.
const RECOVERY: Duration = Duration::from_secs(45);
const NOT_RECOVERED: &str = "lapin has not recovered within 45 s";
/// Nothing tells the one from the other.
const ENDED: &str = "the stream has ended: the queue is gone, or lapin has given up its \
                     consumer in the middle of a recovery";

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
        (["consume"], _) => consume_all().await,
        _ => {
            eprintln!("usage: rabbitmq_auto_recovery [publish COUNT | consume]");
            return ExitCode::from(2);
        }
    };
    let status = match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    };
    // At once: between two attempts to connect, lapin's thread would panic when the
    // runtime ends before it (4.12).
    std::process::exit(status)
}

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let publisher = publisher(&connection).await?;
    purge(&publisher).await?;
    let mut readings = consume(&connection).await?;
    publish(&publisher, "reading-1").await?;
    let old = next(&mut readings).await?;
    println!("consumed:  {}, not acknowledged yet", text(&old));

    break_connection(&publisher).await?;
    println!("broken:    RabbitMQ has closed the connection, lapin has a new one");

    publish(&publisher, "reading-2").await?;
    println!("published: reading-2, on the same channel");
    let known = old.ack(BasicAckOptions::default()).await?;
    ensure!(!known, "RabbitMQ knows the delivery");
    println!("old ack:   Ok(false), it was of the old connection");

    for _reading in 0..2 {
        let reading = next(&mut readings).await?;
        let again = if reading.redelivered {
            ", redelivered to the same stream"
        } else {
            ""
        };
        println!("consumed:  {}{again}", text(&reading));
        acknowledge(&reading).await?;
    }
    close(&connection).await?;
    Ok(())
}

/// Asks for what RabbitMQ does not know, `immediate`: it answers by closing the
/// connection, as it does when an operator closes it or the server stops. Returns
/// when there is a new one, with this channel open in it.
async fn break_connection(channel: &Channel) -> Result<()> {
    let immediate = BasicPublishOptions {
        immediate: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default();
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), immediate, b"", properties)
        .await?;
    let Err(error) = confirm.await else {
        bail!("RabbitMQ has not closed the connection");
    };
    let recovery = timeout(RECOVERY, channel.wait_for_recovery(error)).await;
    recovery.context(NOT_RECOVERED)??;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: publish
/// Publishes until RabbitMQ has it, and says how often it had to be repeated.
async fn publish(channel: &Channel, reading: &str) -> Result<usize> {
    let mut repeated = 0;
    loop {
        // Also an answer that never comes, of a server that is blocked, ends.
        let answer = timeout(RECOVERY, try_publish(channel, reading)).await;
        match answer.context("RabbitMQ has not confirmed within 45 s")? {
            Ok(Confirmation::Ack(_)) => return Ok(repeated),
            Ok(answer) => bail!("RabbitMQ did not store {reading}: {answer:?}"),
            Err(error) if error.can_be_recovered() => {
                // Maybe RabbitMQ has it, and the answer was lost. Nobody knows, so
                // it is published again.
                let recovery = channel.wait_for_recovery(error);
                let recovery = timeout(RECOVERY, recovery).await;
                recovery.context(NOT_RECOVERED)??;
                repeated += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn try_publish(
    channel: &Channel,
    reading: &str,
) -> lapin::Result<Confirmation> {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let options = BasicPublishOptions::default();
    channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            options,
            reading.as_bytes(),
            properties,
        )
        .await?
        .await
}
// ANCHOR_END: publish

async fn publish_many(count: usize) -> Result<()> {
    let connection = connect().await?;
    let publisher = publisher(&connection).await?;
    println!("ready:     {count} readings to {QUEUE}");
    let mut repeated = 0;
    for number in 1..=count {
        let reading = format!("reading-{number}");
        repeated += publish(&publisher, &reading).await?;
    }
    println!("published: {count} readings, {repeated} publishes repeated");
    close(&connection).await?;
    Ok(())
}

async fn consume_all() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let publisher = publisher(&connection).await?;
    let mut readings = consume(&connection).await?;
    println!("ready:     readings from {QUEUE}, Ctrl-C to stop");
    let not_recovered = not_recovered(&connection);
    tokio::pin!(not_recovered);
    loop {
        let reading = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            () = &mut not_recovered => bail!(NOT_RECOVERED),
            reading = readings.next() => reading,
        };
        let reading = reading.context(ENDED)??;
        println!("consumed:  {}", text(&reading));
        acknowledge(&reading).await?;
    }
    drop(publisher);
    close(&connection).await?;
    println!("stopped");
    Ok(())
}

async fn publisher(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    queue(&channel, QUEUE).await?;
    Ok(channel)
}

// ANCHOR: consume
async fn consume(connection: &Connection) -> Result<Consumer> {
    let channel = connection.create_channel().await?;
    // Set again by lapin on each new connection, as the consumer is.
    channel.basic_qos(10, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}
// ANCHOR_END: consume

// ANCHOR: acknowledge
/// `false` if the connection was lost before: the reading comes again.
async fn acknowledge(reading: &Delivery) -> Result<bool> {
    let ack = reading.ack(BasicAckOptions::default());
    // If the connection is lost in this very moment, lapin 4.12 may never answer.
    match timeout(PATIENCE, ack).await {
        Ok(Err(error)) if error.can_be_recovered() => Ok(false),
        Ok(known) => Ok(known?),
        Err(_no_answer) => Ok(false),
    }
}
// ANCHOR_END: acknowledge

// ANCHOR: watch
/// Ends when there has been no connection for longer than a recovery may take. If
/// writing fails in the moment of the loss, lapin 4.12.3 waits for ever for what it
/// can no longer send: the recovery does not begin, and the stream is silent.
async fn not_recovered(connection: &Connection) {
    let mut seen = Instant::now();
    while seen.elapsed() < RECOVERY {
        sleep(Duration::from_secs(1)).await;
        if connection.status().connected() {
            seen = Instant::now();
        }
    }
}
// ANCHOR_END: watch

async fn next(readings: &mut Consumer) -> Result<Delivery> {
    let reading = timeout(RECOVERY, readings.next()).await;
    let reading = reading.context("no reading came within 45 s")?;
    Ok(reading.context(ENDED)??)
}

/// In the middle of a recovery there is nothing to close, and a connection that is
/// lost in this very moment is closed as well.
async fn close(connection: &Connection) -> Result<()> {
    if !connection.status().connected() {
        return Ok(());
    }
    match connection.close(200, "done".into()).await {
        Err(error) if error.can_be_recovered() => Ok(()),
        closed => Ok(closed?),
    }
}

fn text(reading: &Delivery) -> String {
    String::from_utf8_lossy(&reading.data).into_owned()
}

async fn purge(channel: &Channel) -> Result<()> {
    let options = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), options).await?;
    Ok(())
}

/// A durable, replicated queue. It has a name of its own: one that the server
/// chooses cannot be declared again by a recovery.
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
    Ok(())
}

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
}

// ANCHOR: connect
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
    // With a backoff, lapin waits for the first connection as well. Where nobody
    // listens, say so at once.
    let (host, port) = (uri.authority.host.as_str(), uri.authority.port);
    timeout(PATIENCE, TcpStream::connect((host, port)))
        .await
        .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
        .map_err(|error| {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        })?;
    let recover = ConnectionProperties::default()
        .enable_auto_recover()
        .configure_backoff(|backoff| {
            backoff
                .with_max_times(ATTEMPTS)
                .with_max_delay(LONGEST_PAUSE)
        });
    timeout(PATIENCE, Connection::connect_uri(uri, recover))
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
// ANCHOR_END: connect
