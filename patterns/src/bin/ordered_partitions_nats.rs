//! Ordered partitions: each order in its order, and many at the same time.
//!
//! Teaches: a subject transform puts a partition into the subject, by a hash of the
//! order in it. Each partition has a durable consumer with `max_ack_pending` of 1: it
//! sends one message, to whichever worker asks, and the next after the
//! acknowledgement. So the changes of an order stay in their order while other
//! partitions are worked on beside it, also when a worker is killed: after `ack_wait`
//! another one gets what it had, and what was done already is known by the journal.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin ordered_partitions_nats                   # the whole story
//! cargo run --bin ordered_partitions_nats work shop.db 1    # terminal 1
//! cargo run --bin ordered_partitions_nats work shop.db 2    # kill -9 it
//! cargo run --bin ordered_partitions_nats publish 1 1000    # 200 orders
//! cargo run --bin ordered_partitions_nats show shop.db
//! cargo run --bin ordered_partitions_nats publish 1 1000 --unordered
//! cargo run --bin ordered_partitions_nats work bad.db 1 --unordered
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 5 changes of each of 4 orders
//! died:      worker 1, with a change written and not acknowledged
//! known:     1 change came again
//! order-1:   placed, paid, packed, shipped, delivered
//! order-2:   placed, paid, packed, shipped, delivered
//! order-3:   placed, paid, packed, shipped, delivered
//! order-4:   placed, paid, packed, shipped, delivered
//! done:      20 changes, 0 of them late
//! ```
//!
//! Left out on purpose: several partitions of one worker at the same time, each with a task
//! of its own.

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

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Message,
        consumer::{AckPolicy, pull},
        stream::{self as jetstream_stream, SubjectTransform},
    },
};
use futures_lite::{StreamExt as _, stream};
use patterns::ordered_partitions::{Change, Journal, Outcome, PARTITIONS};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ORDER_STATES";
/// A message to `order-states.order-7` is stored as `order-states.2.order-7`, with its
/// partition.
const SUBJECT: &str = "order-states";
/// What the careless ones use: one consumer for all.
const UNORDERED_STREAM: &str = "ORDER_STATES_UNORDERED";
const UNORDERED_SUBJECT: &str = "order-states-unordered";
/// After this time NATS delivers again what is not acknowledged. It must be longer than
/// a worker takes for one message of each partition.
const ACK_WAIT: Duration = Duration::from_secs(2);
const USAGE: &str = "usage: ordered_partitions_nats [publish FIRST LAST \
                     [--unordered] | work FILE WORKER [--unordered] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let order = match words.last() {
        Some(&"--unordered") => Order::Lost,
        _ => Order::Kept,
    };
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] | ["publish", first, last, "--unordered"] => {
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) => publish_all(first, last, order).await,
                _ => return usage(),
            }
        }
        ["work", file, worker] | ["work", file, worker, "--unordered"] => {
            match worker.parse() {
                Ok(worker) => work(file, worker, order).await,
                Err(_no_number) => return usage(),
            }
        }
        ["show", file] => open(file).and_then(|journal| show(&journal)),
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Kept,
    /// The mistake, to see what it costs.
    Lost,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64, order: Order) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, order).await?;
    for number in first..=last {
        let change = Change::numbered(number);
        publish(&jetstream, &change, order).await?;
        println!("published: {} {}", change.order, change.state);
    }
    client.drain().await?;
    Ok(())
}

// ANCHOR: publish
/// Returns when NATS has stored the change. After an error it may have it or not:
/// publish it again, before the next.
async fn publish(
    jetstream: &jetstream::Context,
    change: &Change,
    order: Order,
) -> Result<()> {
    let subject = match order {
        Order::Kept => SUBJECT,
        Order::Lost => UNORDERED_SUBJECT,
    };
    let payload = serde_json::to_vec(change)?;
    // Two awaits: the first hands the message to the connection, the second waits for
    // the answer of the stream.
    let stored = jetstream
        .publish(format!("{subject}.{}", change.order), payload.into())
        .await?
        .await;
    stored.with_context(|| {
        let Change { order, state, .. } = change;
        format!("NATS did not store {order} {state}")
    })?;
    Ok(())
}
// ANCHOR_END: publish

// ---- Worker ----------------------------------------------------------------

