//! Bridge: from RabbitMQ to Kafka, and nothing is lost on the way.
//!
//! Teaches: a bridge acknowledges on its side what the other side has acknowledged,
//! in this order. If it dies in between, Kafka gets the message twice, also with
//! `enable.idempotence`, which knows no program but one. So the id travels on, in a
//! header, for whoever reads it. RabbitMQ puts what is not acknowledged back to its
//! place, so with one bridge the order stays.
//!
//! Run, after `cargo lab up rabbitmq` and `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin bridge_rabbitmq                  # the whole story
//! cargo run --bin bridge_rabbitmq run              # Ctrl-C to stop, kill -9 it
//! cargo run --bin bridge_rabbitmq publish 1 100    # something to carry
//! cargo run --bin bridge_rabbitmq run --ack-first  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: order-10, order-20, order-30, and order-40 with two hops
//! carried:   order-10
//! carried:   order-20, and the bridge dies before it acknowledges
//! carried:   order-20
//! carried:   order-30
//! stopped:   order-40, it has been around
//! Kafka:     order-10, order-20, order-20, order-30
//! ```
//!
//! Left out on purpose: many messages on their way at a time, which is quicker; see
//! kafka_producer_pipelined for a window.

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

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::bridge::{HOPS, Verdict, id, order, verdict};
// Not `rdkafka::*`: its `Consumer` is a name of the other client as well.
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::RDKafkaErrorCode,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_AMQP_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const DEFAULT_BROKERS: &str = "localhost:9092";
const QUEUE: &str = "partner.orders";
const CONSUMER_TAG: &str = "bridge-to-kafka";
/// How many messages may be on their way to the bridge.
const PREFETCH: u16 = 20;
/// The header that holds in RabbitMQ what is the key in Kafka.
const KEY: &str = "key";
const TOPIC: &str = "partner-orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
/// The header that holds the id of an order in Kafka.
const ID: &str = "order-id";
const USAGE: &str =
    "usage: bridge_rabbitmq [publish FIRST LAST | run [--ack-first]]";

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
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    for number in first..=last {
        publish(&channel, number, "0").await?;
        println!("published: {}", id(number));
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn publish(channel: &Channel, number: u64, hops: &str) -> Result<()> {
    let order = order(number);
    let mut headers = FieldTable::default();
    headers.insert(HOPS.into(), AMQPValue::LongString(hops.into()));
    let key = AMQPValue::LongString(order.partner.as_str().into());
    headers.insert(KEY.into(), key);
    let properties = BasicProperties::default()
        .with_message_id(id(number).into())
        .with_headers(headers);
    publish_confirmed(channel, &serde_json::to_vec(&order)?, properties).await
}

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

// ---- The bridge ------------------------------------------------------------

// ANCHOR: run
async fn run(acknowledge: Acknowledge) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let producer = producer(&brokers)?;
    let connection = connect_rabbitmq().await?;
    let (channel, mut deliveries) = take_orders(&connection).await?;
    println!(
        "ready:     from RabbitMQ's {QUEUE} to {TOPIC} in Kafka, Ctrl-C to stop"
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
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        if acknowledge == Acknowledge::First {
            done_with(&delivery).await?;
        }
        let (carried, _stored) = carry(&producer, &delivery).await?;
        println!("{carried}");
        if acknowledge == Acknowledge::AfterTheTarget {
            // Only now. If the bridge dies before this line, it carries the message
            // again, with the same id.
            done_with(&delivery).await?;
        }
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Publishes a message on the other side, and returns when it is stored there, with
/// what to tell about it and where it is.
async fn carry(
    producer: &FutureProducer,
    delivery: &Delivery,
) -> Result<(String, Option<future_producer::Delivery>)> {
    let id = delivery.properties.message_id().as_ref();
    // A delivery tag is new each time: nothing of RabbitMQ's would do as an id.
    let id = id.map_or("", |id| id.as_str());
    let Verdict::Forward(hops) = verdict(header(delivery, HOPS).as_deref()) else {
        return Ok((format!("stopped:   {id}, it has been around"), None));
    };
    // Typed in RabbitMQ; bytes in Kafka.
    let hops = hops.to_string();
    let header_of = |key, value| Header {
        key,
        value: Some(value),
    };
    let headers = OwnedHeaders::new()
        .insert(header_of(ID, id))
        .insert(header_of(HOPS, &hops));
    let key = header(delivery, KEY);
    let mut record = FutureRecord::to(TOPIC)
        .headers(headers)
        .payload(&delivery.data);
    if let Some(key) = &key {
        // What has the same key stays in its order.
        record = record.key(key);
    }
    let stored = producer.send(record, PATIENCE).await;
    let stored = stored
        .map_err(|(error, _record)| anyhow!("Kafka did not store {id}: {error}"))?;
    Ok((format!("carried:   {id}"), Some(stored)))
}
// ANCHOR_END: run

fn header(delivery: &Delivery, name: &str) -> Option<String> {
    let headers = delivery.properties.headers().as_ref()?;
    Some(match headers.inner().get(name)? {
        AMQPValue::LongString(text) => text.to_string(),
        AMQPValue::ShortString(text) => text.to_string(),
        // Other clients write a number as one, each of a size that it likes.
        AMQPValue::ShortShortInt(number) => number.to_string(),
        AMQPValue::ShortShortUInt(number) => number.to_string(),
        AMQPValue::ShortInt(number) => number.to_string(),
        AMQPValue::ShortUInt(number) => number.to_string(),
        AMQPValue::LongInt(number) => number.to_string(),
        AMQPValue::LongUInt(number) => number.to_string(),
        AMQPValue::LongLongInt(number) => number.to_string(),
        // Not nothing: a hop count that nobody can read is one all the same.
        other => format!("{other:?}"),
    })
}

async fn done_with(delivery: &Delivery) -> Result<()> {
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
    Ok(())
}

async fn take_orders(connection: &Connection) -> Result<(Channel, lapin::Consumer)> {
    let channel = connection.create_channel().await?;
    declare_queue(&channel, QUEUE).await?;
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

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    // Of one partner, so in one partition and in order.
    for (number, hops) in [(10, "0"), (20, "0"), (30, "0"), (40, "2")] {
        publish(&channel, number, hops).await?;
    }
    println!("published: order-10, order-20, order-30, and order-40 with two hops");

    // A connection of its own, because that is what dies with it.
    let first = connect_rabbitmq().await?;
    let (_channel, mut deliveries) = take_orders(&first).await?;
    let delivery = next(&mut deliveries).await?;
    let (carried, stored) = carry(&producer, &delivery).await?;
    println!("{carried}");
    let begin = stored.context("it has not been around")?;
    done_with(&delivery).await?;
    let delivery = next(&mut deliveries).await?;
    let (carried, _stored) = carry(&producer, &delivery).await?;
    println!("{carried}, and the bridge dies before it acknowledges");
    first.close(200, "the bridge dies".into()).await?;

    let (_channel, mut deliveries) = take_orders(&connection).await?;
    for _message in 0..3 {
        let delivery = next(&mut deliveries).await?;
        let (carried, _stored) = carry(&producer, &delivery).await?;
        println!("{carried}");
        done_with(&delivery).await?;
    }
    println!("Kafka:     {}", ids(&brokers, &begin, 4).await?.join(", "));
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn next(deliveries: &mut lapin::Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery =
        delivery.context("no order came; has another bridge taken it?")?;
    Ok(delivery.context("RabbitMQ ended the consumer")??)
}

/// The ids of so many records, from this one on.
async fn ids(
    brokers: &str,
    begin: &future_producer::Delivery,
    count: usize,
) -> Result<Vec<String>> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // A consumer needs one; this one commits nothing.
        .set("group.id", "partner-orders-story")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut partition = TopicPartitionList::new();
    let offset = Offset::Offset(begin.offset);
    partition.add_partition_offset(TOPIC, begin.partition, offset)?;
    consumer.assign(&partition)?;
    let mut ids = Vec::new();
    for _record in 0..count {
        let record = timeout(PATIENCE, consumer.recv()).await;
        let record = record.context("no record came within 8 s")??;
        let headers = record.headers().into_iter().flat_map(|all| all.iter());
        let id = headers.filter(|header| header.key == ID).last();
        let id = id.and_then(|header| header.value).unwrap_or_default();
        ids.push(String::from_utf8_lossy(id).into_owned());
    }
    spawn_blocking(move || drop(consumer)).await?;
    Ok(ids)
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

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        let known = |name: &_| metadata.topics().iter().any(|it| it.name() == *name);
        if TOPICS.iter().all(known) {
            return Ok(());
        }
        let topics = TOPICS
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&topics, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before is
        // told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {TOPICS:?}; ask who may describe it")
}

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
