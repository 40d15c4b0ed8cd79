//! Subjects: one token for what a subscriber may want to choose by.
//!
//! Teaches: `*` stands for exactly one token, `>` for one or more at the end.
//! What a pattern can choose is decided when the subjects are designed: here
//! region first, event second. Each subscription that matches gets its own copy.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_wildcards
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 6 orders, each to its own subject
//! orders_in.eu.placed gets eu.placed
//! orders_in.*.placed  gets eu.placed, us.placed
//! orders_in.eu.*      gets eu.placed, eu.cancelled
//! orders_in.*         gets eu
//! orders_in.>         gets eu, eu.placed, us.placed, eu.cancelled, eu.placed.gift
//! orders_in           gets (itself)
//! orders_in.pl*       gets nothing
//! orders_in.>.placed  gets nothing
//! ```
//!
//! Left out on purpose: several subscriptions read as one stream; that is
//! `nats_multiple_subscriptions`.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{Client, ConnectErrorKind, ServerAddr, Subscriber};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";

/// `<root>.<region>.<event>`: the token most people choose by comes first.
const ROOT: &str = "orders_in";
const EVENTS: [&str; 6] = [
    "orders_in",
    "orders_in.eu",
    "orders_in.eu.placed",
    "orders_in.us.placed",
    "orders_in.eu.cancelled",
    "orders_in.eu.placed.gift",
];

const PATTERNS: [&str; 8] = [
    "orders_in.eu.placed",
    "orders_in.*.placed",
    "orders_in.eu.*",
    "orders_in.*",
    // One token or more, so not `orders_in` itself.
    "orders_in.>",
    "orders_in",
    // Both compile, and `subscribe` takes both. In the first, `*` is a letter
    // like any other, as it is not the whole token. The second the server
    // refuses, and tells the connection, not the subscriber.
    "orders_in.pl*",
    "orders_in.>.placed",
];

/// How long the server may take to deliver.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match match_all().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn match_all() -> Result<()> {
    let client = connect().await?;
    let mut subscribers = Vec::new();
    for pattern in PATTERNS {
        subscribers.push((pattern, client.subscribe(pattern).await?));
    }

    // The same connection, so the server has read the subscriptions before.
    for subject in EVENTS {
        client.publish(subject, "{}".into()).await?;
    }
    round_trip(&client).await?;
    println!(
        "published: {} orders, each to its own subject",
        EVENTS.len()
    );

    for (pattern, subscriber) in subscribers {
        println!("{pattern:<19} gets {}", received(subscriber).await?);
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: round_trip
/// Returns when all that the server has delivered to this connection for what
/// was published on it is here.
async fn round_trip(client: &Client) -> Result<()> {
    // A message to ourselves, behind all others: the server takes the commands
    // of one connection, and delivers to it, in their order. `flush` waits for
    // no answer, and `drain` of async-nats 0.51 does not either: what is still
    // on its way from the server when a subscription is drained is lost.
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await?;
    client.publish(inbox, "".into()).await?;
    timeout(PATIENCE, echo.next())
        .await
        .with_context(|| {
            format!(
                "nothing came back within {PATIENCE:?}; may this user subscribe \
                 to _INBOX.>?"
            )
        })?
        .context("the server ended the subscription")?;
    Ok(())
}
// ANCHOR_END: round_trip

// ANCHOR: received
/// The subjects of all messages that are here for this subscription.
async fn received(mut subscriber: Subscriber) -> Result<String> {
    // Ends the stream behind the last message that has arrived. Without it,
    // `next` would wait for a message that may never come.
    subscriber.drain().await?;
    let mut subjects = Vec::new();
    while let Some(message) = subscriber.next().await {
        subjects.push(short(message.subject.as_str()));
    }
    Ok(if subjects.is_empty() {
        "nothing".to_owned()
    } else {
        subjects.join(", ")
    })
}
// ANCHOR_END: received

fn short(subject: &str) -> String {
    match subject.strip_prefix(ROOT) {
        Some("") => "(itself)".to_owned(),
        Some(rest) => rest.trim_start_matches('.').to_owned(),
        None => subject.to_owned(),
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
