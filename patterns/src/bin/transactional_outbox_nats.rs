//! Transactional outbox: an order and the event about it, both or none.
//!
//! Teaches: whoever writes to a database and then publishes loses the event when he
//! dies in between, and no order of the two is right. So the event is written into a
//! table of the same database, in the transaction of the order, and a relay
//! publishes from there. It crosses an event off when NATS has stored it, so a relay
//! that dies publishes one again, with the same id, and within two minutes NATS
//! drops it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin transactional_outbox_nats                     # the whole story
//! cargo run --bin transactional_outbox_nats relay shop.db       # terminal 1
//! cargo run --bin transactional_outbox_nats place 1 100 shop.db # terminal 2
//! cargo run --bin transactional_outbox_nats dual-write 1 100 shop.db
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:    order-1, order-2, order-3, each with its event
//! published: order-1.placed
//! published: order-2.placed, and the relay dies before it crosses it off
//! published: order-2.placed, which NATS had already
//! published: order-3.placed
//! stream:    order-1.placed, order-2.placed, order-3.placed
//! ```
//!
//! Left out on purpose: a second relay, for the case that the first machine fails.
//! Two at a time keep no order; let a lease decide, as in nats_kv_lease.

use std::{
    env,
    future::Future,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr, header,
    jetstream::{self, message::PublishMessage, stream},
};
use futures_lite::future::poll_once;
use patterns::transactional_outbox::{Event, Shop, order};
use tokio::{sync::Notify, task::block_in_place, time::sleep};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ORDERS_PLACED";
const SUBJECT: &str = "orders.placed";
/// The story has a stream of its own, which it deletes: NATS remembers the ids of the
/// last two minutes, also those of an earlier run.
const STORY_STREAM: &str = "ORDERS_STORY";
const STORY_SUBJECT: &str = "orders.story";
/// How many events the relay takes from the database at a time.
const BATCH: usize = 100;
/// How often it looks when there was nothing to do: so late an event may be.
const POLL: Duration = Duration::from_millis(50);
const USAGE: &str = "usage: transactional_outbox_nats [place FIRST LAST FILE | \
                     relay FILE | dual-write FIRST LAST FILE]";

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["relay", file] => relay(file).await,
        [way @ ("place" | "dual-write"), first, last, file] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if way == "place" => place(first, last, file),
                (Ok(first), Ok(last)) => dual_write(first, last, file).await,
                _ => return usage(),
            }
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

// ---- The shop --------------------------------------------------------------

// ANCHOR: place
/// Places orders. No broker is needed for it, and none can be in the way.
fn place(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    for number in first..=last {
        let order = order(number);
        shop.place(&order)
            .with_context(|| format!("{} is not placed", order.order))?;
        println!("placed:    {}", order.order);
    }
    Ok(())
}
// ANCHOR_END: place

fn open(file: &str) -> Result<Shop> {
    Shop::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ANCHOR: dual_write
/// The mistake: two writes, and a program can die between them.
async fn dual_write(first: u64, last: u64, file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, STREAM, SUBJECT).await?;
    for number in first..=last {
        let order = order(number);
        block_in_place(|| shop.place_without_event(&order))?;
        // From here on the order is there. Who will publish its event?
        publish(&jetstream, SUBJECT, &Event::about(&order)).await?;
        println!("placed:    {}", order.order);
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: dual_write

// ---- The relay -------------------------------------------------------------

// ANCHOR: relay
async fn relay(file: &str) -> Result<()> {
    let mut shop = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, STREAM, SUBJECT).await?;
    println!("ready:     events from {file} to {SUBJECT}, Ctrl-C to stop");
    'relay: loop {
        // A database blocks its thread.
        let events = block_in_place(|| shop.waiting(BATCH))?;
        if events.is_empty() {
            tokio::select! {
                () = &mut stop_signal => break,
                () = sleep(POLL) => continue,
            }
        }
        // One after the other: the order of the events is that of the transactions.
        for event in events {
            if poll_once(&mut stop_signal).await.is_some() {
                break 'relay;
            }
            let had_it = publish(&jetstream, SUBJECT, &event).await?;
            println!("published: {}{}", event.id, note(had_it));
            // If the program ends before this line, the event is published again.
            block_in_place(|| shop.cross_off(&event))?;
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: relay

// ANCHOR: publish
/// Returns when NATS has stored the event, with whether it had it already.
async fn publish(
    jetstream: &jetstream::Context,
    subject: &'static str,
    event: &Event,
) -> Result<bool> {
    let message = PublishMessage::build()
        .payload(event.payload.clone().into())
        .message_id(&event.id);
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    let stored = jetstream
        .send_publish(subject, message)
        .await?
        .await
        .with_context(|| format!("NATS did not store {}", event.id))?;
    Ok(stored.duplicate)
}
// ANCHOR_END: publish

fn note(had_it: bool) -> &'static str {
    if had_it {
        ", which NATS had already"
    } else {
        ""
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STORY_STREAM).await;
    let mut stream = declare(&jetstream, STORY_STREAM, STORY_SUBJECT).await?;

    let mut shop = open(":memory:")?;
    for number in 1..=3 {
        shop.place(&order(number))?;
    }
    println!("placed:    order-1, order-2, order-3, each with its event");

    for event in shop.waiting(2)? {
        publish(&jetstream, STORY_SUBJECT, &event).await?;
        if event.position == 1 {
            shop.cross_off(&event)?;
            println!("published: {}", event.id);
        } else {
            let id = &event.id;
            println!("published: {id}, and the relay dies before it crosses it off");
        }
    }
    // The next relay knows no more than what stands in the database.
    for event in shop.waiting(BATCH)? {
        let had_it = publish(&jetstream, STORY_SUBJECT, &event).await?;
        println!("published: {}{}", event.id, note(had_it));
        shop.cross_off(&event)?;
    }

    let mut ids = Vec::new();
    for sequence in 1..=stream.info().await?.state.last_sequence {
        let message = stream.get_raw_message(sequence).await?;
        let id = message.headers.get(header::NATS_MESSAGE_ID);
        ids.push(id.context("an event without an id")?.to_string());
    }
    println!("stream:    {}", ids.join(", "));
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

// ANCHOR: declare
/// Declares a stream that outlives a restart of the broker, and keeps its messages for
/// all who want to read them.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
}
// ANCHOR_END: declare

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
