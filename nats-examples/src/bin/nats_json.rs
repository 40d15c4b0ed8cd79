//! Headers and payloads: JSON, and a place for what cannot be read.
//!
//! Teaches: each payload is decoded for itself. A malformed one neither ends the
//! loop nor disappears: it goes to another subject, as it came, with the reason
//! in a header, and by request, so that the worker knows that somebody has it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_json
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 5 payloads to json.orders
//! order 1:   2 x lamp
//! put aside: on json.orders.unreadable, EOF while parsing a string at line 1 column 9
//! order 3:   1 x chair
//! put aside: on json.orders.unreadable, missing field `quantity` at line 1 column 26
//! order 5:   7 x shelf
//! desk has:  {"id": "2
//! desk has:  {"id": 4, "item": "table"}
//! ```
//!
//! Left out on purpose: storage. The desk's subject is core NATS, so a payload
//! is as safe there as the desk; to keep it, let a stream take the subject.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, HeaderValue, Message, Request, ServerAddr,
    Subscriber,
};
use futures_lite::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "json.orders";
/// Where payloads go that the worker cannot read.
const UNREADABLE: &str = "json.orders.unreadable";
const REASON: &str = "Reason";

/// How long an order may be on its way, and the desk take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

// ANCHOR: order
/// Fields that are not here are ignored, so a newer publisher may add some.
#[derive(Serialize, Deserialize)]
struct Order {
    id: u64,
    item: String,
    quantity: u32,
}
// ANCHOR_END: order

#[tokio::main]
async fn main() -> ExitCode {
    match read_orders().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn read_orders() -> Result<()> {
    let client = connect().await?;
    let mut orders = client.subscribe(SUBJECT).await?;
    let unreadable = client.subscribe(UNREADABLE).await?;
    let desk = tokio::spawn(desk(client.clone(), unreadable));

    let payloads = [
        order(1, "lamp", 2)?,
        br#"{"id": "2"#.to_vec(),
        order(3, "chair", 1)?,
        br#"{"id": 4, "item": "table"}"#.to_vec(),
        br#"{"id": 5, "item": "shelf", "quantity": 7, "gift": true}"#.to_vec(),
    ];
    let count = payloads.len();
    for payload in payloads {
        client.publish(SUBJECT, payload.into()).await?;
    }
    client.flush().await?;
    println!("published: {count} payloads to {SUBJECT}");

    for _payload in 0..count {
        let message = timeout(PATIENCE, orders.next())
            .await
            .context("an order did not come back; may this user subscribe?")?
            .context("the server ended the subscription")?;
        handle(&client, &message).await?;
    }
    // Ends the subscriptions, and with them the desk.
    client.drain().await?;
    for payload in desk.await?? {
        println!("desk has:  {payload}");
    }
    Ok(())
}
// ANCHOR_END: story

fn order(id: u64, item: &str, quantity: u32) -> Result<Vec<u8>> {
    let item = item.to_owned();
    Ok(serde_json::to_vec(&Order { id, item, quantity })?)
}

// ANCHOR: handle
async fn handle(client: &Client, message: &Message) -> Result<()> {
    // Not `?`: one payload that is no order would end the loop for all others.
    match serde_json::from_slice::<Order>(&message.payload) {
        Ok(order) => {
            let Order { id, item, quantity } = order;
            println!("order {id}:   {quantity} x {item}");
            Ok(())
        }
        Err(error) => put_aside(client, message, &error.to_string()).await,
    }
}
// ANCHOR_END: handle

// ANCHOR: put_aside
async fn put_aside(client: &Client, message: &Message, reason: &str) -> Result<()> {
    let mut headers = HeaderMap::new();
    // The reason may quote the payload, so it may hold what a header must not.
    let reason = reason.replace(['\r', '\n'], " ");
    headers.insert(REASON, reason.parse::<HeaderValue>()?);
    let request = Request::new()
        .headers(headers)
        // The bytes as they came: whoever mends them needs nothing else.
        .payload(message.payload.clone())
        .timeout(Some(PATIENCE));
    match client.send_request(UNREADABLE, request).await {
        Ok(_receipt) => println!("put aside: on {UNREADABLE}, {reason}"),
        // Nobody has it, or nobody has said so. The other orders do not wait for
        // that, and the payload is at least where the operator looks.
        Err(error) => eprintln!(
            "error: {error} on {UNREADABLE}; not put aside: {:?}, {reason}",
            String::from_utf8_lossy(&message.payload)
        ),
    }
    Ok(())
}
// ANCHOR_END: put_aside

// ANCHOR: desk
/// Takes what nobody could read, and says so; returns it all in the end.
async fn desk(client: Client, mut unreadable: Subscriber) -> Result<Vec<String>> {
    let mut payloads = Vec::new();
    while let Some(message) = unreadable.next().await {
        payloads.push(String::from_utf8_lossy(&message.payload).into_owned());
        if let Some(reply_to) = message.reply {
            client.publish(reply_to, "taken".into()).await?;
        }
    }
    Ok(payloads)
}
// ANCHOR_END: desk

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
