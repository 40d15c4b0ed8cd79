//! Inspect: what a stream holds, who reads it, and how to take something out.
//!
//! Teaches: subjects with their counts, consumers with what they have still to
//! read, one message by its sequence, the last one of a subject. And two ways to
//! delete: one message, or all of a subject.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_inspect
//! ```
//!
//! Expected output:
//!
//! ```text
//! stream:   INSPECTED, 6 messages, sequences 1 to 6
//! subject:  inspected.eu 3
//! subject:  inspected.test 2
//! subject:  inspected.us 1
//! consumer: billing, 4 to read, 2 without acknowledgement
//! message 2: inspected.us order-2
//! last of inspected.eu: order-6 (sequence 6)
//! missing:  inspected.asia, message not found
//! purged:   2 messages of inspected.test
//! deleted:  message 1
//! stream:   INSPECTED, 3 messages, sequences 2 to 6
//! ```
//!
//! Left out on purpose: reading many messages, for which a consumer is the right
//! way, and the streams and limits of the whole account.

use std::{collections::BTreeMap, env, process::ExitCode};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::pull,
        context::DeleteStreamErrorKind,
        stream::{self, DirectGetErrorKind, Stream},
    },
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "INSPECTED";
const SUBJECTS: &str = "inspected.*";
const CONSUMER: &str = "billing";
const TEST_ORDERS: &str = "inspected.test";

/// Subject and payload, in their order.
const ORDERS: [(&str, &str); 6] = [
    ("inspected.eu", "order-1"),
    ("inspected.us", "order-2"),
    (TEST_ORDERS, "order-3"),
    (TEST_ORDERS, "order-4"),
    ("inspected.eu", "order-5"),
    ("inspected.eu", "order-6"),
];

#[tokio::main]
async fn main() -> ExitCode {
    match inspect().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn inspect() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The sequences below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    let mut stream = fill(&jetstream).await?;
    show(&mut stream).await?;
    subjects(&stream).await?;
    consumers(&stream).await?;
    look_up(&stream).await?;
    take_out(&stream).await?;
    show(&mut stream).await?;
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// A stream with six orders, of which a reader has two in work.
async fn fill(jetstream: &jetstream::Context) -> Result<Stream> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECTS.to_owned()],
            // Lets a message be read without a consumer, by any replica.
            allow_direct: true,
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    for (subject, order) in ORDERS {
        jetstream.publish(subject, order.into()).await?.await?;
    }
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ..pull::Config::default()
        })
        .await?;
    let mut orders = consumer.fetch().max_messages(2).messages().await?;
    while let Some(order) = orders.next().await {
        order.map_err(Error::from_boxed)?;
    }
    Ok(stream)
}

// ANCHOR: show
async fn show(stream: &mut Stream) -> Result<()> {
    // Asks the server; `cached_info` would repeat what was true before.
    let state = &stream.info().await?.state;
    println!(
        "stream:   {STREAM}, {} messages, sequences {} to {}",
        state.messages, state.first_sequence, state.last_sequence
    );
    Ok(())
}

async fn subjects(stream: &Stream) -> Result<()> {
    // Comes in pages, and in no order.
    let mut pages = stream.info_with_subjects(SUBJECTS).await?;
    let mut counts = BTreeMap::new();
    while let Some(subject) = pages.next().await {
        let (subject, count) = subject?;
        counts.insert(subject, count);
    }
    for (subject, count) in counts {
        println!("subject:  {subject} {count}");
    }
    Ok(())
}

async fn consumers(stream: &Stream) -> Result<()> {
    let mut consumers = stream.consumers();
    while let Some(consumer) = consumers.next().await {
        let consumer = consumer?;
        println!(
            "consumer: {}, {} to read, {} without acknowledgement",
            consumer.name, consumer.num_pending, consumer.num_ack_pending
        );
    }
    Ok(())
}
// ANCHOR_END: show

// ANCHOR: look_up
async fn look_up(stream: &Stream) -> Result<()> {
    let message = stream.direct_get(2).await?;
    println!(
        "message 2: {} {}",
        message.subject,
        String::from_utf8_lossy(&message.payload)
    );
    let last = stream.direct_get_last_for_subject("inspected.eu").await?;
    println!(
        "last of inspected.eu: {} (sequence {})",
        String::from_utf8_lossy(&last.payload),
        last.sequence
    );
    match stream.direct_get_last_for_subject("inspected.asia").await {
        Ok(message) => bail!("who has published {}?", message.subject),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => {
            println!("missing:  inspected.asia, {}", error.kind());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
// ANCHOR_END: look_up

// ANCHOR: take_out
async fn take_out(stream: &Stream) -> Result<()> {
    // Without the filter it would empty the whole stream.
    let purged = stream.purge().filter(TEST_ORDERS).await?;
    println!("purged:   {} messages of {TEST_ORDERS}", purged.purged);
    if stream.delete_message(1).await? {
        println!("deleted:  message 1");
    }
    Ok(())
}
// ANCHOR_END: take_out

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
