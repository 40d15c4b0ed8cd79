//! Delayed message: a reminder that comes when it is due, unless it is cancelled.
//!
//! Teaches: a NATS server of 2.12 or newer waits by itself. A schedule is a stored
//! message with two headers, when and to which subject, and it outlives the program
//! that wrote it and the server. A newer one on the same subject replaces it; to delete
//! it is to cancel it, and the answer says whether it was still there. What is due
//! appears in the stream alone: a subscriber of core NATS never hears of it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin delayed_message_nats                         # the whole story
//! cargo run --bin delayed_message_nats remind                  # terminal 1
//! cargo run --bin delayed_message_nats plan 1 5 10             # 1 to 5, in 10 s
//! cargo run --bin delayed_message_nats cancel 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s
//! cancelled: invoice-3, which is paid
//! due:       invoice-2, not before its time
//! due:       invoice-1, not before its time
//! never:     invoice-3
//! ```
//!
//! Left out on purpose: schedules that repeat (`@hourly`, `@every 5m`, cron).

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
    header::{NATS_SCHEDULE, NATS_SCHEDULE_TARGET},
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::delayed_message::{Reminder, invoice, now};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SHOP: Place = Place {
    stream: "PAYMENT_REMINDERS",
    planned: "payment.reminders.planned",
    due: "payment.reminders.due",
    unreadable: "payment.reminders.unreadable",
};
/// The story has a stream of its own, which it deletes: what it plans is no business
/// of those who remind beside it.
const STORY: Place = Place {
    stream: "PAYMENT_REMINDERS_STORY",
    planned: "payment.story.planned",
    due: "payment.story.due",
    unreadable: "payment.story.unreadable",
};
const CONSUMER: &str = "reminder-mail";
/// After this time NATS delivers again what is not acknowledged.
const ACK_WAIT: Duration = Duration::from_secs(10);
const USAGE: &str = "usage: delayed_message_nats [plan FIRST LAST SECONDS | cancel \
                     NUMBER | remind]";

/// How long a reminder may let wait for itself.
const LATEST: Duration = Duration::from_secs(30);

/// Where plans lie, and where they appear when they are due: one subject for each
/// invoice, below these.
struct Place {
    stream: &'static str,
    planned: &'static str,
    due: &'static str,
    /// Where what nobody can read is kept.
    unreadable: &'static str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["plan", first, last, seconds] => {
            match (first.parse(), last.parse(), seconds.parse()) {
                (Ok(first), Ok(last), Ok(seconds)) if first <= last => {
                    plan_all(first, last, seconds).await
                }
                _ => return usage(),
            }
        }
        ["cancel", number] => match number.parse() {
            Ok(number) => cancel_one(number).await,
            Err(_no_number) => return usage(),
        },
        ["remind"] => remind().await,
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

// ---- Plan and cancel -------------------------------------------------------

async fn plan_all(first: u64, last: u64, seconds: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, &SHOP).await?;
    for number in first..=last {
        plan(&jetstream, &SHOP, number, seconds).await?;
        println!("planned:   {} in {seconds} s", invoice(number));
    }
    client.drain().await?;
    Ok(())
}

async fn cancel_one(number: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let stream = declare(&jetstream, &SHOP).await?;
    let invoice = invoice(number);
    if cancel(&stream, &SHOP, &invoice).await? {
        println!("cancelled: {invoice}");
    } else {
        println!("too late:  {invoice} is not planned, or no longer");
    }
    client.drain().await?;
    Ok(())
}

// ANCHOR: plan
/// Returns when NATS has stored the reminder: from now on it does not depend on this
/// program.
async fn plan(
    jetstream: &jetstream::Context,
    place: &Place,
    number: u64,
    seconds: u64,
) -> Result<()> {
    let delay = Duration::from_secs(seconds);
    let reminder = Reminder::after(number, now(), delay);
    let invoice = &reminder.invoice;
    let when = i128::from(reminder.due) * 1_000_000;
    let when = OffsetDateTime::from_unix_timestamp_nanos(when)
        .with_context(|| format!("{seconds} s are too long"))?;
    let message = PublishMessage::build()
        .header(NATS_SCHEDULE, format!("@at {}", when.format(&Rfc3339)?))
        .header(NATS_SCHEDULE_TARGET, format!("{}.{invoice}", place.due))
        .payload(serde_json::to_vec(&reminder)?.into());
    jetstream
        .send_publish(format!("{}.{invoice}", place.planned), message)
        .await?
        .await
        .with_context(|| format!("NATS did not store {invoice}"))?;
    Ok(())
}

