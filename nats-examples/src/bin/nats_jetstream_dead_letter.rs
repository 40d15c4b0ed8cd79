//! Dead letters: an order that no worker can read is moved out of the way.
//!
//! Teaches: after `max_deliver` deliveries the server gives up on a message and
//! says so once, in an advisory. A stream keeps the advisories, so a handler that
//! starts later gets them too. It stores the order as a dead letter, then deletes
//! it, then acknowledges the advisory: killed in between, it does the rest again.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_dead_letter                   # the whole story
//! cargo run --bin nats_jetstream_dead_letter worker            # terminal 1
//! cargo run --bin nats_jetstream_dead_letter producer          # terminal 2
//! cargo run --bin nats_jetstream_dead_letter handler           # terminal 3
//! cargo run --bin nats_jetstream_dead_letter worker --fixed    # terminal 1
//! cargo run --bin nats_jetstream_dead_letter redrive           # terminal 2
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued: 4 orders in INTAKE
//! done:   order-1 (delivery 1)
//! failed: order-2 (delivery 1): "three" is not a quantity
//! done:   order-3 (delivery 1)
//! done:   order-4 (delivery 1)
//! failed: order-2 (delivery 2): "three" is not a quantity
//! failed: order-2 (delivery 3): "three" is not a quantity
//! stored: INTAKE 2 from intake.orders.web, 3 deliveries, as dead letter 1
//! moved:  INTAKE 2
//! redriven: dead letter 1 to intake.orders.web
//! done:   order-2 (delivery 1)
//! ```
//!
//! Left out on purpose: an order that the worker itself knows to be hopeless. A
//! term ends its deliveries at once, with another advisory (`MSG_TERMINATED`).

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

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{
            PullConsumer,
            pull::{self, MessagesErrorKind},
        },
        message::PublishMessage,
        stream::{self, LastRawMessageErrorKind, RetentionPolicy},
    },
};
use futures_lite::StreamExt as _;
use serde::Deserialize;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const ORDERS: &str = "INTAKE";
const ORDERS_SUBJECT: &str = "intake.orders.*";
const WORKERS: &str = "intake";
/// The server's own subject; its last two tokens are the stream and the consumer.
const ADVISORIES_SUBJECT: &str =
    "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.INTAKE.intake";
const ADVISORIES: &str = "INTAKE_GIVEN_UP";
const HANDLERS: &str = "intake-handler";
const DEAD: &str = "INTAKE_DEAD";
const DEAD_SUBJECT: &str = "dead.intake";
const REDRIVERS: &str = "intake-redrive";
const USAGE: &str = "usage: nats_jetstream_dead_letter \
    [producer | worker [--fixed] | handler [--slow] | redrive]";

const MAX_DELIVER: i64 = 3;
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long an unfinished order or advisory waits for somebody else.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// For how long the dead letters remember a message id. A handler that comes
/// back later than this, after a crash between storing and deleting, stores the
/// order a second time.
const REMEMBER: Duration = Duration::from_secs(24 * 60 * 60);

/// With `--slow`: time to kill the handler between storing and deleting.
const PAUSE: Duration = Duration::from_secs(3);

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => timeout(PATIENCE, story()).await.unwrap_or_else(|_elapsed| {
            Err(anyhow!(
                "not finished within 30 s; is another program working on {ORDERS}?"
            ))
        }),
        ["producer"] => producer().await,
        ["worker"] => worker(false).await,
        ["worker", "--fixed"] => worker(true).await,
        ["handler"] => handler(Duration::ZERO).await,
        ["handler", "--slow"] => handler(PAUSE).await,
        ["redrive"] => redriver().await,
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

async fn producer() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    declare(&jetstream).await?;
    queue_orders(&jetstream).await
}

async fn queue_orders(jetstream: &jetstream::Context) -> Result<()> {
    let quantities = ["1", "three", "2", "5"];
    for (number, quantity) in (1..).zip(quantities) {
        let order = PublishMessage::build()
            .header("Customer", format!("customer-{number}"))
            .payload(format!("order-{number} {quantity}").into());
        jetstream
            .send_publish("intake.orders.web", order)
            .await?
            .await?;
    }
    println!("queued: {} orders in {ORDERS}", quantities.len());
    Ok(())
}

