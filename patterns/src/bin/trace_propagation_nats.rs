//! Trace propagation: one order, one trace, over NATS and on to RabbitMQ.
//!
//! Teaches: a broker carries no trace by itself. Who publishes writes the context of
//! its span into the headers, with an `Injector`; who consumes reads it from there,
//! with an `Extractor`, and its span becomes a child of the other one. Headers of NATS
//! are lines of text, and async-nats panics on a value that is none.
//!
//! Run, after `cargo lab up nats` and `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin trace_propagation_nats              # the whole story
//! cargo run --bin trace_propagation_nats serve        # stock, Ctrl-C to stop
//! cargo run --bin trace_propagation_nats publish 1 3  # or trace_propagation_kafka
//! cargo run --bin trace_propagation_nats publish 4 4 --no-inject  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! span:    payment, publish orders.paid, order-1: trace=<trace> id=<paid> parent=none
//! paid:    order-1
//! span:    stock, publish orders.packed, order-1: trace=<trace> id=<packed> parent=<stock>
//! span:    stock, process orders.paid, order-1: trace=<trace> id=<stock> parent=<paid>
//! packed:  order-1
//! ```
//!
//! Left out on purpose: logs, metrics, baggage, and TLS to the collector. Spans go to
//! one where `OTEL_EXPORTER_OTLP_ENDPOINT` names it.

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
    Client, ConnectErrorKind, HeaderMap, HeaderValue, ServerAddr,
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
        BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
    uri::AMQPUri,
};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::TraceContextExt as _,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use patterns::trace_propagation::{
    ID, Telemetry, end_span, id, order, process_span, publish_span,
};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_NATS_URL: &str = "nats://localhost:4222";
const DEFAULT_AMQP_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "PAID_ORDERS";
const SUBJECT: &str = "orders.paid";
const CONSUMER: &str = "stock";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(10);
const QUEUE: &str = "orders.packed";
const USAGE: &str = "usage: trace_propagation_nats [publish FIRST LAST \
                     [--no-inject] | serve [--no-inject]]";

/// How long a broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

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

/// Reads it from there.
struct FromMessage<'a>(Option<&'a HeaderMap>);

impl Extractor for FromMessage<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        Some(self.0?.get(key)?.as_str())
    }

    fn keys(&self) -> Vec<&str> {
        let headers = self.0.into_iter().flat_map(HeaderMap::iter);
        headers.map(|(name, _values)| name.as_ref()).collect()
    }
}
// ANCHOR_END: headers

// ANCHOR: to_table
/// Writes the context of a span into the headers of a message of RabbitMQ.
struct ToTable<'a>(&'a mut FieldTable);

impl Injector for ToTable<'_> {
    fn set(&mut self, key: &str, value: String) {
        // A header has a type there. Other clients write and expect a text.
        self.0
            .insert(key.into(), AMQPValue::LongString(value.into()));
    }
}
// ANCHOR_END: to_table

// ---- Payment: here the trace begins ----------------------------------------

/// Stands for the payment of trace_propagation_kafka, which has a trace to go on with.
async fn publish_all(first: u64, last: u64, inject: Inject) -> Result<()> {
    let payment = telemetry("payment")?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    for number in first..=last {
        pay(&payment, &jetstream, number, inject).await?;
        println!("paid:    {}", id(number));
    }
    client.drain().await?;
    block_in_place(|| payment.end());
    Ok(())
}

// ANCHOR: publish
async fn pay(
    payment: &Telemetry,
    jetstream: &jetstream::Context,
    number: u64,
    inject: Inject,
) -> Result<()> {
    let id = id(number);
    let payload = serde_json::to_vec(&order(number))?;
    // Without a parent: a trace begins.
    let span = publish_span("nats", SUBJECT, &id)
        .start_with_context(&payment.tracer, &Context::new());
    let context = Context::new().with_span(span);
    let mut headers = HeaderMap::new();
    headers.insert(ID, id.as_str());
    if inject == Inject::Yes {
        // The only line that carries the trace. It writes the header `traceparent`.
        TraceContextPropagator::new()
            .inject_context(&context, &mut ToMessage(&mut headers));
    }
    let stored = store(jetstream, headers, &payload).await;
    let stored = stored.with_context(|| format!("NATS did not store {id}"));
    end_span(&context, &stored);
    stored
}
// ANCHOR_END: publish

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

// ---- Stock: the trace goes on ----------------------------------------------

