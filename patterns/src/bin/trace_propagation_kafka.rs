//! Trace propagation: one order, one trace, over Kafka and on to NATS.
//!
//! Teaches: a broker carries no trace by itself. Who publishes writes the context of
//! its span into the headers, with an `Injector`; who consumes reads it from there,
//! with an `Extractor`, and its span becomes a child of the other one. Headers of
//! Kafka are bytes, in a list. A batch has many parents, so its span has none, and a
//! link to each.
//!
//! Run, after `cargo lab up kafka` and `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin trace_propagation_kafka              # the whole story
//! cargo run --bin trace_propagation_kafka serve        # payment, Ctrl-C to stop
//! cargo run --bin trace_propagation_kafka publish 1 3  # the shop: it begins here
//! cargo run --bin trace_propagation_kafka publish 4 4 --no-inject  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! span:    shop, publish placed-orders, order-10: trace=<trace> id=<placed> parent=none
//! placed:  order-10
//! span:    payment, publish orders.paid, order-10: trace=<trace> id=<paid> parent=<payment>
//! span:    payment, process placed-orders, order-10: trace=<trace> id=<payment> parent=<placed>
//! paid:    order-10
//! span:    shop, publish placed-orders, order-20: trace=<other-trace> id=<second> parent=none
//! placed:  order-20
//! span:    books, process placed-orders, 2 messages: trace=<own-trace> id=<batch> parent=none link=<placed> link=<second>
//! booked:  order-10, order-20
//! ```
//!
//! Left out on purpose: logs, metrics, baggage, and TLS to the collector. Spans go to
//! one where `OTEL_EXPORTER_OTLP_ENDPOINT` names it.

use std::{
    borrow::Cow,
    env,
    future::Future,
    mem,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, HeaderValue, ServerAddr,
    jetstream::{self, stream},
};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::{Link, TraceContextExt as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use patterns::trace_propagation::{
    ID, Telemetry, batch_span, end_span, id, order, process_span, publish_span,
};
// Not `rdkafka::*`: its `Consumer` and `Message` are names of the other client as well.
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{
        BorrowedHeaders, BorrowedMessage, Header, Headers as _, OwnedHeaders,
    },
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const DEFAULT_NATS_URL: &str = "nats://localhost:4222";
const TOPIC: &str = "placed-orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
const GROUP: &str = "traced-payment";
const STORY_GROUP: &str = "traced-payment-story";
const STREAM: &str = "PAID_ORDERS";
const SUBJECT: &str = "orders.paid";
const USAGE: &str = "usage: trace_propagation_kafka [publish FIRST LAST \
                     [--no-inject] | serve [--no-inject]]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first record may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (words, inject) = match words[..] {
        [ref words @ .., "--no-inject"] if !words.is_empty() => (words, Inject::No),
        ref words => (words, Inject::Yes),
    };
    let result = match words {
        [] => story().await,
        ["publish", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => {
                publish_all(first, last, inject).await
            }
            _ => return usage(),
        },
        ["serve"] => serve(inject).await,
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
enum Inject {
    Yes,
    /// The mistake, to see what it costs.
    No,
}

fn telemetry(service: &'static str) -> Result<Telemetry> {
    Telemetry::start(service).context("cannot use the OTEL_* variables")
}

// ---- The headers -----------------------------------------------------------

// ANCHOR: headers
/// Writes the context of a span into the headers of a record.
struct ToRecord(OwnedHeaders);

impl Injector for ToRecord {
    fn set(&mut self, key: &str, value: String) {
        let header = Header {
            key,
            value: Some(&value),
        };
        // rdkafka hands headers back when one has been added.
        self.0 = mem::take(&mut self.0).insert(header);
    }
}

/// Reads it from there. What is no text is no context.
struct FromRecord<'a>(Option<&'a BorrowedHeaders>);

impl Extractor for FromRecord<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let headers = self.0.into_iter().flat_map(|all| all.iter());
        let header = headers.filter(|header| header.key == key).last()?;
        str::from_utf8(header.value?).ok()
    }

    fn keys(&self) -> Vec<&str> {
        let headers = self.0.into_iter().flat_map(|all| all.iter());
        headers.map(|header| header.key).collect()
    }
}
// ANCHOR_END: headers

