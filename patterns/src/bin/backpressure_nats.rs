//! Backpressure: a worker holds no more labels than it can print soon.
//!
//! Teaches: NATS sends what is asked for, so the worker asks for as many labels as it
//! has room for in a bounded channel, and asks again when there is room. Beside that
//! `max_ack_pending` bounds what all workers together hold. A label is acknowledged
//! when it is printed. The publisher has a window of labels without an answer from the
//! stream, and waits for the oldest. Core NATS has none of that: it drops.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin backpressure_nats                               # the whole story
//! cargo run --bin backpressure_nats worker printed.db             # terminal 1
//! cargo run --bin backpressure_nats producer 1 3000               # terminal 2
//! cargo run --bin backpressure_nats worker printed.db --rate 200  # a quicker printer
//! cargo run --bin backpressure_nats worker printed.db --unbounded # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels.due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  set, held no more than 16
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels.due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  none, held more than 16
//! ```
//!
//! Left out on purpose: a bound for the stream itself; see nats_jetstream_limits, where
//! a full stream refuses. What core NATS drops is in nats_slow_consumer.

use std::{
    collections::VecDeque,
    env,
    future::{Future, IntoFuture as _},
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{AckPolicy, PullConsumer, pull},
        context::PublishAckFuture,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::backpressure::{HIGH, Held, LOW, Printer, label, name};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::block_in_place,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "LABELS_DUE";
const SUBJECT: &str = "labels.due";
const CONSUMER: &str = "label-printer";
const USAGE: &str = "usage: backpressure_nats [producer FIRST LAST | worker FILE \
                     [--rate LABELS_A_SECOND] [--unbounded]]";

/// How many labels the printer prints in a second.
const RATE: u32 = 10;
/// The same in the story, which has to end.
const STORY_RATE: u32 = 50;
/// How many labels the story sends, each time.
const STORY_LABELS: u64 = 60;
/// How many labels a publisher has on their way, at most.
const WINDOW: usize = 32;
/// How many labels a worker without bounds asks for at a time.
const MANY: usize = 100;
/// How long a request for labels stands. The worker needs so much longer to stop.
const REQUEST: Duration = Duration::from_secs(1);
/// After this time NATS delivers again what is not acknowledged. Longer than the
/// printer takes for all that is held, and then some.
const ACK_WAIT: Duration = Duration::from_secs(5);

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the labels of the story may take.
const STORY: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => producer(first, last).await,
            _ => return usage(),
        },
        ["worker", file, ref flags @ ..] => {
            let (rate, bounds) = match flags {
                [] => (RATE, Bounds::Set),
                ["--unbounded"] => (RATE, Bounds::None),
                ["--rate", rate] => (rate.parse().unwrap_or(0), Bounds::Set),
                ["--rate", rate, "--unbounded"] => {
                    (rate.parse().unwrap_or(0), Bounds::None)
                }
                _ => return usage(),
            };
            if rate == 0 || rate > 1000 {
                return usage();
            }
            worker_until_signal(file, rate, bounds).await
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bounds {
    Set,
    /// The mistake, to see what it costs.
    None,
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    let waits = send(&jetstream, first, last).await?;
    println!(
        "sent:    label-{first} to label-{last}, waited {waits} times for room"
    );
    client.drain().await?;
    Ok(())
}

// ANCHOR: send
/// Sends labels as fast as the stream stores them. Returns how often it waited
/// for room.
async fn send(jetstream: &jetstream::Context, first: u64, last: u64) -> Result<u32> {
    let mut on_their_way = VecDeque::new();
    let mut waits = 0;
    for number in first..=last {
        if on_their_way.len() == WINDOW {
            waits += 1;
            settle(&mut on_their_way).await?;
        }
        let answer = jetstream.publish(SUBJECT, label(number).into()).await?;
        on_their_way.push_back(answer);
    }
    while !on_their_way.is_empty() {
        settle(&mut on_their_way).await?;
    }
    Ok(waits)
}

/// Waits for the oldest.
async fn settle(on_their_way: &mut VecDeque<PublishAckFuture>) -> Result<()> {
    let oldest = on_their_way.pop_front().context("nothing is on its way")?;
    let stored = oldest.into_future().await;
    stored.context("NATS did not store a label")?;
    Ok(())
}
// ANCHOR_END: send

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(file: &str, rate: u32, bounds: Bounds) -> Result<()> {
    let stop = stop_signal()?;
    let printer = Printer::open(Path::new(file));
    let printer = printer.with_context(|| format!("cannot print to {file}"))?;
    let held = Arc::new(Held::default());
    worker(printer, rate, bounds, &held, stop).await
}

// ANCHOR: worker
async fn worker(
    printer: Printer,
    rate: u32,
    bounds: Bounds,
    held: &Arc<Held>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let consumer = take_labels(&jetstream, bounds).await?;
    println!("ready:   labels from {SUBJECT}, Ctrl-C to stop");
    let room = match bounds {
        Bounds::Set => LOW,
        // As good as none.
        Bounds::None => Semaphore::MAX_PERMITS,
    };
    let (labels, to_print) = mpsc::channel(room);
    let (stop_printer, stopping) = oneshot::channel();
    let print = print(printer, rate, to_print, Arc::clone(held), stopping);
    let printing = tokio::spawn(print);
    let mut request = None;
    tokio::pin!(stop);
    loop {
        tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            () = labels.closed() => break,
            taken = take(&consumer, &labels, held, &mut request) => taken?,
        }
    }
    // Take no more. The request is read to its end: what comes to one that is dropped
    // is nobody's until `ACK_WAIT` is over.
    let mut rest = Vec::new();
    while let Some(request) = &mut request
        && let Some(label) = request.next().await
    {
        rest.push(label.map_err(Error::from_boxed)?);
    }
    // Then finish the label that is begun, and give back the others. While a request is
    // open, what is given back would come to this worker again.
    drop((stop_printer, labels));
    let (count, mut back) = printing.await??;
    for label in rest {
        give_back(&label).await?;
        back += 1;
    }
    client.drain().await?;
    let most = held.most();
    println!("stopped: {count} printed, at most {most} held, {back} given back");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: take
/// Takes a label, if the request has one; otherwise a new request is made the next
/// time. Cancel-safe: what is taken is in the channel at once.
async fn take(
    consumer: &PullConsumer,
    labels: &mpsc::Sender<Message>,
    held: &Held,
    request: &mut Option<pull::Batch>,
) -> Result<()> {
    let open = match request {
        Some(open) => open,
        None => {
            // Waits for room, and leaves it where it is.
            let _room = labels.reserve().await.context("the printer has ended")?;
            let room = (labels.capacity() + 1).min(MANY);
            let asked = consumer.batch().max_messages(room).expires(REQUEST);
            let asked = asked.messages().await;
            request.insert(asked.context(
                "cannot take labels; is the stream or its consumer deleted?",
            )?)
        }
    };
    match open.next().await {
        Some(label) => {
            // First: the printer may be done with it before this task goes on.
            held.take();
            labels.try_send(label.map_err(Error::from_boxed)?)?;
        }
        None => *request = None,
    }
    Ok(())
}

async fn take_labels(
    jetstream: &jetstream::Context,
    bounds: Bounds,
) -> Result<PullConsumer> {
    let stream = declare(jetstream).await?;
    stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // Of all workers together; 1,000 by default.
            max_ack_pending: match bounds {
                Bounds::Set => i64::try_from(HIGH)?,
                Bounds::None => -1,
            },
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the workers")
}
// ANCHOR_END: take

// ANCHOR: print
/// The printer takes a label when it is ready for one, and no sooner. Returns how many
/// it has printed, and how many it has given back.
async fn print(
    printer: Printer,
    rate: u32,
    mut to_print: mpsc::Receiver<Message>,
    held: Arc<Held>,
    mut stopping: oneshot::Receiver<()>,
) -> Result<(u64, u64)> {
    let mut ready = interval(Duration::from_secs(1) / rate);
    // It does not print faster because it had nothing to do for a while.
    ready.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut count, mut back) = (0, 0);
    loop {
        let label = tokio::select! {
            biased;
            _dropped = &mut stopping => break,
            label = async {
                ready.tick().await;
                to_print.recv().await
            } => label,
        };
        let Some(label) = label else { break };
        let name = name(&label.payload);
        block_in_place(|| printer.print(&name)).context("cannot print")?;
        answer_with(&label, AckKind::Ack).await?;
        let now = held.release();
        count += 1;
        // About once a second.
        if count % u64::from(rate) == 0 {
            println!("print:   {count} printed, {now} held");
        }
    }
    to_print.close();
    while let Some(label) = to_print.recv().await {
        give_back(&label).await?;
        held.release();
        back += 1;
    }
    Ok((count, back))
}
// ANCHOR_END: print

