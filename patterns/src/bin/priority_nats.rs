//! Priority: express orders first, and standard ones not last for ever.
//!
//! Teaches: NATS knows no priority of messages; its priority groups are about clients.
//! So each lane is a subject with a consumer of its own, and the worker asks both for
//! their next order. It chooses: express, but after three of them a standard one if one
//! waits. On one subject, or with a batch taken from a lane, an express order waits
//! behind all that was there before; strictly by priority, a standard order waits until
//! express ends.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin priority_nats                              # the whole story
//! cargo run --bin priority_nats place 1 100 standard         # terminal 1
//! cargo run --bin priority_nats worker shipped.db            # terminal 2
//! cargo run --bin priority_nats place 101 110 express        # terminal 1
//! cargo run --bin priority_nats worker shipped.db --rate 50  # a quicker worker
//! cargo run --bin priority_nats place 1 9 express --one-lane # a mistake
//! cargo run --bin priority_nats worker shipped.db --strict   # another
//! cargo run --bin priority_nats worker shipped.db --ahead    # and another
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:   60 standard orders, then 20 express
//! weighted: express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express goes first, and standard goes on
//! placed:   60 standard orders, then 20 express
//! one lane: express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express waits as long as all others
//! placed:   60 standard orders, then 20 express
//! strict:   express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express goes first, and standard stands still
//! ```
//!
//! Left out on purpose: an order that kills its worker, see poison_message_nats; and
//! an order that is shipped twice when a worker is killed, see idempotent_consumer_nats.

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
        consumer::{AckPolicy, pull},
        context::PublishAckFuture,
        message::PublishMessage,
        stream,
    },
};
use futures_lite::{StreamExt as _, future::poll_once};
use patterns::priority::{Desk, Lane, Order, Placement, Report, Rule, Turns};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "DISPATCH";
const EXPRESS: &str = "dispatch.express";
const STANDARD: &str = "dispatch.standard";
const ASIDE: &str = "DISPATCH_ASIDE";
const ASIDE_SUBJECT: &str = "dispatch.aside";
const CONSUMERS: [&str; 2] = ["dispatchers-express", "dispatchers-standard"];
/// After this time NATS delivers again what is not acknowledged. Longer than an order
/// lies in front of a worker that ships others first, each in a second at most.
const ACK_WAIT: Duration = Duration::from_secs(8);
const USAGE: &str = "usage: priority_nats [place FIRST LAST SERVICE [--one-lane] | \
                     worker FILE [--rate ORDERS_A_SECOND] [--strict | --ahead]]";

/// How many orders a worker ships in a second.
const RATE: u32 = 10;
/// The same in the story, which has to end.
const STORY_RATE: u32 = 100;
/// How many orders the story places, each time.
const STORY_STANDARD: u64 = 60;
const STORY_EXPRESS: u64 = 20;
/// How many orders a worker takes from a lane before it looks at the other.
const ONE: usize = 1;
/// The same with `--ahead`.
const MANY: usize = 100;
/// How long it waits for one more of them then.
const ONE_MORE: Duration = Duration::from_millis(100);
/// How many orders are on their way to NATS, at most.
const WINDOW: usize = 100;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the orders of the story may take.
const STORY: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["place", first, last, service, ref flags @ ..] => {
            let lanes = match flags {
                [] => Lanes::Two,
                ["--one-lane"] => Lanes::One,
                _ => return usage(),
            };
            match Placement::parse(first, last, service) {
                Some(placement) => place(&placement, lanes).await,
                None => return usage(),
            }
        }
        ["worker", file, ref flags @ ..] => {
            let (rate, flags) = match flags {
                ["--rate", rate, flags @ ..] => (rate.parse().unwrap_or(0), flags),
                flags => (RATE, flags),
            };
            let (rule, ahead) = match flags {
                [] => (Rule::Weighted, ONE),
                ["--strict"] => (Rule::Strict, ONE),
                ["--ahead"] => (Rule::Weighted, MANY),
                _ => return usage(),
            };
            if rate == 0 || rate > 1000 {
                return usage();
            }
            worker_until_signal(file, rate, rule, ahead).await
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
enum Lanes {
    Two,
    /// The mistake, to see what it costs: all orders in that of the standard ones.
    One,
}

// ---- Placing orders --------------------------------------------------------

async fn place(placement: &Placement, lanes: Lanes) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    send(&jetstream, placement, lanes).await?;
    println!("placed:   {placement}");
    client.drain().await?;
    Ok(())
}

// ANCHOR: send
/// Stores orders in their lane. The stream has these two subjects and no others: of
/// `dispatch.*` it would keep what no consumer reads, and nobody would see it.
async fn send(
    jetstream: &jetstream::Context,
    placement: &Placement,
    lanes: Lanes,
) -> Result<()> {
    let subject = match (lanes, Lane::of(&placement.service)) {
        (Lanes::Two, Lane::Express) => EXPRESS,
        (Lanes::Two, Lane::Standard) | (Lanes::One, _) => STANDARD,
    };
    let mut on_their_way = VecDeque::new();
    for order in placement.orders() {
        if on_their_way.len() == WINDOW {
            settle(&mut on_their_way).await?;
        }
        let answer = jetstream.publish(subject, order.write()?.into()).await?;
        on_their_way.push_back(answer);
    }
    while !on_their_way.is_empty() {
        settle(&mut on_their_way).await?;
    }
    Ok(())
}
// ANCHOR_END: send