// ANCHOR: to_message
/// Writes the context of a span into the headers of a message of NATS.
struct ToMessage<'a>(&'a mut HeaderMap);

impl Injector for ToMessage<'_> {
    fn set(&mut self, key: &str, value: String) {
        // The state of a trace comes from outside and goes on as it is. async-nats
        // panics on a value of two lines, which Kafka and RabbitMQ have carried.
        if let Ok(value) = value.parse::<HeaderValue>() {
            self.0.insert(key, value);
        }
    }
}
// ANCHOR_END: to_message

// ---- The shop: the trace begins --------------------------------------------

async fn publish_all(first: u64, last: u64, inject: Inject) -> Result<()> {
    let shop = telemetry("shop")?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        place(&shop, &producer, number, inject).await?;
        println!("placed:  {}", id(number));
    }
    block_in_place(|| shop.end());
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

// ANCHOR: publish
async fn place(
    shop: &Telemetry,
    producer: &FutureProducer,
    number: u64,
    inject: Inject,
) -> Result<Delivery> {
    let id = id(number);
    let order = order(number);
    let payload = serde_json::to_vec(&order)?;
    // Without a parent: a trace begins.
    let span = publish_span("kafka", TOPIC, &id)
        .start_with_context(&shop.tracer, &Context::new());
    let context = Context::new().with_span(span);
    let headers = OwnedHeaders::new().insert(Header {
        key: ID,
        value: Some(&id),
    });
    let mut headers = ToRecord(headers);
    if inject == Inject::Yes {
        // The only line that carries the trace. It writes the header `traceparent`.
        TraceContextPropagator::new().inject_context(&context, &mut headers);
    }
    let record = FutureRecord::to(TOPIC)
        .key(&order.customer)
        .headers(headers.0)
        .payload(&payload);
    let sent = producer.send(record, PATIENCE).await;
    let sent = sent
        .map_err(|(error, _record)| anyhow!("Kafka did not store {id}: {error}"));
    end_span(&context, &sent);
    sent
}
// ANCHOR_END: publish

// ---- Payment: the trace goes on --------------------------------------------

async fn serve(inject: Inject) -> Result<()> {
    let payment = telemetry("payment")?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    let consumer = take_orders(&brokers, GROUP)?;
    println!("ready:   payment, from Kafka's {TOPIC} to {SUBJECT} in NATS");
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
        println!("{}", process(&payment, &jetstream, &record, inject).await?);
        // Only now. If the service dies before this offset is committed, the order
        // comes again, and its trace has this span twice.
        consumer.store_offset_from_message(&record)?;
    }
    close(consumer).await?;
    client.drain().await?;
    block_in_place(|| payment.end());
    println!("stopped");
    Ok(())
}

// ANCHOR: process
/// Takes the money for an order and publishes it on the other side. Returns when it is
/// stored there, with what to tell about it.
async fn process(
    payment: &Telemetry,
    jetstream: &jetstream::Context,
    record: &BorrowedMessage<'_>,
    inject: Inject,
) -> Result<String> {
    let id = order_id(record);
    // Where there is no context, or none that can be read, this one is empty, and the
    // span begins a trace of its own.
    let parent = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &FromRecord(record.headers()));
    let span = process_span("kafka", TOPIC, &id)
        .start_with_context(&payment.tracer, &parent);
    let context = parent.with_span(span);
    // The work would be here. All that it does is a child of `context`.
    let payload = record.payload().unwrap_or_default();
    let paid =
        publish_paid(payment, jetstream, &context, &id, payload, inject).await;
    end_span(&context, &paid);
    paid?;
    Ok(format!("paid:    {id}"))
}

async fn publish_paid(
    payment: &Telemetry,
    jetstream: &jetstream::Context,
    parent: &Context,
    id: &str,
    payload: &[u8],
    inject: Inject,
) -> Result<()> {
    let span = publish_span("nats", SUBJECT, id)
        .start_with_context(&payment.tracer, parent);
    let context = parent.with_span(span);
    let mut headers = HeaderMap::new();
    headers.insert(ID, one_line(id));
    if inject == Inject::Yes {
        // The context of this span, and not the one that came.
        TraceContextPropagator::new()
            .inject_context(&context, &mut ToMessage(&mut headers));
    }
    let stored = store(jetstream, headers, payload).await;
    let stored = stored.with_context(|| format!("NATS did not store {id}"));
    end_span(&context, &stored);
    stored
}
// ANCHOR_END: process

