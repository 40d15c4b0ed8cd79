//! Splitter and aggregator: an order in pieces, and one result for it.
//!
//! Teaches: a splitter cuts an order into lines, workers reserve them, and an
//! aggregator makes one result of the answers, by the numbers of the lines and not by
//! their count. The answers go to a consumer with `max_ack_pending` of 1, which keeps
//! their order also when an aggregator dies. The deadline of an order is a row; when
//! it has passed, the aggregator sends itself a reminder behind all answers in the
//! stream. Answer, end and result are one transaction, and the ack comes after it.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin splitter_aggregator_nats                       # the whole story
//! cargo run --bin splitter_aggregator_nats splitter              # terminal 1
//! cargo run --bin splitter_aggregator_nats worker ann            # terminal 2
//! cargo run --bin splitter_aggregator_nats worker bob            # terminal 3
//! cargo run --bin splitter_aggregator_nats aggregator orders.db  # terminal 4
//! cargo run --bin splitter_aggregator_nats order 1 20            # kill one
//! cargo run --bin splitter_aggregator_nats order 21 30 --within 500
//! cargo run --bin splitter_aggregator_nats show orders.db
//! cargo run --bin splitter_aggregator_nats aggregator orders.db --count-answers
//! cargo run --bin splitter_aggregator_nats aggregator --in-memory
//! ```
//!
//! Expected output:
//!
//! ```text
//! order-1    opened                     0 of 3
//! order-1    line 1: reserved           1 of 3
//! order-1    line 2: reserved           2 of 3
//! order-1    line 3: reserved           complete, reserved: 1 2 3
//! order-2    opened                     0 of 2
//! order-2    opened, again              0 of 2
//! order-2    line 1: reserved           1 of 2
//! order-2    line 2: reserved           complete, reserved: 1 2
//! order-2    line 1: reserved, again    complete
//! order-2    line 2: reserved, again    complete
//! order-3    opened                     0 of 4
//! order-3    line 1: reserved           1 of 4
//! order-3    line 2: sold out           2 of 4
//! order-3    line 3: reserved           3 of 4
//! order-3    deadline                   timeout, reserved: 1 3, sold out: 2, missing: 4
//! order-3    line 4: reserved, too late timeout
//! results:   order-1 complete, order-2 complete, order-3 timeout
//! ```
//!
//! Left out on purpose: the stock. A worker that is killed reserves a line again, so
//! its table has to know the line, as in idempotent_consumer_nats; and what was
//! reserved for an order that has timed out has to be released, as in
//! saga_orchestration_nats.

use std::{
    env,
    future::Future,
    num::NonZeroU32,
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
    Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, ServerAddr,
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        stream,
    },
};
use bytes::Bytes;
use futures_lite::StreamExt as _;
use patterns::splitter_aggregator::{
    self as shop, Label, Orders, Place as To, Report, Rule, Taken, Word, basket,
    header, json, now,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
/// Where everybody meets: a stream, and in it the subjects `basket.orders`, and so on.
const SHOP: Place = Place {
    stream: "BASKET",
    subject: "basket",
};
/// The story has a stream of its own, which it deletes.
const STORY: Place = Place {
    stream: "BASKET_STORY",
    subject: "basket-story",
};
/// Where orders wait for the splitter.
const ORDERS: &str = "orders";
/// Where lines wait for the workers.
const LINES: &str = "lines";
/// Where the aggregator hears of orders, answers and deadlines.
const ANSWERS: &str = "answers";
const RESULTS: &str = "results";
/// What nobody can read, as it came, with the reason in a header.
const ASIDE: &str = "aside";
/// How many messages may be on their way to a program. Few, so that there is
/// something left for the other workers.
const PREFETCH: usize = 5;
/// After this time NATS delivers again what is not acknowledged. A multiple of the
/// time that a message takes.
const ACK_WAIT: Duration = Duration::from_secs(1);
/// How many messages are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long a customer waits, unless `--within` says otherwise.
const WITHIN: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: splitter_aggregator_nats [order FIRST [LAST] \
                     [--within MS] | splitter | worker NAME | \
                     aggregator FILE|--in-memory [--count-answers] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

struct Place {
    stream: &'static str,
    subject: &'static str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let Some(result) = run(&words).await else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing if the words say nothing that there is.
async fn run(words: &[&str]) -> Option<Result<()>> {
    let result = match *words {
        [] => story().await,
        ["order", ref words @ ..] => {
            let (first, last, within) = to_place(words)?;
            place(first, last, within).await
        }
        ["splitter"] => splitter().await,
        ["worker", name] if is_a_name(name) => worker(name).await,
        ["aggregator", file] => aggregator(file, Rule::EachLineAnswered).await,
        ["aggregator", file, "--count-answers"] => {
            aggregator(file, Rule::EnoughAnswers).await
        }
        ["show", file] => show(file),
        _ => return None,
    };
    Some(result)
}

/// Which orders, and how long their customers wait.
fn to_place(words: &[&str]) -> Option<(u64, u64, Duration)> {
    let (words, within) = match *words {
        [ref words @ .., "--within", milliseconds] => {
            let within: NonZeroU32 = milliseconds.parse().ok()?;
            (words, Duration::from_millis(within.get().into()))
        }
        ref words => (words, WITHIN),
    };
    let (first, last) = match *words {
        [number] => (number, number),
        [first, last] => (first, last),
        _ => return None,
    };
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last, within))
}

fn is_a_name(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|it| it.is_ascii_alphanumeric())
}

