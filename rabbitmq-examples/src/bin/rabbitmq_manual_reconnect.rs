//! Recovery: a loop of your own that makes everything anew.
//!
//! Teaches: when the connection is lost, throw all of it away, connect to the
//! next address after a pause that grows, and make queue, limit, confirms and
//! consumer again in one function. What must outlive a connection, here the number
//! of the next reading, lies outside. A publish without an answer is published
//! again, a delivery without an acknowledgement comes again: at least once.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_manual_reconnect                # the whole story
//! cargo run --bin rabbitmq_manual_reconnect publish 1000   # restart RabbitMQ meanwhile
//! cargo run --bin rabbitmq_manual_reconnect consume        # Ctrl-C to stop
//! ```
//!
//! `AMQP_URL` may name several nodes, with commas between them.
//!
//! Expected output:
//!
//! ```text
//! consumed:  reading-1, not acknowledged yet
//! lost:      protocol error: AMQP hard error: NOT-IMPLEMENTED: NOT_IMPLEMENTED - immediate=true
//! connected: again, with a new channel and a new consumer
//! published: reading-2
//! consumed:  reading-1, redelivered
//! consumed:  reading-2
//! ```
//!
//! Left out on purpose: to recognise a reading that comes twice; and errors that a
//! new connection would not mend, a refused declaration for example, which end the
//! program.

