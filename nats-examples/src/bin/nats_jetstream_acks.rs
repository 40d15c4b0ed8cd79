//! Acknowledgements: five answers of a worker, and what the server makes of them.
//!
//! Teaches: "done" (ack), "later" (nak with a delay), "still at it" (progress)
//! and "never" (term) are different answers. No answer at all is one too: the
//! server waits as `backoff` says and delivers again, `max_deliver` times.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_acks
//! cargo run --bin nats_jetstream_acks -- --no-progress
//! ```
//!
//! Expected output:
//!
//! ```text
//! parcel-1: delivery 1
//! parcel-1: booked, ack
//! parcel-2: delivery 1
//! parcel-2: carrier is busy, nak, again in 1000 ms
//! parcel-2: delivery 2, <ms> ms after the one before
//! parcel-2: booked, ack
//! parcel-3: delivery 1
//! parcel-3: slow carrier, told the server 4 times that we are at it
//! parcel-3: booked, ack
//! parcel-4: delivery 1
//! parcel-4: no such street, term
//! parcel-5: delivery 1
//! parcel-5: no answer to the server
//! parcel-5: delivery 2, <ms> ms after the one before
//! parcel-5: no answer to the server
//! parcel-5: delivery 3, <ms> ms after the one before
//! parcel-5: no answer to the server
//! finished: nothing more within 3000 ms
//! ```
//!
//! Left out on purpose: where a message goes that nobody could process (dead
//! letters), and whether the server has received an answer.

use std::{
    collections::HashMap,
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, AckKind, ErrorCode, Message,
        consumer::{PullConsumer, pull},
        context::DeleteStreamErrorKind,
        stream,
    },
};
use futures_lite::StreamExt as _;
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "CARRIER_BOOKINGS";
const SUBJECT: &str = "carrier.bookings";
const CONSUMER: &str = "booker";
const BOOKINGS: [&str; 5] =
    ["parcel-1", "parcel-2", "parcel-3", "parcel-4", "parcel-5"];

/// How long the server waits for an answer to the first delivery, the second,
/// and all later ones. It replaces `ack_wait`, and is for silence only: a nak
/// brings its own delay, and one without a delay comes back at once, in a loop.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];

/// At least as many as `BACKOFF` has waits, or the server refuses the consumer.
const MAX_DELIVER: i64 = 3;

const NAK_DELAY: Duration = Duration::from_secs(1);

/// A slow booking takes `STEPS` of these, longer than the first of `BACKOFF`.
const STEP: Duration = Duration::from_millis(400);
const STEPS: u32 = 4;

/// Longer than the last of `BACKOFF`: what does not come in it does not come.
const QUIET: Duration = Duration::from_secs(3);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let progress = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => true,
        ["--no-progress"] => false,
        _ => {
            eprintln!("usage: nats_jetstream_acks [--no-progress]");
            return ExitCode::from(2);
        }
    };
    match book_all(progress).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn book_all(progress: bool) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let consumer = declare(&jetstream).await?;
    let mut messages = consumer.messages().await?;
    let mut seen = HashMap::new();

    // One after the other: the server's clock runs from the delivery, also for
    // a message that waits in the client behind a slow one.
    for booking in BOOKINGS {
        jetstream.publish(SUBJECT, booking.into()).await?.await?;
        loop {
            let message = timeout(Duration::from_secs(10), messages.next())
                .await
                .context("no message within 10 s; is another program booking?")?
                .context("the server ended the consumer")??;
            let settled = book(&message, &mut seen, progress).await?;
            if settled && message.payload == booking {
                break;
            }
        }
    }
    match timeout(QUIET, messages.next()).await {
        Err(_elapsed) => {
            println!("finished: nothing more within {} ms", QUIET.as_millis())
        }
        Ok(_more) => println!("finished: but there is still more"),
    }
    // An ack is only a publish; this sends what is queued.
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: book
/// Answers one delivery. True when no other delivery should follow.
async fn book(
    message: &Message,
    seen: &mut HashMap<String, Instant>,
    progress: bool,
) -> Result<bool> {
    let name = String::from_utf8_lossy(&message.payload).into_owned();
    let delivery = message.info().map_err(Error::from_boxed)?.delivered;
    match seen.insert(name.clone(), Instant::now()) {
        None => println!("{name}: delivery {delivery}"),
        Some(before) => println!(
            "{name}: delivery {delivery}, {} ms after the one before",
            before.elapsed().as_millis()
        ),
    }
    match &*name {
        "parcel-2" if delivery == 1 => {
            let later = AckKind::Nak(Some(NAK_DELAY));
            message.ack_with(later).await.map_err(Error::from_boxed)?;
            let delay = NAK_DELAY.as_millis();
            println!("{name}: carrier is busy, nak, again in {delay} ms");
            return Ok(false);
        }
        "parcel-3" => {
            for _step in 0..STEPS {
                sleep(STEP).await;
                if progress {
                    // Starts the server's wait anew, so it has to come well
                    // before the wait is over.
                    let at_it = message.ack_with(AckKind::Progress).await;
                    at_it.map_err(Error::from_boxed)?;
                }
            }
            let told = if progress { STEPS } else { 0 };
            println!(
                "{name}: slow carrier, told the server {told} times that we are at it"
            );
        }
        "parcel-4" => {
            // Another try would find the same: do not deliver it again.
            let never = message.ack_with(AckKind::Term).await;
            never.map_err(Error::from_boxed)?;
            println!("{name}: no such street, term");
            return Ok(true);
        }
        "parcel-5" => {
            println!("{name}: no answer to the server");
            return Ok(delivery == MAX_DELIVER);
        }
        _ => {}
    }
    message.ack().await.map_err(Error::from_boxed)?;
    println!("{name}: booked, ack");
    Ok(true)
}
// ANCHOR_END: book

// ANCHOR: declare
async fn declare(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    // The story counts deliveries, so what an earlier run left has to go.
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
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..Default::default()
        })
        .await
        .with_context(|| format!("cannot create the stream {STREAM}"))?;
    let config = pull::Config {
        durable_name: Some(CONSUMER.into()),
        backoff: BACKOFF.to_vec(),
        max_deliver: MAX_DELIVER,
        ..Default::default()
    };
    Ok(stream.create_consumer(config).await?)
}
// ANCHOR_END: declare

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
