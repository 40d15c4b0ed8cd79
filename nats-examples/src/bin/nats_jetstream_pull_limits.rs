//! Consumer limits: what the server allows the readers of one consumer.
//!
//! Teaches: a consumer can bound how much one request may ask for and how many
//! messages may be unacknowledged. A request above a limit ends the stream of
//! messages with an error that names it, and so does a consumer that is deleted.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_pull_limits
//! ```
//!
//! Expected output:
//!
//! ```text
//! too many at once: pull request exceeded consumer limits: Exceeded MaxRequestBatch of 10
//! too long a wait: pull request exceeded consumer limits: Exceeded MaxRequestExpires of 2s
//! in work: 3 of 5 messages, as many as may be unacknowledged
//! in work: 1 more, after one acknowledgement
//! deleted: consumer deleted
//! ```
//!
//! Left out on purpose: a limit by bytes (`max_bytes`) and one for the number of
//! waiting requests (`max_waiting`).

use std::{env, error::Error as _, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::{
            PullConsumer,
            pull::{self, MessagesError, MessagesErrorKind},
        },
        context::DeleteStreamErrorKind,
        stream::{self, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "TENANTS";
const SUBJECT: &str = "tenants.jobs";
const CONSUMER: &str = "tenant";

/// How many messages one request may ask for.
const MAX_BATCH: i64 = 10;
/// How long one request may wait.
const MAX_EXPIRES: Duration = Duration::from_secs(2);
/// How many messages may be out without an acknowledgement, of all readers.
const MAX_ACK_PENDING: i64 = 3;

/// How long an answer of the server may let wait for itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing may come before nothing more is to come.
const QUIET: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match meet_the_limits().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn meet_the_limits() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // What an earlier run has left unacknowledged would count.
    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    let consumer = limited(&stream).await?;

    let greedy = consumer.stream().max_messages_per_batch(100);
    let greedy = greedy.expires(MAX_EXPIRES).messages().await?;
    println!("too many at once: {}", end_of(greedy).await?);
    let patient = consumer.stream().max_messages_per_batch(10);
    let patient = patient.expires(Duration::from_secs(30)).messages().await?;
    println!("too long a wait: {}", end_of(patient).await?);

    for job in 1..=5 {
        let job = format!("job {job}");
        jetstream.publish(SUBJECT, job.into()).await?.await?;
    }
    let modest = consumer.stream().max_messages_per_batch(10);
    let mut modest = modest.expires(MAX_EXPIRES).messages().await?;
    let mut in_work = Vec::new();
    while let Ok(Some(job)) = timeout(QUIET, modest.next()).await {
        in_work.push(job?);
    }
    println!(
        "in work: {} of 5 messages, as many as may be unacknowledged",
        in_work.len()
    );
    let done = in_work.first().context("no message came")?;
    done.double_ack().await.map_err(Error::from_boxed)?;
    let mut more = 0;
    while let Ok(Some(job)) = timeout(QUIET, modest.next()).await {
        job?;
        more += 1;
    }
    println!("in work: {more} more, after one acknowledgement");

    stream.delete_consumer(CONSUMER).await?;
    println!("deleted: {}", end_of(modest).await?);
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: limited
async fn limited(stream: &Stream) -> Result<PullConsumer> {
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            max_batch: MAX_BATCH,
            max_expires: MAX_EXPIRES,
            max_ack_pending: MAX_ACK_PENDING,
            ..pull::Config::default()
        })
        .await?;
    Ok(consumer)
}
// ANCHOR_END: limited

// ANCHOR: end_of
/// The error with which a stream of messages ends, in one line.
async fn end_of(mut messages: pull::Stream) -> Result<String> {
    loop {
        let message = timeout(PATIENCE, messages.next())
            .await
            .context("the server has said nothing within 10 s")?;
        match message.context("the stream ended without a word")? {
            Ok(_message) => continue,
            Err(error) => match error.kind() {
                // Asking again would be refused again: a mistake in the settings,
                // the reader's or the consumer's.
                MessagesErrorKind::RequestLimitExceeded
                // Somebody has deleted it; to make it anew is a decision.
                | MessagesErrorKind::ConsumerDeleted => return Ok(told(&error)),
                _ => bail!(error),
            },
        }
    }
}

fn told(error: &MessagesError) -> String {
    match error.source() {
        Some(source) => format!("{}: {source}", error.kind()),
        None => error.kind().to_string(),
    }
}
// ANCHOR_END: end_of

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
