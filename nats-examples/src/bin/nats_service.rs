//! Services: answers with errors, found by name, counted by NATS itself.
//!
//! Teaches: the service API on top of request and reply. Instances of one
//! service share its requests, an error is an answer with two headers, and
//! everybody can ask who is there (`PING`) and what they have done (`STATS`).
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_service               # the whole story
//! cargo run --bin nats_service instance      # terminal 1, and 2
//! cargo run --bin nats_service ask           # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready: 2 instances of shop-stock 1.0.0 on shop.stock.check
//! answer: sku-1 12 in stock
//! refused: sku-9 (404 unknown sku)
//! answer: sku-2 0 in stock
//! found: 2 instances of shop-stock
//! counted: 3 requests, 1 error, all instances together
//! stopped
//! ```
//!
//! Left out on purpose: several requests at the same time in one instance; this
//! one answers one after the other.

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
    Client, ConnectErrorKind, HeaderMap, RequestErrorKind, ServerAddr,
    service::{
        NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, PingResponse, Service,
        ServiceExt as _, Stats, endpoint::Endpoint, error,
    },
};
use bytes::Bytes;
use futures_lite::StreamExt as _;
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SERVICE: &str = "shop-stock";
/// Must be a semantic version, or the service does not start.
const VERSION: &str = "1.0.0";
/// The endpoint `check` in the group `shop.stock`.
const GROUP: &str = "shop.stock";
const ENDPOINT: &str = "check";
const SUBJECT: &str = "shop.stock.check";
const USAGE: &str = "usage: nats_service [instance | ask]";

/// Nobody can know how many instances will answer a question to all, so it ends
/// when none has answered for this long.
const GAP: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["instance"] => instance().await,
        ["ask"] => ask().await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story() -> Result<()> {
    let mut instances = Vec::new();
    for _ in 0..2 {
        // A connection for each, as if they were two programs.
        let client = connect().await?;
        let (service, requests) = start(&client).await?;
        let answering = tokio::spawn(answer_all(requests));
        instances.push((client, service, answering));
    }
    println!("ready: 2 instances of {SERVICE} {VERSION} on {SUBJECT}");
    ask().await?;
    for (client, service, answering) in instances {
        stop(&client, service).await?;
        answering.await??;
    }
    println!("stopped");
    Ok(())
}

// ---- An instance -----------------------------------------------------------

async fn instance() -> Result<()> {
    let client = connect().await?;
    let stop_signal = stop_signal()?;
    let (service, requests) = start(&client).await?;
    let answering = tokio::spawn(answer_all(requests));
    println!("ready: {SERVICE} {VERSION} on {SUBJECT}, Ctrl-C to stop");
    stop_signal.await;
    stop(&client, service).await?;
    answering.await??;
    println!("stopped");
    Ok(())
}

// ANCHOR: start
/// Announces an instance and returns it with the stream of its requests.
async fn start(client: &Client) -> Result<(Service, Endpoint)> {
    let service = client
        .service_builder()
        .description("How much of an article is in stock")
        .start(SERVICE, VERSION)
        .await
        .map_err(Error::from_boxed)?;
    // All instances subscribe with the same queue group, so each request goes to
    // one of them.
    let requests = service
        .group(GROUP)
        .endpoint(ENDPOINT)
        .await
        .map_err(Error::from_boxed)?;
    // The subscriptions are only queued in the client until now.
    client.flush().await?;
    Ok((service, requests))
}
// ANCHOR_END: start

// ANCHOR: answer
async fn answer_all(mut requests: Endpoint) -> Result<()> {
    while let Some(request) = requests.next().await {
        // A plain publish has no reply subject; to respond to it is an error, and
        // with `?` the end of this instance.
        if request.message.reply.is_none() {
            continue;
        }
        let sku = String::from_utf8_lossy(&request.message.payload);
        let answer = match sku.as_ref() {
            "sku-1" => Ok(Bytes::from("12 in stock")),
            "sku-2" => Ok(Bytes::from("0 in stock")),
            // Counted as an error in the statistics, and told to the asker.
            _ => Err(error::Error {
                code: 404,
                status: "unknown sku".to_owned(),
            }),
        };
        // `respond` also keeps the time that it took; a request that is dropped
        // without it is not counted, and its asker waits for nothing.
        request.respond(answer).await?;
    }
    Ok(())
}
// ANCHOR_END: answer

// ANCHOR: stop
/// Takes no more requests, answers those that have come, closes the connection.
/// One that is on its way meanwhile gets no answer, so its asker asks again.
async fn stop(client: &Client, service: Service) -> Result<()> {
    service.stop().await.map_err(Error::from_boxed)?;
    // Ends the stream of requests after the last one that had come.
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: stop

// ---- The asker -------------------------------------------------------------

// ANCHOR: ask
async fn ask() -> Result<()> {
    let client = connect().await?;
    for sku in ["sku-1", "sku-9", "sku-2"] {
        let answer = match client.request(SUBJECT, sku.into()).await {
            Ok(answer) => answer,
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                bail!("no instance of {SERVICE}; start one: nats_service instance")
            }
            Err(error) => return Err(error).context("cannot ask"),
        };
        // An error of the service arrives as `Ok`: NATS has delivered an answer.
        match refusal(answer.headers.as_ref()) {
            Some(reason) => println!("refused: {sku} ({reason})"),
            None => println!(
                "answer: {sku} {}",
                String::from_utf8_lossy(&answer.payload)
            ),
        }
    }

    let found: Vec<PingResponse> = ask_all(&client, "PING").await?;
    println!("found: {} instances of {SERVICE}", found.len());
    let counted: Vec<Stats> = ask_all(&client, "STATS").await?;
    let endpoints = || counted.iter().flat_map(|instance| &instance.endpoints);
    println!(
        "counted: {} requests, {} error, all instances together",
        endpoints().map(|endpoint| endpoint.requests).sum::<usize>(),
        endpoints().map(|endpoint| endpoint.errors).sum::<usize>(),
    );
    client.drain().await?;
    Ok(())
}

/// Code and text of an error answer.
fn refusal(headers: Option<&HeaderMap>) -> Option<String> {
    let headers = headers?;
    let code = headers.get(NATS_SERVICE_ERROR_CODE)?;
    let status = headers.get(NATS_SERVICE_ERROR)?;
    Some(format!("{code} {status}"))
}
// ANCHOR_END: ask

// ANCHOR: discover
/// Asks every instance, as `nats micro` does: `PING`, `INFO` or `STATS`.
async fn ask_all<T: DeserializeOwned>(
    client: &Client,
    verb: &str,
) -> Result<Vec<T>> {
    // Not `request`, which takes the first answer and drops the others.
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply(format!("$SRV.{verb}.{SERVICE}"), inbox, "".into())
        .await?;
    let mut all = Vec::new();
    while let Ok(Some(answer)) = timeout(GAP, answers.next()).await {
        all.push(serde_json::from_slice(&answer.payload)?);
    }
    answers.unsubscribe().await?;
    Ok(all)
}
// ANCHOR_END: discover

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