// ANCHOR: work
async fn work(file: &str, worker: u32, order: Order) -> Result<()> {
    let mut journal = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_changes(&jetstream, order).await?;
    println!("ready:     worker {worker}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery.context("NATS ended the deliveries")??;
        say(&handle(&mut journal, worker, &delivery).await?);
        // Only now comes the next one of this partition.
        done(&delivery).await?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

async fn handle(
    journal: &mut Journal,
    worker: u32,
    delivery: &Message,
) -> Result<Outcome> {
    let payload = &delivery.payload;
    if let Some(change) = Change::read(payload) {
        sleep(change.work()).await;
    }
    // A database blocks its thread.
    block_in_place(|| journal.write(worker, payload))
        .context("cannot write; what is not acknowledged will come again")
}
// ANCHOR_END: work

/// Acknowledges, after the work. If that gets lost, the message comes again and is
/// known, so there is no need to wait for an answer.
async fn done(delivery: &Message) -> Result<()> {
    delivery.ack().await.map_err(Error::from_boxed)
}

fn say(outcome: &Outcome) {
    match outcome {
        Outcome::Changed(Change { order, state, .. }) => {
            println!("changed:   {order} {state}");
        }
        Outcome::Known(Change { order, state, .. }) => {
            println!("known:     {order} {state}, written before");
        }
        Outcome::Late(Change { order, state, .. }) => {
            println!("late:      {order} {state}, after a later one");
        }
        Outcome::SetAside => eprintln!("not a change, set aside"),
    }
}

/// The deliveries of several consumers, as they come.
type Deliveries = stream::Boxed<Result<Message>>;

// ANCHOR: take
/// Each worker asks each consumer, and gets a message when no other worker has one of
/// the same partition.
async fn take_changes(
    jetstream: &jetstream::Context,
    order: Order,
) -> Result<Deliveries> {
    let stored = declare(jetstream, order).await?;
    let mut all: Deliveries = stream::pending().boxed();
    for consumer in consumers(order) {
        let deliveries = stored
            .create_consumer(consumer)
            .await
            .context("cannot make the consumer of a partition")?
            .stream()
            // What is asked for has to be done within `ACK_WAIT`.
            .max_messages_per_batch(1)
            .messages()
            .await?
            .map(|delivery| {
                delivery.context(
                    "cannot take changes; is the stream or a consumer deleted?",
                )
            });
        let end = anyhow!("NATS ended the deliveries of a consumer");
        let deliveries = deliveries.chain(stream::once(Err(end)));
        all = stream::race(all, deliveries).boxed();
    }
    Ok(all)
}

/// A consumer for each partition, or one for all.
fn consumers(order: Order) -> Vec<pull::Config> {
    let all = pull::Config {
        durable_name: Some("all".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        ..pull::Config::default()
    };
    if order == Order::Lost {
        return vec![all];
    }
    let of_partition = |partition| pull::Config {
        durable_name: Some(format!("partition-{partition}")),
        filter_subject: format!("{SUBJECT}.{partition}.*"),
        // With one at a time, over all workers, there is nothing that a redelivery
        // could come after.
        max_ack_pending: 1,
        ..all.clone()
    };
    (0..PARTITIONS).map(of_partition).collect()
}
// ANCHOR_END: take

fn open(file: &str) -> Result<Journal> {
    Journal::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

fn show(journal: &Journal) -> Result<()> {
    for line in journal.show()? {
        println!("{line}");
    }
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let stored = declare(&jetstream, Order::Kept).await?;
    stored.purge().await?;
    for number in 1..=20 {
        publish(&jetstream, &Change::numbered(number), Order::Kept).await?;
    }
    println!("published: 5 changes of each of 4 orders");

    let mut journal = open(":memory:")?;
    // A connection of its own, because that is what dies with it.
    let dying = connect().await?;
    let jetstream_of_dying = jetstream::new(dying.clone());
    let mut deliveries = take_changes(&jetstream_of_dying, Order::Kept).await?;
    let delivery = next(&mut deliveries).await?;
    handle(&mut journal, 1, &delivery).await?;
    drop(deliveries);
    dying.drain().await?;
    println!("died:      worker 1, with a change written and not acknowledged");

    let mut first = take_changes(&jetstream, Order::Kept).await?;
    let mut second = take_changes(&jetstream, Order::Kept).await?;
    let (mut changed, mut known) = (1, 0);
    while changed < 20 {
        let (worker, delivery) = tokio::select! {
            delivery = next(&mut first) => (1, delivery?),
            delivery = next(&mut second) => (2, delivery?),
        };
        match handle(&mut journal, worker, &delivery).await? {
            Outcome::Changed(_) => changed += 1,
            Outcome::Known(_) => known += 1,
            wrong => bail!("{wrong:?}"),
        }
        done(&delivery).await?;
    }
    println!("known:     {known} change came again");
    client.drain().await?;
    show(&journal)
}

async fn next(deliveries: &mut Deliveries) -> Result<Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no change came; has another taken it?")?;
    delivery.context("NATS ended the deliveries")?
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

// ANCHOR: declare
/// Declares a queue that outlives a restart of the broker, with partitions or without.
async fn declare(
    jetstream: &jetstream::Context,
    order: Order,
) -> Result<jetstream_stream::Stream> {
    let (name, subject) = match order {
        Order::Kept => (STREAM, SUBJECT),
        Order::Lost => (UNORDERED_STREAM, UNORDERED_SUBJECT),
    };
    // So many partitions, by a hash of the first wildcard, which is the order.
    let partition = format!("{{{{partition({PARTITIONS},1)}}}}");
    let transform = SubjectTransform {
        source: format!("{subject}.*"),
        destination: format!("{subject}.{partition}.{{{{wildcard(1)}}}}"),
    };
    jetstream
        .create_stream(jetstream_stream::Config {
            name: name.to_owned(),
            subjects: vec![format!("{subject}.*")],
            subject_transform: (order == Order::Kept).then_some(transform),
            // A change is removed when it is acknowledged.
            retention: jetstream_stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: jetstream_stream::StorageType::File,
            ..jetstream_stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {name} ({error}); if it was made with \
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
