//! Retention: with interest, a message stays until every consumer acknowledged.
//!
//! Teaches: with `RetentionPolicy::Interest` the consumers that are there when a
//! message is published decide how long it stays. Nobody there: it is not kept
//! at all, although the publisher gets its acknowledgement.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_interest
//! ```
//!
//! Expected output:
//!
//! ```text
//! no consumer:   published as message 1, 0 messages kept
//! two consumers: published as message 2, 1 messages kept
//! billing done:  1 messages kept
//! mail done:     0 messages kept
//! ```
//!
//! Left out on purpose: a limit on age or size. A consumer that nobody reads
//! any more keeps every message for ever; give the stream a `max_age`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self,
        consumer::{AckPolicy, PullConsumer, pull},
        stream::{self, RetentionPolicy, Stream},
    },
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "FANOUT";
const SUBJECT: &str = "fanout.placed";

const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match publish_with_and_without_interest().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: interest
async fn publish_with_and_without_interest() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // A run that was stopped in the middle leaves its consumers. There may be
    // no such stream.
    jetstream.delete_stream(STREAM).await.ok();
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            retention: RetentionPolicy::Interest,
            ..stream::Config::default()
        })
        .await
        .with_context(|| {
            format!("cannot have the stream {STREAM}; is JetStream on?")
        })?;

    // The acknowledgement says "taken", not "kept".
    let stored = jetstream.publish(SUBJECT, "order-1".into()).await?.await?;
    let (number, kept) = (stored.sequence, left(&stream).await?);
    println!("no consumer:   published as message {number}, {kept} messages kept");

    let billing = consumer(&stream, "billing").await?;
    let mail = consumer(&stream, "mail").await?;
    let stored = jetstream.publish(SUBJECT, "order-2".into()).await?.await?;
    let (number, kept) = (stored.sequence, left(&stream).await?);
    println!("two consumers: published as message {number}, {kept} messages kept");

    finish_one(&billing).await?;
    println!("billing done:  {} messages kept", left(&stream).await?);
    finish_one(&mail).await?;
    println!("mail done:     {} messages kept", left(&stream).await?);
    Ok(())
}

async fn finish_one(consumer: &PullConsumer) -> Result<()> {
    let pulling = consumer.batch().max_messages(1).expires(PATIENCE);
    let mut messages = pulling.messages().await?;
    let message = messages.next().await.context("no message within 5 s")?;
    let message = message.map_err(Error::from_boxed)?;
    // Waits for the server, so that the count afterwards is right.
    message.double_ack().await.map_err(Error::from_boxed)?;
    Ok(())
}
// ANCHOR_END: interest

async fn consumer(stream: &Stream, durable: &str) -> Result<PullConsumer> {
    Ok(stream
        .create_consumer(pull::Config {
            durable_name: Some(durable.into()),
            // With `AckPolicy::None` a delivery alone would count as done.
            ack_policy: AckPolicy::Explicit,
            ..pull::Config::default()
        })
        .await?)
}

async fn left(stream: &Stream) -> Result<u64> {
    Ok(stream.get_info().await?.state.messages)
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