/// Waits for the oldest.
async fn settle(on_their_way: &mut VecDeque<PublishAckFuture>) -> Result<()> {
    let oldest = on_their_way.pop_front().context("nothing is on its way")?;
    let stored = oldest.into_future().await;
    stored.context("NATS did not store an order")?;
    Ok(())
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(
    file: &str,
    rate: u32,
    rule: Rule,
    ahead: usize,
) -> Result<()> {
    let stop = stop_signal()?;
    let desk = Desk::open(Path::new(file));
    let desk = desk.with_context(|| format!("cannot keep the book {file}"))?;
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let lanes = Both::open(&jetstream, rule, ahead).await?;
    println!("ready:    orders from {EXPRESS} and {STANDARD}, Ctrl-C to stop");
    let say = |line| println!("{line}");
    worker(lanes, &jetstream, &desk, rate, say, stop).await?;
    client.drain().await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
async fn worker(
    mut lanes: Both,
    jetstream: &jetstream::Context,
    desk: &Desk,
    rate: u32,
    say: impl Fn(String),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    tokio::pin!(stop);
    loop {
        let message = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            next = lanes.next() => next?,
        };
        // Begun, it is finished: also after a Ctrl-C.
        match Order::read(&message.payload) {
            Ok(order) => {
                sleep(Duration::from_secs(1) / rate).await;
                block_in_place(|| desk.ship(&order)).context("cannot ship")?;
                answer_with(&message, AckKind::Ack).await?;
                say(format!("shipped:  {}, {}", order.id, order.service));
            }
            Err(error) => {
                let reason = format!("no order: {error}");
                set_aside(jetstream, &message, &reason).await?;
                let bytes = message.payload.len();
                say(format!("aside:    {bytes} bytes, {reason}"));
            }
        }
    }
    lanes.close().await
}
// ANCHOR_END: worker

// ANCHOR: both
/// Both lanes, and whose turn it is.
struct Both {
    express: Line,
    standard: Line,
    turns: Turns,
    /// What is taken from a lane at a time: one order, or the mistake.
    ahead: usize,
    taken: VecDeque<Message>,
}

impl Both {
    /// The next order, as soon as there is one. Cancel-safe: what has come is in a
    /// field of `self` at once.
    async fn next(&mut self) -> Result<Message> {
        loop {
            // Also before the last one that is taken is returned: the next one of that
            // lane comes while it is shipped.
            self.look().await?;
            if let Some(order) = self.taken.pop_front() {
                return Ok(order);
            }
            let express = self.express.next.is_some();
            let standard = self.standard.next.is_some();
            if let Some(lane) = self.turns.next(express, standard) {
                self.take(lane).await?;
                continue;
            }
            // Both are empty, so the first order that comes is the next one.
            tokio::select! {
                filled = self.express.fill() => filled?,
                filled = self.standard.fill() => filled?,
            }
        }
    }

    /// What is there by now. Not waited for: that would stop the other lane. And to
    /// look is to ask, as NATS sends no order that nobody has asked for.
    async fn look(&mut self) -> Result<()> {
        for line in [&mut self.express, &mut self.standard] {
            poll_once(line.fill()).await.transpose()?;
        }
        Ok(())
    }

    /// Takes an order of a lane, or as many as `ahead` says, if they come.
    async fn take(&mut self, lane: Lane) -> Result<()> {
        let line = match lane {
            Lane::Express => &mut self.express,
            Lane::Standard => &mut self.standard,
        };
        self.taken.extend(line.next.take());
        while self.taken.len() < self.ahead {
            match timeout(ONE_MORE, line.fill()).await {
                Ok(filled) => filled?,
                Err(_elapsed) => break,
            }
            self.taken.extend(line.next.take());
        }
        Ok(())
    }
}

/// A lane, and the order at its head.
struct Line {
    orders: pull::Stream,
    next: Option<Message>,
}

impl Line {
    /// Waits for the next order, unless there is one.
    async fn fill(&mut self) -> Result<()> {
        if self.next.is_none() {
            let order = self.orders.next().await;
            let order = order.context("NATS ended the deliveries")?;
            let deleted =
                "cannot take orders; is the stream or its consumer deleted?";
            self.next = Some(order.context(deleted)?);
        }
        Ok(())
    }
}
// ANCHOR_END: both

impl Both {
    async fn open(
        jetstream: &jetstream::Context,
        rule: Rule,
        ahead: usize,
    ) -> Result<Self> {
        let stream = declare(jetstream).await?;
        let [express, standard] = CONSUMERS;
        Ok(Self {
            express: Line::open(&stream, EXPRESS, express, ahead).await?,
            standard: Line::open(&stream, STANDARD, standard, ahead).await?,
            turns: Turns::new(rule),
            ahead,
            taken: VecDeque::new(),
        })
    }

    /// Asks for no more, and gives back what is not shipped.
    async fn close(mut self) -> Result<()> {
        // What came while the last one was shipped.
        self.look().await?;
        let Self {
            express,
            standard,
            mut taken,
            ..
        } = self;
        for line in [express, standard] {
            // Dropped, its requests are gone: what is given back does not come here.
            drop(line.orders);
            taken.extend(line.next);
        }
        for order in taken {
            answer_with(&order, AckKind::Nak(None)).await?;
        }
        Ok(())
    }
}

impl Line {
    // ANCHOR: open
    async fn open(
        stream: &stream::Stream,
        subject: &str,
        consumer: &str,
        ahead: usize,
    ) -> Result<Self> {
        let consumer = stream
            .create_consumer(pull::Config {
                durable_name: Some(consumer.to_owned()),
                filter_subject: subject.to_owned(),
                ack_policy: AckPolicy::Explicit,
                ack_wait: ACK_WAIT,
                ..pull::Config::default()
            })
            .await
            .context("cannot make a consumer of the workers")?;
        // 200 by default: out of reach for other workers, and for `ACK_WAIT`.
        let orders = consumer.stream().max_messages_per_batch(ahead);
        Ok(Self {
            orders: orders.messages().await?,
            next: None,
        })
    }
    // ANCHOR_END: open
}

/// Answers a delivery and waits until NATS has the answer.
async fn answer_with(order: &Message, kind: AckKind) -> Result<()> {
    let answered = timeout(PATIENCE, order.double_ack_with(kind)).await;
    answered.context("lost NATS")?.map_err(Error::from_boxed)
}

/// Stored there first, then ended here. Killed in between, the next worker stores it
/// again; NATS knows the id and keeps one, within two minutes.
async fn set_aside(
    jetstream: &jetstream::Context,
    message: &Message,
    reason: &str,
) -> Result<()> {
    let info = message.info().map_err(Error::from_boxed)?;
    let sequence = info.stream_sequence;
    // The time as well: a stream that is made anew counts from 1 again.
    let time = info.published.unix_timestamp_nanos();
    let copy = PublishMessage::build()
        // The bytes as they came: what was not understood is not written anew.
        .payload(message.payload.clone())
        .message_id(format!("{STREAM}.{sequence}.{time}"))
        .header("Origin-Stream", STREAM)
        .header("Origin-Subject", message.subject.as_str())
        .header("Origin-Sequence", sequence.to_string())
        .header("Reason", reason);
    jetstream
        .send_publish(ASIDE_SUBJECT, copy)
        .await?
        .await
        .context("cannot set aside; the message stays in its lane")?;
    answer_with(message, AckKind::Term).await
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STREAM).await;
    declare(&jetstream).await?;
    for (name, lanes, rule) in [
        ("weighted:", Lanes::Two, Rule::Weighted),
        ("one lane:", Lanes::One, Rule::Weighted),
        ("strict:", Lanes::Two, Rule::Strict),
    ] {
        let all = STORY_STANDARD + STORY_EXPRESS;
        let standard = Placement::new(1..=STORY_STANDARD, "standard");
        let express = Placement::new(STORY_STANDARD + 1..=all, "express");
        for placement in [standard, express] {
            send(&jetstream, &placement, lanes).await?;
        }
        println!(
            "placed:   {STORY_STANDARD} standard orders, then {STORY_EXPRESS} express"
        );
        let desk = Desk::open(Path::new(":memory:"))?;
        let both = Both::open(&jetstream, rule, ONE).await?;
        // What has not come is missed below.
        let stop = async {
            let _came = timeout(STORY, all_shipped(&desk, all)).await;
        };
        worker(both, &jetstream, &desk, STORY_RATE, drop, stop).await?;
        let shipped = desk.shipped()?;
        ensure!(
            shipped.len() as u64 == all,
            "{} of {all} orders have come; has another worker taken the rest?",
            shipped.len()
        );
        let report = Report::of(&shipped);
        println!("{name:9} {report}\nso:       {}", report.verdict());
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

async fn all_shipped(desk: &Desk, all: u64) {
    // One that cannot be read ends by itself.
    while desk.count().map_or(all, u64::from) < all {
        sleep(Duration::from_millis(20)).await;
    }
}

// ---- Streams and connection ------------------------------------------------

/// Declares the stream of both lanes, and before it that for what is no order.
async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    let limits = stream::RetentionPolicy::Limits;
    queue(jetstream, ASIDE, &[ASIDE_SUBJECT], limits).await?;
    let work_queue = stream::RetentionPolicy::WorkQueue;
    queue(jetstream, STREAM, &[EXPRESS, STANDARD], work_queue).await
}

async fn queue(
    jetstream: &jetstream::Context,
    stream: &str,
    subjects: &[&str],
    retention: stream::RetentionPolicy,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: subjects.iter().map(|&it| it.to_owned()).collect(),
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
