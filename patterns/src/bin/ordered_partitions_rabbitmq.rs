//! Ordered partitions: each order in its order, and many at the same time.
//!
//! Teaches: a consistent-hash exchange sends what has the same routing key to the same
//! queue, and a queue with a single active consumer sends to one worker, one message
//! at a time. So the changes of an order stay in their order while other queues are
//! worked on beside it, also when a worker is killed: what it had not acknowledged
//! comes first, and what was done already is known by the journal.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin ordered_partitions_rabbitmq                   # the whole story
//! cargo run --bin ordered_partitions_rabbitmq work shop.db 1    # terminal 1
//! cargo run --bin ordered_partitions_rabbitmq work shop.db 2    # kill -9 it
//! cargo run --bin ordered_partitions_rabbitmq publish 1 1000    # 200 orders
//! cargo run --bin ordered_partitions_rabbitmq show shop.db
//! cargo run --bin ordered_partitions_rabbitmq publish 1 1000 --unordered
//! cargo run --bin ordered_partitions_rabbitmq work bad.db 1 --unordered
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 5 changes of each of 4 orders
//! died:      worker 1, with a change written and not acknowledged
//! known:     1 change came again
//! order-1:   placed, paid, packed, shipped, delivered
//! order-2:   placed, paid, packed, shipped, delivered
//! order-3:   placed, paid, packed, shipped, delivered
//! order-4:   placed, paid, packed, shipped, delivered
//! done:      20 changes, 0 of them late
//! ```
//!
//! Left out on purpose: several queues of one worker at the same time, each with a task
//! of its own.

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
use futures_lite::{StreamExt as _, stream};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::ordered_partitions::{
    Change, Journal, Outcome, PARTITIONS, preference,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
/// An exchange that shares out by a hash of the routing key. Its queues have its name
/// and a number.
const EXCHANGE: &str = "orders.states";
/// What the careless ones use: one queue for all.
const UNORDERED: &str = "orders.states.unordered";
/// With one at a time there is nothing that a redelivery could come after.
const PREFETCH: u16 = 1;
const USAGE: &str = "usage: ordered_partitions_rabbitmq [publish FIRST LAST \
                     [--unordered] | work FILE WORKER [--unordered] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let order = match words.last() {
        Some(&"--unordered") => Order::Lost,
        _ => Order::Kept,
    };
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] | ["publish", first, last, "--unordered"] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) => publish_all(first, last, order).await,
                _ => return usage(),
            }
        }
        ["work", file, worker] | ["work", file, worker, "--unordered"] => {
            match worker.parse() {
                Ok(worker) => work(file, worker, order).await,
                Err(_no_number) => return usage(),
            }
        }
        ["show", file] => open(file).and_then(|journal| show(&journal)),
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
enum Order {
    Kept,
    /// The mistake, to see what it costs.
    Lost,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64, order: Order) -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection, order).await?;
    for number in first..=last {
        let change = Change::numbered(number);
        publish(&channel, &change, order).await?;
        println!("published: {} {}", change.order, change.state);
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn publisher(connection: &Connection, order: Order) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare(&channel, order).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: publish
/// Returns when RabbitMQ has stored the change. After an error it may have it or not:
/// publish it again, before the next.
async fn publish(channel: &Channel, change: &Change, order: Order) -> Result<()> {
    let (exchange, key) = match order {
        // The exchange hashes the key: the same order, the same queue.
        Order::Kept => (EXCHANGE, change.order.as_str()),
        Order::Lost => ("", UNORDERED),
    };
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let payload = serde_json::to_vec(change)?;
    let confirm = channel
        .basic_publish(exchange.into(), key.into(), options, &payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => {
            let Change { order, state, .. } = change;
            bail!("RabbitMQ did not store {order} {state}: {answer:?}")
        }
    }
}
// ANCHOR_END: publish

// ---- Worker ----------------------------------------------------------------

// ANCHOR: work
async fn work(file: &str, worker: u32, order: Order) -> Result<()> {
    let mut journal = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let mut deliveries = take_changes(&connection, worker, order).await?;
    println!("ready:     worker {worker}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery.context("RabbitMQ ended the deliveries")??;
        say(&handle(&mut journal, worker, &delivery).await?);
        // Only now comes the next one of this queue.
        done(&delivery).await?;
    }
    // What has come and was not begun goes back to the front of its queue.
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

async fn handle(
    journal: &mut Journal,
    worker: u32,
    delivery: &Delivery,
) -> Result<Outcome> {
    let payload = &delivery.data;
    if let Some(change) = Change::read(payload) {
        sleep(change.work()).await;
    }
    // A database blocks its thread.
    block_in_place(|| journal.write(worker, payload))
        .context("cannot write; what is not acknowledged will come again")
}
// ANCHOR_END: work

/// Acknowledges, after the work.
async fn done(delivery: &Delivery) -> Result<()> {
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
    Ok(())
}

fn say(outcome: &Outcome) {
    match outcome {
        Outcome::Changed(Change { order, state, .. }) => {
            println!("changed:   {order} {state}");
        }
        Outcome::Known(Change { order, state, .. }) => {
            println!("known:     {order} {state}, written before");
        }
        Outcome::Late(Change { order, state, .. }) => {
            println!("late:      {order} {state}, after a later one");
        }
        Outcome::SetAside => eprintln!("not a change, set aside"),
    }
}

/// The deliveries of several queues, as they come.
type Deliveries = stream::Boxed<Result<Delivery>>;

// ANCHOR: take
/// Each worker consumes from each queue. A queue sends to one of them, the one with
/// the highest priority, and turns to the next when that one is gone. Without
/// priorities the first worker would get all queues.
async fn take_changes(
    connection: &Connection,
    worker: u32,
    order: Order,
) -> Result<Deliveries> {
    let channel = connection.create_channel().await?;
    let mut all: Deliveries = stream::pending().boxed();
    for (partition, queue) in (0..).zip(declare(&channel, order).await?) {
        let mut arguments = FieldTable::default();
        if order == Order::Kept {
            let priority = i32::try_from(preference(worker, partition))?;
            arguments.insert("x-priority".into(), AMQPValue::LongInt(priority));
        }
        // For each consumer of the channel that comes after it.
        channel
            .basic_qos(PREFETCH, BasicQosOptions::default())
            .await?;
        let tag = format!("worker-{worker}-{partition}");
        let options = BasicConsumeOptions::default();
        let deliveries = channel
            .basic_consume(queue.clone().into(), tag.into(), options, arguments)
            .await?
            .map(|delivery| {
                delivery.context(
                    "lost RabbitMQ; what is not acknowledged will come again",
                )
            });
        let end = anyhow!("RabbitMQ ended it: is {queue} deleted?");
        let deliveries = deliveries.chain(stream::once(Err(end)));
        all = stream::race(all, deliveries).boxed();
    }
    Ok(all)
}
// ANCHOR_END: take

fn open(file: &str) -> Result<Journal> {
    Journal::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

fn show(journal: &Journal) -> Result<()> {
    for line in journal.show()? {
        println!("{line}");
    }
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection, Order::Kept).await?;
    for queue in declare(&channel, Order::Kept).await? {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    for number in 1..=20 {
        publish(&channel, &Change::numbered(number), Order::Kept).await?;
    }
    println!("published: 5 changes of each of 4 orders");

    let mut journal = open(":memory:")?;
    // A connection of its own, because that is what dies with it.
    let dying = connect().await?;
    let mut deliveries = take_changes(&dying, 1, Order::Kept).await?;
    let delivery = next(&mut deliveries).await?;
    handle(&mut journal, 1, &delivery).await?;
    dying.close(200, "worker 1 dies".into()).await?;
    println!("died:      worker 1, with a change written and not acknowledged");

    let mut first = take_changes(&connection, 1, Order::Kept).await?;
    let mut second = take_changes(&connection, 2, Order::Kept).await?;
    let (mut changed, mut known) = (1, 0);
    while changed < 20 {
        let (worker, delivery) = tokio::select! {
            delivery = next(&mut first) => (1, delivery?),
            delivery = next(&mut second) => (2, delivery?),
        };
        match handle(&mut journal, worker, &delivery).await? {
            Outcome::Changed(_) => changed += 1,
            Outcome::Known(_) => known += 1,
            wrong => bail!("{wrong:?}"),
        }
        done(&delivery).await?;
    }
    println!("known:     {known} change came again");
    connection.close(200, "done".into()).await?;
    show(&journal)
}

async fn next(deliveries: &mut Deliveries) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no change came; has another taken it?")?;
    delivery.context("RabbitMQ ended the deliveries")?
}
// ANCHOR_END: story

// ---- Queues and connection -------------------------------------------------

// ANCHOR: declare
/// Declares what outlives a restart of the broker, and returns the queues: one for
/// each partition, or one for all.
async fn declare(channel: &Channel, order: Order) -> Result<Vec<String>> {
    if order == Order::Lost {
        declare_queue(channel, UNORDERED, false).await?;
        return Ok(vec![UNORDERED.to_owned()]);
    }
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Custom("x-consistent-hash".to_owned()),
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the exchange {EXCHANGE} ({error}); is the plugin \
                 rabbitmq_consistent_hash_exchange enabled?"
            )
        })?;
    let mut queues = Vec::new();
    for partition in 0..PARTITIONS {
        let queue = format!("{EXCHANGE}.{partition}");
        declare_queue(channel, &queue, true).await?;
        channel
            .queue_bind(
                queue.clone().into(),
                EXCHANGE.into(),
                "1".into(), // a weight: one queue gets as much as the other
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
        queues.push(queue);
    }
    Ok(queues)
}

async fn declare_queue(channel: &Channel, queue: &str, single: bool) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    arguments.insert("x-single-active-consumer".into(), single.into());
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
// ANCHOR_END: declare

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
