//! Idempotent consumer: delivered more than once, charged once.
//!
//! Teaches: RabbitMQ delivers at least once, and a publisher that has heard no
//! confirm publishes again, so a payment may come twice. Its id is in `message_id`;
//! the id and the charge are written in one transaction, and the acknowledgement
//! comes after it. `redelivered` does not do: it says that a message may have been
//! seen, not that it was charged, and nothing of what is published twice.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin idempotent_consumer_rabbitmq                    # the whole story
//! cargo run --bin idempotent_consumer_rabbitmq publish 1 1000     # and once more
//! cargo run --bin idempotent_consumer_rabbitmq consume ledger.db  # kill -9 it
//! cargo run --bin idempotent_consumer_rabbitmq consume ledger.db --no-inbox
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: payment-1, payment-2, payment-2 once more, payment-3
//! charged:   payment-1, and the consumer dies before it acknowledges
//! known:     payment-1, not charged again
//! charged:   payment-2
//! known:     payment-2, not charged again
//! charged:   payment-3
//! total:     6 cents, as 1 + 2 + 3
//! ```
//!
//! Left out on purpose: an inbox that forgets. Delete what is older than any message
//! can still come.

use std::{
    env,
    future::Future,
    path::Path,
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
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::idempotent_consumer::{Ledger, Outcome, id, payment};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "payments.due";
const CONSUMER_TAG: &str = "ledger";
/// How many payments may be on their way to the consumer.
const PREFETCH: u16 = 20;
const USAGE: &str = "usage: idempotent_consumer_rabbitmq [publish FIRST LAST | consume \
                     FILE [--no-inbox]]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => publish_all(first, last).await,
            _ => return usage(),
        },
        ["consume", file] => consume(file, Inbox::Used).await,
        ["consume", file, "--no-inbox"] => consume(file, Inbox::Missing).await,
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
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Inbox {
    Used,
    /// The mistake, to see what it costs.
    Missing,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    for number in first..=last {
        publish(&channel, number).await?;
        println!("published: {}", id(number));
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn publisher(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: publish
/// Returns when RabbitMQ has stored the payment. After an error it may have it or
/// not: publish it again, with the same id.
async fn publish(channel: &Channel, number: u64) -> Result<()> {
    let properties = BasicProperties::default()
        .with_message_id(id(number).into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let payload = serde_json::to_vec(&payment(number))?;
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, &payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store {}: {answer:?}", id(number)),
    }
}
// ANCHOR_END: publish

// ---- Consumer --------------------------------------------------------------

// ANCHOR: consume
async fn consume(file: &str, inbox: Inbox) -> Result<()> {
    let mut ledger = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, mut deliveries) = take_payments(&connection).await?;
    println!("ready:     payments from {QUEUE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        let id = message_id(&delivery);
        match charge(&mut ledger, inbox, &delivery)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => eprintln!("not a payment, set aside: {id:?}"),
        }
        // After the transaction. If the program ends before this line, the payment
        // comes again, and is known.
        let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
        ack.await.context("lost RabbitMQ")??;
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

fn charge(
    ledger: &mut Ledger,
    inbox: Inbox,
    delivery: &Delivery,
) -> Result<Outcome> {
    let id = message_id(delivery);
    // A database blocks its thread.
    let outcome = block_in_place(|| match inbox {
        Inbox::Used => ledger.charge(id, &delivery.data),
        Inbox::Missing => ledger.charge_each_time(id, &delivery.data),
    });
    outcome.with_context(|| format!("cannot charge {id}, which will come again"))
}

fn message_id(delivery: &Delivery) -> &str {
    let id = delivery.properties.message_id().as_ref();
    id.map_or("", |id| id.as_str())
}
// ANCHOR_END: consume

async fn take_payments(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
}

fn open(file: &str) -> Result<Ledger> {
    Ledger::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    // As one does that has heard no confirm for payment-2.
    for number in [1, 2, 2, 3] {
        publish(&channel, number).await?;
    }
    println!("published: payment-1, payment-2, payment-2 once more, payment-3");

    let mut ledger = open(":memory:")?;
    // A connection of its own, because that is what dies with it.
    let first = connect().await?;
    let (_channel, mut deliveries) = take_payments(&first).await?;
    let delivery = next(&mut deliveries).await?;
    charge(&mut ledger, Inbox::Used, &delivery)?;
    let id = message_id(&delivery);
    println!("charged:   {id}, and the consumer dies before it acknowledges");
    first.close(200, "the consumer dies".into()).await?;

    let (_channel, mut deliveries) = take_payments(&connection).await?;
    for _delivery in 0..4 {
        let delivery = next(&mut deliveries).await?;
        let id = message_id(&delivery);
        match charge(&mut ledger, Inbox::Used, &delivery)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => bail!("cannot read {id:?}"),
        }
        delivery.ack(BasicAckOptions::default()).await?;
    }
    println!("total:     {} cents, as 1 + 2 + 3", ledger.total()?);
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn next(deliveries: &mut Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no payment came; has another taken it?")?;
    Ok(delivery.context("RabbitMQ ended the consumer")??)
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn declare(channel: &Channel, queue: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {queue} ({error}); if it was made with \
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
