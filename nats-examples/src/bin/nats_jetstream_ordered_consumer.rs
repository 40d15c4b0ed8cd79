//! Ordered consumer: read a stream from its beginning, in order, without a gap.
//!
//! Teaches: a reader that acknowledges nothing and stores nothing on the server.
//! The client counts; when a message is missing or the server was away, it makes
//! a new consumer that goes on behind the last message that was handed out.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_ordered_consumer           # the whole story
//! cargo run --bin nats_jetstream_ordered_consumer reader    # goes on reading
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored: 5 movements
//! stock after sequence 1: 10
//! stock after sequence 2: 7
//! stock after sequence 3: 5
//! stock after sequence 4: 9
//! stock after sequence 5: 8
//! rebuilt: 8 pieces, from 5 movements in order
//! ```
//!
//! Left out on purpose: where to go on after a restart of this program. It
//! reads from the beginning; with a stored sequence it could begin behind it.

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

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode, Message,
        consumer::{DeliverPolicy, pull},
        context::DeleteStreamErrorKind,
        stream::{self, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "STOCK_MOVEMENTS";
const SUBJECT: &str = "stock.movements";
const USAGE: &str = "usage: nats_jetstream_ordered_consumer [reader]";

/// How long the next message may let wait for itself in the story.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["reader"] => reader().await,
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

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The sequences below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    let stream = declare(&jetstream).await?;
    let movements = ["10", "-3", "-2", "4", "-1"];
    for movement in movements {
        jetstream.publish(SUBJECT, movement.into()).await?.await?;
    }
    println!("stored: {} movements", movements.len());

    let mut messages = read(&stream).await?;
    let mut stock = Stock::default();
    for _movement in movements {
        let message = timeout(PATIENCE, messages.next())
            .await
            .context("no movement came within 10 s")?
            .context("NATS ended the deliveries")??;
        stock.apply(&message)?;
    }
    println!(
        "rebuilt: {} pieces, from {} movements in order",
        stock.pieces, stock.sequence
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: read
/// All that the stream holds, from the first message on, and then each new one.
async fn read(stream: &Stream) -> Result<pull::Ordered> {
    let consumer = stream
        .create_consumer(pull::OrderedConfig {
            deliver_policy: DeliverPolicy::All,
            ..pull::OrderedConfig::default()
        })
        .await
        .context("cannot make the consumer")?;
    Ok(consumer.messages().await?)
}
// ANCHOR_END: read

// ANCHOR: apply
/// A read model: what is in stock, and up to which message it is true.
#[derive(Default)]
struct Stock {
    pieces: i64,
    sequence: u64,
}

impl Stock {
    fn apply(&mut self, message: &Message) -> Result<()> {
        let sequence = message.info().map_err(Error::from_boxed)?.stream_sequence;
        // What the ordered consumer promises. A model that skips a movement is
        // wrong for good, so it is worth a line.
        ensure!(
            sequence == self.sequence + 1,
            "sequence {sequence} came after {}",
            self.sequence
        );
        let movement = String::from_utf8_lossy(&message.payload);
        let movement: i64 = movement
            .parse()
            .with_context(|| format!("{movement:?} is no movement"))?;
        self.pieces += movement;
        self.sequence = sequence;
        println!("stock after sequence {sequence}: {}", self.pieces);
        Ok(())
    }
}
// ANCHOR_END: apply

// ANCHOR: reader
async fn reader() -> Result<()> {
    let client = connect().await?;
    let stream = declare(&jetstream::new(client.clone())).await?;
    let mut messages = read(&stream).await?;
    let mut stock = Stock::default();
    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("reading {SUBJECT}, Ctrl-C to stop");
    loop {
        let message = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            message = messages.next() => message,
        };
        match message.context("NATS ended the deliveries")? {
            Ok(message) => stock.apply(&message)?,
            // While the server is away: the next call tries again.
            Err(error) => eprintln!("interrupted: {error}"),
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: reader

async fn declare(jetstream: &jetstream::Context) -> Result<Stream> {
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")
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

/// Deletes a stream, if there is one.
async fn forget(jetstream: &jetstream::Context, stream: &str) -> Result<()> {
    match jetstream.delete_stream(stream).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => Err(anyhow!(
                "cannot delete {stream} ({error}); is JetStream on?"
            )),
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
