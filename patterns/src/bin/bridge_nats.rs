//! Bridge: from NATS to RabbitMQ, and nothing is lost on the way.
//!
//! Teaches: a bridge acknowledges on its side what the other side has confirmed, in
//! this order. If it dies in between, RabbitMQ gets the message twice: it drops
//! nothing by its id, so the id travels on, in `message_id`, for whoever reads it.
//! And as one message after the other is carried, and none is delivered before the
//! last one is acknowledged, the order stays.
//!
//! Run, after `cargo lab up nats` and `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin bridge_nats                  # the whole story
//! cargo run --bin bridge_nats run              # Ctrl-C to stop, kill -9 it
//! cargo run --bin bridge_nats publish 1 100    # something to carry
//! cargo run --bin bridge_nats run --ack-first  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: order-1, order-2, order-3, and order-4 with two hops
//! carried:   order-1
//! carried:   order-2, and the bridge dies before it acknowledges
//! carried:   order-2
//! carried:   order-3
//! stopped:   order-4, it has been around
//! RabbitMQ:  order-1, order-2, order-2, order-3
//! ```
//!
//! Left out on purpose: many messages on their way at a time, which is quicker and
//! can change their order when one is delivered again.

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

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, ServerAddr, header,
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        stream,
    },
};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
    uri::AMQPUri,
};
use patterns::bridge::{HOPS, Verdict, id, order, verdict};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_NATS_URL: &str = "nats://localhost:4222";
const DEFAULT_AMQP_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "PARTNER_ORDERS";
const SUBJECT: &str = "partner.orders";
const CONSUMER: &str = "bridge-to-rabbitmq";
/// The header that holds in NATS what is the key in Kafka.
const KEY: &str = "key";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(2);
const QUEUE: &str = "partner.orders";
const USAGE: &str = "usage: bridge_nats [publish FIRST LAST | run [--ack-first]]";

/// How long a broker may take to answer before it counts as not there.
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
        ["run"] => run(Acknowledge::AfterTheTarget).await,
        ["run", "--ack-first"] => run(Acknowledge::First).await,
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
enum Acknowledge {
    AfterTheTarget,
    /// The mistake, to see what it costs.
    First,
}

// ---- Something to carry ----------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    for number in first..=last {
        publish(&jetstream, number, "0").await?;
        println!("published: {}", id(number));
    }
    client.drain().await?;
    Ok(())
}

async fn publish(
    jetstream: &jetstream::Context,
    number: u64,
    hops: &str,
) -> Result<()> {
    let order = order(number);
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, id(number));
    headers.insert(KEY, order.partner.as_str());
    headers.insert(HOPS, hops);
    let payload = serde_json::to_vec(&order)?;
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    jetstream
        .publish_with_headers(SUBJECT, headers, payload.into())
        .await?
        .await
        .with_context(|| format!("NATS did not store {}", id(number)))?;
    Ok(())
}

// ---- The bridge ------------------------------------------------------------

// ANCHOR: run
async fn run(acknowledge: Acknowledge) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_orders(&jetstream).await?;
    println!(
        "ready:     from {SUBJECT} in NATS to RabbitMQ's {QUEUE}, Ctrl-C to stop"
    );
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .context("NATS ended the deliveries")?
            .context("cannot take orders; is the stream or its consumer deleted?")?;
        if acknowledge == Acknowledge::First {
            delivery.double_ack().await.map_err(Error::from_boxed)?;
        }
        println!("{}", carry(&channel, &delivery).await?);
        if acknowledge == Acknowledge::AfterTheTarget {
            // Only now. If the bridge dies before this line, it carries the message
            // again, with the same id.
            delivery.double_ack().await.map_err(Error::from_boxed)?;
        }
    }
    client.drain().await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Publishes a message on the other side, and returns when it is stored there, with
