//! Throughput: what an answer takes, counted from the moment it was due.
//!
//! Teaches: a requester that waits for one answer before it asks again also
//! waits with its questions when the responder pauses. It then measures one long
//! wait where its users would have had hundreds. So the questions are due by the
//! clock, and each is measured from then on, whenever it could be sent.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --release --bin nats_request_latency
//! cargo run --release --bin nats_request_latency responder          # terminal 1
//! cargo run --release --bin nats_request_latency requester 10000 500 # terminal 2
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready: answers on latency.quote
//! paused: 250 ms, once
//! answered: 1000 requests of 128 B in <seconds> s (p50 <us> us, p99 <us> us)
//! measured from the sending instead: p99 <us> us
//! ```
//!
//! Left out on purpose: several requests at the same time, which need a requester
//! for each, or a list of those that are open.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, RequestErrorKind, ServerAddr, Subscriber,
};
use bytes::Bytes;
use futures_lite::StreamExt as _;
use hdrhistogram::Histogram;
use tokio::{
    sync::{Notify, mpsc},
    time::sleep,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "latency.quote";
const COUNT: u32 = 1000;
const SIZE: usize = 128;
const USAGE: &str =
    "usage: nats_request_latency [responder | requester [COUNT [RATE]]]";

/// Requests a second in the story.
const RATE: u32 = 1000;

/// How long the responder of the story pauses, and before which request.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_BEFORE: u32 = COUNT / 2;

// One thread: this program waits for the client's connection and the connection
// for this program, by turns. On two threads each turn would wake the other one.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let numbers: Option<Vec<u32>> =
        words.iter().skip(1).map(|word| word.parse().ok()).collect();
    let result = match (words.first().copied(), numbers.as_deref()) {
        (None, _) => story().await,
        (Some("responder"), Some([])) => responder().await,
        (Some("requester"), Some([])) => requester(COUNT, None).await,
        (Some("requester"), Some(&[count])) => requester(count, None).await,
        (Some("requester"), Some(&[count, rate])) if rate > 0 => {
            requester(count, Some(rate)).await
        }
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
    let client = connect().await?;
    let requests = subscribe(&client).await?;
    let answering = tokio::spawn(async move {
        answer_all(&client, requests, Some(PAUSE_BEFORE)).await
    });
    let latencies = ask_all(&connect().await?, COUNT, Some(RATE)).await?;
    answering.abort();
    println!("paused: {} ms, once", PAUSE.as_millis());
    latencies.print();
    println!(
        "measured from the sending instead: p99 {} us",
        latencies.from_sending.value_at_quantile(0.99)
    );
    Ok(())
}

async fn responder() -> Result<()> {
    let stop = stop_signal()?;
    let client = connect().await?;
    let requests = subscribe(&client).await?;
    tokio::select! {
        biased;
        () = stop => {}
        ended = answer_all(&client, requests, None) => ended?,
    }
    // The last answer may still be in the client's queue.
    client.flush().await?;
    println!("stopped");
    Ok(())
}

async fn requester(count: u32, rate: Option<u32>) -> Result<()> {
    ask_all(&connect().await?, count, rate).await?.print();
    Ok(())
}

async fn subscribe(client: &Client) -> Result<Subscriber> {
    let requests = client.subscribe(SUBJECT).await?;
    client.flush().await?;
    println!("ready: answers on {SUBJECT}");
    Ok(requests)
}

/// Sends each request back as its answer, and pauses before one of them.
async fn answer_all(
    client: &Client,
    mut requests: Subscriber,
    pause_before: Option<u32>,
) -> Result<()> {
    let mut number = 0;
    while let Some(request) = requests.next().await {
        number += 1;
        if pause_before == Some(number) {
            sleep(PAUSE).await;
        }
        if let Some(reply_to) = request.reply {
            client.publish(reply_to, request.payload).await?;
        }
    }
    bail!("the server ended the subscription")
}

/// In microseconds.
struct Latencies {
    seconds: f64,
    from_due: Histogram<u64>,
    from_sending: Histogram<u64>,
}

// ANCHOR: ask
/// Asks again and again: by the clock, or, without a rate, as soon as there is an
/// answer, so that each request is due when it is sent.
async fn ask_all(
    client: &Client,
    count: u32,
    rate: Option<u32>,
) -> Result<Latencies> {
    let payload = Bytes::from(vec![b'q'; SIZE]);
    // Three digits, whatever the size of the value.
    let mut from_due = Histogram::new(3)?;
    let mut from_sending = Histogram::new(3)?;
    let started = Instant::now();
    let mut due_times = rate.map(|rate| clock(started, count, rate));
    for _ in 0..count {
        let due = match &mut due_times {
            Some(times) => Some(times.recv().await.context("the clock ended")?),
            None => None,
        };
        let sent = Instant::now();
        match client.request(SUBJECT, payload.clone()).await {
            Ok(_answer) => {}
            Err(error) if error.kind() == RequestErrorKind::NoResponders => bail!(
                "no responders on {SUBJECT}; start one: nats_request_latency responder"
            ),
            Err(error) => {
                return Err(error).context(format!("cannot ask {SUBJECT}"));
            }
        }
        from_due.record(microseconds(due.unwrap_or(sent).elapsed()))?;
        from_sending.record(microseconds(sent.elapsed()))?;
    }
    Ok(Latencies {
        seconds: started.elapsed().as_secs_f64(),
        from_due,
        from_sending,
    })
}
// ANCHOR_END: ask

// ANCHOR: clock
/// Sends each moment at which a request is due, when it has come. From a thread
/// of its own, since Tokio's timers count in milliseconds.
fn clock(started: Instant, count: u32, rate: u32) -> mpsc::Receiver<Instant> {
    // If the requester is late, this waits; the moments stay those of the plan.
    let (sender, due_times) = mpsc::channel(1);
    thread::spawn(move || {
        for number in 0..count {
            let due = started
                + Duration::from_secs_f64(f64::from(number) / f64::from(rate));
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.blocking_send(due).is_err() {
                break;
            }
        }
    });
    due_times
}
// ANCHOR_END: clock

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Latencies {
    fn print(&self) {
        println!(
            "answered: {} requests of {SIZE} B in {:.3} s (p50 {} us, p99 {} us)",
            self.from_due.len(),
            self.seconds,
            self.from_due.value_at_quantile(0.5),
            self.from_due.value_at_quantile(0.99),
        );
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
