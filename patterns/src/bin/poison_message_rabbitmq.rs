//! Poison message: one bad order does not stop the line.
//!
//! Teaches: bytes that are no order are rejected, and RabbitMQ moves them to the queue
//! for bad messages, with their origin in `x-death`. An order that kills its worker
//! leaves nobody to reject it: the quorum queue counts deliveries, and beyond its
//! `x-delivery-limit` it moves the order by itself. A classic queue counts nothing.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin poison_message_rabbitmq                       # the whole story
//! cargo run --bin poison_message_rabbitmq producer
//! cargo run --bin poison_message_rabbitmq worker         # until it stays alive
//! cargo run --bin poison_message_rabbitmq producer --careless   # a classic queue
//! cargo run --bin poison_message_rabbitmq worker --careless     # again and again
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:  order-1, noise, order-2, order-3, order-4
//! done:  order-1
//! aside: 11 bytes, no order: expected value at line 1 column 1
//! done:  order-2
//! start: order-3, attempt 1, and the worker dies
//! start: order-3, attempt 2, and the worker dies
//! start: order-3, attempt 3, and the worker dies
//! done:  order-4
//! kept:  11 bytes from line.orders: rejected
//! kept:  29 bytes from line.orders: delivery_limit
//! ```
//!
//! Left out on purpose: the way back, when the bug is mended, and the error in words:
//! `reject` carries none. Who needs it publishes a copy with a header, then
//! acknowledges, as retry_dlq_rabbitmq does.

use std::{
    env,
    future::Future,
    process::{self, ExitCode},
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
        BasicPublishOptions, BasicQosOptions, BasicRejectOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::poison_message::{ATTEMPTS, Verdict, decode, kills, line, verdict};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "line.orders";
const ASIDE: &str = "line.aside";
/// What the careless worker takes: a classic queue.
const CLASSIC: &str = "line.classic";
const CONSUMER_TAG: &str = "packer";
const USAGE: &str = "usage: poison_message_rabbitmq [producer [--careless] | worker \
                     [--careless]]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer(Care::Taken).await,
        ["producer", "--careless"] => producer(Care::None).await,
        ["worker"] => worker(Care::Taken).await,
        ["worker", "--careless"] => worker(Care::None).await,
        _ => {
            eprintln!("{USAGE}");
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Care {
    Taken,
    /// The mistake, to see what it costs.
    None,
}

// ---- Producer --------------------------------------------------------------

async fn producer(care: Care) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let queue = declare(&channel, care).await?;
    send(&channel, queue).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn send(channel: &Channel, queue: &str) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for payload in line()? {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions {
            mandatory: true, // return it if no queue takes it
            ..BasicPublishOptions::default()
        };
        let confirm = channel
            .basic_publish("".into(), queue.into(), options, &payload, properties)
            .await?;
        let answer = timeout(PATIENCE, confirm)
            .await
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
        match answer {
            Confirmation::Ack(None) => {}
            answer => bail!("RabbitMQ did not store an order: {answer:?}"),
        }
    }
    println!("sent:  order-1, noise, order-2, order-3, order-4");
    Ok(())
}

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(care: Care) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, queue, mut deliveries) = take_orders(&connection, care).await?;
    println!("ready: orders from {queue}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {queue} deleted?"))?
            .context("lost RabbitMQ; what is not decided will come again")?;
        if care == Care::None {
            // Ends here, and has decided nothing.
            decode(&delivery.data).context("cannot decode an order")?;
        }
        match step(&delivery).await? {
            Step::Next => {}
            // Nothing of this program runs after this line.
            Step::Dies => process::abort(),
        }
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

enum Step {
    Next,
    Dies,
}

