//! Throughput: publish without waiting, but never far ahead of the subscriber.
//!
//! Teaches: `publish` only hands a message to the task that writes to the
//! socket, so what costs time is everything you add: a flush for each, a copy
//! of each payload, a change of threads. And core NATS slows no publisher down
//! for a slow subscriber, whose client drops what its buffer cannot hold; so
//! every few thousand messages, this publisher asks how far the subscriber is.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --release --bin nats_throughput
//! cargo run --release --bin nats_throughput subscriber             # terminal 1
//! cargo run --release --bin nats_throughput publisher 1000000 128  # terminal 2
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready: subscribed to throughput.readings
//! published: 200000 messages of 128 B in <seconds> s (<rate> msg/s)
//! consumed: 200000 messages of 128 B in <seconds> s (<rate> msg/s)
//! lost: 0
//! ```
//!
//! Left out on purpose: several subscribers, of which this publisher would
//! follow the quickest; and messages that must survive, which JetStream keeps.

use std::{
    env, fmt,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, ServerAddr, StatusCode, Subscriber,
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::{
    sync::{Notify, oneshot},
    task::unconstrained,
    time::timeout,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "throughput.readings";
const COUNT: usize = 200_000;
const SIZE: usize = 128;
const USAGE: &str =
    "usage: nats_throughput [publisher [COUNT [SIZE]] | subscriber [COUNT]]";

/// How many messages a subscription holds that nobody has taken out yet. The
/// client drops what comes on top, and tells nobody but its event callback.
const BUFFER: usize = 65_536;

/// After so many messages comes a question. One question may be open, so at most
/// twice as many are on their way: what the buffer holds.
const STRIDE: usize = BUFFER / 2;

/// How many messages a subscriber takes out at once.
const BATCH: usize = 1024;

/// How long the subscriber may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

// One thread: the loop below and the task that writes to the socket take turns,
// where on two threads they would wake each other up all the time.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let numbers: Option<Vec<usize>> =
        words.iter().skip(1).map(|word| word.parse().ok()).collect();
    let result = match (words.first().copied(), numbers.as_deref()) {
        (None, _) => story().await,
        (Some("publisher"), Some([])) => publisher(COUNT, SIZE).await,
        (Some("publisher"), Some(&[count])) => publisher(count, SIZE).await,
        (Some("publisher"), Some(&[count, size])) => publisher(count, size).await,
        (Some("subscriber"), Some([])) => subscriber(usize::MAX).await,
        (Some("subscriber"), Some(&[count])) => subscriber(count).await,
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

/// Both halves in one program, each with a connection of its own.
async fn story() -> Result<()> {
    let consumer = connect().await?;
    let readings = subscribe(&consumer).await?;
    let publisher = connect().await?;
    let (all_sent, stop) = oneshot::channel::<()>();
    let consuming = tokio::spawn(async move {
        let stop = async { stop.await.unwrap_or_default() };
        consume(&consumer, readings, COUNT, stop).await
    });
    let published = publish(&publisher, COUNT, SIZE).await?;
    // The last message has been answered, so what is missing now is lost.
    drop(all_sent);
    let consumed = consuming.await??;
    println!("published: {published}");
    println!("consumed: {consumed}");
    println!("lost: {}", published.count - consumed.count);
    Ok(())
}

async fn publisher(count: usize, size: usize) -> Result<()> {
    let client = connect().await?;
    let published = publish(&client, count, size).await?;
    println!("published: {published}");
    Ok(())
}

async fn subscriber(count: usize) -> Result<()> {
    let stop = stop_signal()?;
    let client = connect().await?;
    let readings = subscribe(&client).await?;
    let consumed = consume(&client, readings, count, stop).await?;
    println!("consumed: {consumed}");
    if consumed.count < count {
        println!("stopped");
    }
    Ok(())
}

// ANCHOR: publish
async fn publish(client: &Client, count: usize, size: usize) -> Result<Measured> {
    // A clone of `Bytes` counts a reference and copies nothing.
    let payload = Bytes::from(vec![b'r'; size]);
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(format!("{inbox}.*")).await?;
    let mut nobody = false;

    let started = Instant::now();
    // Tokio has a task yield after 128 operations, so that others get a turn.
    // Here the only other is the one that writes to the socket, and it writes
    // more at a time when this one goes on until the queue between them is full.
    unconstrained(async {
        for sent in 1..=count {
            if sent % STRIDE != 0 && sent != count {
                client.publish(SUBJECT, payload.clone()).await?;
                continue;
            }
            // A reading like the others, and a question too: the reply subject
            // holds its number, and the answer comes on it.
            let reply = format!("{inbox}.{sent}");
            client
                .publish_with_reply(SUBJECT, reply, payload.clone())
                .await?;
            // One question may stay open while we go on, but not the last one.
            let due = if sent == count { sent } else { sent - STRIDE };
            nobody = !answered(&mut answers, due).await?;
        }
        anyhow::Ok(())
    })
    .await?;
    // Not before the last answer: a flush would only say that all is written.
    let seconds = started.elapsed().as_secs_f64();
    if nobody {
        println!("nobody has subscribed to {SUBJECT}");
    }
    Ok(Measured {
        count,
        size,
        seconds,
    })
}
// ANCHOR_END: publish

// ANCHOR: answered
/// Waits until the subscriber has had this many messages. False if the server
/// says that nobody has subscribed.
async fn answered(answers: &mut Subscriber, due: usize) -> Result<bool> {
    let mut somebody = true;
    let mut had = 0;
    while had < due {
        let answer = timeout(PATIENCE, answers.next())
            .await
            .map_err(|_elapsed| {
                anyhow!("the subscriber has not answered for 5 s; is it stuck?")
            })?
            .context("the server ended the subscription")?;
        let (_, number) = answer.subject.rsplit_once('.').context("no number")?;
        had = number.parse()?;
        somebody = answer.status != Some(StatusCode::NO_RESPONDERS);
    }
    Ok(somebody)
}
// ANCHOR_END: answered

async fn subscribe(client: &Client) -> Result<Subscriber> {
    let readings = client.subscribe(SUBJECT).await?;
    client.flush().await?;
    println!("ready: subscribed to {SUBJECT}");
    Ok(readings)
}

// ANCHOR: consume
async fn consume(
    client: &Client,
    readings: Subscriber,
    count: usize,
    stop: impl Future<Output = ()>,
) -> Result<Measured> {
    tokio::pin!(stop);
    // Takes out together what has arrived, so that `select!` looks at both of
    // its futures once for each batch and not once for each message.
    let mut batches = readings.take(count).ready_chunks(BATCH);
    let (mut consumed, mut size) = (0, 0);
    let mut started = None;
    while consumed < count {
        let batch = tokio::select! {
            biased;
            () = &mut stop => break,
            batch = batches.next() => batch,
        };
        started.get_or_insert_with(Instant::now);
        for reading in batch.context("the server ended the subscription")? {
            consumed += 1;
            size = reading.payload.len();
            if let Some(question) = reading.reply {
                client.publish(question, Bytes::new()).await?;
            }
        }
    }
    let seconds = started.map_or(0.0, |first| first.elapsed().as_secs_f64());
    // The last answer may still be in the client's queue.
    client.flush().await?;
    Ok(Measured {
        count: consumed,
        size,
        seconds,
    })
}
// ANCHOR_END: consume

/// So many messages of this size in so many seconds.
struct Measured {
    count: usize,
    size: usize,
    seconds: f64,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            count,
            size,
            seconds,
        } = self;
        let rate = *count as f64 / seconds.max(f64::MIN_POSITIVE);
        write!(
            f,
            "{count} messages of {size} B in {seconds:.3} s ({rate:.0} msg/s)"
        )
    }
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

// ANCHOR: connect
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
    ConnectOptions::new()
        .subscription_capacity(BUFFER)
        .connect(server)
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
// ANCHOR_END: connect
