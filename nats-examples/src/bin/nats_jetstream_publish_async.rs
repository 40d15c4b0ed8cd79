//! JetStream publish: many messages in flight, and still an answer for each.
//!
//! Teaches: a window of unanswered messages. Publish until the window is full,
//! then await the oldest answer before the next message. The answers have to be
//! kept: `wait_for_acks` waits for them all and tells of no failure.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_publish_async
//! cargo run --release --bin nats_jetstream_publish_async 100000 128   # count, bytes
//! ```
//!
//! Expected output:
//!
//! ```text
//! answered: 8 of 10 are stored
//! refused: reading 9, maximum messages exceeded (code 503, error code 10077)
//! refused: reading 10, maximum messages exceeded (code 503, error code 10077)
//! wait_for_acks: 10 published, no failure reported, 0 stored
//! ```
//!
//! Left out on purpose: what to do with a refused message. Sending it again
//! later changes the order.

use std::{
    collections::VecDeque,
    env,
    num::NonZeroUsize,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        context::{ContextBuilder, DeleteStreamErrorKind, PublishAckFuture},
        stream::{self, DiscardPolicy},
    },
};
use bytes::Bytes;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "TELEMETRY_IMPORT";
const SUBJECT: &str = "telemetry.import";
const MEASURED_STREAM: &str = "TELEMETRY_MEASURED";
const MEASURED_SUBJECT: &str = "telemetry.measured";
const USAGE: &str = "usage: nats_jetstream_publish_async [COUNT [BYTES]]";

/// How many messages may be without an answer. What is in the window when the
/// program dies may be stored or not.
const WINDOW: usize = 5_000;

/// How long the server may take to answer for a message.
const PATIENCE: Duration = Duration::from_secs(5);

// One thread: the program and the client's connection hand messages and answers
// to each other all the time, and on two threads would wake each other for it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let numbers: Result<Vec<NonZeroUsize>, _> =
        env::args().skip(1).map(|word| word.parse()).collect();
    let result = match numbers.as_deref() {
        Ok([]) => import().await,
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
async fn import() -> Result<()> {
    let client = connect().await?;
    let jetstream = windowed(&client);
    // What an earlier run has left would fill the stream before its time.
    forget(&jetstream, STREAM).await?;
    let mut stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            // Room for eight of the ten, and a word for the others.
            max_messages: 8,
            discard: DiscardPolicy::New,
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;

    let readings =
        || (1..=10).map(|number| Bytes::from(format!("reading {number}")));
    let refused = publish_all(&jetstream, SUBJECT, readings()).await?;
    println!("answered: {} of 10 are stored", 10 - refused.len());
    for (number, reason) in refused {
        println!("refused: reading {number}, {reason}");
    }

    let before = stream.info().await?.state.messages;
    for reading in readings() {
        // The answer is dropped: it still comes, and nobody looks at it.
        drop(jetstream.publish(SUBJECT, reading).await?);
    }
    jetstream.wait_for_acks().await;
    let stored = stream.info().await?.state.messages - before;
    println!("wait_for_acks: 10 published, no failure reported, {stored} stored");
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: window
/// A context that lets a whole window be without an answer. In the default one,
/// the client's own limit decides.
fn windowed(client: &Client) -> jetstream::Context {
    ContextBuilder::new()
        .timeout(PATIENCE)
        .max_ack_inflight(WINDOW)
        // Full, a publish waits for room instead of failing.
        .backpressure_on_inflight(true)
        .build(client.clone())
}

/// Publishes all messages and returns those that were not stored: number, from
/// 1, and reason.
async fn publish_all(
    jetstream: &jetstream::Context,
    subject: &'static str,
    messages: impl Iterator<Item = Bytes>,
) -> Result<Vec<(usize, String)>> {
    let mut refused = Vec::new();
    let mut window: VecDeque<(usize, PublishAckFuture)> =
        VecDeque::with_capacity(WINDOW);
    for (number, message) in (1..).zip(messages) {
        if window.len() == WINDOW {
            // The server answers in order, so the oldest answer is the next to
            // come, and the others are on their way meanwhile.
            settle(window.pop_front(), &mut refused).await?;
        }
        let answer =
            jetstream.publish(subject, message).await.with_context(|| {
                let oldest = window.front().map_or(number, |(number, _)| *number);
                unknown_from(oldest)
            })?;
        window.push_back((number, answer));
    }
    while !window.is_empty() {
        settle(window.pop_front(), &mut refused).await?;
    }
    Ok(refused)
}

/// Awaits one answer. A refusal is noted; that there is no answer at all is an
/// error, because then nobody knows whether the message is stored.
async fn settle(
    oldest: Option<(usize, PublishAckFuture)>,
    refused: &mut Vec<(usize, String)>,
) -> Result<()> {
    let Some((number, answer)) = oldest else {
        return Ok(());
    };
    if let Err(error) = answer.await {
        // The server's own error is behind the client's.
        let server = std::error::Error::source(&error)
            .and_then(|source| source.downcast_ref::<jetstream::Error>());
        match server {
            Some(server) => refused.push((number, server.to_string())),
            None => return Err(error).with_context(|| unknown_from(number)),
        }
    }
    Ok(())
}

fn unknown_from(number: usize) -> String {
    format!("message {number} and those after it may be stored or not")
}
// ANCHOR_END: window

// ANCHOR: measure
/// Publishes many messages and says how long it took until the last answer.
async fn measure(count: usize, bytes: usize) -> Result<()> {
    let client = connect().await?;
    let jetstream = windowed(&client);
    jetstream
        .create_stream(stream::Config {
            name: MEASURED_STREAM.to_owned(),
            subjects: vec![MEASURED_SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    // Counted references to one buffer: a clone copies no byte of it.
    let payload = Bytes::from(vec![b'x'; bytes]);
    let messages = std::iter::repeat_n(payload, count);
    let started = Instant::now();
    let refused = publish_all(&jetstream, MEASURED_SUBJECT, messages).await?;
    let seconds = started.elapsed().as_secs_f64();
    if let Some((number, reason)) = refused.first() {
        return Err(anyhow!("message {number} is not stored: {reason}"));
    }
    let rate = count as f64 / seconds;
    println!(
        "published: {count} messages of {bytes} B in {seconds:.3} s ({rate:.0} msg/s)"
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: measure

/// Deletes a stream, if there is one.
async fn forget(jetstream: &jetstream::Context, stream: &str) -> Result<()> {
    match jetstream.delete_stream(stream).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => Err(anyhow!(
                "cannot delete {stream} ({error}); is JetStream on?"
            )),
        },
    }
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
