//! Expiry and schedules: a message that the server delivers later.
//!
//! Teaches: a schedule is a stored message with two headers, when and to which
//! subject. It outlives the program that wrote it, a newer one on the same
//! subject replaces it, and to delete it is to cancel it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_schedule
//! ```
//!
//! Expected output:
//!
//! ```text
//! scheduled: reminder for order-17 in 60 s
//! scheduled: reminder for order-17 in 2 s, instead
//! scheduled: reminder for order-18 in 2 s
//! cancelled: reminder for order-18
//! due: order-17, not before its time
//! nothing else is due
//! ```
//!
//! Left out on purpose: repeated schedules (`@hourly`, `@every 5m`, cron).

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    header::{NATS_SCHEDULE, NATS_SCHEDULE_TARGET, NATS_SCHEDULER},
    jetstream::{
        self, ErrorCode,
        consumer::{AckPolicy, pull},
        context::DeleteStreamErrorKind,
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "REMINDERS";
/// Where schedules are kept: one for each subject.
const PLANNED: &str = "reminders.planned";
/// Where their messages appear when they are due.
const DUE: &str = "reminders.due";

/// Whole seconds; the server looks once a second.
const SOON: Duration = Duration::from_secs(2);

/// How long a reminder may let wait for itself.
const PATIENCE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> ExitCode {
    match remind().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn remind() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // What an earlier run has planned would come in between.
    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![format!("{PLANNED}.*"), format!("{DUE}.*")],
            allow_message_schedules: true,
            ..stream::Config::default()
        })
        .await
        .context(
            "cannot create the stream; is JetStream on (-js), and the server 2.12 \
             or newer?",
        )?;
    // A subscriber of core NATS would wait for ever: a due message goes into the
    // stream and nowhere else.
    let consumer = stream
        .create_consumer(pull::Config {
            filter_subject: format!("{DUE}.*"),
            ack_policy: AckPolicy::Explicit,
            ..pull::Config::default()
        })
        .await?;

    plan(&jetstream, "order-17", Duration::from_secs(60)).await?;
    println!("scheduled: reminder for order-17 in 60 s");
    let due = plan(&jetstream, "order-17", SOON).await?;
    println!(
        "scheduled: reminder for order-17 in {} s, instead",
        SOON.as_secs()
    );
    plan(&jetstream, "order-18", SOON).await?;
    println!("scheduled: reminder for order-18 in {} s", SOON.as_secs());
    stream.purge().filter(format!("{PLANNED}.order-18")).await?;
    println!("cancelled: reminder for order-18");

    let mut messages = consumer.messages().await?;
    let reminder = timeout(PATIENCE, messages.next())
        .await
        .context("no reminder came within 15 s")?
        .context("NATS ended the deliveries")??;
    let order = String::from_utf8_lossy(&reminder.payload);
    let stored = reminder
        .info()
        .map_err(anyhow::Error::from_boxed)?
        .published;
    ensure!(
        stored.unix_timestamp() >= due.unix_timestamp(),
        "{order} came at {stored}, before {due}"
    );
    let headers = reminder
        .headers
        .as_ref()
        .context("a reminder has headers")?;
    ensure!(
        headers.get(NATS_SCHEDULER).is_some(),
        "{order} does not come from a schedule"
    );
    println!("due: {order}, not before its time");
    reminder.ack().await.map_err(anyhow::Error::from_boxed)?;

    // The cancelled one was due at the same time, so it would be here by now or
    // within a second.
    let other = timeout(SOON, messages.next()).await;
    ensure!(other.is_err(), "something else is due: {other:?}");
    println!("nothing else is due");
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: plan
/// Stores a schedule, and returns when its message is due.
async fn plan(
    jetstream: &jetstream::Context,
    order: &'static str,
    wait: Duration,
) -> Result<OffsetDateTime> {
    let due = OffsetDateTime::now_utc() + wait;
    let message = PublishMessage::build()
        .header(NATS_SCHEDULE, format!("@at {}", due.format(&Rfc3339)?))
        .header(NATS_SCHEDULE_TARGET, format!("{DUE}.{order}"))
        .payload(order.into());
    // The answer says that the schedule is stored: from now on the reminder does
    // not depend on this program.
    jetstream
        .send_publish(format!("{PLANNED}.{order}"), message)
        .await?
        .await?;
    Ok(due)
}
// ANCHOR_END: plan

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
