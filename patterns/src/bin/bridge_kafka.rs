//! Bridge: from Kafka to NATS, and nothing is lost on the way.
//!
//! Teaches: a bridge commits on its side what the other side has acknowledged, in
//! this order. If it dies in between, it publishes again, with the id that the
//! message had in Kafka, and NATS drops what it has. What does not map is decided
//! here: the key becomes a header, bytes become text, and a hop count keeps a circle
//! of bridges from turning for ever.
//!
//! Run, after `cargo lab up kafka` and `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin bridge_kafka                  # the whole story
//! cargo run --bin bridge_kafka run              # Ctrl-C to stop, kill -9 it
//! cargo run --bin bridge_kafka publish 1 100    # something to carry
//! cargo run --bin bridge_kafka run --ack-first  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: order-10, order-20, order-30, and order-40 with two hops
//! carried:   order-10
//! carried:   order-20, and the bridge dies before it commits
//! carried:   order-20, which NATS had already
//! carried:   order-30
//! stopped:   order-40, it has been around
//! NATS:      3 messages
//! ```
//!
//! Left out on purpose: many messages on their way at a time, which is quicker; see
//! nats_jetstream_throughput for a window.

use std::{
    borrow::Cow,
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
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, ServerAddr, header,
    jetstream::{self, stream},
};
use patterns::bridge::{HOPS, Verdict, id, order, verdict};
// Not `rdkafka::*`: its `Consumer` and `Message` are names of the other client as well.
use rdkafka::{
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const DEFAULT_NATS_URL: &str = "nats://localhost:4222";
const TOPIC: &str = "partner-orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
const GROUP: &str = "bridge-to-nats";
const STORY_GROUP: &str = "bridge-to-nats-story";
/// The header that holds the id of an order in Kafka.
const ID: &str = "order-id";
const STREAM: &str = "PARTNER_ORDERS";
const SUBJECT: &str = "partner.orders";
/// The header that holds in NATS what is the key in Kafka.
const KEY: &str = "key";
const USAGE: &str = "usage: bridge_kafka [publish FIRST LAST | run [--ack-first]]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first record may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

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
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        publish(&producer, number, "0").await?;
        println!("published: {}", id(number));
    }
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

async fn publish(
    producer: &FutureProducer,
    number: u64,
    hops: &str,
) -> Result<Delivery> {
    let order = order(number);
    let payload = serde_json::to_vec(&order)?;
    let id = id(number);
    let header = |key, value| Header {
        key,
        value: Some(value),
    };
    let headers = OwnedHeaders::new()
        .insert(header(ID, id.as_str()))
        .insert(header(HOPS, hops));
    let record = FutureRecord::to(TOPIC)
        .key(&order.partner)
        .headers(headers)
        .payload(&payload);
    let delivery = producer.send(record, PATIENCE).await;
    delivery.map_err(|(error, _record)| anyhow!("Kafka did not store {id}: {error}"))
}

// ---- The bridge ------------------------------------------------------------