// ---- Orders ----------------------------------------------------------------

async fn place(first: u64, last: u64, within: Duration) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, &SHOP).await?;
    for number in first..=last {
        let order = place_one(&jetstream, &SHOP, number, within).await?;
        println!("placed:    {order}");
    }
    client.drain().await?;
    Ok(())
}

async fn place_one(
    jetstream: &jetstream::Context,
    place: &Place,
    number: u64,
    within: Duration,
) -> Result<String> {
    let within = i64::try_from(within.as_millis())?;
    let basket = basket(number, now().saturating_add(within));
    let headers = HeaderMap::new();
    publish(jetstream, place, ORDERS, headers, json(&basket).into()).await?;
    Ok(basket.order)
}

/// Prints how far each order is. No broker is needed for it.
fn show(file: &str) -> Result<()> {
    ensure!(Path::new(file).exists(), "there is no file {file}");
    for report in open(file, Rule::EachLineAnswered)?.all()? {
        println!("{:<10} {report}", report.order);
    }
    Ok(())
}

// ---- Splitter --------------------------------------------------------------

// ANCHOR: splitter
async fn splitter() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut orders = consume(&jetstream, &SHOP, ORDERS).await?;
    println!("ready:     orders, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = orders.next() => received(delivery)?,
        };
        match split(&jetstream, &SHOP, &delivery).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&jetstream, &SHOP, &delivery, &reason).await?,
        }
        acknowledge(&delivery).await?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Sends the lines of an order; afterwards it is acknowledged. If the program ends
/// before, the order comes again, and its lines are there twice.
async fn split(
    jetstream: &jetstream::Context,
    place: &Place,
    delivery: &jetstream::Message,
) -> Result<Result<String, String>> {
    let split = match shop::split(&delivery.payload) {
        Ok(split) => split,
        Err(reason) => return Ok(Err(reason)),
    };
    // First, so that its deadline runs whatever becomes of the lines.
    let (label, payload) = &split.opened;
    send(jetstream, place, ANSWERS, label, payload).await?;
    for (label, payload) in &split.lines {
        send(jetstream, place, LINES, label, payload).await?;
    }
    let lines = split.lines.len();
    Ok(Ok(format!("{:<10} {lines} lines", label.order)))
}
// ANCHOR_END: splitter

// ---- Worker ----------------------------------------------------------------

async fn worker(name: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut lines = consume(&jetstream, &SHOP, LINES).await?;
    println!("ready:     lines for {name}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            delivery = lines.next() => received(delivery)?,
        };
        match work(&jetstream, &SHOP, &delivery).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&jetstream, &SHOP, &delivery, &reason).await?,
        }
        acknowledge(&delivery).await?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
/// Reserves a line and sends the answer; afterwards the line is acknowledged.
async fn work(
    jetstream: &jetstream::Context,
    place: &Place,
    delivery: &jetstream::Message,
) -> Result<Result<String, String>> {
    let (label, answer) = match shop::work(label(delivery), &delivery.payload) {
        Ok(worked) => worked,
        Err(reason) => return Ok(Err(reason)),
    };
    let payload = Word::Answered(answer).to_json();
    send(jetstream, place, ANSWERS, &label, &payload).await?;
    let line = label.line.unwrap_or_default();
    Ok(Ok(format!("{:<10} line {line}: {answer}", label.order)))
}
// ANCHOR_END: worker

// ---- Aggregator ------------------------------------------------------------

