//! Acknowledgements: an ack that is confirmed, and a payment captured once.
//!
//! Teaches: `ack` ends when the answer is in the client's queue; `double_ack`
//! ends when the server confirms it, or with an error that the worker sees. A
//! delivery can come twice with either, so the worker knows payments by their id.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_double_ack
//! cargo run --bin nats_jetstream_double_ack -- worker
//! cargo run --bin nats_jetstream_double_ack -- worker --plain
//! cargo run --bin nats_jetstream_double_ack -- publisher
//! ```
//!
//! Expected output:
//!
//! ```text
//! pay-1: captured
//! pay-1: ack confirmed
//! pay-2: captured
//! pay-2: ack confirmed
//! pay-1: captured before, not again
//! pay-1: ack confirmed
//! stopped: 2 captured
//! ```
//!
//! Left out on purpose: a table that outlives the worker. Here it is in memory;
//! a product writes the id in the same transaction as the capture.

use std::{
    collections::HashSet,
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode, Message,
        consumer::{
            PullConsumer,
            pull::{self, MessagesErrorKind},
        },
        context::DeleteStreamErrorKind,
        stream,
    },
};
use futures_lite::StreamExt as _;
use tokio::sync::Notify;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PAYMENT_CAPTURES";
const SUBJECT: &str = "payment.captures";
const CONSUMER: &str = "capturer";

/// The customer of the first pressed the button again.
const PAYMENTS: [&str; 3] = ["pay-1", "pay-2", "pay-1"];

/// How long the server waits for an answer before it delivers again.
const ACK_WAIT: Duration = Duration::from_secs(3);

/// How long a worker waits for the server to confirm its answer.
const CONFIRM: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publisher"] => publisher().await,
        ["worker"] => worker(true).await,
        ["worker", "--plain"] => worker(false).await,
        _ => {
            eprintln!(
                "usage: nats_jetstream_double_ack [publisher | worker [--plain]]"
            );
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
    let (client, jetstream) = connect_jetstream().await?;
    // The story counts captures, so what an earlier run left has to go.
    if let Err(error) = jetstream.delete_stream(STREAM).await {
        match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
            _ => {
                return Err(error).context(format!(
                    "cannot delete the stream {STREAM}; is JetStream on \
                     (nats-server -js)?"
                ));
            }
        }
    }
    let mut messages = declare(&jetstream).await?.messages().await?;
    let mut captured = HashSet::new();
    for payment in PAYMENTS {
        jetstream.publish(SUBJECT, payment.into()).await?.await?;
        let message = tokio::time::timeout(Duration::from_secs(10), messages.next())
            .await
            .context("no message within 10 s; is another worker running?")?
            .context("the server ended the consumer")??;
        capture(&client, &message, &mut captured, true).await?;
    }
    println!("stopped: {} captured", captured.len());
    client.drain().await?;
    Ok(())
}

async fn publisher() -> Result<()> {
    let (client, jetstream) = connect_jetstream().await?;
    declare(&jetstream).await?;
    jetstream
        .publish(SUBJECT, PAYMENTS[0].into())
        .await?
        .await?;
    println!("stored: {}", PAYMENTS[0]);
    client.drain().await?;
    Ok(())
}

// ANCHOR: worker
async fn worker(confirmed: bool) -> Result<()> {
    let (client, jetstream) = connect_jetstream().await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut messages = declare(&jetstream).await?.messages().await?;
    let mut captured = HashSet::new();
    println!("waiting for payments on {SUBJECT}, Ctrl-C to stop");
    loop {
        let message = tokio::select! {
            biased;
            () = &mut stop => break,
            message = messages.next() => message,
        };
        match message.context("the server ended the consumer")? {
            Ok(message) => {
                capture(&client, &message, &mut captured, confirmed).await?;
            }
            Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                // The client reconnects, and pulls again, by itself.
                eprintln!("nothing heard from the server; waiting for it");
            }
            Err(error) => {
                return Err(error).context("the consumer cannot be read further");
            }
        }
    }
    println!("stopped: {} captured", captured.len());
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: capture
async fn capture(
    client: &Client,
    message: &Message,
    captured: &mut HashSet<String>,
    confirmed: bool,
) -> Result<()> {
    let payment = String::from_utf8_lossy(&message.payload).into_owned();
    // The id comes first: what is in the table is only acknowledged again.
    if captured.insert(payment.clone()) {
        println!("{payment}: captured");
    } else {
        println!("{payment}: captured before, not again");
    }
    if !confirmed {
        message.ack().await.map_err(Error::from_boxed)?;
        // Even this ends when the bytes are with the operating system.
        client.flush().await?;
        println!("{payment}: ack sent");
        return Ok(());
    }
    match message.double_ack().await {
        Ok(()) => println!("{payment}: ack confirmed"),
        // Received or not, nobody knows: the server may deliver it again, and
        // then the table has it.
        Err(error) => println!("{payment}: ack not confirmed, {error}"),
    }
    Ok(())
}
// ANCHOR_END: capture

async fn declare(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    let stream = jetstream
        .get_or_create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..Default::default()
        })
        .await
        .with_context(|| {
            format!("no stream {STREAM}; is JetStream on (nats-server -js)?")
        })?;
    let config = pull::Config {
        durable_name: Some(CONSUMER.into()),
        ack_wait: ACK_WAIT,
        ..Default::default()
    };
    Ok(stream.create_consumer(config).await?)
}

async fn connect_jetstream() -> Result<(Client, jetstream::Context)> {
    let client = connect().await?;
    let mut jetstream = jetstream::new(client.clone());
    // Also the limit of a `double_ack`.
    jetstream.set_timeout(CONFIRM);
    Ok((client, jetstream))
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
