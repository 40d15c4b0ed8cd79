//! Consumer: a message leaves the queue when it has been acknowledged.
//!
//! Teaches: acknowledge after the work, and limit how many messages RabbitMQ
//! hands out in advance (prefetch). What a consumer held when it died comes
//! again, marked as redelivered.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_consumer
//! cargo run --bin rabbitmq_publisher     # in a second terminal, again and again
//! ```
//!
//! Expected output:
//!
//! ```text
//! waiting for messages in hello, Ctrl-C to stop
//! received: Hello, RabbitMQ!
//! stopped
//! ```
//!
//! Left out on purpose: reconnecting; a lost connection ends this program with
//! an error.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use futures_lite::StreamExt as _;
use lapin::{
    Channel, Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "hello";
const CONSUMER_TAG: &str = "my-consumer";

/// How many messages RabbitMQ hands out before the first is acknowledged.
/// Without a limit it hands out the whole queue.
const PREFETCH: u16 = 10;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    match consume().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: consume
async fn consume() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let mut deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(), // `no_ack` is off: we acknowledge
            FieldTable::default(),
        )
        .await?;

    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for messages in {QUEUE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ; messages not acknowledged will come again")?;
        process(&delivery);
        delivery.ack(BasicAckOptions::default()).await?;
    }
    // Stops new deliveries. What was handed out in advance and not acknowledged
    // goes back to the queue when the connection closes.
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: consume

// ANCHOR: process
fn process(delivery: &Delivery) {
    let text = String::from_utf8_lossy(&delivery.data);
    let again = if delivery.redelivered {
        " (redelivered)"
    } else {
        ""
    };
    println!("received: {text}{again}");
}
// ANCHOR_END: process

/// Declares the queue, which changes nothing if it is there already.
///
/// Durable and replicated ("quorum"): it outlives a restart of the broker. What
/// `QueueDeclareOptions::default()` makes does not.
async fn declare(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {QUEUE} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
}

// ANCHOR: stop
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
// ANCHOR_END: stop

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
