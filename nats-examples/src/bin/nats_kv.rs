//! Key-value: the last value of each key, and as much history as you ask for.
//!
//! Teaches: a bucket is a stream with a subject for each key. Every write gets a
//! revision; `delete` hides the value and keeps the history, `purge` removes
//! both. What the bucket does not keep, `HISTORY` decides.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_kv
//! ```
//!
//! Expected output:
//!
//! ```text
//! bucket:  shop_prices keeps 3 revisions of each key
//! put:     tea = 3.50 (revision 1)
//! put:     coffee = 7.20 (revision 2)
//! put:     coffee = 7.40 (revision 3)
//! put:     tea = 3.20 (revision 4)
//! put:     tea = 3.40 (revision 5)
//! get:     tea = 3.40
//! deleted: tea
//! get:     tea has no value
//! entry:   tea Delete (revision 6)
//! keys:    coffee
//! history: tea 3.20, 3.40, Delete
//! purged:  coffee
//! history: coffee Purge
//! refused: a key with a blank (key cannot be empty or start/end with `.`)
//! ```
//!
//! Left out on purpose: what happens when two write the same key; that is
//! `nats_kv_cas`.

use std::{env, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Context, ErrorCode,
        context::{CreateKeyValueErrorKind, DeleteStreamErrorKind},
        kv::{self, Entry, Operation, PutErrorKind, Store},
    },
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const BUCKET: &str = "shop_prices";
/// The stream in which NATS keeps a bucket has this prefix and the bucket's name.
const STREAM: &str = "KV_shop_prices";

/// How many revisions of each key are kept. The default is 1, the most is 64.
const HISTORY: i64 = 3;

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
    let jetstream = jetstream::new(connect().await?);
    // Revisions count all writes to a bucket: those of an earlier run would
    // make the ones below unreadable.
    delete_leftovers(&jetstream).await?;
    let prices = bucket(&jetstream).await?;
    println!("bucket:  {BUCKET} keeps {HISTORY} revisions of each key");

    put(&prices, "tea", "3.50").await?;
    put(&prices, "coffee", "7.20").await?;
    put(&prices, "coffee", "7.40").await?;
    put(&prices, "tea", "3.20").await?;
    put(&prices, "tea", "3.40").await?;
    get(&prices, "tea").await?;

    // A delete is a write too: a marker with a revision of its own.
    prices.delete("tea").await?;
    println!("deleted: tea");
    get(&prices, "tea").await?;
    let marker = prices.entry("tea").await?.context("the marker is gone")?;
    println!(
        "entry:   tea {:?} (revision {})",
        marker.operation, marker.revision
    );
    let mut keys: Vec<String> = prices.keys().await?.try_collect().await?;
    keys.sort();
    println!("keys:    {}", keys.join(", "));
    history(&prices, "tea").await?;

    prices.purge("coffee").await?;
    println!("purged:  coffee");
    history(&prices, "coffee").await?;

    match prices.put("green tea", "4.10".into()).await {
        Err(error) if error.kind() == PutErrorKind::InvalidKey => {
            println!("refused: a key with a blank ({error})");
            Ok(())
        }
        Err(error) => Err(error).context("cannot put green tea"),
        Ok(revision) => bail!("a key with a blank became revision {revision}"),
    }
}
// ANCHOR_END: story

// ANCHOR: bucket
async fn bucket(jetstream: &Context) -> Result<Store> {
    let config = kv::Config {
        bucket: BUCKET.to_owned(),
        history: HISTORY,
        ..kv::Config::default()
    };
    // Changes nothing if it is there with the same settings.
    jetstream
        .create_key_value(config)
        .await
        .map_err(|error| match error.kind() {
            CreateKeyValueErrorKind::BucketCreate => anyhow!(
                "cannot create the bucket {BUCKET} ({error}); if it was made with \
                 other settings, delete it first"
            ),
            _ => anyhow!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
        })
}
// ANCHOR_END: bucket

// ANCHOR: access
async fn put(prices: &Store, product: &str, price: &'static str) -> Result<()> {
    // Returns when the server has stored it.
    let revision = prices.put(product, price.into()).await?;
    println!("put:     {product} = {price} (revision {revision})");
    Ok(())
}

async fn get(prices: &Store, product: &str) -> Result<()> {
    // None for a key that never was, and for one that was deleted; which of the
    // two it is, `entry` tells.
    match prices.get(product).await? {
        Some(price) => {
            println!("get:     {product} = {}", String::from_utf8_lossy(&price));
        }
        None => println!("get:     {product} has no value"),
    }
    Ok(())
}

async fn history(prices: &Store, product: &str) -> Result<()> {
    let entries: Vec<Entry> = prices.history(product).await?.try_collect().await?;
    let shown: Vec<String> = entries
        .iter()
        .map(|entry| match entry.operation {
            Operation::Put => String::from_utf8_lossy(&entry.value).into_owned(),
            marker => format!("{marker:?}"),
        })
        .collect();
    println!("history: {product} {}", shown.join(", "));
    Ok(())
}
// ANCHOR_END: access

async fn delete_leftovers(jetstream: &Context) -> Result<()> {
    match jetstream.delete_stream(STREAM).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => bail!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
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