async fn serve(inject: Inject) -> Result<()> {
    let stock = telemetry("stock")?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_orders(&jetstream).await?;
    println!("ready:   stock, from {SUBJECT} in NATS to RabbitMQ's {QUEUE}");
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
        println!("{}", process(&stock, &channel, &delivery, inject).await?);
        // Only now. If the service dies before this line, the order comes again, and
        // its trace has this span twice.
        delivery.double_ack().await.map_err(Error::from_boxed)?;
    }
    client.drain().await?;
    connection.close(200, "stopped".into()).await?;
    block_in_place(|| stock.end());
    println!("stopped");
    Ok(())
}

// ANCHOR: process
/// Packs an order and publishes it on the other side. Returns when it is stored there,
/// with what to tell about it.
async fn process(
    stock: &Telemetry,
    channel: &Channel,
    delivery: &jetstream::Message,
    inject: Inject,
) -> Result<String> {
    let id = order_id(delivery)?;
    // Where there is no context, or none that can be read, this one is empty, and the
    // span begins a trace of its own.
    let parent = TraceContextPropagator::new().extract_with_context(
        &Context::new(),
        &FromMessage(delivery.headers.as_ref()),
    );
    let span = process_span("nats", SUBJECT, &id)
        .start_with_context(&stock.tracer, &parent);
    let context = parent.with_span(span);
    // The work would be here. All that it does is a child of `context`.
    let payload = &delivery.payload;
    let packed =
        publish_packed(stock, channel, &context, &id, payload, inject).await;
    end_span(&context, &packed);
    packed?;
    Ok(format!("packed:  {id}"))
}

async fn publish_packed(
    stock: &Telemetry,
    channel: &Channel,
    parent: &Context,
    id: &str,
    payload: &[u8],
    inject: Inject,
) -> Result<()> {
    let span = publish_span("rabbitmq", QUEUE, id)
        .start_with_context(&stock.tracer, parent);
    let context = parent.with_span(span);
    let mut headers = FieldTable::default();
    if inject == Inject::Yes {
        // The context of this span, and not the one that came.
        TraceContextPropagator::new()
            .inject_context(&context, &mut ToTable(&mut headers));
    }
    let stored = store_confirmed(channel, id, headers, payload).await;
    let stored = stored.with_context(|| format!("RabbitMQ did not store {id}"));
    end_span(&context, &stored);
    stored
}
// ANCHOR_END: process

/// The id of an order. Whoever gave it none, or one that is too long for RabbitMQ, gets
/// one that is the same each time.
fn order_id(delivery: &jetstream::Message) -> Result<String> {
    let id = delivery
        .headers
        .as_ref()
        .and_then(|headers| headers.get(ID));
    match id.map(HeaderValue::as_str) {
        Some(id) if !id.is_empty() && ShortString::try_new(id).is_ok() => {
            Ok(id.to_owned())
        }
        _ => {
            let info = delivery.info().map_err(Error::from_boxed)?;
            Ok(format!("{STREAM}-{}", info.stream_sequence))
        }
    }
}

async fn take_orders(jetstream: &jetstream::Context) -> Result<pull::Stream> {
    let stream = declare(jetstream).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the stock")?;
    // What is asked for has to be done within `ACK_WAIT`.
    let deliveries = consumer.stream().max_messages_per_batch(20).messages();
    Ok(deliveries.await?)
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
async fn store_confirmed(
    channel: &Channel,
    id: &str,
    headers: FieldTable,
    payload: &[u8],
) -> Result<()> {
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default()
        .with_message_id(ShortString::try_new(id)?)
        .with_headers(headers)
        .with_delivery_mode(2); // persistent
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("no confirm within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("{answer:?}"),
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let payment = telemetry("payment")?;
    let stock = telemetry("stock")?;
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    let client = connect_nats().await?;
    let jetstream = jetstream::new(client.clone());
    // What others have left is no part of the story. An error says that there is no
    // stream.
    let _deleted = jetstream.delete_stream(STREAM).await;
    let mut deliveries = take_orders(&jetstream).await?;

    pay(&payment, &jetstream, 1, Inject::Yes).await?;
    println!("paid:    order-1");
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery
        .context("no order came; has another stock taken it?")?
        .context("NATS ended the deliveries")??;
    println!(
        "{}",
        process(&stock, &channel, &delivery, Inject::Yes).await?
    );
    delivery.double_ack().await.map_err(Error::from_boxed)?;
    drop(deliveries);
    client.drain().await?;
    connection.close(200, "done".into()).await?;
    for service in [payment, stock] {
        block_in_place(|| service.end());
    }
    Ok(())
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
