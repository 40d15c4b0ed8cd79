//! JetStream publish: a message is sent when the stream has said that it has it.
//!
//! Teaches: two awaits. The first hands the message to the connection, the
//! second is the answer of the stream, with the sequence. A subject that no
//! stream stores is an error, where core NATS would say nothing.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_publish
//! cargo run --release --bin nats_jetstream_publish 10000 128   # count, bytes
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored: order-1 (ORDERS_PLACED, sequence <sequence>)
//! stored: order-2 (ORDERS_PLACED, sequence <sequence>)
//! refused: order-3, no stream found for given subject
//! unanswered: order-4, published without JetStream, stored all the same
//! ```
//!
//! Left out on purpose: many messages in flight at once. Awaiting one answer
//! after the other, as here, costs a round trip for each message.

use std::{
    env,
    num::NonZeroUsize,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self,
        context::PublishErrorKind,
        stream::{self, StorageType, Stream},
    },
};
use bytes::Bytes;
use tokio::time::sleep;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ORDERS_PLACED";
const SUBJECT: &str = "orders.placed";
/// What no stream stores: a slip of the pen.
const OTHER_SUBJECT: &str = "orders.palced";
const MEASURED_STREAM: &str = "ORDERS_MEASURED";
const MEASURED_SUBJECT: &str = "orders.measured";
const USAGE: &str = "usage: nats_jetstream_publish [COUNT [BYTES]]";

/// How long the stream may take to store what nobody answers for.
const PATIENCE: Duration = Duration::from_secs(5);

// One thread: this program waits for the client's connection and the connection
// for this program, by turns. On two threads each turn would wake the other one.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let numbers: Result<Vec<NonZeroUsize>, _> =
        env::args().skip(1).map(|word| word.parse()).collect();
    let result = match numbers.as_deref() {
        Ok([]) => publish_orders().await,
        Ok([count]) => measure(count.get(), 128).await,
        Ok([count, bytes]) => measure(count.get(), bytes.get()).await,
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

// ANCHOR: story
async fn publish_orders() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut stream = declare(&jetstream, STREAM, SUBJECT).await?;

    for order in ["order-1", "order-2"] {
        let answer = jetstream.publish(SUBJECT, order.into()).await?;
        // Without this second await the message is on its way, and nothing more.
        let ack = answer.await.context("not stored")?;
        println!(
            "stored: {order} ({}, sequence {})",
            ack.stream, ack.sequence
        );
    }

    let answer = jetstream.publish(OTHER_SUBJECT, "order-3".into()).await?;
    match answer.await {
        Ok(ack) => bail!("{} stores {OTHER_SUBJECT}", ack.stream),
        // Nobody listens on this subject, and the server says so at once. A
        // stream that is just electing a leader looks the same: try again.
        Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
            println!("refused: order-3, {}", error.kind());
        }
        Err(error) => return Err(error.into()),
    }

    // A stream is a subscriber like others: it stores what anybody publishes to
    // its subjects. But here nobody would hear that it did not.
    let before = stream.info().await?.state.last_sequence;
    client.publish(SUBJECT, "order-4".into()).await?;
    client.flush().await?;
    let asked = Instant::now();
    while stream.info().await?.state.last_sequence == before {
        ensure!(asked.elapsed() < PATIENCE, "order-4 is not stored");
        sleep(Duration::from_millis(10)).await;
    }
    println!(
        "unanswered: order-4, published without JetStream, stored all the same"
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: measure
/// Publishes many messages, one after the other, and says how long it took.
async fn measure(count: usize, bytes: usize) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, MEASURED_STREAM, MEASURED_SUBJECT).await?;
    // Counted references to one buffer: a clone copies no byte of it.
    let payload = Bytes::from(vec![b'x'; bytes]);
    let started = Instant::now();
    for number in 1..=count {
        let answer = jetstream.publish(MEASURED_SUBJECT, payload.clone()).await?;
        answer
            .await
            .with_context(|| format!("message {number} is not stored"))?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let rate = count as f64 / seconds;
    println!(
        "published: {count} messages of {bytes} B in {seconds:.3} s ({rate:.0} msg/s)"
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: measure

// ANCHOR: declare
/// Creates the stream, which changes nothing if it is there already.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // The default: in files, so that a restart of the server loses
            // nothing that it had answered for.
            storage: StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot create the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
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
