//! Stream limits: what happens to the message that does not fit.
//!
//! Teaches: with `discard: old`, the default, a full stream forgets its oldest
//! message and tells nobody. With `discard: new` it refuses the newest one, and
//! the publisher knows. A limit for each subject keeps the last of each.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_limits
//! ```
//!
//! Expected output:
//!
//! ```text
//! discard old: 5 accepted, 0 refused, left: reading 3, reading 4, reading 5
//! discard new: 3 accepted, 2 refused, left: reading 1, reading 2, reading 3
//! refused because: maximum messages exceeded (code 503, error code 10077)
//! one for each subject: left: oven reading 5, fridge reading 5
//! made larger: 5 accepted, 0 refused
//! ```
//!
//! Left out on purpose: a limit by size (`max_bytes`), which discards in the
//! same two ways, and one by age (`max_age`), which only removes.

use std::{env, process::ExitCode};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::pull,
        context::DeleteStreamErrorKind,
        stream::{self, DiscardPolicy, Stream},
    },
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "READINGS";
const OVEN: &str = "readings.oven";
const FRIDGE: &str = "readings.fridge";

/// How many messages the stream may hold.
const LIMIT: i64 = 3;

#[tokio::main]
async fn main() -> ExitCode {
    match fill_up().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn fill_up() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());

    let stream = fresh(&jetstream, DiscardPolicy::Old).await?;
    let sent = send_readings(&jetstream, OVEN).await?;
    println!(
        "discard old: {}, left: {}",
        sent.counts(),
        left(&stream).await?
    );

    let stream = fresh(&jetstream, DiscardPolicy::New).await?;
    let sent = send_readings(&jetstream, OVEN).await?;
    println!(
        "discard new: {}, left: {}",
        sent.counts(),
        left(&stream).await?
    );
    println!("refused because: {}", sent.reason);

    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            max_messages_per_subject: 1,
            ..config(DiscardPolicy::Old)
        })
        .await?;
    send_readings(&jetstream, OVEN).await?;
    send_readings(&jetstream, FRIDGE).await?;
    println!("one for each subject: left: {}", left(&stream).await?);

    // An update replaces the whole configuration, so take the present one and
    // change what is to change.
    let mut stream = fresh(&jetstream, DiscardPolicy::New).await?;
    let mut larger = stream.info().await?.config.clone();
    larger.max_messages = 2 * LIMIT;
    jetstream.update_stream(larger).await?;
    let sent = send_readings(&jetstream, OVEN).await?;
    println!("made larger: {}", sent.counts());
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: config
/// A new stream that holds [`LIMIT`] messages.
async fn fresh(
    jetstream: &jetstream::Context,
    discard: DiscardPolicy,
) -> Result<Stream> {
    // Also what an earlier run has left: the counts are those of a new stream.
    forget(jetstream, STREAM).await?;
    jetstream
        .create_stream(config(discard))
        .await
        .context("cannot create the stream; is JetStream on (-js)?")
}

fn config(discard: DiscardPolicy) -> stream::Config {
    stream::Config {
        name: STREAM.to_owned(),
        subjects: vec![OVEN.to_owned(), FRIDGE.to_owned()],
        max_messages: LIMIT,
        discard,
        ..stream::Config::default()
    }
}
// ANCHOR_END: config

struct Sent {
    accepted: usize,
    refused: usize,
    /// What the server said of the last one that it refused.
    reason: String,
}

impl Sent {
    fn counts(&self) -> String {
        format!("{} accepted, {} refused", self.accepted, self.refused)
    }
}

// ANCHOR: send
/// Publishes five readings and counts the answers.
async fn send_readings(
    jetstream: &jetstream::Context,
    subject: &'static str,
) -> Result<Sent> {
    let mut sent = Sent {
        accepted: 0,
        refused: 0,
        reason: String::new(),
    };
    for number in 1..=5 {
        let reading = format!("reading {number}");
        match jetstream.publish(subject, reading.into()).await?.await {
            Ok(_ack) => sent.accepted += 1,
            Err(error) => {
                // The server's own error is behind the client's. Any other is a
                // failure and not a refusal.
                let server = std::error::Error::source(&error)
                    .and_then(|source| source.downcast_ref::<jetstream::Error>());
                let Some(server) = server else {
                    return Err(error.into());
                };
                sent.refused += 1;
                // This reading is not stored. What becomes of it is for the
                // publisher to decide, and here is where it can.
                sent.reason = server.to_string();
            }
        }
    }
    Ok(sent)
}
// ANCHOR_END: send

/// All that the stream holds, in its order.
async fn left(stream: &Stream) -> Result<String> {
    let consumer = stream.create_consumer(pull::Config::default()).await?;
    let count = consumer.cached_info().num_pending;
    let count = usize::try_from(count)?;
    let mut messages = consumer.fetch().max_messages(count).messages().await?;
    let mut left = Vec::new();
    while let Some(message) = messages.next().await {
        let message = message.map_err(anyhow::Error::from_boxed)?;
        let reading = String::from_utf8_lossy(&message.payload).into_owned();
        let device = message.subject.trim_start_matches("readings.").to_owned();
        left.push((device, reading));
    }
    stream.delete_consumer(&consumer.cached_info().name).await?;
    let one_device = left.iter().all(|(device, _)| *device == left[0].0);
    let shown: Vec<_> = left
        .iter()
        .map(|(device, reading)| match one_device {
            true => reading.clone(),
            false => format!("{device} {reading}"),
        })
        .collect();
    Ok(shown.join(", "))
}

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
