//! Expiry and schedules: a message that the server removes when its time is up.
//!
//! Teaches: a lifetime for a single message, on a stream that allows it, and
//! the marker that tells consumers of the end. Without a marker a message only
//! vanishes, and whoever keeps a copy of it keeps it for good.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_message_ttl
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused: STAYS allows no lifetimes (code 10166)
//! stored: reservations.sku-1 for 2 s
//! stored: reservations.sku-2 until it is deleted
//! seen: reservations.sku-1
//! seen: reservations.sku-2
//! ended: reservations.sku-1 (MaxAge)
//! left: reservations.sku-2
//! ```
//!
//! Left out on purpose: an age that holds for the whole stream (`max_age`).

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    header::NATS_MARKER_REASON,
    jetstream::{
        self, ErrorCode,
        consumer::{DeliverPolicy, pull},
        context::DeleteStreamErrorKind,
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "RESERVATIONS";
const SUBJECTS: &str = "reservations.>";
/// A stream without `allow_message_ttl`, to see what it says.
const STRICT_STREAM: &str = "STAYS";
const STRICT_SUBJECT: &str = "stays.sku-1";

/// Whole seconds, at least one.
const LIFETIME: Duration = Duration::from_secs(2);

/// How long a marker itself stays. A lifetime that is shorter than this is
/// raised to it, so keep it small.
const MARKER_LIFETIME: Duration = Duration::from_secs(1);

/// How long anything may let wait for itself.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    match reserve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn reserve() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    be_refused(&jetstream).await?;

    // What an earlier run has left would be seen again.
    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECTS.to_owned()],
            allow_message_ttl: true,
            // Without this, a message that expires leaves no trace.
            subject_delete_marker_ttl: Some(MARKER_LIFETIME),
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;

    let short = PublishMessage::build().payload("cart 17".into());
    let short = short.ttl(LIFETIME);
    jetstream
        .send_publish("reservations.sku-1", short)
        .await?
        .await?;
    println!("stored: reservations.sku-1 for {} s", LIFETIME.as_secs());
    jetstream
        .publish("reservations.sku-2", "cart 18".into())
        .await?
        .await?;
    println!("stored: reservations.sku-2 until it is deleted");

    let consumer = stream
        .create_consumer(pull::OrderedConfig {
            deliver_policy: DeliverPolicy::All,
            ..pull::OrderedConfig::default()
        })
        .await?;
    let mut messages = consumer.messages().await?;
    loop {
        let message = timeout(PATIENCE, messages.next())
            .await
            .context("no marker came within 10 s")?
            .context("NATS ended the deliveries")??;
        let headers = message.headers.as_ref();
        match headers.and_then(|headers| headers.get(NATS_MARKER_REASON)) {
            // A marker has the subject of what it ends, and no payload.
            Some(reason) => {
                println!("ended: {} ({reason})", message.subject);
                break;
            }
            None => println!("seen: {}", message.subject),
        }
    }
    let left = stream.get_last_raw_message_by_subject("reservations.sku-2");
    println!("left: {}", left.await?.subject);
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: refused
/// What a stream says that was not made for lifetimes: it stores nothing.
async fn be_refused(jetstream: &jetstream::Context) -> Result<()> {
    jetstream
        .create_stream(stream::Config {
            name: STRICT_STREAM.to_owned(),
            subjects: vec![STRICT_SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    let message = PublishMessage::build()
        .payload("cart 17".into())
        .ttl(LIFETIME);
    let refused = jetstream.send_publish(STRICT_SUBJECT, message).await?.await;
    let Err(error) = refused else {
        bail!("{STRICT_STREAM} has stored a message with a lifetime");
    };
    let server = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<jetstream::Error>());
    match server.map(jetstream::Error::error_code) {
        Some(ErrorCode::MESSAGE_TTL_DISABLED) => println!(
            "refused: {STRICT_STREAM} allows no lifetimes (code {})",
            ErrorCode::MESSAGE_TTL_DISABLED.0
        ),
        _ => return Err(error.into()),
    }
    forget(jetstream, STRICT_STREAM).await
}
// ANCHOR_END: refused

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