/// Whether it was planned, and is no longer.
async fn cancel(
    stream: &stream::Stream,
    place: &Place,
    invoice: &str,
) -> Result<bool> {
    let subject = format!("{}.{invoice}", place.planned);
    let purged = stream.purge().filter(subject).await?;
    Ok(purged.purged > 0)
}
// ANCHOR_END: plan

// ---- Wait ------------------------------------------------------------------

// ANCHOR: declare
/// NATS waits by itself: a setting of the stream is all that there is to it.
async fn declare(
    jetstream: &jetstream::Context,
    place: &Place,
) -> Result<stream::Stream> {
    let name = place.stream;
    jetstream
        .create_stream(stream::Config {
            name: name.to_owned(),
            subjects: vec![
                format!("{}.*", place.planned),
                format!("{}.*", place.due),
                place.unreadable.to_owned(),
            ],
            allow_message_schedules: true,
            // A reminder is removed when it is acknowledged. An age for all (`max_age`)
            // would also remove what is still to come.
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {name} ({error}); the server has to be \
                 2.12 or newer, with JetStream (-js); if the stream was made with \
                 another configuration, delete it first"
            )
        })
}
// ANCHOR_END: declare

// ---- Remind ----------------------------------------------------------------

// ANCHOR: remind
async fn remind() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut deliveries = take_due(&jetstream, &SHOP).await?;
    println!("ready:     reminders from {}.*, Ctrl-C to stop", SHOP.due);
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery.context("NATS ended the deliveries")?.context(
            "cannot take reminders; is the stream or its consumer deleted?",
        )?;
        match Reminder::read(&delivery.payload) {
            Some(reminder) => {
                // The clocks of two machines differ: who is early, waits.
                sleep(reminder.wait(now())).await;
                println!("due:       {}", reminder.invoice);
            }
            None => {
                eprintln!("not a reminder, set aside in {}", SHOP.unreadable);
                let payload = delivery.payload.clone();
                jetstream.publish(SHOP.unreadable, payload).await?.await?;
            }
        }
        // If the program ends before this line, the customer is reminded twice.
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: remind

async fn take_due(
    jetstream: &jetstream::Context,
    place: &Place,
) -> Result<pull::Stream> {
    let stream = declare(jetstream, place).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            filter_subject: format!("{}.*", place.due),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of those who remind")?;
    // What is asked for has to be done within `ACK_WAIT`.
    let deliveries = consumer.stream().max_messages_per_batch(20).messages();
    Ok(deliveries.await?)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // What an earlier run has left is no part of the story. An error says that there
    // is none.
    let _deleted = jetstream.delete_stream(STORY.stream).await;
    let stream = declare(&jetstream, &STORY).await?;

    for (number, seconds) in [(1, 4), (2, 1), (3, 2)] {
        plan(&jetstream, &STORY, number, seconds).await?;
    }
    println!("planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s");
    let in_time = cancel(&stream, &STORY, "invoice-3").await?;
    ensure!(in_time, "invoice-3 was not planned");
    println!("cancelled: invoice-3, which is paid");

    let mut deliveries = take_due(&jetstream, &STORY).await?;
    for _reminder in 0..2 {
        let delivery = timeout(LATEST, deliveries.next()).await;
        let delivery = delivery.context("no reminder came within 30 s")?;
        let delivery = delivery.context("NATS ended the deliveries")??;
        let reminder = Reminder::read(&delivery.payload);
        let reminder = reminder.context("not a reminder")?;
        let (invoice, early) = (&reminder.invoice, reminder.wait(now()));
        ensure!(early.is_zero(), "{invoice} came {early:?} before its time");
        println!("due:       {invoice}, not before its time");
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    // It was due before the last one that came.
    println!("never:     invoice-3");
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Connection ------------------------------------------------------------

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
