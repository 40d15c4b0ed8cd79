//! Mirrors and sources: streams that the server fills from other streams.
//!
//! Teaches: a mirror is a copy of one stream, with its sequences; a stream with
//! sources gathers several, each with its own filter. The server copies in the
//! background: look at the lag before you rely on the copy.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_mirror_source
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:   3 in SHIPPED_EU, 3 in SHIPPED_US
//! mirrored: 3 in SHIPPED_EU_COPY, sequences 1 to 3 as in the origin
//! gathered: 5 in SHIPPED_ALL, without the cancellation
//!   from SHIPPED_EU: parcel-1, parcel-2, parcel-3
//!   from SHIPPED_US: parcel-4, parcel-6
//! purged:   0 in SHIPPED_EU, 3 in SHIPPED_EU_COPY
//! ```
//!
//! Left out on purpose: origins in another account or behind a leaf node
//! (`external`, `domain`), for which the copying goes on after an interruption.

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::pull,
        context::DeleteStreamErrorKind,
        stream::{self, Source, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::{Instant, sleep};

const DEFAULT_URL: &str = "nats://localhost:4222";
const EU: &str = "SHIPPED_EU";
const US: &str = "SHIPPED_US";
const COPY: &str = "SHIPPED_EU_COPY";
const ALL: &str = "SHIPPED_ALL";
const US_SENT: &str = "shipped.us.sent";
/// The header in which the server says where it has a message from.
const SOURCE: &str = "Nats-Stream-Source";

/// Subject and payload.
const PARCELS: [(&str, &str); 6] = [
    ("shipped.eu.sent", "parcel-1"),
    ("shipped.eu.sent", "parcel-2"),
    ("shipped.eu.sent", "parcel-3"),
    (US_SENT, "parcel-4"),
    ("shipped.us.cancelled", "parcel-5"),
    (US_SENT, "parcel-6"),
];

/// How long the copies may take.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    match copy_and_gather().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn copy_and_gather() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The counts below are those of new streams; the copies go first.
    for stream in [ALL, COPY, US, EU] {
        forget(&jetstream, stream).await?;
    }
    let mut eu = origin(&jetstream, EU, "shipped.eu.>").await?;
    let mut us = origin(&jetstream, US, "shipped.us.>").await?;
    let mut copy = mirror(&jetstream).await?;
    let mut all = gather(&jetstream).await?;

    for (subject, parcel) in PARCELS {
        jetstream.publish(subject, parcel.into()).await?.await?;
    }
    println!(
        "stored:   {} in {EU}, {} in {US}",
        count(&mut eu).await?,
        count(&mut us).await?
    );

    caught_up(&mut copy, 3).await?;
    let state = copy.info().await?.state.clone();
    println!(
        "mirrored: {} in {COPY}, sequences {} to {} as in the origin",
        state.messages, state.first_sequence, state.last_sequence
    );
    caught_up(&mut all, 5).await?;
    println!(
        "gathered: {} in {ALL}, without the cancellation",
        count(&mut all).await?
    );
    for (origin, parcels) in by_origin(&all).await? {
        println!("  from {origin}: {}", parcels.join(", "));
    }

    // Deleting is not copied, so a mirror also keeps what its origin forgets.
    eu.purge().await?;
    println!(
        "purged:   {} in {EU}, {} in {COPY}",
        count(&mut eu).await?,
        count(&mut copy).await?
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

async fn origin(
    jetstream: &jetstream::Context,
    name: &str,
    subject: &str,
) -> Result<Stream> {
    jetstream
        .create_stream(stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")
}

// ANCHOR: mirror
/// A copy of one stream. It has no subjects: nobody can publish to it.
async fn mirror(jetstream: &jetstream::Context) -> Result<Stream> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: COPY.to_owned(),
            mirror: Some(Source {
                name: EU.to_owned(),
                ..Source::default()
            }),
            ..stream::Config::default()
        })
        .await?;
    Ok(stream)
}
// ANCHOR_END: mirror

// ANCHOR: gather
/// Several streams in one, each with what is wanted of it. It numbers anew.
async fn gather(jetstream: &jetstream::Context) -> Result<Stream> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: ALL.to_owned(),
            sources: Some(vec![
                Source {
                    name: EU.to_owned(),
                    ..Source::default()
                },
                Source {
                    name: US.to_owned(),
                    filter_subject: Some(US_SENT.to_owned()),
                    ..Source::default()
                },
            ]),
            ..stream::Config::default()
        })
        .await?;
    Ok(stream)
}
// ANCHOR_END: gather

// ANCHOR: caught_up
/// Waits until a copy has what it should have. Its lag alone would not do: it is
/// 0, too, before the copying has begun.
async fn caught_up(stream: &mut Stream, messages: u64) -> Result<()> {
    let asked = Instant::now();
    loop {
        let info = stream.info().await?;
        let mirror = info.mirror.iter();
        let lag: u64 = mirror.chain(&info.sources).map(|from| from.lag).sum();
        if info.state.messages == messages && lag == 0 {
            return Ok(());
        }
        ensure!(
            asked.elapsed() < PATIENCE,
            "{} has {} of {messages} messages after {PATIENCE:?}, lag {lag}",
            info.config.name,
            info.state.messages
        );
        sleep(Duration::from_millis(20)).await;
    }
}
// ANCHOR_END: caught_up

// ANCHOR: by_origin
/// The parcels by the stream from which the server took them: it says so in a
/// header, with the sequence there.
async fn by_origin(all: &Stream) -> Result<BTreeMap<String, Vec<String>>> {
    let consumer = all.create_consumer(pull::OrderedConfig::default()).await?;
    let mut messages = consumer.messages().await?;
    let mut parcels: BTreeMap<String, Vec<String>> = BTreeMap::new();
    loop {
        let message = messages
            .next()
            .await
            .context("NATS ended the deliveries")??;
        let headers = message.headers.as_ref();
        let source = headers.and_then(|headers| headers.get(SOURCE));
        let source = source.context("a gathered message names its source")?;
        let origin = source.as_str().split(' ').next().unwrap_or_default();
        let parcel = String::from_utf8_lossy(&message.payload).into_owned();
        parcels.entry(origin.to_owned()).or_default().push(parcel);
        if message.info().map_err(Error::from_boxed)?.pending == 0 {
            return Ok(parcels);
        }
    }
}
// ANCHOR_END: by_origin

async fn count(stream: &mut Stream) -> Result<u64> {
    Ok(stream.info().await?.state.messages)
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
