//! Key-value: values that go by themselves, with a bucket's age or a key's own.
//!
//! Teaches: `max_age` is one age for the whole bucket, and nobody is told when
//! it is reached. `limit_markers` lets a key have its own time to live, and
//! leaves a marker that a watcher sees. A plain `put` over such a key takes its
//! time to live away.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_kv_ttl
//! ```
//!
//! Expected output:
//!
//! ```text
//! session:  anna, all sessions live 2 s
//! session:  anna is gone, and a watcher was told nothing
//! reserved: cart-17 for 3 s
//! refused:  cart-17 is reserved already
//! watcher:  cart-17 Put
//! watcher:  cart-17 Purge
//! free:     cart-17, after <seconds> s
//! ```
//!
//! Left out on purpose: making a reservation longer, which needs the time to
//! live again with each write; `nats_kv_lease` does it.

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Context,
        context::CreateKeyValueErrorKind,
        kv::{self, CreateErrorKind, Operation, Store, Watch},
    },
};
use futures_lite::{StreamExt as _, future::poll_once};
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SESSIONS: &str = "shop_sessions";
const RESERVATIONS: &str = "shop_reservations";

/// The age of every session.
const SESSION: Duration = Duration::from_secs(2);
/// The time to live of one reservation, in whole seconds.
const RESERVATION: Duration = Duration::from_secs(3);
/// How long the marker of an expired key stays. A time to live below it is
/// raised to it by the server, so it has to be short.
const MARKER: Duration = Duration::from_secs(1);
/// How long to wait for something to go before that counts as an error.
const PATIENCE: Duration = Duration::from_secs(8);

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

async fn story() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    let sessions = bucket(
        &jetstream,
        kv::Config {
            bucket: SESSIONS.to_owned(),
            max_age: SESSION,
            ..kv::Config::default()
        },
    )
    .await?;
    let reservations = bucket(
        &jetstream,
        kv::Config {
            bucket: RESERVATIONS.to_owned(),
            limit_markers: Some(MARKER),
            ..kv::Config::default()
        },
    )
    .await?;
    session(&sessions).await?;
    reservation(&reservations).await
}

// ANCHOR: bucket_age
async fn session(sessions: &Store) -> Result<()> {
    let mut changes = sessions.watch("anna").await?;
    sessions.put("anna", "logged in".into()).await?;
    println!("session:  anna, all sessions live {} s", SESSION.as_secs());
    next_operation(&mut changes).await?; // our own put

    let goes = async {
        while sessions.get("anna").await?.is_some() {
            sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    timeout(PATIENCE, goes)
        .await
        .context("the session of anna does not end; who renews it?")??;
    if let Some(told) = poll_once(changes.next()).await {
        bail!("the end of a session was announced: {told:?}");
    }
    println!("session:  anna is gone, and a watcher was told nothing");
    Ok(())
}
// ANCHOR_END: bucket_age

// ANCHOR: key_ttl
async fn reservation(reservations: &Store) -> Result<()> {
    // A run that was killed may have left a reservation, and a write without a
    // time to live one that stays. And the marker must go too: over a marker,
    // `create_with_ttl` of async-nats 0.51 writes without the time to live.
    reservations.purge_with_ttl("cart-17", MARKER).await?;
    let marker_is_gone = async {
        while reservations.entry("cart-17").await?.is_some() {
            sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    timeout(PATIENCE, marker_is_gone)
        .await
        .context("cart-17 does not become free")??;

    let mut changes = reservations.watch("cart-17").await?;
    let started = Instant::now();
    if !reserve(reservations).await? {
        bail!("cart-17 was reserved by somebody else just now");
    }
    println!("reserved: cart-17 for {} s", RESERVATION.as_secs());
    if reserve(reservations).await? {
        bail!("cart-17 was reserved twice");
    }
    println!("refused:  cart-17 is reserved already");

    loop {
        let operation = next_operation(&mut changes).await.context(
            "cart-17 does not expire; a plain put has taken its time to live",
        )?;
        println!("watcher:  cart-17 {operation:?}");
        // What a watcher gets for a key that has expired is a purge.
        if operation == Operation::Purge {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("free:     cart-17, after {seconds:.1} s");
    Ok(())
}

/// False if somebody has it.
async fn reserve(reservations: &Store) -> Result<bool> {
    match reservations
        .create_with_ttl("cart-17", "reserved".into(), RESERVATION)
        .await
    {
        Ok(_revision) => Ok(true),
        Err(error) if error.kind() == CreateErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).context("cannot reserve cart-17"),
    }
}
// ANCHOR_END: key_ttl

async fn next_operation(changes: &mut Watch) -> Result<Operation> {
    let entry = timeout(PATIENCE, changes.next())
        .await
        .with_context(|| format!("no change within {} s", PATIENCE.as_secs()))?
        .context("the server ended the watch")??;
    Ok(entry.operation)
}

async fn bucket(jetstream: &Context, config: kv::Config) -> Result<Store> {
    let name = config.bucket.clone();
    // Changes nothing if it is there with the same settings.
    jetstream
        .create_key_value(config)
        .await
        .map_err(|error| match error.kind() {
            CreateKeyValueErrorKind::BucketCreate => anyhow!(
                "cannot create the bucket {name} ({error}); if it was made with \
                 other settings, delete it first"
            ),
            CreateKeyValueErrorKind::LimitMarkersNotSupported => anyhow!(
                "this server is too old for a time to live of keys; it came with \
                 NATS 2.11"
            ),
            _ => anyhow!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
        })
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
