//! Concurrent processing: several messages of one subscription at a time.
//!
//! Teaches: `for_each_concurrent` with a limit. Without one, a burst of messages
//! becomes as many requests at the printer; with a limit of one, each message
//! waits for the one before. The order in which they are done is lost.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_concurrent_processing                  # the whole story
//! cargo run --bin nats_concurrent_processing one-at-a-time    # the mistake
//! cargo run --bin nats_concurrent_processing worker           # without printer
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 8 labels to labels.orders
//! sheet 1:   4 labels, full
//! sheet 2:   4 labels, full
//! done:      8 labels, at most 4 at the same time
//! ```
//!
//! Left out on purpose: work that keeps a processor busy. All labels wait within
//! one task here; computing belongs into `tokio::task::spawn_blocking`.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, Message, Request, ServerAddr, Subscriber,
};
use futures_util::{Stream, StreamExt as _};
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "labels.orders";
/// Prints a sheet when it has enough labels for one, and answers then.
const PRINTER: &str = "labels.printer";
const PER_SHEET: usize = 4;
const LABELS: usize = 8;
/// How many labels are in work at the same time.
const LIMIT: usize = 4;
const USAGE: &str = "usage: nats_concurrent_processing [one-at-a-time | worker]";

/// How long the printer may take, and the server.
const PATIENCE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(LIMIT).await,
        ["one-at-a-time"] => story(1).await,
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

// ANCHOR: story
async fn story(limit: usize) -> Result<()> {
    let client = connect().await?;
    let requests = client.subscribe(PRINTER).await?;
    let printer = tokio::spawn(printer(client.clone(), requests));
    let mut orders = client.subscribe(SUBJECT).await?;

    for number in 1..=LABELS {
        let label = format!("label {number}");
        client.publish(SUBJECT, label.into()).await?;
    }
    round_trip(&client).await?;
    println!("published: {LABELS} labels to {SUBJECT}");

    // All labels are here: the stream shall end behind the last of them.
    orders.drain().await?;
    let tally = process(&client, orders, limit).await;
    client.drain().await?;
    printer.await??;
    let (done, most) = (tally.done.load(Relaxed), tally.most.load(Relaxed));
    println!("done:      {done} labels, at most {most} at the same time");
    if done < LABELS {
        bail!("{} labels are not known to be printed", LABELS - done);
    }
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: worker
async fn worker() -> Result<()> {
    let client = connect().await?;
    let orders = client.subscribe(SUBJECT).await?;
    let stop = stop_signal()?;
    round_trip(&client).await?;
    println!("waiting for labels on {SUBJECT}, Ctrl-C to stop");
    // Ends the stream, not the work: labels in hand are finished. Those that
    // wait behind them in this process are lost, as core NATS has no other copy.
    let orders = orders.take_until(stop);
    let tally = process(&client, orders, LIMIT).await;
    client.drain().await?;
    println!("stopped after {} labels", tally.done.load(Relaxed));
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: process
#[derive(Default)]
struct Tally {
    now: AtomicUsize,
    most: AtomicUsize,
    done: AtomicUsize,
}

/// Ends when the stream has ended and the last label is done.
async fn process(
    client: &Client,
    orders: impl Stream<Item = Message>,
    limit: usize,
) -> Tally {
    let tally = Tally::default();
    orders
        // `None` instead of a number would be no limit.
        .for_each_concurrent(limit, async |order| {
            let now = tally.now.fetch_add(1, Relaxed) + 1;
            tally.most.fetch_max(now, Relaxed);
            // One label that fails must not stop the others.
            match print(client, &order).await {
                Ok(()) => {
                    tally.done.fetch_add(1, Relaxed);
                }
                Err(error) => eprintln!("error: {error:#}"),
            }
            tally.now.fetch_sub(1, Relaxed);
        })
        .await;
    tally
}
// ANCHOR_END: process

// ANCHOR: print
async fn print(client: &Client, order: &Message) -> Result<()> {
    let request = Request::new()
        .payload(order.payload.clone())
        .timeout(Some(PATIENCE));
    client
        .send_request(PRINTER, request)
        .await
        .with_context(|| String::from_utf8_lossy(&order.payload).into_owned())?;
    Ok(())
}
// ANCHOR_END: print

// ANCHOR: printer
async fn printer(client: Client, mut requests: Subscriber) -> Result<()> {
    let mut sheet = Vec::new();
    let mut sheets = 0;
    while let Some(request) = requests.next().await {
        sheet.extend(request.reply);
        if sheet.len() < PER_SHEET {
            continue;
        }
        sheets += 1;
        println!("sheet {sheets}:   {PER_SHEET} labels, full");
        for reply_to in sheet.drain(..) {
            client.publish(reply_to, "printed".into()).await?;
        }
    }
    Ok(())
}
// ANCHOR_END: printer

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
}

/// Returns when all that the server has delivered to this connection for what
/// was published on it is here.
async fn round_trip(client: &Client) -> Result<()> {
    // A message to ourselves, behind all others: the server takes the commands
    // of one connection, and delivers to it, in their order. `flush` waits for
    // no answer, and `drain` of async-nats 0.51 does not either.
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await?;
    client.publish(inbox, "".into()).await?;
    timeout(PATIENCE, echo.next())
        .await
        .with_context(|| {
            format!(
                "nothing came back within {PATIENCE:?}; may this user subscribe \
                 to _INBOX.>?"
            )
        })?
        .context("the server ended the subscription")?;
    Ok(())
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
