//! Idempotent consumer: delivered more than once, charged once.
//!
//! Teaches: JetStream delivers at least once. A payment that is published twice with
//! the same `Nats-Msg-Id` is stored once, within the stream's window, two minutes by
//! default; that ends at the stream, and a message whose acknowledgement is lost is
//! delivered again all the same. So the id and the charge are written in one
//! transaction, and the acknowledgement comes after it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin idempotent_consumer_nats                    # the whole story
//! cargo run --bin idempotent_consumer_nats publish 1 1000     # and once more
//! cargo run --bin idempotent_consumer_nats consume ledger.db  # kill -9 it
//! cargo run --bin idempotent_consumer_nats consume ledger.db --no-inbox
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: payment-1, payment-2, payment-3
//! published: payment-2 once more, and NATS has it already
//! charged:   payment-1, and the consumer dies before it acknowledges
//! known:     payment-1, not charged again
//! charged:   payment-2
//! charged:   payment-3
//! total:     6 cents, as 1 + 2 + 3
//! ```
//!
//! Left out on purpose: an inbox that forgets. Delete what is older than any message
//! can still come.

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

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr, header,
    jetstream::{
        self, Message,
        consumer::{AckPolicy, pull},
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::idempotent_consumer::{Ledger, Outcome, id, payment};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PAYMENTS_DUE";
const SUBJECT: &str = "payments.due";
/// The story has a stream of its own, which it deletes: NATS remembers the ids of the
/// last two minutes, also those of an earlier run.
const STORY_STREAM: &str = "PAYMENTS_STORY";
const STORY_SUBJECT: &str = "payments.story";
const CONSUMER: &str = "ledger";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(2);
const USAGE: &str = "usage: idempotent_consumer_nats [publish FIRST LAST | consume \
                     FILE [--no-inbox]]";

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
        ["consume", file] => consume(file, Inbox::Used).await,
        ["consume", file, "--no-inbox"] => consume(file, Inbox::Missing).await,
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
enum Inbox {
    Used,
    /// The mistake, to see what it costs.
    Missing,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, STREAM, SUBJECT).await?;
    for number in first..=last {
        publish(&jetstream, SUBJECT, number).await?;
        println!("published: {}", id(number));
    }
    client.drain().await?;
    Ok(())
}

// ANCHOR: publish
/// Returns when NATS has stored the payment, with whether it had it already. After an
/// error it may have it or not: publish it again, with the same id.
async fn publish(
    jetstream: &jetstream::Context,
    subject: &'static str,
    number: u64,
) -> Result<bool> {
    let payload = serde_json::to_vec(&payment(number))?;
    let message = PublishMessage::build()
        .payload(payload.into())
        .message_id(id(number));
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    let stored = jetstream
        .send_publish(subject, message)
        .await?
        .await
        .with_context(|| format!("NATS did not store {}", id(number)))?;
    Ok(stored.duplicate)
}
// ANCHOR_END: publish

// ---- Consumer --------------------------------------------------------------

// ANCHOR: consume
async fn consume(file: &str, inbox: Inbox) -> Result<()> {
    let mut ledger = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_payments(&jetstream, STREAM, SUBJECT).await?;
    println!("ready:     payments from {SUBJECT}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery.context("NATS ended the deliveries")?.context(
            "cannot take payments; is the stream or its consumer deleted?",
        )?;
        let id = message_id(&delivery);
        match charge(&mut ledger, inbox, &delivery)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => eprintln!("not a payment, set aside: {id:?}"),
        }
        // After the transaction. If the program ends before this line, the payment
        // comes again, and is known. So there is no need to wait for an answer.
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

fn charge(ledger: &mut Ledger, inbox: Inbox, delivery: &Message) -> Result<Outcome> {
    let id = message_id(delivery);
    // A database blocks its thread.
    let outcome = block_in_place(|| match inbox {
        Inbox::Used => ledger.charge(id, &delivery.payload),
        Inbox::Missing => ledger.charge_each_time(id, &delivery.payload),
    });
    outcome.with_context(|| format!("cannot charge {id}, which will come again"))
}

fn message_id(delivery: &Message) -> &str {
    let headers = delivery.headers.as_ref();
    let id = headers.and_then(|headers| headers.get(header::NATS_MESSAGE_ID));
    id.map_or("", |id| id.as_str())
}
// ANCHOR_END: consume

async fn take_payments(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<pull::Stream> {
    let stream = declare(jetstream, stream, subject).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the ledger")?;
    // What is asked for has to be done within `ACK_WAIT`.
    let deliveries = consumer.stream().max_messages_per_batch(20).messages();
    Ok(deliveries.await?)
}

fn open(file: &str) -> Result<Ledger> {
    Ledger::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STORY_STREAM).await;
    declare(&jetstream, STORY_STREAM, STORY_SUBJECT).await?;
    for number in 1..=3 {
        publish(&jetstream, STORY_SUBJECT, number).await?;
    }
    println!("published: payment-1, payment-2, payment-3");
    // As one does that has heard no answer for payment-2.
    let had_it = publish(&jetstream, STORY_SUBJECT, 2).await?;
    ensure!(had_it, "NATS has stored payment-2 twice");
    println!("published: payment-2 once more, and NATS has it already");

    let mut ledger = open(":memory:")?;
    // A connection of its own, because that is what dies with it.
    let first = connect().await?;
    let one = jetstream::new(first.clone());
    let mut deliveries = take_payments(&one, STORY_STREAM, STORY_SUBJECT).await?;
    let delivery = next(&mut deliveries).await?;
    charge(&mut ledger, Inbox::Used, &delivery)?;
    let id = message_id(&delivery);
    println!("charged:   {id}, and the consumer dies before it acknowledges");
    drop(deliveries);
    first.drain().await?;

    let mut deliveries =
        take_payments(&jetstream, STORY_STREAM, STORY_SUBJECT).await?;
    for _delivery in 0..3 {
        let delivery = next(&mut deliveries).await?;
        let id = message_id(&delivery);
        match charge(&mut ledger, Inbox::Used, &delivery)? {
            Outcome::Charged => println!("charged:   {id}"),
            Outcome::Known => println!("known:     {id}, not charged again"),
            Outcome::SetAside => bail!("cannot read {id:?}"),
        }
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    println!("total:     {} cents, as 1 + 2 + 3", ledger.total()?);
    client.drain().await?;
    Ok(())
}

async fn next(deliveries: &mut pull::Stream) -> Result<Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no payment came; has another taken it?")?;
    Ok(delivery.context("NATS ended the deliveries")??)
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // A payment is removed when it is acknowledged.
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
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
