//! Worker pool: workers that use one durable consumer share its messages.
//!
//! Teaches: nobody registers a worker; each pulls from the same durable name. A
//! worker that dies in the middle of an order leaves it without acknowledgement,
//! and another gets it once `ACK_WAIT` has passed, marked as delivery 2.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_worker_pool             # the whole story
//! cargo run --bin nats_jetstream_worker_pool worker      # terminal 1, and 2
//! cargo run --bin nats_jetstream_worker_pool producer    # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued: 12 orders in PACKING
//! worker 1 start: order-1 (delivery 1)
//! worker 1 dies in the middle of order-1
//! worker 2 done:  order-2 (delivery 1)
//! ...
//! worker 2 done:  order-12 (delivery 1)
//! worker 2 done:  order-1 (delivery 2)
//! all 12 orders are packed
//! ```
//!
//! Left out on purpose: a limit on the number of deliveries (`max_deliver`). An
//! order that kills its worker each time would come for ever.

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
        self, Message,
        consumer::{
            AckPolicy, PullConsumer,
            pull::{self, MessagesErrorKind},
        },
        stream,
    },
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PACKING";
const SUBJECT: &str = "packing.orders";
const DURABLE: &str = "packers";
const ORDERS: usize = 12;
const USAGE: &str = "usage: nats_jetstream_worker_pool [producer | worker]";

/// How long the server waits for an acknowledgement before another worker gets
/// the order: several times what packing takes.
const ACK_WAIT: Duration = Duration::from_secs(8);

/// How many orders all workers together may hold. Too low, and workers stand
/// idle beside a full stream.
const MAX_ACK_PENDING: i64 = 100;

/// How long it takes to pack: long enough to kill the worker in the middle.
const PACK: Duration = Duration::from_millis(300);

const PATIENCE: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer"] => producer().await,
        ["worker"] => worker().await,
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

async fn producer() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    declare(&jetstream).await?;
    queue_orders(&jetstream).await
}

async fn queue_orders(jetstream: &jetstream::Context) -> Result<()> {
    for number in 1..=ORDERS {
        let order = format!("order-{number}");
        jetstream.publish(SUBJECT, order.into()).await?.await?;
    }
    println!("queued: {ORDERS} orders in {STREAM}");
    Ok(())
}

// ANCHOR: worker
async fn worker() -> Result<()> {
    let client = connect().await?;
    let consumer = declare(&jetstream::new(client.clone())).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    // One at a time: what waits in the client of a busy worker is out of reach
    // for one that has nothing to do.
    let pulling = consumer.stream().max_messages_per_batch(1);
    let mut messages = pulling.messages().await?;
    println!("waiting for orders on {SUBJECT}, Ctrl-C to stop");
    loop {
        let message = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            message = messages.next() => message,
        };
        let message = match message.context("the server ended the consumer")? {
            Ok(message) => message,
            Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                // The client reconnects, and pulls again, by itself.
                eprintln!("nothing heard from the server; waiting for it");
                continue;
            }
            Err(error) => {
                return Err(error).context("the consumer cannot be read further");
            }
        };
        let order = order(&message)?;
        println!("start: {order}");
        sleep(PACK).await;
        // Moved above the work, this would lose the order of a killed worker.
        message.double_ack().await.map_err(Error::from_boxed)?;
        println!("done:  {order}");
    }
    println!("stopped");
    Ok(())
}

fn order(message: &Message) -> Result<String> {
    let name = String::from_utf8_lossy(&message.payload);
    let delivery = message.info().map_err(Error::from_boxed)?.delivered;
    Ok(format!("{name} (delivery {delivery})"))
}
// ANCHOR_END: worker

// ANCHOR: stop
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
// ANCHOR_END: stop

// ---- The whole story in one process ----------------------------------------

async fn story() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // Orders of an earlier run would be counted here. There may be none.
    jetstream.delete_stream(STREAM).await.ok();
    let mut consumer = declare(&jetstream).await?;
    queue_orders(&jetstream).await?;

    let first = declare(&jetstream::new(connect().await?)).await?;
    let taken = take_one(&first).await?;
    println!("worker 1 start: {}", order(&taken)?);
    let name = String::from_utf8_lossy(&taken.payload);
    println!("worker 1 dies in the middle of {name}");
    drop(first);

    for _ in 0..ORDERS {
        let message = take_one(&consumer).await?;
        message.double_ack().await.map_err(Error::from_boxed)?;
        println!("worker 2 done:  {}", order(&message)?);
    }
    let info = consumer.info().await?;
    ensure!(info.num_ack_pending == 0, "orders are left: {info:?}");
    println!("all {ORDERS} orders are packed");
    Ok(())
}

async fn take_one(consumer: &PullConsumer) -> Result<Message> {
    let pulling = consumer.batch().max_messages(1).expires(PATIENCE);
    let mut batch = pulling.messages().await?;
    let message = timeout(PATIENCE, batch.next())
        .await
        .ok()
        .flatten()
        .context("no order within 15 s; has another worker taken it?")?;
    message.map_err(Error::from_boxed)
}

// ANCHOR: declare
/// Makes the stream and its consumer, which changes nothing if they are there.
async fn declare(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..stream::Config::default()
        })
        .await
        .with_context(|| {
            format!("cannot have the stream {STREAM}; is JetStream on?")
        })?;
    stream
        .create_consumer_strict(pull::Config {
            durable_name: Some(DURABLE.into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: MAX_ACK_PENDING,
            ..pull::Config::default()
        })
        .await
        .with_context(|| {
            format!(
                "cannot have the consumer {DURABLE}; if it was made with another \
                 configuration, delete it first"
            )
        })
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