/// Two awaits: the first hands the message to the connection, the second waits for the
/// answer of the stream.
async fn store(
    jetstream: &jetstream::Context,
    headers: HeaderMap,
    payload: &[u8],
) -> Result<()> {
    jetstream
        .publish_with_headers(SUBJECT, headers, payload.to_vec().into())
        .await?
        .await?;
    Ok(())
}

/// The id of an order. Whoever gave it none, or one that is too long for the brokers to
/// come, gets one that is the same each time.
fn order_id<'a>(record: &'a BorrowedMessage<'_>) -> Cow<'a, str> {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let id = headers.filter(|header| header.key == ID).last();
    match id.and_then(|header| header.value) {
        Some(id) if (1..=255).contains(&id.len()) => String::from_utf8_lossy(id),
        _ => format!("{}-{}", record.partition(), record.offset()).into(),
    }
}

/// A header of NATS is one line, and async-nats panics on more: a single record would
/// end the service, and again each time it is started.
fn one_line(text: &str) -> String {
    text.replace('\r', "\\r").replace('\n', "\\n")
}

fn take_orders(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // A restarted service takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", "payment-1")
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

// ---- The books: a batch ----------------------------------------------------

// ANCHOR: batch
/// Enters so many orders into the books at once, from this one on: in a trace of its
/// own, with a link to the trace of each.
async fn book(
    books: &Telemetry,
    brokers: &str,
    begin: &Delivery,
    count: usize,
) -> Result<String> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // A consumer needs one; this one commits nothing.
        .set("group.id", "traced-books")
        .set("enable.auto.commit", "false")
        .create()?;
    let mut partition = TopicPartitionList::new();
    let offset = Offset::Offset(begin.offset);
    partition.add_partition_offset(TOPIC, begin.partition, offset)?;
    consumer.assign(&partition)?;
    let mut ids = Vec::new();
    let mut links = Vec::new();
    for _record in 0..count {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no record came within 30 s")??;
        let context = TraceContextPropagator::new()
            .extract_with_context(&Context::new(), &FromRecord(record.headers()));
        links.push(Link::with_context(context.span().span_context().clone()));
        ids.push(order_id(&record).into_owned());
    }
    let span = batch_span("kafka", TOPIC, links)
        .start_with_context(&books.tracer, &Context::new());
    let context = Context::new().with_span(span);
    // The work would be here.
    end_span(&context, &Ok::<_, String>(()));
    close(consumer).await?;
    Ok(format!("booked:  {}", ids.join(", ")))
}
// ANCHOR_END: batch

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let shop = telemetry("shop")?;
    let payment = telemetry("payment")?;
    let books = telemetry("books")?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?.purge().await?;

    let producer = producer(&brokers)?;
    // Of one customer, so in one partition and in order.
    let begin = place(&shop, &producer, 10, Inject::Yes).await?;
    println!("placed:  order-10");
    let consumer = take_orders(&brokers, STORY_GROUP)?;
    let record = next(&consumer, &begin).await?;
    let paid = process(&payment, &jetstream, &record, Inject::Yes).await?;
    println!("{paid}");
    consumer.store_offset_from_message(&record)?;
    // A record that is held would keep the consumer from ending.
    drop(record);
    close(consumer).await?;

    place(&shop, &producer, 20, Inject::Yes).await?;
    println!("placed:  order-20");
    println!("{}", book(&books, &brokers, &begin, 2).await?);
    client.drain().await?;
    for service in [shop, payment, books] {
        block_in_place(|| service.end());
    }
    Ok(())
}

/// The first order of this run. What others have left is no part of the story.
async fn next<'a>(
    consumer: &'a StreamConsumer,
    begin: &Delivery,
) -> Result<BorrowedMessage<'a>> {
    loop {
        let record = timeout(FIRST, consumer.recv()).await;
        let record = record.context("no order came within 30 s")??;
        if record.partition() == begin.partition && record.offset() >= begin.offset {
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
