//! Publish and subscribe: each service hears of each order, also after it was down.
//!
//! Teaches: a fanout exchange gives a copy to each queue that is bound to it, so
//! each service has a queue of its own, with its own pace and its own backlog, and
//! the publisher knows none of them. The queue keeps what comes while the service is
//! down, as long as there is room on the disk. What was published before a queue was
//! bound, its service never hears.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin pubsub_rabbitmq                      # the whole story
//! cargo run --bin pubsub_rabbitmq subscribe billing    # terminal 1
//! cargo run --bin pubsub_rabbitmq subscribe stock      # terminal 2, mail is the third
//! cargo run --bin pubsub_rabbitmq publish 1 9          # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! billing:   order-1, order-2, order-3
//! stock:     order-1, order-2, order-3
//! mail:      order-1, order-2, order-3, which came while it was down
//! analytics: nothing, its queue is younger than the events
//! ```
//!
//! Left out on purpose: a limit for the queue of a service that never comes back, see
//! rabbitmq_max_length; and events for some services only, see rabbitmq_topics.

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

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer, ExchangeKind,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
        QueueDeleteOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::pubsub::{Heard, SERVICES, event, heard};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "orders.events";
const CONSUMER_TAG: &str = "service";
/// How many events may be on their way to a service.
const PREFETCH: u16 = 20;
const USAGE: &str = "usage: pubsub_rabbitmq [publish FIRST LAST | subscribe billing | \
                     subscribe stock | subscribe mail]";

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
        ["subscribe", service] if SERVICES.contains(&service) => {
            subscribe(service).await
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

/// The queue of a service.
fn queue(service: &str) -> String {
    format!("{EXCHANGE}.{service}")
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    for number in first..=last {
        publish(&channel, number).await?;
        println!("published: order-{number}");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn publisher(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare_exchange(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: publish
/// Returns when each queue that is bound has stored the event. Where none is, it is
/// gone, and that is no error: nobody wanted to hear it.
async fn publish(channel: &Channel, number: u64) -> Result<()> {
    let payload = serde_json::to_vec(&event(number))?;
    let properties = BasicProperties::default().with_delivery_mode(2); // persistent
    let options = BasicPublishOptions::default();
    let confirm = channel
        .basic_publish(EXCHANGE.into(), "".into(), options, &payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store order-{number}: {answer:?}"),
    }
}
// ANCHOR_END: publish

// ---- Subscriber ------------------------------------------------------------

// ANCHOR: subscribe
async fn subscribe(service: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, mut events) = take_events(&connection, service).await?;
    println!("ready:     {service} listens to {EXCHANGE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = events.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| {
                format!("RabbitMQ ended it: is {EXCHANGE}.{service} deleted?")
            })?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        show(&delivery.data);
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

/// The service's own queue, which stays when the service goes.
async fn take_events(
    connection: &Connection,
    service: &str,
) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare_exchange(&channel).await?;
    let queue = queue(service);
    declare(&channel, &queue).await?;
    channel
        .queue_bind(
            queue.as_str().into(),
            EXCHANGE.into(),
            "".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let events = channel
        .basic_consume(
            queue.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, events))
}
// ANCHOR_END: subscribe

/// What a service does with an event: here, to say that it has heard it.
fn show(payload: &[u8]) {
    match heard(payload) {
        Heard::Order(order) => println!("heard:     {order}"),
        Heard::Noise => eprintln!("not an event: {} bytes", payload.len()),
    }
}

async fn declare_exchange(channel: &Channel) -> Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        )
        .await?;
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    // What an earlier run has left is no part of the story.
    let late = queue("analytics");
    channel
        .queue_delete(late.as_str().into(), QueueDeleteOptions::default())
        .await?;
    for service in SERVICES {
        // Each was here before; now it is down, and its queue is there.
        let down = connect().await?;
        take_events(&down, service).await?;
        down.close(200, "the service stops".into()).await?;
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue(service).into(), purge).await?;
    }
    for number in 1..=3 {
        publish(&channel, number).await?;
    }
    for service in SERVICES {
        let down = if service == "mail" {
            ", which came while it was down"
        } else {
            ""
        };
        let (of_service, mut events) = take_events(&connection, service).await?;
        let mut orders = Vec::new();
        for _event in 0..3 {
            let delivery = timeout(PATIENCE, events.next()).await;
            let delivery = delivery.context("no event came within 8 s")?;
            let delivery = delivery.context("RabbitMQ ended the consumer")??;
            orders.push(order(&delivery.data)?);
            delivery.ack(BasicAckOptions::default()).await?;
        }
        of_service
            .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
            .await?;
        println!("{:10} {}{down}", format!("{service}:"), orders.join(", "));
    }
    // One that is here for the first time.
    let newcomer = connect().await?;
    let (of_service, _events) = take_events(&newcomer, "analytics").await?;
    of_service
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    let get = BasicGetOptions { no_ack: true };
    let message = of_service.basic_get(late.as_str().into(), get).await?;
    match message {
        None => println!("analytics: nothing, its queue is younger than the events"),
        Some(message) => bail!("analytics has {}", order(&message.delivery.data)?),
    }
    channel
        .queue_delete(late.into(), QueueDeleteOptions::default())
        .await?;
    newcomer.close(200, "done".into()).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

fn order(payload: &[u8]) -> Result<String> {
    match heard(payload) {
        Heard::Order(order) => Ok(order),
        Heard::Noise => bail!("not an event"),
    }
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
