//! Priorities: what is urgent overtakes what waits.
//!
//! Teaches: a quorum queue of RabbitMQ 4.3 orders its messages by their priority,
//! 0 to 31, without being asked; a classic queue does so if it was declared with
//! `x-max-priority`. Only what waits in the queue is ordered: what a consumer holds
//! in advance stays in front, so the prefetch limit decides how much priorities are
//! worth.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_priority_queue
//! ```
//!
//! Expected output:
//!
//! ```text
//! quorum:      express-5, courier-3, standard-1, parcel-0
//! classic:     express-5, courier-3, standard-1, parcel-0
//! no argument: parcel-0, standard-1, courier-3, express-5
//! prefetch 10: parcel-0, standard-1, courier-3, express-5
//! ```
//!
//! Left out on purpose: what never comes to an end because something more urgent
//! always comes; two queues with a worker each do not starve.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUORUM: &str = "priority.orders.quorum";
const CLASSIC: &str = "priority.orders.classic";
const PLAIN: &str = "priority.orders.plain";
/// In the order in which they are placed.
const ORDERS: [(&str, u8); 4] = [
    ("parcel-0", 0),
    ("standard-1", 1),
    ("courier-3", 3),
    ("express-5", 5),
];

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
    declare(&channel).await?;

    for (name, queue) in [
        ("quorum:", QUORUM),
        ("classic:", CLASSIC),
        ("no argument:", PLAIN),
    ] {
        // All of them wait before somebody comes.
        for (order, priority) in ORDERS {
            publish(&channel, queue, order, priority).await?;
        }
        let worker = connection.create_channel().await?;
        let mut orders = consume(&worker, queue, 1).await?;
        println!("{name:12} {}", take_all(&mut orders).await?);
        worker.close(200, "done".into()).await?;
    }

    // Somebody is there first, and takes each order as it comes.
    let worker = connection.create_channel().await?;
    let mut orders = consume(&worker, QUORUM, 10).await?;
    for (order, priority) in ORDERS {
        publish(&channel, QUORUM, order, priority).await?;
    }
    println!("prefetch 10: {}", take_all(&mut orders).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), text("quorum"));
    queue(channel, QUORUM, quorum).await?;

    let mut classic = FieldTable::default();
    classic.insert("x-queue-type".into(), text("classic"));
    queue(channel, PLAIN, classic.clone()).await?;
    // Each priority costs memory and time: a handful is enough.
    classic.insert("x-max-priority".into(), AMQPValue::ShortShortUInt(5));
    queue(channel, CLASSIC, classic).await
}

async fn publish(
    channel: &Channel,
    queue: &str,
    order: &str,
    priority: u8,
) -> Result<()> {
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_priority(priority);
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            order.as_bytes(),
            properties,
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {order}");
    Ok(())
}
// ANCHOR_END: declare

async fn consume(channel: &Channel, queue: &str, prefetch: u16) -> Result<Consumer> {
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(queue.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

/// Takes all orders, and tells in which order they came.
async fn take_all(orders: &mut Consumer) -> Result<String> {
    let mut came = Vec::new();
    for _order in ORDERS {
        let order = timeout(PATIENCE, orders.next()).await;
        let order = order.context("no order came within 8 s")?;
        let order = order.context("the queue is gone")??;
        order.ack(BasicAckOptions::default()).await?;
        came.push(String::from_utf8_lossy(&order.data).into_owned());
    }
    Ok(came.join(", "))
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
