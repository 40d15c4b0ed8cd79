//! Publish and subscribe: each service hears of each order, also after it was down.
//!
//! Teaches: core NATS gives a message to those who listen at this moment, and to
//! nobody else. A stream keeps the events, and each service has a durable consumer
//! on it: a place in the stream that stays when the service goes. One that comes for
//! the first time can begin with the first event that is kept.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin pubsub_nats                      # the whole story
//! cargo run --bin pubsub_nats subscribe billing    # terminal 1
//! cargo run --bin pubsub_nats subscribe stock      # terminal 2, mail is the third
//! cargo run --bin pubsub_nats publish 1 9          # terminal 3
//! cargo run --bin pubsub_nats subscribe mail --core   # only what comes meanwhile
//! ```
//!
//! Expected output:
//!
//! ```text
//! billing:   order-1, order-2, order-3
//! stock:     order-1, order-2, order-3
//! mail:      order-1, order-2, order-3, which came while it was down
//! analytics: order-1, order-2, order-3, older than its consumer
//! core:      nothing, it was not there
//! ```
//!
//! Left out on purpose: limits of the stream, without which it keeps all there ever
//! was, see nats_jetstream_limits; and several workers for one service.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, RequestErrorKind, ServerAddr,
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::pubsub::{Heard, SERVICES, event, heard};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ORDERS_EVENTS";
const SUBJECT: &str = "orders.events";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(2);
const USAGE: &str = "usage: pubsub_nats [publish FIRST LAST | subscribe billing | \
                     subscribe stock | subscribe mail] [--core]";

/// How long an event may take to come.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long nothing has to come until it counts as nothing.
const SILENCE: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => publish_all(first, last).await,
            _ => return usage(),
        },
        ["subscribe", service] if SERVICES.contains(&service) => {
            subscribe(service).await
        }
        ["subscribe", service, "--core"] if SERVICES.contains(&service) => {
            subscribe_core(service).await
        }
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    for number in first..=last {
        publish(&jetstream, number).await?;
        println!("published: order-{number}");
    }
    client.drain().await?;
    Ok(())
}

// ANCHOR: publish
/// Returns when the stream has stored the event. Whoever listens to the subject without
/// a stream has it as well.
async fn publish(jetstream: &jetstream::Context, number: u64) -> Result<()> {
    let payload = serde_json::to_vec(&event(number))?;
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    jetstream
        .publish(SUBJECT, payload.into())
        .await?
        .await
        .with_context(|| format!("NATS did not store order-{number}"))?;
    Ok(())
}
// ANCHOR_END: publish

// ---- Subscriber ------------------------------------------------------------

// ANCHOR: subscribe
async fn subscribe(service: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut events = take_events(&jetstream, service).await?;
    println!("ready:     {service} listens to {SUBJECT}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = events.next() => delivery,
        };
        let delivery = delivery
            .context("NATS ended the deliveries")?
            .context("cannot take events; is the stream or its consumer deleted?")?;
        show(&delivery.payload);
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// The service's own place in the stream, which stays when the service goes.
async fn take_events(
    jetstream: &jetstream::Context,
    service: &str,
) -> Result<pull::Stream> {
    let stream = declare(jetstream).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(service.to_owned()),
            // By default it begins with the first event that the stream has.
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .with_context(|| format!("cannot make the consumer of {service}"))?;
    let events = consumer.stream().max_messages_per_batch(20).messages();
    Ok(events.await?)
}
// ANCHOR_END: subscribe

// ANCHOR: core
/// Without the stream: what comes while nobody listens is gone.
async fn subscribe_core(service: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let mut events = client.subscribe(SUBJECT).await?;
    known(&client).await?;
    println!("ready:     {service} listens to {SUBJECT}, Ctrl-C to stop");
    loop {
        tokio::select! {
            biased;
            () = &mut stop_signal => break,
            event = events.next() => {
                show(&event.context("NATS ended the subscription")?.payload);
            }
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: core

/// Returns when the server knows of what this connection has subscribed to: it reads a
/// connection in order, and answers this at once. A flush only writes.
async fn known(client: &Client) -> Result<()> {
    match client.request("nobody.listens.here", "".into()).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(()),
        other => bail!("NATS does not say that nobody listens: {other:?}"),
    }
}

/// What a service does with an event: here, to say that it has heard it.
fn show(payload: &[u8]) {
    match heard(payload) {
        Heard::Order(order) => println!("heard:     {order}"),
        Heard::Noise => eprintln!("not an event: {} bytes", payload.len()),
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // What an earlier run has left is no part of the story. An error says that there is
    // no stream.
    let _deleted = jetstream.delete_stream(STREAM).await;
    for service in SERVICES {
        // Each was here before; now it is down, and its place in the stream is there.
        drop(take_events(&jetstream, service).await?);
    }
    for number in 1..=3 {
        publish(&jetstream, number).await?;
    }
    for service in ["billing", "stock", "mail", "analytics"] {
        let note = match service {
            "mail" => ", which came while it was down",
            "analytics" => ", older than its consumer",
            _ => "",
        };
        let mut events = take_events(&jetstream, service).await?;
        let mut orders = Vec::new();
        for _event in 0..3 {
            let delivery = timeout(PATIENCE, events.next()).await;
            let delivery = delivery.context("no event came within 8 s")?;
            let delivery = delivery.context("NATS ended the deliveries")??;
            orders.push(order(&delivery.payload)?);
            delivery.ack().await.map_err(Error::from_boxed)?;
        }
        println!("{:10} {}{note}", format!("{service}:"), orders.join(", "));
    }
    let mut core = client.subscribe(SUBJECT).await?;
    match timeout(SILENCE, core.next()).await {
        Err(_silence) => println!("core:      nothing, it was not there"),
        Ok(_event) => bail!("core NATS has kept an event"),
    }
    client.drain().await?;
    Ok(())
}

fn order(payload: &[u8]) -> Result<String> {
    match heard(payload) {
        Heard::Order(order) => Ok(order),
        Heard::Noise => bail!("not an event"),
    }
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

/// Declares a stream that outlives a restart of the broker, and keeps its messages for
/// all who want to read them.
async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {STREAM} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
}

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
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