// ANCHOR: step
async fn step(delivery: &Delivery) -> Result<Step> {
    let attempt = attempt(delivery)?;
    match verdict(&delivery.data, attempt) {
        Verdict::Work(order) if kills(&order) => {
            println!(
                "start: {}, attempt {attempt}, and the worker dies",
                order.id
            );
            return Ok(Step::Dies);
        }
        Verdict::Work(order) => {
            let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
            ack.await.context("lost RabbitMQ")??;
            println!("done:  {}", order.id);
        }
        Verdict::SetAside(reason) => {
            // RabbitMQ moves the bytes as they came, and says whence in `x-death`.
            let aside = BasicRejectOptions { requeue: false };
            let reject = timeout(PATIENCE, delivery.reject(aside));
            reject.await.context("lost RabbitMQ")??;
            println!("aside: {}, {reason}", name(&delivery.data));
        }
    }
    Ok(Step::Next)
}

/// The quorum queue counts what came back, also from a worker that died.
fn attempt(delivery: &Delivery) -> Result<u32> {
    let headers = delivery.properties.headers().as_ref();
    // Not there the first time.
    let count = headers.and_then(|headers| headers.inner().get("x-delivery-count"));
    let count = count.and_then(AMQPValue::as_long_long_int).unwrap_or(0);
    Ok(u32::try_from(count)? + 1)
}
// ANCHOR_END: step

fn name(payload: &[u8]) -> String {
    let order = decode(payload);
    order.map_or_else(|_| format!("{} bytes", payload.len()), |order| order.id)
}

async fn take_orders(
    connection: &Connection,
    care: Care,
) -> Result<(Channel, &'static str, Consumer)> {
    let channel = connection.create_channel().await?;
    let queue = declare(&channel, care).await?;
    // One: what waits in a worker that dies counts as delivered as well, and a good
    // order would be moved together with the bad one ahead of it.
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let deliveries = consume(&channel, queue).await?;
    Ok((channel, queue, deliveries))
}

async fn consume(channel: &Channel, queue: &str) -> Result<Consumer> {
    let deliveries = channel
        .basic_consume(
            queue.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(deliveries)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel, Care::Taken).await?;
    for queue in [QUEUE, ASIDE] {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    send(&channel, QUEUE).await?;

    loop {
        // A connection of its own, because that is what dies with a worker.
        let own = connect().await?;
        let (_channel, _queue, mut deliveries) =
            take_orders(&own, Care::Taken).await?;
        let mut last = false;
        while !last {
            let delivery = next(&mut deliveries).await?;
            match step(&delivery).await? {
                Step::Next => last = name(&delivery.data) == "order-4",
                Step::Dies => break,
            }
        }
        own.close(200, "the worker dies".into()).await?;
        if last {
            break;
        }
    }

    let mut aside = consume(&channel, ASIDE).await?;
    for _message in 0..2 {
        let kept = next(&mut aside).await?;
        let (queue, reason) = origin(&kept).context("a message without a past")?;
        println!("kept:  {} bytes from {queue}: {reason}", kept.data.len());
        kept.ack(BasicAckOptions::default()).await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn next(deliveries: &mut Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no order came; has another taken it?")?;
    Ok(delivery.context("RabbitMQ ended the consumer")??)
}

/// The queue that gave it up, and why.
fn origin(kept: &Delivery) -> Option<(String, String)> {
    let headers = kept.properties.headers().as_ref()?.inner();
    let deaths = headers.get("x-death")?.as_array()?;
    let death = deaths.as_slice().first()?.as_field_table()?.inner();
    let text = |name| Some(death.get(name)?.as_long_string()?.to_string());
    Some((text("queue")?, text("reason")?))
}
// ANCHOR_END: story

// ---- Queues and connection -------------------------------------------------

// ANCHOR: declare
/// Declares what this worker takes from, and returns its name.
async fn declare(channel: &Channel, care: Care) -> Result<&'static str> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    if care == Care::None {
        arguments.insert("x-queue-type".into(), text("classic"));
        queue(channel, CLASSIC, arguments).await?;
        return Ok(CLASSIC);
    }
    arguments.insert("x-queue-type".into(), text("quorum"));
    queue(channel, ASIDE, arguments.clone()).await?;
    // So many deliveries beyond the first one.
    arguments.insert("x-delivery-limit".into(), (ATTEMPTS - 1).into());
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(ASIDE));
    // Kept here until it is stored there; by default it may be lost on its way.
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    queue(channel, QUEUE, arguments).await?;
    Ok(QUEUE)
}
// ANCHOR_END: declare

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
