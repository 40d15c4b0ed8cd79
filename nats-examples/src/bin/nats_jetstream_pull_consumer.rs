//! Pull consumer: the worker asks for messages when it has room for them.
//!
//! Teaches: the server keeps the position of a durable consumer, so a worker
//! that starts again goes on where it stopped. `fetch` takes what is there,
//! `batch` waits for more, `messages` never ends.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_pull_consumer                    # the whole story
//! cargo run --bin nats_jetstream_pull_consumer worker             # terminal 1
//! cargo run --bin nats_jetstream_pull_consumer producer           # terminal 2
//! cargo run --bin nats_jetstream_pull_consumer producer 9000 128  # 128 B each
//! cargo run --bin nats_jetstream_pull_consumer worker 9000        # and measure
//! ```
//!
//! Expected output:
//!
//! ```text
//! created:  SHIPMENTS with the durable consumer shipping-worker
//! fetch:    0 shipments, as the stream is empty
//! batch:    waits for 3 shipments
//! batch:    shipment-1 shipment-2 shipment-3
//! fetch:    shipment-4 shipment-5
//! messages: shipment-6
//! messages: shipment-7
//! restart:  a new connection, the same durable consumer
//! messages: shipment-8
//! messages: shipment-9
//! messages: shipment-10
//! left:     0 to deliver, 0 without acknowledgement
//! ```
//!
//! Left out on purpose: giving back what a stopped worker was sent in advance.
//! The server delivers it again, once `ACK_WAIT` has passed.

use std::{
    collections::VecDeque,
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Message,
        consumer::{
            AckPolicy, PullConsumer,
            pull::{Config, MessagesErrorKind},
        },
        stream,
    },
};
use futures_lite::{Stream, StreamExt as _};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "SHIPMENTS";
const SUBJECT: &str = "shipments.requested";
const DURABLE: &str = "shipping-worker";
const USAGE: &str = "usage: nats_jetstream_pull_consumer \
                     [producer [COUNT [SIZE]] | worker [COUNT]]";

/// How long the server waits for an acknowledgement before it delivers again.
/// Short, so that you can watch it; in production, well above the work's time.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// How many messages a worker asks for at once. The client asks again when half
/// of them have come, so the server is never waiting for the next request.
const BATCH: usize = 500;

/// How many publications may wait for their acknowledgement.
const WINDOW: usize = 500;

const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer(10, 0).await,
        ["producer", count] if number(count) > 0 => producer(number(count), 0).await,
        ["producer", count, size] if number(count) > 0 && number(size) > 0 => {
            producer(number(count), number(size)).await
        }
        ["worker"] => worker(None).await,
        ["worker", count] if number(count) > 0 => worker(Some(number(count))).await,
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

/// Anything that is no number counts as 0, for which there is no role.
fn number(word: &str) -> usize {
    word.parse().unwrap_or(0)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // Shipments of an earlier run would be delivered first. There may be none.
    jetstream.delete_stream(STREAM).await.ok();
    let consumer = declare(&jetstream).await?;
    println!("created:  {STREAM} with the durable consumer {DURABLE}");

    let mut fetched = consumer.fetch().max_messages(10).messages().await?;
    let names = finish_all(&mut fetched).await?;
    ensure!(names.is_empty(), "a new stream is not empty: {names:?}");
    println!("fetch:    0 shipments, as the stream is empty");

    let waiting = consumer.batch().max_messages(3).expires(PATIENCE);
    let mut batch = waiting.messages().await?;
    println!("batch:    waits for 3 shipments");
    publish(&jetstream, 1..=3, 0).await?;
    println!("batch:    {}", finish_all(&mut batch).await?.join(" "));

    publish(&jetstream, 4..=10, 0).await?;
    let mut fetched = consumer.fetch().max_messages(2).messages().await?;
    println!("fetch:    {}", finish_all(&mut fetched).await?.join(" "));
    print_messages(&consumer, 2).await?;

    println!("restart:  a new connection, the same durable consumer");
    let jetstream = jetstream::new(connect().await?);
    let mut consumer = declare(&jetstream).await?;
    print_messages(&consumer, 3).await?;

    let info = consumer.info().await?;
    println!(
        "left:     {} to deliver, {} without acknowledgement",
        info.num_pending, info.num_ack_pending
    );
    Ok(())
}

async fn print_messages(consumer: &PullConsumer, count: usize) -> Result<()> {
    // One at a time, so that the connection ends with nothing sent in advance.
    let pulling = consumer.stream().max_messages_per_batch(1);
    let mut messages = pulling.messages().await?;
    for _ in 0..count {
        let message = timeout(PATIENCE, messages.next())
            .await
            .context("no shipment within 5 s; has another worker taken it?")?
            .context("the server ended the consumer")??;
        println!("messages: {}", finish(&message).await?);
    }
    Ok(())
}