// ANCHOR: aggregator
async fn aggregator(file: &str, rule: Rule) -> Result<()> {
    let mut orders = open(file, rule)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut answers = consume(&jetstream, &SHOP, ANSWERS).await?;
    println!("ready:     answers, Ctrl-C to stop");
    loop {
        // First what a dead aggregator has left.
        send_waiting(&jetstream, &SHOP, &mut orders).await?;
        // A database blocks its thread.
        let wait = block_in_place(|| orders.wait(now()))?;
        if wait.is_zero() {
            block_in_place(|| orders.remind(now()))?;
            continue;
        }
        tokio::select! {
            biased;
            () = &mut stop_signal => break,
            delivery = answers.next() => {
                let delivery = received(delivery)?;
                take(&jetstream, &SHOP, &mut orders, &delivery).await?;
                acknowledge(&delivery).await?;
            }
            () = sleep(wait) => {} // until a deadline has passed
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the tables; afterwards it is acknowledged. If the program
/// ends in between, it comes again and changes nothing.
async fn take(
    jetstream: &jetstream::Context,
    place: &Place,
    orders: &mut Orders,
    delivery: &jetstream::Message,
) -> Result<()> {
    let taken = block_in_place(|| orders.take(label(delivery), &delivery.payload))
        .context("cannot write down what has come, it will come again")?;
    match taken {
        Taken::Noted(entry) => println!("{entry}"),
        Taken::SetAside(reason) => {
            set_aside(jetstream, place, delivery, &reason).await?;
        }
    }
    Ok(())
}
// ANCHOR_END: aggregator

// ANCHOR: send
/// Sends what is in the outbox: results, and reminders to the aggregator itself.
async fn send_waiting(
    jetstream: &jetstream::Context,
    place: &Place,
    orders: &mut Orders,
) -> Result<()> {
    loop {
        let waiting = block_in_place(|| orders.waiting(BATCH))?;
        if waiting.is_empty() {
            return Ok(());
        }
        for post in waiting {
            let to = match post.to {
                To::Results => RESULTS,
                To::Answers => ANSWERS,
            };
            send(jetstream, place, to, &post.label, &post.payload).await?;
            // If the program ends before this line, it is sent again.
            block_in_place(|| orders.cross_off(&post))?;
        }
    }
}
// ANCHOR_END: send

fn open(file: &str, rule: Rule) -> Result<Orders> {
    // The mistake, to see what it costs: forgets when it is killed.
    let path = if file == "--in-memory" {
        ":memory:"
    } else {
        file
    };
    Orders::open(Path::new(path), rule).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let mut story = Story::begin(jetstream::new(client.clone())).await?;
    story.place(1).await?;
    story.split(1).await?;
    story.work(3).await?;
    story.gather(4).await?;

    // The splitter dies before its ack, and the order comes again.
    story.place(2).await?;
    story.split(2).await?;
    story.work(4).await?;
    story.gather(6).await?;

    // Nobody takes the last line of four, until the customer has gone.
    story.place(3).await?;
    story.split(1).await?;
    story.work(3).await?;
    story.gather(4).await?;
    story.remind().await?;
    story.gather(1).await?;
    story.work(1).await?;
    story.gather(1).await?;
    story.show_results().await?;
    client.drain().await?;
    Ok(())
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    jetstream: jetstream::Context,
    orders: Orders,
    baskets: pull::Stream,
    lines: pull::Stream,
    answers: pull::Stream,
    results: pull::Stream,
}

impl Story {
    async fn begin(jetstream: jetstream::Context) -> Result<Self> {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(STORY.stream).await;
        Ok(Self {
            orders: open("--in-memory", Rule::EachLineAnswered)?,
            baskets: consume(&jetstream, &STORY, ORDERS).await?,
            lines: consume(&jetstream, &STORY, LINES).await?,
            answers: consume(&jetstream, &STORY, ANSWERS).await?,
            results: consume(&jetstream, &STORY, RESULTS).await?,
            jetstream,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let within = Duration::from_secs(1);
        place_one(&self.jetstream, &STORY, number, within).await?;
        Ok(())
    }

    /// Splits the next order, so many times.
    async fn split(&mut self, times: u32) -> Result<()> {
        let delivery = next(&mut self.baskets).await?;
        for _time in 0..times {
            let said = split(&self.jetstream, &STORY, &delivery).await?;
            said.map_err(|reason| anyhow!(reason))?;
        }
        acknowledge(&delivery).await
    }

    async fn work(&mut self, lines: u32) -> Result<()> {
        for _line in 0..lines {
            let delivery = next(&mut self.lines).await?;
            let said = work(&self.jetstream, &STORY, &delivery).await?;
            said.map_err(|reason| anyhow!(reason))?;
            acknowledge(&delivery).await?;
        }
        Ok(())
    }

    async fn gather(&mut self, messages: u32) -> Result<()> {
        for _message in 0..messages {
            let delivery = next(&mut self.answers).await?;
            take(&self.jetstream, &STORY, &mut self.orders, &delivery).await?;
            acknowledge(&delivery).await?;
        }
        send_waiting(&self.jetstream, &STORY, &mut self.orders).await
    }

    /// Waits for the deadline.
    async fn remind(&mut self) -> Result<()> {
        sleep(self.orders.wait(now())?).await;
        self.orders.remind(now())?;
        send_waiting(&self.jetstream, &STORY, &mut self.orders).await
    }

    async fn show_results(&mut self) -> Result<()> {
        let mut results = Vec::new();
        for _result in 0..3 {
            let delivery = next(&mut self.results).await?;
            let report: Report = serde_json::from_slice(&delivery.payload)?;
            results.push(report.summary());
            acknowledge(&delivery).await?;
        }
        println!("results:   {}", results.join(", "));
        Ok(())
    }
}
// ANCHOR_END: story

async fn next(deliveries: &mut pull::Stream) -> Result<jetstream::Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    received(delivery.context("nothing came; has another taken it?")?)
}

// ---- Stream and connection -------------------------------------------------

// ANCHOR: declare
/// Declares the stream. A message stays in it until who it is for has acknowledged it.
async fn declare(
    jetstream: &jetstream::Context,
    place: &Place,
) -> Result<stream::Stream> {
    let Place { stream, subject } = place;
    jetstream
        .create_stream(stream::Config {
            name: (*stream).to_owned(),
            subjects: vec![format!("{subject}.*")],
            retention: stream::RetentionPolicy::WorkQueue,
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

/// What comes for a program, also what came while it was down.
async fn consume(
    jetstream: &jetstream::Context,
    place: &Place,
    name: &str,
) -> Result<pull::Stream> {
    let stream = declare(jetstream, place).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(name.to_owned()),
            filter_subject: format!("{}.{name}", place.subject),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // One after the other: what a dead aggregator had comes again before
            // anything that is behind it, and a reminder ends no order too early.
            max_ack_pending: if name == ANSWERS { 1 } else { 1_000 },
            ..pull::Config::default()
        })
        .await
        .with_context(|| format!("cannot make the consumer {name}"))?;
    let deliveries = consumer
        .stream()
        .max_messages_per_batch(PREFETCH)
        .messages();
    Ok(deliveries.await?)
}
// ANCHOR_END: declare

// ANCHOR: publish
/// Sends what is about an order, with its label in the headers.
async fn send(
    jetstream: &jetstream::Context,
    place: &Place,
    name: &str,
    label: &Label,
    payload: &[u8],
) -> Result<()> {
    let mut headers = HeaderMap::new();
    for (name, value) in label.headers() {
        headers.insert(name, value);
    }
    if name == RESULTS {
        // There is one result for an order: one that is sent once more within two
        // minutes is dropped. Not so the others, which may be sent again on purpose.
        headers.insert(async_nats::header::NATS_MESSAGE_ID, label.order.as_str());
    }
    publish(jetstream, place, name, headers, payload.to_vec().into()).await
}

/// Returns when NATS has stored the message.
async fn publish(
    jetstream: &jetstream::Context,
    place: &Place,
    name: &str,
    headers: HeaderMap,
    payload: Bytes,
) -> Result<()> {
    let subject = format!("{}.{name}", place.subject);
    // Two awaits: the first hands the message to the connection, the second waits
    // for the answer of the stream.
    let stored = jetstream
        .publish_with_headers(subject, headers, payload)
        .await?;
    let stored = stored.await;
    stored.with_context(|| format!("NATS did not store it for {name}"))?;
    Ok(())
}
// ANCHOR_END: publish

/// Keeps what nobody can read, as it came, where a person can look at it. It is
/// acknowledged after that: nothing behind it waits for it.
async fn set_aside(
    jetstream: &jetstream::Context,
    place: &Place,
    delivery: &jetstream::Message,
    reason: &str,
) -> Result<()> {
    let mut headers = delivery.headers.clone().unwrap_or_default();
    headers.insert(header::REASON, reason);
    let payload = delivery.payload.clone();
    publish(jetstream, place, ASIDE, headers, payload).await?;
    eprintln!("set aside: {reason}");
    Ok(())
}

/// The label of a message, or what is wrong with it.
fn label(delivery: &jetstream::Message) -> Result<Label, String> {
    Label::read(|name| {
        let value = delivery.headers.as_ref()?.get(name)?;
        Some(value.as_str().to_owned())
    })
}

fn received(
    delivery: Option<Result<jetstream::Message, pull::MessagesError>>,
) -> Result<jetstream::Message> {
    delivery
        .context("NATS ended the deliveries")?
        .context("cannot read on; is the stream or its consumer deleted?")
}

/// Returns when NATS knows of it.
async fn acknowledge(delivery: &jetstream::Message) -> Result<()> {
    let acknowledged = delivery.double_ack().await.map_err(Error::from_boxed);
    acknowledged.context("lost NATS; what is not acknowledged will come again")
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
        // The client connects again by itself, and would do so in silence.
        .event_callback(|event| async move {
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