async fn give_back(label: &Message) -> Result<()> {
    answer_with(label, AckKind::Nak(None)).await
}

/// Answers a delivery and waits until NATS has the answer.
async fn answer_with(label: &Message, kind: AckKind) -> Result<()> {
    let answered = timeout(PATIENCE, label.double_ack_with(kind)).await;
    answered.context("lost NATS")?.map_err(Error::from_boxed)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STREAM).await;
    declare(&jetstream).await?;
    for bounds in [Bounds::Set, Bounds::None] {
        let waits = send(&jetstream, 1, STORY_LABELS).await?;
        println!("sent:    {STORY_LABELS} labels, waited {waits} times for room");
        let printer = Printer::open(Path::new(":memory:"))?;
        let held = Arc::new(Held::default());
        let all = async {
            let empty = async {
                while held.taken() < STORY_LABELS as usize || held.now() > 0 {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            // What has not come is missed below.
            let _came = timeout(STORY, empty).await;
        };
        worker(printer, STORY_RATE, bounds, &held, all).await?;
        ensure!(
            held.taken() == STORY_LABELS as usize,
            "not all have come; has another worker taken them?"
        );
        judge(bounds, &held);
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

fn judge(bounds: Bounds, held: &Held) {
    let set = match bounds {
        Bounds::Set => "set",
        Bounds::None => "none",
    };
    let than = if held.most() > HIGH {
        "more"
    } else {
        "no more"
    };
    println!("bounds:  {set}, held {than} than {HIGH}");
}

// ---- Stream and connection -------------------------------------------------

async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    let retention = stream::RetentionPolicy::WorkQueue;
    queue(jetstream, STREAM, SUBJECT, retention).await
}

async fn queue(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
    retention: stream::RetentionPolicy,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            retention,
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
    ConnectOptions::new()
        .event_callback(|event| async move {
            // The client connects again by itself.
            if event == Event::Disconnected {
                eprintln!("lost NATS, still trying");
            }
        })
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
