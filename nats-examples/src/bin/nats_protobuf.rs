//! Headers and payloads: Protobuf, and readers older than the message.
//!
//! Teaches: fields are known by their numbers, so an old reader skips what it
//! does not know, and a new one finds a default where the old writer wrote
//! nothing. Bytes do not say what they are: the type belongs in a header.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_protobuf
//! ```
//!
//! Expected output:
//!
//! ```text
//! published:  shop.Order, shop.Order, shop.Customer
//! new writer: 17 bytes
//! new reader: Order { id: 7, item: "lamp", gift_note: "For Ada" }
//! old reader: OldOrder { id: 7, item: "lamp" }
//! passed on:  8 bytes, without the gift note
//! old writer: 9 bytes
//! new reader: Order { id: 8, item: "chair", gift_note: "" }
//! old reader: OldOrder { id: 8, item: "chair" }
//! other type: 7 bytes of shop.Customer, not read
//! unchecked:  Order { id: 9, item: "Ada", gift_note: "" } from shop.Customer
//! ```
//!
//! Left out on purpose: `.proto` files and a compiler for them. The derive is
//! enough for Rust on both sides; with other languages, generate both from one
//! file.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{Client, ConnectErrorKind, HeaderMap, ServerAddr};
use bytes::Bytes;
use futures_lite::StreamExt as _;
use prost::Message as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "protobuf.orders";
const TYPE: &str = "Proto-Type";
const ORDER: &str = "shop.Order";
const CUSTOMER: &str = "shop.Customer";

// ANCHOR: types
/// What a program knows that was built last year.
#[derive(Clone, PartialEq, prost::Message)]
struct OldOrder {
    #[prost(uint64, tag = 1)]
    id: u64,
    #[prost(string, tag = 2)]
    item: String,
}

/// What it knows today: a field more, with a number that was never used. A
/// number that meant something else once would be read as that.
#[derive(Clone, PartialEq, prost::Message)]
struct Order {
    #[prost(uint64, tag = 1)]
    id: u64,
    #[prost(string, tag = 2)]
    item: String,
    #[prost(string, tag = 3)]
    gift_note: String,
}

/// Something else, with the same numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct Customer {
    #[prost(uint64, tag = 1)]
    id: u64,
    #[prost(string, tag = 2)]
    name: String,
}
// ANCHOR_END: types

#[tokio::main]
async fn main() -> ExitCode {
    match write_and_read().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn write_and_read() -> Result<()> {
    let client = connect().await?;
    let mut orders = client.subscribe(SUBJECT).await?;

    let new = Order {
        id: 7,
        item: "lamp".into(),
        gift_note: "For Ada".into(),
    };
    let old = OldOrder {
        id: 8,
        item: "chair".into(),
    };
    let customer = Customer {
        id: 9,
        name: "Ada".into(),
    };
    publish(&client, ORDER, new.encode_to_vec()).await?;
    publish(&client, ORDER, old.encode_to_vec()).await?;
    // By mistake on the subject of the orders.
    publish(&client, CUSTOMER, customer.encode_to_vec()).await?;
    client.flush().await?;
    println!("published:  {ORDER}, {ORDER}, {CUSTOMER}");

    for writer in ["new writer:", "old writer:", "other type:"] {
        let message = timeout(Duration::from_secs(5), orders.next())
            .await
            .context("nothing came back within 5 s; may this user subscribe?")?
            .context("the server ended the subscription")?;
        read(writer, message.headers.as_ref(), message.payload)?;
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: publish
async fn publish(client: &Client, name: &'static str, bytes: Vec<u8>) -> Result<()> {
    let mut headers = HeaderMap::new();
    headers.insert(TYPE, name);
    client
        .publish_with_headers(SUBJECT, headers, bytes.into())
        .await?;
    Ok(())
}
// ANCHOR_END: publish

// ANCHOR: read
fn read(writer: &str, headers: Option<&HeaderMap>, bytes: Bytes) -> Result<()> {
    let size = bytes.len();
    let name = headers
        .and_then(|headers| headers.get(TYPE))
        .map_or("no type", |name| name.as_str());
    if name != ORDER {
        println!("{writer} {size} bytes of {name}, not read");
        // Without the look at the header: no error, and an order that never was.
        println!("unchecked:  {:?} from {name}", Order::decode(bytes)?);
        return Ok(());
    }
    println!("{writer} {size} bytes");
    let new = Order::decode(bytes.clone()).context("an order")?;
    println!("new reader: {new:?}");
    let old = OldOrder::decode(bytes).context("an order")?;
    println!("old reader: {old:?}");
    // prost keeps no unknown fields. A program that passes a message on should
    // pass on the bytes and not what it has read.
    let passed_on = old.encode_to_vec();
    if passed_on.len() < size {
        println!(
            "passed on:  {} bytes, without the gift note",
            passed_on.len()
        );
    }
    Ok(())
}
// ANCHOR_END: read

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
