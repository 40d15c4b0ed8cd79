//! Priority groups: one worker has all the work, another stands by.
//!
//! Teaches: a pinned client. All writers pull from one consumer, the server gives
//! everything to one of them, and to another only when the first has stopped
//! pulling for `PIN_LASTS`. So one works at a time, without a lock; only what the
//! first had in hand when it died comes later than its turn.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_priority_groups              # the whole story
//! cargo run --bin nats_jetstream_priority_groups writer       # terminal 1, and 2
//! ```
//!
//! Expected output:
//!
//! ```text
//! writer 1 wrote: entry 1
//! writer 1 wrote: entry 2
//! writer 1 wrote: entry 3
//! writer 2 stands by
//! writer 1 is gone
//! writer 2 wrote: entry 4
//! writer 2 wrote: entry 5
//! ```
//!
//! Left out on purpose: the policies `overflow`, where the second helps out when
//! the first has too much, and `prioritized`.

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

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode, Message,
        consumer::{AckPolicy, PriorityPolicy, pull},
        context::DeleteStreamErrorKind,
        stream,
    },
};
use futures_lite::{StreamExt as _, future::poll_once};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "LEDGER";
const SUBJECT: &str = "ledger.entries";
const CONSUMER: &str = "ledger-writer";
const GROUP: &str = "ledger";
const USAGE: &str = "usage: nats_jetstream_priority_groups [writer]";

/// How long the pin stays with a writer that pulls no more. The server's default
/// is 2 minutes.
const PIN_LASTS: Duration = Duration::from_secs(3);

/// How long one pull request is good for. Well below [`PIN_LASTS`], or the pin is
/// lost between two requests of a writer that is well.
const PULL: Duration = Duration::from_secs(1);

/// How long the next entry may let wait for itself.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["writer"] => writer().await,
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
    // The pin of an earlier run may still hold.
    forget(&jetstream, STREAM).await?;

    // A connection for each, as if they were two programs.
    let first = connect().await?;
    let mut entries = pull(&jetstream::new(first.clone())).await?;
    add(&jetstream, 1..=3).await?;
    for _ in 0..3 {
        println!(
            "writer 1 wrote: {}",
            write(next(&mut entries).await?).await?
        );
    }
    let mut standby = pull(&jetstream).await?;
    if let Some(entry) = poll_once(standby.next()).await {
        bail!("writer 2 got {entry:?}, although writer 1 is there");
    }
    println!("writer 2 stands by");

    drop(entries);
    first.drain().await?;
    // Before the server knows it, an entry could still go to writer 1, and would
    // come again after `ack_wait`, behind the next one.
    let stream = jetstream.get_stream(STREAM).await?;
    let asked = Instant::now();
    while stream.consumer_info(CONSUMER).await?.num_waiting > 1 {
        ensure!(asked.elapsed() < PATIENCE, "writer 1 is still waiting");
        sleep(Duration::from_millis(20)).await;
    }
    println!("writer 1 is gone");
    add(&jetstream, 4..=5).await?;
    for _ in 0..2 {
        println!(
            "writer 2 wrote: {}",
            write(next(&mut standby).await?).await?
        );
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: writer
async fn writer() -> Result<()> {
    let client = connect().await?;
    let mut entries = pull(&jetstream::new(client.clone())).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("waiting for entries in {SUBJECT}, Ctrl-C to stop");
    loop {
        let entry = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            entry = entries.next() => entry,
        };
        let entry = entry.context("NATS ended the deliveries")??;
        println!("wrote: {}", write(entry).await?);
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: writer

// ANCHOR: pull
/// Starts to pull as a member of the group. On standby it gets nothing, and the
/// server remembers that it has asked.
async fn pull(jetstream: &jetstream::Context) -> Result<pull::Stream> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            // What a writer held when it died comes again after this.
            ack_wait: PIN_LASTS,
            priority_policy: PriorityPolicy::PinnedClient,
            priority_groups: vec![GROUP.to_owned()],
            priority_timeout: PIN_LASTS,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer; is the server 2.12 or newer?")?;
    // Not `fetch` and not `batch`: they refuse a pinned consumer, because a pin
    // that they took would never be renewed.
    let entries = consumer.stream().group(GROUP).expires(PULL).messages();
    Ok(entries.await?)
}
// ANCHOR_END: pull

async fn add(
    jetstream: &jetstream::Context,
    numbers: impl Iterator<Item = u32>,
) -> Result<()> {
    for number in numbers {
        let entry = format!("entry {number}");
        jetstream.publish(SUBJECT, entry.into()).await?.await?;
    }
    Ok(())
}

async fn next(entries: &mut pull::Stream) -> Result<Message> {
    let entry = timeout(PATIENCE, entries.next())
        .await
        .context("no entry came within 20 s; has another writer the pin?")?;
    Ok(entry.context("NATS ended the deliveries")??)
}

/// Writes an entry into the ledger: here, no more than its name.
async fn write(entry: Message) -> Result<String> {
    let name = String::from_utf8_lossy(&entry.payload).into_owned();
    entry.double_ack().await.map_err(Error::from_boxed)?;
    Ok(name)
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
