//! Trace propagation: one order, one trace, over RabbitMQ to its end.
//!
//! Teaches: a broker carries no trace by itself. Who publishes writes the context of
//! its span into the headers, with an `Injector`; who consumes reads it from there,
//! with an `Extractor`, and its span becomes a child of the other one. Headers of
//! RabbitMQ have types, and a context is a text.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin trace_propagation_rabbitmq              # the whole story
//! cargo run --bin trace_propagation_rabbitmq serve        # mail, Ctrl-C to stop
//! cargo run --bin trace_propagation_rabbitmq publish 1 3  # or trace_propagation_nats
//! cargo run --bin trace_propagation_rabbitmq publish 4 4 --no-inject  # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! span:    stock, publish orders.packed, order-1: trace=<trace> id=<packed> parent=none
//! packed:  order-1
//! span:    mail, process orders.packed, order-1: trace=<trace> id=<mail> parent=<packed>
//! mailed:  order-1
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

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
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
    Telemetry, end_span, id, order, process_span, publish_span,
};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_AMQP_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "orders.packed";
const CONSUMER_TAG: &str = "mail";
/// How many messages may be on their way to the service.
const PREFETCH: u16 = 20;
const USAGE: &str = "usage: trace_propagation_rabbitmq [publish FIRST LAST \
                     [--no-inject] | serve]";

/// How long the broker may take to answer before it counts as not there.
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
        // The last one: it publishes nothing.
        ["serve"] if inject == Inject::Yes => serve().await,
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
/// Writes the context of a span into the headers of a message of RabbitMQ.
struct ToTable<'a>(&'a mut FieldTable);

impl Injector for ToTable<'_> {
    fn set(&mut self, key: &str, value: String) {
        // A header has a type there. Other clients write and expect a text.
        self.0
            .insert(key.into(), AMQPValue::LongString(value.into()));
    }
}

/// Reads it from there. What is no text is no context.
struct FromTable<'a>(Option<&'a FieldTable>);

impl Extractor for FromTable<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match self.0?.inner().get(key)? {
            AMQPValue::LongString(text) => str::from_utf8(text.as_bytes()).ok(),
            AMQPValue::ShortString(text) => Some(text.as_str()),
            _other => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        let headers = self.0.into_iter().flat_map(|table| table.inner());
        headers.map(|(name, _value)| name.as_str()).collect()
    }
}
// ANCHOR_END: headers

// ---- Stock: here the trace begins ------------------------------------------

/// Stands for the stock of trace_propagation_nats, which has a trace to go on with.
async fn publish_all(first: u64, last: u64, inject: Inject) -> Result<()> {
    let stock = telemetry("stock")?;
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    for number in first..=last {
        pack(&stock, &channel, number, inject).await?;
        println!("packed:  {}", id(number));
    }
    connection.close(200, "done".into()).await?;
    block_in_place(|| stock.end());
    Ok(())
}

// ANCHOR: publish
async fn pack(
    stock: &Telemetry,
    channel: &Channel,
    number: u64,
    inject: Inject,
) -> Result<()> {
    let id = id(number);
    let payload = serde_json::to_vec(&order(number))?;
    // Without a parent: a trace begins.
    let span = publish_span("rabbitmq", QUEUE, &id)
        .start_with_context(&stock.tracer, &Context::new());
    let context = Context::new().with_span(span);
    let mut headers = FieldTable::default();
    if inject == Inject::Yes {
        // The only line that carries the trace. It writes the header `traceparent`.
        TraceContextPropagator::new()
            .inject_context(&context, &mut ToTable(&mut headers));
    }
    let stored = store_confirmed(channel, &id, headers, &payload).await;
    let stored = stored.with_context(|| format!("RabbitMQ did not store {id}"));
    end_span(&context, &stored);
    stored
}
// ANCHOR_END: publish

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

// ---- Mail: the trace goes on -----------------------------------------------

async fn serve() -> Result<()> {
    let mail = telemetry("mail")?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect_rabbitmq().await?;
    let (channel, mut deliveries) = take_orders(&connection).await?;
    println!("ready:   mail, from RabbitMQ's {QUEUE}");
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
        println!("{}", process(&mail, &delivery));
        // Only now. If the service dies before this line, the order comes again, and
        // its trace has this span twice.
        done_with(&delivery).await?;
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    block_in_place(|| mail.end());
    println!("stopped");
    Ok(())
}

// ANCHOR: process
/// Writes the customer a mail. Returns what to tell about it.
fn process(mail: &Telemetry, delivery: &Delivery) -> String {
    let id = delivery.properties.message_id().as_ref();
    let id = id.map_or("an order without an id", ShortString::as_str);
    // Where there is no context, or none that can be read, this one is empty, and the
    // span begins a trace of its own.
    let headers = FromTable(delivery.properties.headers().as_ref());
    let parent = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &headers);
    let span = process_span("rabbitmq", QUEUE, id)
        .start_with_context(&mail.tracer, &parent);
    let context = parent.with_span(span);
    // The work would be here. All that it does is a child of `context`.
    end_span(&context, &Ok::<_, String>(()));
    format!("mailed:  {id}")
}
// ANCHOR_END: process

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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let stock = telemetry("stock")?;
    let mail = telemetry("mail")?;
    let connection = connect_rabbitmq().await?;
    let channel = confirming(&connection).await?;
    // What others have left is no part of the story.
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;

    pack(&stock, &channel, 1, Inject::Yes).await?;
    println!("packed:  order-1");
    let (_channel, mut deliveries) = take_orders(&connection).await?;
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery
        .context("no order came; has another mail taken it?")?
        .context("RabbitMQ ended the consumer")??;
    println!("{}", process(&mail, &delivery));
    done_with(&delivery).await?;
    connection.close(200, "done".into()).await?;
    for service in [stock, mail] {
        block_in_place(|| service.end());
    }
    Ok(())
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

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