use std::{
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
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
    sync::Notify,
    time::{Instant, sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "reconnect.readings";

/// How long to go on trying before it is given up.
const GIVE_UP: Duration = Duration::from_secs(90);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Two of these without a word, and the connection counts as lost, also when its
/// other end has vanished without closing it.
const HEARTBEAT_SECONDS: u16 = 5;

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
            eprintln!("usage: rabbitmq_manual_reconnect [publish COUNT | consume]");
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

// ANCHOR: supervise
/// Runs this work on one connection after the other, until it is done or has an
/// error of its own.
async fn supervise(
    stop: &Notify,
    mut work: impl AsyncFnMut(&Connection) -> Result<()>,
) -> Result<()> {
    // The first one is not waited for: a wrong address should say so at once.
    let mut connection = connect().await?;
    loop {
        let result = tokio::select! {
            biased;
            result = work(&connection) => result,
            () = lost(&connection) => Err(anyhow!("connection lost")),
        };
        match result {
            Ok(()) => {
                // Lost in this moment, it is closed as well.
                let _already_lost = connection.close(200, "done".into()).await;
                return Ok(());
            }
            // An error while the connection is there is no loss of it.
            Err(error) if connection.status().connected() => return Err(error),
            Err(error) => println!("lost:      {error}"),
        }
        connection = tokio::select! {
            biased;
            () = stop.notified() => return Ok(()),
            connection = reconnect() => connection?,
        };
        println!("connected: again, with a new channel and a new consumer");
    }
}

/// Returns a moment after the connection is lost. What waits for an answer then
/// may wait for ever, with lapin 4.12 an acknowledgement for example.
async fn lost(connection: &Connection) {
    while connection.status().connected() {
        sleep(LOOK_EVERY).await;
    }
    // An error of the work says more than this, so it may come first.
    sleep(LOOK_EVERY).await;
}

/// Tries all addresses, and again, with pauses in between.
async fn reconnect() -> Result<Connection> {
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        match connect().await {
            Ok(connection) => return Ok(connection),
            Err(error) if start.elapsed() > GIVE_UP => return Err(error),
            Err(_not_yet) => {}
        }
        // Each client waits for another time, or all those of a restarted node
        // come at once.
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// All that a connection needs, made anew on each: nothing of it outlives the
/// one before.
async fn set_up(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel.basic_qos(10, BasicQosOptions::default()).await?;
    queue(&channel, QUEUE).await?;
    Ok(channel)
}
// ANCHOR_END: supervise

// ANCHOR: publish
async fn publish_many(count: usize) -> Result<()> {
    // Outlives the connections: the next one goes on where this one was.
    let mut published = 0;
    // Ctrl-C ends it at once.
    supervise(&Notify::new(), async |connection| {
        let channel = set_up(connection).await?;
        println!("ready:     {count} readings to {QUEUE}");
        while published < count {
            publish(&channel, &format!("reading-{}", published + 1)).await?;
            published += 1;
        }
        Ok(())
    })
    .await?;
    println!("published: {count} readings");
    Ok(())
}
// ANCHOR_END: publish

// ANCHOR: consume
async fn consume_all() -> Result<()> {
    let stop = stop_signal()?;
    supervise(&stop, async |connection| {
        let channel = set_up(connection).await?;
        let mut readings = consume(&channel).await?;
        println!("ready:     readings from {QUEUE}, Ctrl-C to stop");
        loop {
            let reading = tokio::select! {
                biased;
                () = stop.notified() => return Ok(()),
                reading = next(&mut readings) => reading?,
            };
            println!("consumed:  {}", text(&reading));
            // `Ok(false)` if the connection was lost meanwhile: it comes again.
            reading.ack(BasicAckOptions::default()).await?;
        }
    })
    .await?;
    println!("stopped");
    Ok(())
}

async fn consume(channel: &Channel) -> Result<Consumer> {
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

async fn next(readings: &mut Consumer) -> Result<Delivery> {
    // A lost connection is an error here; the end without one is the queue's.
    Ok(readings.next().await.context("the queue is gone")??)
}
// ANCHOR_END: consume

// ANCHOR: story
async fn story() -> Result<()> {
    let mut broken = false;
    // Ctrl-C ends it at once.
    supervise(&Notify::new(), async |connection| {
        let channel = set_up(connection).await?;
        if !broken {
            broken = true;
            let purge = QueuePurgeOptions::default();
            channel.queue_purge(QUEUE.into(), purge).await?;
            publish(&channel, "reading-1").await?;
            let mut readings = consume(&channel).await?;
            let reading = next(&mut readings).await?;
            println!("consumed:  {}, not acknowledged yet", text(&reading));
            return break_connection(&channel, &mut readings).await;
        }
        publish(&channel, "reading-2").await?;
        println!("published: reading-2");
        let mut readings = consume(&channel).await?;
        for _reading in 0..2 {
            let reading = timeout(PATIENCE, next(&mut readings)).await;
            let reading = reading.context("no reading came within 8 s")??;
            let again = if reading.redelivered {
                ", redelivered"
            } else {
                ""
            };
            println!("consumed:  {}{again}", text(&reading));
            reading.ack(BasicAckOptions::default()).await?;
        }
        Ok(())
    })
    .await
}

/// Asks for what RabbitMQ does not know, `immediate`: it answers by closing the
/// connection, as it does when an operator closes it or the server stops.
async fn break_connection(channel: &Channel, readings: &mut Consumer) -> Result<()> {
    let immediate = BasicPublishOptions {
        immediate: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default();
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), immediate, b"", properties)
        .await?;
    drop(confirm);
    let lost = timeout(PATIENCE, next(readings)).await;
    lost.context("the connection is still there after 8 s")??;
    bail!("the connection is still there")
}
// ANCHOR_END: story

async fn publish(channel: &Channel, reading: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            reading.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(_) => Ok(()),
        answer => bail!("RabbitMQ did not store {reading}: {answer:?}"),
    }
}

fn text(reading: &Delivery) -> String {
    String::from_utf8_lossy(&reading.data).into_owned()
}

/// A durable, replicated queue.
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

/// Woken by the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<Arc<Notify>> {
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
    Ok(stop)
}

// ANCHOR: connect
/// Connects to the first node that answers.
async fn connect() -> Result<Connection> {
    let urls = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let mut answer = Err(anyhow!("AMQP_URL is empty"));
    for url in urls.split(',') {
        answer = connect_to(url).await;
        if answer.is_ok() {
            break;
        }
    }
    answer
}

async fn connect_to(url: &str) -> Result<Connection> {
    let mut uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    uri.query.heartbeat = Some(HEARTBEAT_SECONDS);
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
// ANCHOR_END: connect
