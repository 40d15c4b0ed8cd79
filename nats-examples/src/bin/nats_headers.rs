//! Headers and payloads: what belongs to the way, not to the order, in headers.
//!
//! Teaches: a header may have several values (`append`), in their order, while
//! `insert` replaces; names are case-sensitive, unlike those of HTTP. A value
//! from outside must be parsed: with a line break in it, `insert` panics.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_headers
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused:   a key with a line break in it
//! published: order 1, twice, with the same Order-Key
//! received:  order 1
//! Hop:       web, checkout
//! Order-Key: key-1
//! order-key: absent
//! again:     order 1, key-1 is done already
//! ```
//!
//! Left out on purpose: remembering the keys for longer than this process lives,
//! which needs a store; and names that begin with `Nats-`, as those are the
//! server's.

use std::{collections::HashSet, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, HeaderValue, Message, ServerAddr,
    Subscriber,
};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "headers.orders";
/// The programs that the order has passed, in their order.
const HOP: &str = "Hop";
/// The same for each attempt to send one order, so that it is done once.
const ORDER_KEY: &str = "Order-Key";

#[tokio::main]
async fn main() -> ExitCode {
    match order_with_headers().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn order_with_headers() -> Result<()> {
    let client = connect().await?;
    let mut orders = client.subscribe(SUBJECT).await?;

    if headers("key-1\r\nHop: nowhere").is_ok() {
        bail!("a value from outside would have added a header");
    }
    println!("refused:   a key with a line break in it");

    // Twice, as a publisher does that does not know whether it was heard.
    for _attempt in 0..2 {
        client
            .publish_with_headers(SUBJECT, headers("key-1")?, "order 1".into())
            .await?;
    }
    client.flush().await?;
    println!("published: order 1, twice, with the same {ORDER_KEY}");

    let mut done = HashSet::new();
    for _attempt in 0..2 {
        receive(&mut orders, &mut done).await?;
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: headers
/// The headers of an order; the key is from outside.
fn headers(key: &str) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.append(HOP, "web");
    headers.append(HOP, "checkout");
    headers.insert(ORDER_KEY, "not known yet");
    // Replaces the value above. As a `&str` it would be converted on the way,
    // and a line break in it would end the program.
    let key: HeaderValue = key.parse().context("the order key")?;
    headers.insert(ORDER_KEY, key);
    Ok(headers)
}
// ANCHOR_END: headers

// ANCHOR: receive
async fn receive(orders: &mut Subscriber, done: &mut HashSet<String>) -> Result<()> {
    let message = timeout(Duration::from_secs(5), orders.next())
        .await
        .with_context(|| {
            format!(
                "nothing came back within 5 s; may this user publish and \
                 subscribe on {SUBJECT}?"
            )
        })?
        .context("the server ended the subscription")?;
    let order = String::from_utf8_lossy(&message.payload);
    // Anybody may publish here without headers: that is no reason to fail.
    let key = values(&message, ORDER_KEY);
    if !done.insert(key.clone()) {
        println!("again:     {order}, {key} is done already");
        return Ok(());
    }
    println!("received:  {order}");
    println!("{HOP}:       {}", values(&message, HOP));
    println!("{ORDER_KEY}: {key}");
    // Another name, as its case is another.
    println!("order-key: {}", values(&message, "order-key"));
    Ok(())
}
// ANCHOR_END: receive

// ANCHOR: values
/// All values of this header, or `absent`.
fn values(message: &Message, name: &str) -> String {
    let values: Vec<&str> = message
        .headers
        .iter()
        .flat_map(|headers| headers.get_all(name))
        .map(HeaderValue::as_str)
        .collect();
    if values.is_empty() {
        "absent".to_owned()
    } else {
        values.join(", ")
    }
}
// ANCHOR_END: values

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