async fn worker(fixed: bool) -> Result<()> {
    let consumers = declare(&jetstream::new(connect().await?)).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut orders = one_at_a_time(&consumers.orders).await?;
    println!("waiting for orders, Ctrl-C to stop");
    loop {
        let message = tokio::select! {
            biased;
            () = &mut stop => break,
            message = next(&mut orders) => message?,
        };
        process(&message, fixed).await?;
    }
    println!("stopped");
    Ok(())
}

// ANCHOR: process
async fn process(message: &Message, fixed: bool) -> Result<()> {
    let text = String::from_utf8_lossy(&message.payload);
    let (order, quantity) = text.split_once(' ').unwrap_or((&text, ""));
    let delivery = message.info().map_err(Error::from_boxed)?.delivered;
    let understood = match quantity.parse::<u32>() {
        Ok(_quantity) => true,
        Err(_not_a_number) => fixed && quantity == "three",
    };
    if understood {
        message.double_ack().await.map_err(Error::from_boxed)?;
        println!("done:   {order} (delivery {delivery})");
    } else {
        // Also after the last delivery: the server counts, the worker need not.
        let later = AckKind::Nak(Some(RETRY_AFTER));
        message.ack_with(later).await.map_err(Error::from_boxed)?;
        println!(
            "failed: {order} (delivery {delivery}): {quantity:?} is not a quantity"
        );
    }
    Ok(())
}
// ANCHOR_END: process

async fn handler(pause: Duration) -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    let consumers = declare(&jetstream).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut advisories = one_at_a_time(&consumers.advisories).await?;
    println!("waiting for orders that were given up, Ctrl-C to stop");
    loop {
        let advisory = tokio::select! {
            biased;
            () = &mut stop => break,
            advisory = next(&mut advisories) => advisory?,
        };
        bury(&jetstream, &advisory, pause).await?;
    }
    println!("stopped");
    Ok(())
}

// ANCHOR: bury
#[derive(Deserialize)]
struct GivenUp {
    stream_seq: u64,
    deliveries: u64,
}

/// Stores, deletes, acknowledges, in this order: from each point in between, the
/// next delivery of the advisory leads to the same end.
async fn bury(
    jetstream: &jetstream::Context,
    advisory: &Message,
    pause: Duration,
) -> Result<()> {
    let GivenUp {
        stream_seq: sequence,
        deliveries,
    } = serde_json::from_slice(&advisory.payload)
        .context("the advisory of the server cannot be read")?;
    let orders = jetstream.get_stream(ORDERS).await?;
    match orders.get_raw_message(sequence).await {
        Ok(original) => {
            let subject = &original.subject;
            // The time as well: a stream that is made anew counts from 1 again.
            let time = original.time.unix_timestamp_nanos();
            let dead = PublishMessage::build()
                .headers(without_ours(&original.headers))
                .header("Dead-Letter-Subject", subject.as_str())
                .header("Dead-Letter-Stream", ORDERS)
                .header("Dead-Letter-Sequence", sequence.to_string())
                .header("Dead-Letter-Deliveries", deliveries.to_string())
                .header("Dead-Letter-Reason", "max_deliver reached")
                .message_id(format!("{ORDERS}.{sequence}.{time}"))
                .payload(original.payload);
            let stored = jetstream.send_publish(DEAD_SUBJECT, dead).await?.await?;
            println!(
                "{} {ORDERS} {sequence} from {subject}, {deliveries} deliveries, \
                 as dead letter {}",
                if stored.duplicate {
                    "known: "
                } else {
                    "stored:"
                },
                stored.sequence
            );
            sleep(pause).await;
            orders.delete_message(sequence).await?;
            println!("moved:  {ORDERS} {sequence}");
        }
        // Killed after the deletion, or somebody else has deleted it.
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
            println!("gone:   {ORDERS} {sequence}");
        }
        Err(error) => return Err(error).context("cannot read the order"),
    }
    advisory.double_ack().await.map_err(Error::from_boxed)?;
    Ok(())
}

/// What the publisher wrote. The headers of NATS are orders to a server: an
/// expected sequence that was right once would have the copy refused.
fn without_ours(headers: &HeaderMap) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _values)| {
            let name: &str = name.as_ref();
            !name.starts_with("Nats-") && !name.starts_with("Dead-Letter-")
        })
        .flat_map(|(name, values)| values.iter().map(move |value| (name, value)))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
