//! Retention: a work queue keeps a message until its one consumer acknowledged.
//!
//! Teaches: with `RetentionPolicy::WorkQueue` an acknowledgement deletes the
//! message, and no two consumers may want the same one: the server refuses
//! filters that overlap.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_workqueue
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:   3 messages in FULFILMENT
//! consumer: pick takes fulfilment.pick
//! refused:  a second consumer for fulfilment.pick (error 10100)
//! consumer: pack takes fulfilment.pack
//! refused:  a change to limits retention (error 10052)
//! done:     pick order-1, 2 messages left
//! done:     pick order-2, 1 messages left
//! done:     pack order-1, 0 messages left
//! ```
//!
//! Left out on purpose: more than one worker for a consumer; they share it by
//! using the same durable name.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::{AckPolicy, PullConsumer, pull},
        context::UpdateStreamErrorKind,
        stream::{self, ConsumerErrorKind, RetentionPolicy, Stream},
    },
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "FULFILMENT";
const SUBJECTS: &str = "fulfilment.*";
const PICK: &str = "fulfilment.pick";
const PACK: &str = "fulfilment.pack";

const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match work_through_the_queue().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: queue
async fn work_through_the_queue() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // A run that was stopped in the middle leaves messages and consumers.
    jetstream.delete_stream(STREAM).await.ok();
    let config = stream::Config {
        name: STREAM.into(),
        subjects: vec![SUBJECTS.into()],
        retention: RetentionPolicy::WorkQueue,
        ..stream::Config::default()
    };
    let stream =
        jetstream
            .create_stream(config.clone())
            .await
            .with_context(|| {
                format!("cannot have the stream {STREAM}; is JetStream on?")
            })?;
    for (subject, order) in [(PICK, "order-1"), (PICK, "order-2"), (PACK, "order-1")]
    {
        jetstream.publish(subject, order.into()).await?.await?;
    }
    // Unlike with interest retention, they wait for a consumer to be made.
    println!("stored:   {} messages in {STREAM}", left(&stream).await?);

    let pick = stream.create_consumer(consumer("pick", PICK)).await?;
    println!("consumer: pick takes {PICK}");
    match stream.create_consumer(consumer("audit", PICK)).await {
        Ok(_consumer) => bail!("two consumers were allowed for {PICK}"),
        Err(error) => match error.kind() {
            ConsumerErrorKind::JetStream(reason)
                if reason.error_code()
                    == ErrorCode::CONSUMER_WQ_CONSUMER_NOT_UNIQUE =>
            {
                let code = reason.error_code().0;
                println!("refused:  a second consumer for {PICK} (error {code})");
            }
            _ => return Err(error.into()),
        },
    }
    let pack = stream.create_consumer(consumer("pack", PACK)).await?;
    println!("consumer: pack takes {PACK}");

    let limits = stream::Config {
        retention: RetentionPolicy::Limits,
        ..config
    };
    match jetstream.update_stream(limits).await {
        Ok(_info) => bail!("the retention was changed"),
        Err(error) => match error.kind() {
            UpdateStreamErrorKind::JetStream(reason)
                if reason.error_code() == ErrorCode::STREAM_INVALID_CONFIG =>
            {
                let code = reason.error_code().0;
                println!("refused:  a change to limits retention (error {code})");
            }
            _ => return Err(error.into()),
        },
    }

    work(&stream, "pick", &pick, 2).await?;
    work(&stream, "pack", &pack, 1).await?;
    ensure!(left(&stream).await? == 0, "the queue is not empty");
    Ok(())
}

async fn work(
    stream: &Stream,
    station: &str,
    consumer: &PullConsumer,
    count: usize,
) -> Result<()> {
    let pulling = consumer.batch().max_messages(count).expires(PATIENCE);
    let mut messages = pulling.messages().await?;
    for _ in 0..count {
        let message = messages.next().await.context("no message within 5 s")?;
        let message = message.map_err(Error::from_boxed)?;
        let order = String::from_utf8_lossy(&message.payload);
        // Deletes the message, so it comes after the work. It waits for the
        // answer of the server, so that the count below is right.
        message.double_ack().await.map_err(Error::from_boxed)?;
        let left = left(stream).await?;
        println!("done:     {station} {order}, {left} messages left");
    }
    Ok(())
}
// ANCHOR_END: queue

// ANCHOR: consumer
fn consumer(durable: &str, subject: &str) -> pull::Config {
    pull::Config {
        durable_name: Some(durable.into()),
        filter_subject: subject.into(),
        // A work queue takes no other: without it nothing would ever leave.
        ack_policy: AckPolicy::Explicit,
        ..pull::Config::default()
    }
}
// ANCHOR_END: consumer

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
