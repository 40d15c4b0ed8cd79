//! Transactional outbox: an order and the event about it, both or none.
//!
//! Teaches: whoever writes to a database and then publishes loses the event when he
//! dies in between, and no order of the two is right. So the event is written into a
//! table of the same database, in the transaction of the order, and a relay
//! publishes from there. It crosses an event off when RabbitMQ has confirmed it, so
//! a relay that dies publishes one again, with the same id.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin transactional_outbox_rabbitmq                     # the whole story
//! cargo run --bin transactional_outbox_rabbitmq relay shop.db       # terminal 1
//! cargo run --bin transactional_outbox_rabbitmq place 1 100 shop.db # terminal 2
//! cargo run --bin transactional_outbox_rabbitmq dual-write 1 100 shop.db
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:    order-1, order-2, order-3, each with its event
//! published: order-1.placed
//! published: order-2.placed, and the relay dies before it crosses it off
//! published: order-2.placed
//! published: order-3.placed
//! queue:     order-1.placed, order-2.placed, order-2.placed, order-3.placed
//! ```
//!
//! Left out on purpose: a second relay, for the case that the first machine fails.
//! Two at a time keep no order; let a lease decide, as in nats_kv_lease.

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
use futures_lite::future::poll_once;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::transactional_outbox::{Event, Shop, order};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "orders.placed";
/// How many events the relay takes from the database at a time.
const BATCH: usize = 100;
/// How often it looks when there was nothing to do: so late an event may be.
const POLL: Duration = Duration::from_millis(50);
const USAGE: &str = "usage: transactional_outbox_rabbitmq [place FIRST LAST FILE | \
                     relay FILE | dual-write FIRST LAST FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["relay", file] => relay(file).await,
        [way @ ("place" | "dual-write"), first, last, file] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if way == "place" => place(first, last, file),
                (Ok(first), Ok(last)) => dual_write(first, last, file).await,
                _ => return usage(),
            }
        }
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

// ---- The shop --------------------------------------------------------------

// ANCHOR: place
/// Places orders. No broker is needed for it, and none can be in the way.
fn place(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    for number in first..=last {
        let order = order(number);
        shop.place(&order)
            .with_context(|| format!("{} is not placed", order.order))?;
        println!("placed:    {}", order.order);
    }
    Ok(())
}
// ANCHOR_END: place

fn open(file: &str) -> Result<Shop> {
    Shop::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ANCHOR: dual_write
/// The mistake: two writes, and a program can die between them.
async fn dual_write(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    for number in first..=last {
        let order = order(number);
        block_in_place(|| shop.place_without_event(&order))?;
        // From here on the order is there. Who will publish its event?
        publish(&channel, &Event::about(&order)).await?;
        println!("placed:    {}", order.order);
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: dual_write

// ---- The relay -------------------------------------------------------------

// ANCHOR: relay
async fn relay(file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    println!("ready:     events from {file} to {QUEUE}, Ctrl-C to stop");
    'relay: loop {
        // A database blocks its thread.
        let events = block_in_place(|| shop.waiting(BATCH))?;
        if events.is_empty() {
            tokio::select! {
                () = &mut stop_signal => break,
                () = sleep(POLL) => continue,
            }
        }
        // One after the other: the order of the events is that of the transactions.
        for event in events {
            if poll_once(&mut stop_signal).await.is_some() {
                break 'relay;
            }
            publish(&channel, &event).await?;
            println!("published: {}", event.id);
            // If the program ends before this line, the event is published again.
            block_in_place(|| shop.cross_off(&event))?;
        }
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: relay

async fn publisher(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: publish
/// Returns when RabbitMQ has stored the event.
async fn publish(channel: &Channel, event: &Event) -> Result<()> {
    let properties = BasicProperties::default()
        .with_message_id(event.id.as_str().into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, &event.payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store {}: {answer:?}", event.id),
    }
}
// ANCHOR_END: publish

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;

    let mut shop = open(":memory:")?;
    for number in 1..=3 {
        shop.place(&order(number))?;
    }
    println!("placed:    order-1, order-2, order-3, each with its event");

    for event in shop.waiting(2)? {
        publish(&channel, &event).await?;
        if event.position == 1 {
            shop.cross_off(&event)?;
            println!("published: {}", event.id);
        } else {
            let id = &event.id;
            println!("published: {id}, and the relay dies before it crosses it off");
        }
    }
    // The next relay knows no more than what stands in the database.
    for event in shop.waiting(BATCH)? {
        publish(&channel, &event).await?;
        println!("published: {}", event.id);
        shop.cross_off(&event)?;
    }

    let mut ids = Vec::new();
    let options = BasicGetOptions { no_ack: true };
    while let Some(message) = channel.basic_get(QUEUE.into(), options).await? {
        let id = message.properties.message_id().as_ref();
        ids.push(id.context("an event without an id")?.to_string());
    }
    println!("queue:     {}", ids.join(", "));
    connection.close(200, "done".into()).await?;
    Ok(())
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
