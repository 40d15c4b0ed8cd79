//! Subject transforms: the server rewrites subjects, and echoes what it stored.
//!
//! Teaches: `{{partition(3,1)}}` in a stream's transform spreads the orders over
//! three partitions, always the same for the same order. So three workers share
//! the orders and each order's messages stay in their sequence. `republish` sends
//! each stored message once more, over core NATS, to everybody who listens.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_transform_republish
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:    transformed.raw.order-1 as transformed.part.1.order-1
//! worker 0:  order-3 placed paid shipped, order-4 placed paid shipped
//! worker 1:  order-1 placed paid shipped, order-2 placed paid shipped
//! worker 2:  order-5 placed paid shipped
//! echoed:    transformed.part.1.order-1 as transformed.live.order-1, sequence 1
//! dashboard: 15 of 15 echoes, in the stream's sequence
//! ```
//!
//! Left out on purpose: what makes sure that a partition has one worker; a
//! consumer with a pinned client does (`nats_jetstream_priority_groups`).

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr, Subscriber,
    jetstream::{
        self, ErrorCode,
        consumer::{AckPolicy, pull},
        context::DeleteStreamErrorKind,
        stream::{self, Republish, Stream, SubjectTransform},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "TRANSFORMED";
/// What producers publish to, with the id of the order at the end.
const RAW: &str = "transformed.raw";
const LIVE: &str = "transformed.live.>";
const PARTITIONS: usize = 3;

/// What happens to each order, in this sequence.
const EVENTS: [&str; 3] = ["placed", "paid", "shipped"];
const ORDERS: usize = 5;

/// How long a message may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The counts below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    let stream = create(&jetstream).await?;

    let mut dashboard = client.subscribe(LIVE).await?;
    for event in EVENTS {
        for order in 1..=ORDERS {
            let subject = format!("{RAW}.order-{order}");
            jetstream.publish(subject, event.into()).await?.await?;
        }
    }
    let first = stream.get_raw_message(1).await?;
    println!("stored:    {RAW}.order-1 as {}", first.subject);

    for partition in 0..PARTITIONS {
        let mut done = Vec::new();
        for (order, events) in work(&stream, partition).await? {
            done.push(format!("{order} {}", events.join(" ")));
        }
        println!("worker {partition}:  {}", done.join(", "));
    }
    // The last acknowledgements are only queued, and to drain does not wait for
    // them.
    client.flush().await?;
    echo(&mut dashboard).await?;
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: create
async fn create(jetstream: &jetstream::Context) -> Result<Stream> {
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![format!("{RAW}.*")],
            // The number of partitions, then the wildcards that are hashed.
            subject_transform: Some(SubjectTransform {
                source: format!("{RAW}.*"),
                destination: format!(
                    "transformed.part.{{{{partition({PARTITIONS},1)}}}}.{{{{wildcard(1)}}}}"
                ),
            }),
            // Must not lead back into the stream.
            republish: Some(Republish {
                source: "transformed.part.*.*".to_owned(),
                destination: "transformed.live.{{wildcard(2)}}".to_owned(),
                headers_only: false,
            }),
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")
}
// ANCHOR_END: create

// ANCHOR: work
/// What the worker of one partition gets, one message at a time.
async fn work(
    stream: &Stream,
    partition: usize,
) -> Result<BTreeMap<String, Vec<String>>> {
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(format!("worker-{partition}")),
            filter_subject: format!("transformed.part.{partition}.*"),
            ack_policy: AckPolicy::Explicit,
            // One after the other, or a redelivery would come after the next.
            max_ack_pending: 1,
            ..pull::Config::default()
        })
        .await?;
    let mut orders: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut pending = consumer.get_info().await?.num_pending;
    let mut messages = consumer.messages().await?;
    while pending > 0 {
        let message = timeout(PATIENCE, messages.next()).await;
        let message = message.context("a message is missing")?;
        let message = message.context("the consumer ended")??;
        let order = message.subject.rsplit('.').next().unwrap_or_default();
        let event = String::from_utf8_lossy(&message.payload).into_owned();
        orders.entry(order.to_owned()).or_default().push(event);
        message.ack().await.map_err(Error::from_boxed)?;
        pending -= 1;
    }
    Ok(orders)
}
// ANCHOR_END: work

// ANCHOR: echo
/// Counts what a subscriber has got that knows nothing of JetStream.
async fn echo(dashboard: &mut Subscriber) -> Result<()> {
    let expected = EVENTS.len() * ORDERS;
    for number in 1..=expected {
        let message = timeout(PATIENCE, dashboard.next()).await;
        let message = message
            .with_context(|| format!("{} of {expected} echoes came", number - 1))?;
        let message = message.context("the server ended the subscription")?;
        let headers = message.headers.context("an echo without headers")?;
        let header =
            |name: &str| headers.get(name).map_or("?", |text| text.as_str());
        let sequence = header("Nats-Sequence");
        // Two echoes that do not follow each other: this subscriber lost some, and
        // can read them from the stream.
        ensure!(
            sequence == number.to_string(),
            "{sequence} after {}",
            number - 1
        );
        if number == 1 {
            println!(
                "echoed:    {} as {}, sequence {sequence}",
                header("Nats-Subject"),
                message.subject
            );
        }
    }
    println!("dashboard: {expected} of {expected} echoes, in the stream's sequence");
    Ok(())
}
// ANCHOR_END: echo

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