async fn finish_all(
    messages: &mut (impl Stream<Item = Result<Message, async_nats::Error>> + Unpin),
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    while let Some(message) = messages.next().await {
        names.push(finish(&message.map_err(Error::from_boxed)?).await?);
    }
    Ok(names)
}

async fn finish(message: &Message) -> Result<String> {
    // Waits until the server has it, so that its numbers are right afterwards.
    message.double_ack().await.map_err(Error::from_boxed)?;
    Ok(name(message))
}
// ANCHOR_END: story

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(count: Option<usize>) -> Result<()> {
    let client = connect().await?;
    let consumer = declare(&jetstream::new(client.clone())).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for shipments on {SUBJECT}, Ctrl-C to stop");

    let started = Instant::now();
    let batch = count.map_or(BATCH, |count| count.min(BATCH));
    let pulling = consumer.stream().max_messages_per_batch(batch);
    let mut messages = pulling.messages().await?;
    let (mut consumed, mut bytes) = (0, 0);
    while count != Some(consumed) {
        let message = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            message = messages.next() => message,
        };
        let message = match message.context("the server ended the consumer")? {
            Ok(message) => message,
            Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                // The client reconnects, and pulls again, by itself.
                eprintln!("nothing heard from the server; waiting for it");
                continue;
            }
            Err(error) => {
                return Err(error).context("the consumer cannot be read further");
            }
        };
        consumed += 1;
        bytes += message.payload.len();
        if count.is_none() {
            let info = message.info().map_err(Error::from_boxed)?;
            let (sequence, delivery) = (info.stream_sequence, info.delivered);
            let name = name(&message);
            println!("received: {name} (message {sequence}, delivery {delivery})");
        }
        if count == Some(consumed) {
            // The server reads in order: when it confirms the last one, it has
            // read those before.
            message.double_ack().await.map_err(Error::from_boxed)?;
        } else {
            message.ack().await.map_err(Error::from_boxed)?;
        }
    }
    // An acknowledgement is only a message: without this it may not leave.
    client.flush().await?;
    if count == Some(consumed) {
        let seconds = started.elapsed().as_secs_f64();
        let rate = consumed as f64 / seconds;
        println!(
            "consumed: {consumed} messages of {} B in {seconds:.3} s ({rate:.0} msg/s)",
            bytes / consumed
        );
    } else {
        println!("stopped");
    }
    Ok(())
}
// ANCHOR_END: worker

fn name(message: &Message) -> String {
    String::from_utf8_lossy(&message.payload)
        .trim_end_matches('.')
        .to_owned()
}

// ANCHOR: stop
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
// ANCHOR_END: stop

// ---- Producer --------------------------------------------------------------

async fn producer(count: usize, size: usize) -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    declare(&jetstream).await?;
    publish(&jetstream, 1..=count, size).await?;
    println!("stored: {count} shipments in {STREAM}");
    Ok(())
}

/// Publishes shipments, each filled up with dots to `size` bytes, and returns
/// when all of them are stored.
async fn publish(
    jetstream: &jetstream::Context,
    numbers: impl Iterator<Item = usize>,
    size: usize,
) -> Result<()> {
    let mut waiting = VecDeque::new();
    for number in numbers {
        if waiting.len() == WINDOW
            && let Some(stored) = waiting.pop_front()
        {
            stored_in_time(stored).await?;
        }
        let shipment = format!("{:.<size$}", format!("shipment-{number}"));
        let stored = jetstream.publish(SUBJECT, shipment.into()).await?;
        waiting.push_back(stored);
    }
    for stored in waiting {
        stored_in_time(stored).await?;
    }
    Ok(())
}

async fn stored_in_time(stored: jetstream::context::PublishAckFuture) -> Result<()> {
    stored
        .await
        .with_context(|| format!("a shipment was not stored in {STREAM}"))?;
    Ok(())
}

// ---- Stream, consumer, connection ------------------------------------------

// ANCHOR: declare
/// Makes the stream and its durable consumer, which changes nothing if they are
/// there already.
async fn declare(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..stream::Config::default()
        })
        .await
        .with_context(|| {
            format!(
                "cannot have the stream {STREAM}; is JetStream on (nats-server \
                 -js), and is no other stream in the way?"
            )
        })?;
    stream
        // Another configuration would silently replace the one that is there.
        .create_consumer_strict(Config {
            durable_name: Some(DURABLE.into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..Config::default()
        })
        .await
        .with_context(|| {
            format!(
                "cannot have the consumer {DURABLE}; if it was made with another \
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