// ANCHOR: run
async fn run(acknowledge: Acknowledge) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    let consumer = take_orders(&brokers, GROUP)?;
    println!("ready:     from Kafka's {TOPIC} to {SUBJECT} in NATS, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            record = consumer.recv() => record,
        };
        let record = match record {
            Ok(record) => record,
            // The client connects again by itself; it says so with each attempt, and
            // to hear it once is enough.
            Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            )) => {
                if !lost {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                lost = true;
                continue;
            }
            Err(error) => return Err(error).context("cannot read on"),
        };
        lost = false;
        if acknowledge == Acknowledge::First {
            consumer.store_offset_from_message(&record)?;
        }
        println!("{}", carry(&jetstream, &record).await?);
        if acknowledge == Acknowledge::AfterTheTarget {
            // Only now. If the bridge dies before this offset is committed, it carries
            // the message again, with the same id.
            consumer.store_offset_from_message(&record)?;
        }
    }
    close(consumer).await?;
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Publishes a record on the other side, and returns when it is stored there, with what
/// to tell about it.
async fn carry(
    jetstream: &jetstream::Context,
    record: &BorrowedMessage<'_>,
) -> Result<String> {
    let place = format!("{}-{}", record.partition(), record.offset());
    // Whoever gave it no id gets one that is the same each time.
    let id = header(record, ID).filter(|id| !id.is_empty());
    let id = id.as_deref().unwrap_or(&place);
    let Verdict::Forward(hops) = verdict(header(record, HOPS).as_deref()) else {
        return Ok(format!("stopped:   {id}, it has been around"));
    };
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, one_line(id));
    headers.insert(HOPS, hops.to_string());
    if let Some(key) = record.key() {
        // Bytes in Kafka, text in NATS.
        headers.insert(KEY, one_line(&String::from_utf8_lossy(key)));
    }
    let payload = record.payload().unwrap_or_default().to_vec();
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    let stored = jetstream
        .publish_with_headers(SUBJECT, headers, payload.into())
        .await?
        .await
        .with_context(|| format!("NATS did not store {id}"))?;
    let had_it = if stored.duplicate {
        ", which NATS had already"
    } else {
        ""
    };
    Ok(format!("carried:   {id}{had_it}"))
}

/// A header of NATS is one line, and async-nats panics on more: a single record would
/// end the bridge, and again each time it is started.
fn one_line(text: &str) -> String {
    text.replace('\r', "\\r").replace('\n', "\\n")
}
// ANCHOR_END: run

/// A header as text; bytes that are none are shown as such, and not passed over.
fn header<'a>(record: &'a BorrowedMessage<'_>, name: &str) -> Option<Cow<'a, str>> {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let value = headers.filter(|header| header.key == name).last()?.value?;
    Some(String::from_utf8_lossy(value))
}

fn take_orders(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted bridge takes its old place at once, and does not wait for the end
        // of the dead one's session.
        .set("group.instance.id", "bridge-1")
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its
/// own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    // NATS remembers the ids of the last two minutes, also those of an earlier run. An
    // error says that there is no stream.
    let _deleted = jetstream.delete_stream(STREAM).await;
    let mut stream = declare(&jetstream).await?;

    let producer = producer(&brokers)?;
    // Of one partner, so in one partition and in order.
    let begin = publish(&producer, 10, "0").await?.offset;
    publish(&producer, 20, "0").await?;
    publish(&producer, 30, "0").await?;
    publish(&producer, 40, "2").await?;
    println!("published: order-10, order-20, order-30, and order-40 with two hops");

    let first = take_orders(&brokers, STORY_GROUP)?;
    let record = next(&first, begin).await?;
    println!("{}", carry(&jetstream, &record).await?);
    first.store_offset_from_message(&record)?;
    // A record that is held would keep the consumer from ending, also one that a new
    // variable of this name has hidden.
    drop(record);
    let record = next(&first, begin).await?;
    let carried = carry(&jetstream, &record).await?;
    println!("{carried}, and the bridge dies before it commits");
    drop(record);
    close(first).await?;

    let second = take_orders(&brokers, STORY_GROUP)?;
    for _record in 0..3 {
        let record = next(&second, begin).await?;
        println!("{}", carry(&jetstream, &record).await?);
        second.store_offset_from_message(&record)?;
    }
    close(second).await?;
    println!(
        "NATS:      {} messages",
        stream.info().await?.state.messages
    );
    client.drain().await?;
    Ok(())
}

/// The next order of this run. What others have left is no part of the story.
async fn next(consumer: &StreamConsumer, begin: i64) -> Result<BorrowedMessage<'_>> {
    loop {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no order came within 30 s")??;
        let of_the_story = order(10).partner;
        if record.offset() >= begin && record.key() == Some(of_the_story.as_bytes())
        {
            return Ok(record);
        }
    }
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
