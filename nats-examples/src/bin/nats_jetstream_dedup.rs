//! Deduplication: a message that is published again is stored once.
//!
//! Teaches: an id in the header `Nats-Msg-Id`, made from what the message is
//! about and not from the attempt. A publisher that got no answer publishes
//! again with the same id, and cannot store the payment twice.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_dedup
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored: payment-17 (sequence 1)
//! again:  payment-17 (a duplicate of sequence 1)
//! without an id: stored twice (sequences 2 and 3)
//! after the window: payment-17 is stored again (sequence 4)
//! ```
//!
//! Left out on purpose: the consumer's side, where a message can still come
//! twice.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode, context::DeleteStreamErrorKind, message::PublishMessage,
        publish::PublishAck, stream,
    },
};
use tokio::time::{Instant, sleep};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PAYMENT_REQUESTS";
const SUBJECT: &str = "payment.requests";

/// How long the stream remembers an id: 2 minutes by default, here short enough
/// to see its end. Longer than any publisher goes on trying.
const WINDOW: Duration = Duration::from_secs(2);

/// How long the end of the window may let wait for itself: the server forgets
/// when it comes to it.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    match request_payments().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn request_payments() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The sequences below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            duplicate_window: WINDOW,
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;

    let first = request(&jetstream, "payment-17").await?;
    println!("stored: payment-17 (sequence {})", first.sequence);
    // As a publisher does that has not seen the first answer.
    let again = request(&jetstream, "payment-17").await?;
    ensure!(again.duplicate, "stored twice: {again:?}");
    println!(
        "again:  payment-17 (a duplicate of sequence {})",
        again.sequence
    );

    let mut sequences = Vec::new();
    for _attempt in 0..2 {
        let ack = jetstream.publish(SUBJECT, "payment-18".into()).await?;
        sequences.push(ack.await?.sequence);
    }
    println!(
        "without an id: stored twice (sequences {} and {})",
        sequences[0], sequences[1]
    );

    // The window is the limit of the promise.
    let asked = Instant::now();
    let late = loop {
        let ack = request(&jetstream, "payment-17").await?;
        if !ack.duplicate {
            break ack;
        }
        ensure!(asked.elapsed() < PATIENCE, "the window has no end");
        sleep(WINDOW / 4).await;
    };
    println!(
        "after the window: payment-17 is stored again (sequence {})",
        late.sequence
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: request
/// Publishes a payment under its own name as the id, and waits for the answer.
async fn request(
    jetstream: &jetstream::Context,
    payment: &'static str,
) -> Result<PublishAck> {
    let message = PublishMessage::build()
        .payload(payment.into())
        .message_id(payment);
    Ok(jetstream.send_publish(SUBJECT, message).await?.await?)
}
// ANCHOR_END: request

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
