//! Poison message: one bad order does not stop the line.
//!
//! Teaches: bytes that are no order are stored in a stream for bad messages, with
//! their origin, and ended with a term. An order that kills its worker leaves nobody
//! to decide afterwards, so the next worker looks at the number of deliveries before
//! it begins. `max_deliver` alone would stop the deliveries and set nothing aside.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin poison_message_nats                     # the whole story
//! cargo run --bin poison_message_nats producer
//! cargo run --bin poison_message_nats worker --careless   # as often as you like
//! cargo run --bin poison_message_nats worker              # until it stays alive
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
//! aside: order-3, killed 3 workers
//! done:  order-4
//! kept:  11 bytes from LINE <sequence>: no order: expected value at line 1 column 1
//! kept:  29 bytes from LINE <sequence>: killed 3 workers
//! ```
//!
//! Left out on purpose: the way back, when the bug is mended; see retry_dlq_nats.

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

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{AckPolicy, pull},
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::poison_message::{Reason, Verdict, decode, kills, line, verdict};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "LINE";
const SUBJECT: &str = "line.orders";
const ASIDE: &str = "LINE_ASIDE";
const ASIDE_SUBJECT: &str = "line.aside";
const CONSUMER: &str = "packer";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(1);
/// More than the attempts, as somebody has to be told of the last one. It ends what
/// kills even the worker that only wants to set it aside.
const MAX_DELIVER: i64 = 10;
const USAGE: &str = "usage: poison_message_nats [producer | worker [--careless]]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer().await,
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

async fn producer() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    send(&jetstream).await?;
    client.drain().await?;
    Ok(())
}

async fn send(jetstream: &jetstream::Context) -> Result<()> {
    for payload in line()? {
        jetstream.publish(SUBJECT, payload.into()).await?.await?;
    }
    println!("sent:  order-1, noise, order-2, order-3, order-4");
    Ok(())
}

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(care: Care) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_orders(&jetstream, care).await?;
    println!("ready: orders from {SUBJECT}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .context("NATS ended the deliveries")?
            .context("cannot take orders; is the stream or its consumer deleted?")?;
        if care == Care::None {
            // Ends here, and has decided nothing.
            decode(&delivery.payload).context("cannot decode an order")?;
        }
        match step(&jetstream, &delivery).await? {
            Step::Next => {}
            // Nothing of this program runs after this line.
            Step::Dies => process::abort(),
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

enum Step {
    Next,
    Dies,
}

// ANCHOR: step
async fn step(jetstream: &jetstream::Context, delivery: &Message) -> Result<Step> {
    let info = delivery.info().map_err(Error::from_boxed)?;
    // The server counts, also what a dead worker had.
    let attempt = u32::try_from(info.delivered)?;
    match verdict(&delivery.payload, attempt) {
        Verdict::Work(order) if kills(&order) => {
            println!(
                "start: {}, attempt {attempt}, and the worker dies",
                order.id
            );
            return Ok(Step::Dies);
        }
        Verdict::Work(order) => {
            delivery.double_ack().await.map_err(Error::from_boxed)?;
            println!("done:  {}", order.id);
        }
        Verdict::SetAside(reason) => {
            set_aside(jetstream, delivery, &reason).await?;
            println!("aside: {}, {reason}", name(&delivery.payload));
        }
    }
    Ok(Step::Next)
}
// ANCHOR_END: step

// ANCHOR: set_aside
/// Stored first, then ended. Killed in between, the next worker stores it again; NATS
/// knows the id and keeps one, within two minutes.
async fn set_aside(
    jetstream: &jetstream::Context,
    delivery: &Message,
    reason: &Reason,
) -> Result<()> {
    let info = delivery.info().map_err(Error::from_boxed)?;
    let sequence = info.stream_sequence;
    // The time as well: a stream that is made anew counts from 1 again.
    let time = info.published.unix_timestamp_nanos();
    let message = PublishMessage::build()
        // The bytes as they came: what was not understood is not written anew.
        .payload(delivery.payload.clone())
        .message_id(format!("{STREAM}.{sequence}.{time}"))
        .header("Origin-Stream", STREAM)
        .header("Origin-Subject", delivery.subject.as_str())
        .header("Origin-Sequence", sequence.to_string())
        .header("Deliveries", info.delivered.to_string())
        .header("Reason", reason.to_string());
    jetstream
        .send_publish(ASIDE_SUBJECT, message)
        .await?
        .await
        .context("cannot set aside; the message stays in the line")?;
    delivery
        .double_ack_with(AckKind::Term)
        .await
        .map_err(Error::from_boxed)
}
// ANCHOR_END: set_aside

fn name(payload: &[u8]) -> String {
    let order = decode(payload);
    order.map_or_else(|_| format!("{} bytes", payload.len()), |order| order.id)
}

// ANCHOR: take
async fn take_orders(
    jetstream: &jetstream::Context,
    care: Care,
) -> Result<pull::Stream> {
    let stream = declare(jetstream).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // A line: no order before the one ahead of it is decided.
            max_ack_pending: 1,
            max_deliver: match care {
                Care::Taken => MAX_DELIVER,
                Care::None => -1, // the default
            },
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the workers")?;
    // One: an order that waits in a worker that dies counts as delivered as well.
    let deliveries = consumer.stream().max_messages_per_batch(1).messages();
    Ok(deliveries.await?)
}
// ANCHOR_END: take

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    for name in [STREAM, ASIDE] {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(name).await;
    }
    declare(&jetstream).await?;
    send(&jetstream).await?;

    let mut left = line()?.len();
    while left > 0 {
        // A connection of its own, because that is what dies with a worker.
        let own = connect().await?;
        let worker = jetstream::new(own.clone());
        let mut deliveries = take_orders(&worker, Care::Taken).await?;
        while left > 0 {
            let delivery = next(&mut deliveries).await?;
            match step(&worker, &delivery).await? {
                Step::Next => left -= 1,
                Step::Dies => break,
            }
        }
        drop(deliveries);
        own.drain().await?;
    }

    let aside = jetstream.get_stream(ASIDE).await?;
    for sequence in 1..=2 {
        let kept = aside.get_raw_message(sequence).await?;
        let header = |name| kept.headers.get(name).map_or("?", |it| it.as_str());
        println!(
            "kept:  {} bytes from {} {}: {}",
            kept.payload.len(),
            header("Origin-Stream"),
            header("Origin-Sequence"),
            header("Reason")
        );
    }
    client.drain().await?;
    Ok(())
}

async fn next(deliveries: &mut pull::Stream) -> Result<Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no order came; has another taken it?")?;
    Ok(delivery.context("NATS ended the deliveries")??)
}
// ANCHOR_END: story

// ---- Streams and connection ------------------------------------------------

/// Declares the stream of the orders, and before it that for bad messages.
async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    queue(
        jetstream,
        ASIDE,
        ASIDE_SUBJECT,
        stream::RetentionPolicy::Limits,
    )
    .await?;
    queue(
        jetstream,
        STREAM,
        SUBJECT,
        stream::RetentionPolicy::WorkQueue,
    )
    .await
}

async fn queue(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
    retention: stream::RetentionPolicy,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            retention,
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
