//! Observe: a wire tap, the client's counters, and the server's message trace.
//!
//! Teaches: a second subscription sees the messages of a domain and changes
//! nothing for the others; it does not see answers, as those go to inboxes. The
//! trace asks the server who would get a message, without delivering it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_wiretap
//! ```
//!
//! Expected output:
//!
//! ```text
//! tapping:   checkout.>
//! answer:    7 on hand
//! tap:       checkout.cart, 4 bytes
//! tap:       checkout.paid, 5 bytes
//! tap:       checkout.stock, 5 bytes, asks for an answer
//! counters:  the shop sent 4 messages, the tap got 3
//! trace:     a message to checkout.paid would go
//! trace:     to the subscription checkout.>
//! counters:  the tap got 0 more
//! ```
//!
//! Left out on purpose: a tap on `>`. It sees the inboxes of everybody, and on a
//! busy server its buffer fills, so that it drops messages.

use std::{env, process::ExitCode, sync::atomic::Ordering::Relaxed, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::{Client, ConnectErrorKind, HeaderMap, ServerAddr, Subscriber};
use futures_lite::StreamExt as _;
use serde::Deserialize;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const DOMAIN: &str = "checkout.>";
const CART: &str = "checkout.cart";
const PAID: &str = "checkout.paid";
const STOCK: &str = "checkout.stock";

/// How long the server may take to deliver.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match observe().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn observe() -> Result<()> {
    // Two connections: each has counters of its own, and a tap that is too slow
    // takes no time from the shop.
    let (shop, tapping) = (connect().await?, connect().await?);
    ensure!(
        shop.is_server_compatible(2, 11, 0),
        "message traces need a NATS server of version 2.11 or later"
    );
    let mut tap = tapping.subscribe(DOMAIN).await?;
    let stock = shop.subscribe(STOCK).await?;
    let answering = tokio::spawn(answer(shop.clone(), stock));
    // The shop is another connection; the tap must be there before it sends.
    round_trip(&tapping).await?;
    println!("tapping:   {DOMAIN}");

    let (sent_before, got_before) = (sent(&shop), received(&tapping));
    shop.publish(CART, "lamp".into()).await?;
    shop.publish(PAID, "19.90".into()).await?;
    let answer = shop.request(STOCK, "sku-1".into()).await?;
    println!("answer:    {}", String::from_utf8_lossy(&answer.payload));

    for _message in 0..3 {
        show(&mut tap).await?;
    }
    println!(
        "counters:  the shop sent {} messages, the tap got {}",
        sent(&shop) - sent_before,
        received(&tapping) - got_before
    );

    let before = received(&tapping);
    trace(&shop, PAID).await?;
    // What the server would have delivered to the tap is here after this, and
    // the echo of the round trip itself.
    round_trip(&tapping).await?;
    let more = received(&tapping) - before - 1;
    println!("counters:  the tap got {more} more");
    tapping.drain().await?;
    shop.drain().await?;
    answering.await?
}
// ANCHOR_END: story

// ANCHOR: show
async fn show(tap: &mut Subscriber) -> Result<()> {
    let message = timeout(PATIENCE, tap.next())
        .await
        .context("the tap got nothing within 5 s; may this user subscribe?")?
        .context("the server ended the subscription")?;
    // Size and not content: what customers write does not belong into a log.
    let asks = match message.reply {
        Some(_inbox) => ", asks for an answer",
        None => "",
    };
    let size = message.payload.len();
    println!("tap:       {}, {size} bytes{asks}", message.subject);
    Ok(())
}
// ANCHOR_END: show

// ANCHOR: counters
/// Messages, of this connection, since it was made; a reconnect goes on counting.
fn sent(client: &Client) -> u64 {
    client.statistics().out_messages.load(Relaxed)
}

fn received(client: &Client) -> u64 {
    client.statistics().in_messages.load(Relaxed)
}
// ANCHOR_END: counters

// ANCHOR: trace
/// What the server says of the way of one message; more fields are ignored.
#[derive(Deserialize)]
struct Trace {
    events: Vec<Hop>,
}

#[derive(Deserialize)]
struct Hop {
    /// `in`: taken from a connection; `eg`: handed to one; others exist.
    #[serde(rename = "type")]
    kind: String,
    /// The subscription that it is handed to.
    #[serde(default)]
    sub: String,
}

async fn trace(client: &Client, subject: &'static str) -> Result<()> {
    let inbox = client.new_inbox();
    let mut traces = client.subscribe(inbox.clone()).await?;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Trace-Dest", inbox.as_str());
    // Without this, the message is delivered as well.
    headers.insert("Nats-Trace-Only", "true");
    client
        .publish_with_headers(subject, headers, "0.00".into())
        .await?;
    let message = timeout(PATIENCE, traces.next())
        .await
        .context("no trace within 5 s; may this user subscribe to _INBOX.>?")?
        .context("the server ended the inbox")?;
    let trace: Trace = serde_json::from_slice(&message.payload)
        .context("the server's trace has another form")?;
    ensure!(
        trace.events.iter().any(|hop| hop.kind == "in"),
        "the trace does not say that the message came in"
    );
    println!("trace:     a message to {subject} would go");
    let mut out: Vec<&str> = trace
        .events
        .iter()
        .filter(|hop| hop.kind == "eg")
        .map(|hop| hop.sub.as_str())
        .collect();
    out.sort_unstable();
    for subscription in out {
        println!("trace:     to the subscription {subscription}");
    }
    Ok(())
}
// ANCHOR_END: trace

async fn answer(client: Client, mut questions: Subscriber) -> Result<()> {
    while let Some(question) = questions.next().await {
        if let Some(reply_to) = question.reply {
            client.publish(reply_to, "7 on hand".into()).await?;
        }
    }
    Ok(())
}

/// Returns when the server has dealt with all that this connection has sent, and
/// what it had for it is here: a message to ourselves comes behind all that.
async fn round_trip(client: &Client) -> Result<()> {
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await?;
    client.publish(inbox, "".into()).await?;
    timeout(PATIENCE, echo.next())
        .await
        .context("no echo within 5 s; may this user subscribe to _INBOX.>?")?
        .context("the server ended the subscription")?;
    Ok(())
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