// ANCHOR_END: bury

async fn redriver() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    let consumers = declare(&jetstream).await?;
    redrive(&jetstream, &consumers.dead).await
}

// ANCHOR: redrive
/// Publishes every dead letter again, where it came from.
async fn redrive(jetstream: &jetstream::Context, dead: &PullConsumer) -> Result<()> {
    let mut letters = dead.fetch().max_messages(100).messages().await?;
    while let Some(letter) = letters.next().await {
        let letter = letter.map_err(Error::from_boxed)?;
        let number = letter.info().map_err(Error::from_boxed)?.stream_sequence;
        let headers = letter.headers.clone().unwrap_or_default();
        let subject = headers
            .get("Dead-Letter-Subject")
            .context("a dead letter without its subject")?
            .to_string();
        let again = PublishMessage::build()
            .headers(without_ours(&headers))
            .message_id(format!("redrive.{number}"))
            .payload(letter.payload.clone());
        jetstream
            .send_publish(subject.clone(), again)
            .await?
            .await?;
        letter.double_ack().await.map_err(Error::from_boxed)?;
        println!("redriven: dead letter {number} to {subject}");
    }
    Ok(())
}
// ANCHOR_END: redrive

// ---- The whole story in one process ----------------------------------------

async fn story() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // What an earlier run left would be counted here. There may be nothing.
    for name in [ORDERS, ADVISORIES, DEAD] {
        jetstream.delete_stream(name).await.ok();
    }
    let consumers = declare(&jetstream).await?;
    let mut orders = one_at_a_time(&consumers.orders).await?;
    let mut advisories = one_at_a_time(&consumers.advisories).await?;
    queue_orders(&jetstream).await?;
    let advisory = loop {
        tokio::select! {
            message = next(&mut orders) => process(&message?, false).await?,
            advisory = next(&mut advisories) => break advisory?,
        }
    };
    bury(&jetstream, &advisory, Duration::ZERO).await?;
    redrive(&jetstream, &consumers.dead).await?;
    process(&next(&mut orders).await?, true).await
}

/// What waits in the client of a busy program is out of reach for others.
async fn one_at_a_time(consumer: &PullConsumer) -> Result<pull::Stream> {
    let pulling = consumer.stream().max_messages_per_batch(1);
    Ok(pulling.messages().await?)
}

async fn next(messages: &mut pull::Stream) -> Result<Message> {
    loop {
        let message = messages.next().await;
        match message.context("the server ended the consumer")? {
            Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                // The client reconnects, and pulls again, by itself.
                eprintln!("nothing heard from the server; waiting for it");
            }
            message => {
                return message.context("the consumer cannot be read further");
            }
        }
    }
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

// ANCHOR: declare
struct Consumers {
    orders: PullConsumer,
    advisories: PullConsumer,
    dead: PullConsumer,
}

/// Makes what is missing. Every role does it, so that the advisories are kept
/// before the first worker can fail.
async fn declare(jetstream: &jetstream::Context) -> Result<Consumers> {
    Ok(Consumers {
        advisories: queue(jetstream, ADVISORIES, ADVISORIES_SUBJECT, HANDLERS, -1)
            .await?,
        dead: queue(jetstream, DEAD, DEAD_SUBJECT, REDRIVERS, -1).await?,
        orders: queue(jetstream, ORDERS, ORDERS_SUBJECT, WORKERS, MAX_DELIVER)
            .await?,
    })
}

/// A stream that keeps each message until its only consumer acknowledges it.
async fn queue(
    jetstream: &jetstream::Context,
    name: &str,
    subject: &str,
    durable: &str,
    max_deliver: i64,
) -> Result<PullConsumer> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: name.into(),
            subjects: vec![subject.into()],
            retention: RetentionPolicy::WorkQueue,
            duplicate_window: REMEMBER,
            ..stream::Config::default()
        })
        .await
        .with_context(|| {
            format!("cannot have the stream {name}; is JetStream on?")
        })?;
    stream
        .create_consumer_strict(pull::Config {
            durable_name: Some(durable.into()),
            ack_wait: ACK_WAIT,
            max_deliver,
            ..pull::Config::default()
        })
        .await
        .with_context(|| {
            format!(
                "cannot have the consumer {durable}; if it was made with another \
                 configuration, delete it first"
            )
        })
}
// ANCHOR_END: declare

async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
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