/// what to tell about it.
async fn carry(channel: &Channel, delivery: &jetstream::Message) -> Result<String> {
    let place = delivery.info().map_err(Error::from_boxed)?.stream_sequence;
    // Whoever gave it no id gets one that is the same each time.
    let place = format!("{STREAM}-{place}");
    let id = header(delivery, header::NATS_MESSAGE_ID.as_ref());
    let id = id.filter(|id| !id.is_empty()).unwrap_or(&place);
    let Verdict::Forward(hops) = verdict(header(delivery, HOPS)) else {
        return Ok(format!("stopped:   {id}, it has been around"));
    };
    // Text in NATS; here a header has a type.
    let mut headers = FieldTable::default();
    headers.insert(HOPS.into(), AMQPValue::LongString(hops.to_string().into()));
    if let Some(key) = header(delivery, KEY) {
        headers.insert(KEY.into(), AMQPValue::LongString(key.into()));
    }
    // An id of RabbitMQ has 255 bytes at most. A longer one gives way to the place.
    let message_id =
        ShortString::try_new(id).or_else(|_| ShortString::try_new(&place));
    let properties = BasicProperties::default()
        .with_message_id(message_id?)
        .with_headers(headers);
    publish_confirmed(channel, &delivery.payload, properties)
        .await
        .with_context(|| format!("cannot carry {id}"))?;
    Ok(format!("carried:   {id}"))
}
// ANCHOR_END: run

fn header<'a>(delivery: &'a jetstream::Message, name: &str) -> Option<&'a str> {
    let value = delivery.headers.as_ref()?.get(name)?;
    Some(value.as_str())
}

// ANCHOR: take
async fn take_orders(jetstream: &jetstream::Context) -> Result<pull::Stream> {
    let stream = declare(jetstream).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // One at a time: what comes again still comes before the next one.
            max_ack_pending: 1,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the bridge")?;
    Ok(consumer.messages().await?)
}
// ANCHOR_END: take

async fn confirming(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare_queue(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

/// Returns when RabbitMQ has stored the message.
async fn publish_confirmed(
    channel: &Channel,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let properties = properties.with_delivery_mode(2); // persistent
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store it: {answer:?}"),
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    // NATS remembers the ids of the last two minutes, also those of an earlier run. An
    // error says that there is no stream.
    let _deleted = jetstream.delete_stream(STREAM).await;
    declare(&jetstream).await?;
    for (number, hops) in [(1, "0"), (2, "0"), (3, "0"), (4, "2")] {
        publish(&jetstream, number, hops).await?;
    }
    println!("published: order-1, order-2, order-3, and order-4 with two hops");

    // A connection of its own, because that is what dies with it.
    let first = connect_nats().await?;
    let mut deliveries = take_orders(&jetstream::new(first.clone())).await?;
    let delivery = next(&mut deliveries).await?;
    println!("{}", carry(&channel, &delivery).await?);
    delivery.double_ack().await.map_err(Error::from_boxed)?;
    let delivery = next(&mut deliveries).await?;
    let carried = carry(&channel, &delivery).await?;
    println!("{carried}, and the bridge dies before it acknowledges");
    drop(deliveries);
    first.drain().await?;

    let mut deliveries = take_orders(&jetstream).await?;
    for _message in 0..3 {
        let delivery = next(&mut deliveries).await?;
        println!("{}", carry(&channel, &delivery).await?);
        delivery.double_ack().await.map_err(Error::from_boxed)?;
    }

    let mut ids = Vec::new();
    let options = BasicGetOptions { no_ack: true };
    while let Some(message) = channel.basic_get(QUEUE.into(), options).await? {
        let id = message.properties.message_id().as_ref();
        ids.push(id.context("a message without an id")?.to_string());
    }
    println!("RabbitMQ:  {}", ids.join(", "));
    client.drain().await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn next(deliveries: &mut pull::Stream) -> Result<jetstream::Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery =
        delivery.context("no order came; has another bridge taken it?")?;
    Ok(delivery.context("NATS ended the deliveries")??)
}
// ANCHOR_END: story

// ---- Both sides ------------------------------------------------------------

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

/// A stream that keeps a message until it is acknowledged.
async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {STREAM} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
}

async fn connect_nats() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_NATS_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!(
                "NATS_URL is not a NATS address; a right one: {DEFAULT_NATS_URL}"
            )
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}

/// Declares a queue that outlives a restart of the broker.
async fn declare_queue(channel: &Channel, queue: &str) -> Result<()> {
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

async fn connect_rabbitmq() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_AMQP_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_AMQP_URL}")
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
