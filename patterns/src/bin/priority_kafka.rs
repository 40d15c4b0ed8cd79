//! Priority: express orders first, and standard ones not last for ever.
//!
//! Teaches: Kafka knows no priority within a topic, so each lane is a topic, and the
//! worker has a consumer for each. It holds the next order of both and chooses: express,
//! but after three of them a standard one if one waits. Each lane is committed by
//! itself, after the work. In one topic, or with a batch taken from a lane, an express
//! order waits behind all that was there before; strictly by priority, a standard order
//! waits until express ends.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin priority_kafka                              # the whole story
//! cargo run --bin priority_kafka place 1 100 standard         # terminal 1
//! cargo run --bin priority_kafka worker shipped.db            # terminal 2
//! cargo run --bin priority_kafka place 101 110 express        # terminal 1
//! cargo run --bin priority_kafka worker shipped.db --rate 50  # a quicker worker
//! cargo run --bin priority_kafka place 1 9 express --one-lane # a mistake
//! cargo run --bin priority_kafka worker shipped.db --strict   # another
//! cargo run --bin priority_kafka worker shipped.db --ahead    # and another
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
//! Left out on purpose: an order that kills its worker, see poison_message_kafka; and
//! an order that is shipped twice when a worker is killed, see
//! idempotent_consumer_kafka.

use std::{
    collections::{HashMap, VecDeque},
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

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::future::poll_once;
use patterns::priority::{Desk, Lane, Order, Placement, Report, Rule, Turns};
use rdkafka::{
    ClientConfig, Message,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, OwnedHeaders, OwnedMessage},
    producer::{DeliveryFuture, FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const EXPRESS: &str = "dispatch-express";
const STANDARD: &str = "dispatch-standard";
const ASIDE: &str = "dispatch-aside";
const TOPICS: [&str; 3] = [EXPRESS, STANDARD, ASIDE];
/// So many workers, at most. The same in both lanes, so that each has a part of both.
const PARTITIONS: i32 = 2;
/// A group for each lane: in one, a worker's two consumers would share out the
/// partitions of both between them.
const GROUPS: [&str; 2] = ["dispatchers-express", "dispatchers-standard"];
const STORY_GROUPS: [&str; 2] =
    ["dispatchers-express-story", "dispatchers-standard-story"];
const USAGE: &str = "usage: priority_kafka [place FIRST LAST SERVICE [--one-lane] | \
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
/// How many orders are on their way to Kafka, at most.
const WINDOW: usize = 500;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the orders of the story may take: a new group has to find its members.
const STORY: Duration = Duration::from_secs(40);

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
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    send(&producer(&brokers)?, placement, lanes, &mut Begin::new()).await?;
    println!("placed:   {placement}");
    Ok(())
}

/// The first offset that counts, in each partition of each lane.
type Begin = HashMap<(String, i32), i64>;

// ANCHOR: send
/// Stores orders in their lane, and notes where the first of them are.
async fn send(
    producer: &FutureProducer,
    placement: &Placement,
    lanes: Lanes,
    begin: &mut Begin,
) -> Result<()> {
    let topic = match lanes {
        Lanes::Two => topic(Lane::of(&placement.service)),
        Lanes::One => STANDARD,
    };
    let mut on_their_way = VecDeque::new();
    for order in placement.orders() {
        if on_their_way.len() == WINDOW {
            settle(&mut on_their_way, topic, begin).await?;
        }
        let payload = order.write()?;
        let record = FutureRecord::to(topic).key(&order.id).payload(&payload);
        let queued = producer
            .send_result(record)
            .map_err(|(error, _record)| anyhow!("not sent to {topic}: {error}"))?;
        on_their_way.push_back(queued);
    }
    while !on_their_way.is_empty() {
        settle(&mut on_their_way, topic, begin).await?;
    }
    Ok(())
}
// ANCHOR_END: send

fn topic(lane: Lane) -> &'static str {
    match lane {
        Lane::Express => EXPRESS,
        Lane::Standard => STANDARD,
    }
}

/// Waits for the oldest.
async fn settle(
    on_their_way: &mut VecDeque<DeliveryFuture>,
    topic: &str,
    begin: &mut Begin,
) -> Result<()> {
    let oldest = on_their_way.pop_front().context("nothing is on its way")?;
    let stored = oldest.await.context("the producer has ended")?;
    let stored = stored.map_err(|(error, _order)| {
        anyhow!("Kafka did not store an order: {error}")
    })?;
    let partition = (topic.to_owned(), stored.partition);
    let first = begin.entry(partition).or_insert(stored.offset);
    *first = stored.offset.min(*first);
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
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
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let lanes = Both::open(&brokers, GROUPS, rule, ahead, None)?;
    println!("ready:    orders from {EXPRESS} and {STANDARD}, Ctrl-C to stop");
    let say = |line| println!("{line}");
    worker(lanes, &brokers, &desk, rate, say, stop).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
async fn worker(
    mut lanes: Both,
    brokers: &str,
    desk: &Desk,
    rate: u32,
    say: impl Fn(String),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let producer = producer(brokers)?;
    tokio::pin!(stop);
    loop {
        let (lane, record) = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            next = lanes.next() => next?,
        };
        // Begun, it is finished: also after a Ctrl-C.
        match Order::read(record.payload().unwrap_or_default()) {
            Ok(order) => {
                sleep(Duration::from_secs(1) / rate).await;
                block_in_place(|| desk.ship(&order)).context("cannot ship")?;
                say(format!("shipped:  {}, {}", order.id, order.service));
            }
            Err(error) => {
                let reason = format!("no order: {error}");
                set_aside(&producer, &record, &reason).await?;
                let bytes = record.payload().unwrap_or_default().len();
                say(format!("aside:    {bytes} bytes, {reason}"));
            }
        }
        lanes.of(lane).store(&record);
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
    taken: VecDeque<(Lane, OwnedMessage)>,
}

impl Both {
    /// The next order, as soon as there is one. Cancel-safe: what is taken from Kafka
    /// is in a field of `self` at once.
    async fn next(&mut self) -> Result<(Lane, OwnedMessage)> {
        loop {
            if let Some(order) = self.taken.pop_front() {
                return Ok(order);
            }
            // What is there by now. Not waited for: that would stop the other lane.
            for line in [&mut self.express, &mut self.standard] {
                poll_once(line.fill()).await.transpose()?;
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

    /// Takes an order of a lane, or as many as `ahead` says, if they come.
    async fn take(&mut self, lane: Lane) -> Result<()> {
        let first = self.of(lane).next.take();
        self.taken.extend(first.map(|order| (lane, order)));
        while self.taken.len() < self.ahead {
            match timeout(ONE_MORE, self.of(lane).fill()).await {
                Ok(filled) => filled?,
                Err(_elapsed) => break,
            }
            let order = self.of(lane).next.take();
            self.taken.extend(order.map(|order| (lane, order)));
        }
        Ok(())
    }
}
// ANCHOR_END: both

impl Both {
    fn open(
        brokers: &str,
        [express, standard]: [&str; 2],
        rule: Rule,
        ahead: usize,
        begin: Option<&Begin>,
    ) -> Result<Self> {
        Ok(Self {
            express: Line::open(brokers, EXPRESS, express, begin)?,
            standard: Line::open(brokers, STANDARD, standard, begin)?,
            turns: Turns::new(rule),
            ahead,
            taken: VecDeque::new(),
        })
    }

    fn of(&mut self, lane: Lane) -> &mut Line {
        match lane {
            Lane::Express => &mut self.express,
            Lane::Standard => &mut self.standard,
        }
    }

    /// What is taken and not shipped is not committed, so it comes again.
    async fn close(self) -> Result<()> {
        self.express.close().await?;
        self.standard.close().await
    }
}

// ANCHOR: line
/// A lane, and the order at its head.
struct Line {
    consumer: StreamConsumer,
    next: Option<OwnedMessage>,
    /// In the story: what others have left is no part of it.
    begin: Option<Begin>,
    lost: bool,
}

impl Line {
    /// Waits for the next order, unless there is one.
    ///
    /// Kafka is polled only when no order of this lane is in hand, and a rebalance
    /// waits for a poll: so it takes no order away that is about to be shipped. And as
    /// each lane has its turn, each is polled often enough to stay in its group
    /// (`max.poll.interval.ms`); strictly by priority it would not.
    async fn fill(&mut self) -> Result<()> {
        while self.next.is_none() {
            let record = self.consumer.recv().await;
            let Some(record) = readable(record, &mut self.lost)? else {
                continue;
            };
            if self
                .begin
                .as_ref()
                .is_none_or(|begin| is_after(begin, &record))
            {
                self.next = Some(record.detach());
            }
        }
        Ok(())
    }

    /// Is committed in the background, and at the end.
    fn store(&self, record: &OwnedMessage) {
        let (topic, partition) = (record.topic(), record.partition());
        let stored = self
            .consumer
            .store_offset(topic, partition, record.offset());
        if let Err(error) = stored {
            // Another has the partition now, and will ship it again.
            eprintln!("shipped, and not ours any more: {error}");
        }
    }
}
// ANCHOR_END: line

impl Line {
    fn open(
        brokers: &str,
        topic: &str,
        group: &str,
        begin: Option<&Begin>,
    ) -> Result<Self> {
        let consumer: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("group.id", group)
            .set("auto.offset.reset", "earliest")
            // Committed in the background is what is stored, and stored what is
            // shipped.
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", "500")
            .set("session.timeout.ms", "6000")
            .create()?;
        consumer.subscribe(&[topic])?;
        Ok(Self {
            consumer,
            next: None,
            begin: begin.cloned(),
            lost: false,
        })
    }

    /// Commits what is stored, and leaves the group. It blocks, hence a thread.
    async fn close(self) -> Result<()> {
        let close = move || match self
            .consumer
            .commit_consumer_state(CommitMode::Sync)
        {
            // There was nothing to commit.
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => Ok(()),
            other => other.context("not committed, so orders may be shipped again"),
        };
        spawn_blocking(close).await?
    }
}

fn is_after(begin: &Begin, record: &BorrowedMessage<'_>) -> bool {
    let partition = (record.topic().to_owned(), record.partition());
    let first = begin.get(&partition);
    first.is_some_and(|first| record.offset() >= *first)
}

/// The record, if there is one. The client connects again by itself; it says so with
/// each attempt, and to hear it once is enough.
fn readable<'a>(
    record: Result<BorrowedMessage<'a>, KafkaError>,
    lost: &mut bool,
) -> Result<Option<BorrowedMessage<'a>>> {
    match record {
        Ok(record) => {
            *lost = false;
            Ok(Some(record))
        }
        Err(KafkaError::MessageConsumption(
            code @ (RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::BrokerTransportFailure),
        )) => {
            if !*lost {
                eprintln!("lost Kafka, still trying ({code})");
            }
            *lost = true;
            Ok(None)
        }
        Err(error) => Err(error).context("cannot read on"),
    }
}

/// Stored there first, and then stored as done here. Killed in between, the next worker
/// stores it once more; the origin tells that the two are one.
async fn set_aside(
    producer: &FutureProducer,
    record: &OwnedMessage,
    reason: &str,
) -> Result<()> {
    // What the producer wrote, then ours.
    let headers = record.headers().cloned();
    let headers = headers.unwrap_or_else(OwnedHeaders::new);
    let headers = [
        ("origin-topic", record.topic().to_owned()),
        ("origin-partition", record.partition().to_string()),
        ("origin-offset", record.offset().to_string()),
        ("reason", reason.to_owned()),
    ]
    .iter()
    .fold(headers, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(value),
        })
    });
    let copy = FutureRecord::to(ASIDE)
        .key(record.key().unwrap_or_default())
        // The bytes as they came: what was not understood is not written anew.
        .payload(record.payload().unwrap_or_default())
        .headers(headers);
    let stored = producer.send(copy, PATIENCE).await;
    stored.map_err(|(error, _record)| {
        anyhow!("cannot set aside, the message stays in its lane: {error}")
    })?;
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for (name, lanes, rule) in [
        ("weighted:", Lanes::Two, Rule::Weighted),
        ("one lane:", Lanes::One, Rule::Weighted),
        ("strict:", Lanes::Two, Rule::Strict),
    ] {
        let all = STORY_STANDARD + STORY_EXPRESS;
        let standard = Placement::new(1..=STORY_STANDARD, "standard");
        let express = Placement::new(STORY_STANDARD + 1..=all, "express");
        let mut begin = Begin::new();
        for placement in [standard, express] {
            send(&producer, &placement, lanes, &mut begin).await?;
        }
        println!(
            "placed:   {STORY_STANDARD} standard orders, then {STORY_EXPRESS} express"
        );
        let desk = Desk::open(Path::new(":memory:"))?;
        let both = Both::open(&brokers, STORY_GROUPS, rule, ONE, Some(&begin))?;
        // What has not come is missed below.
        let stop = async {
            let _came = timeout(STORY, all_shipped(&desk, all)).await;
        };
        worker(both, &brokers, &desk, STORY_RATE, drop, stop).await?;
        let shipped = desk.shipped()?;
        ensure!(
            shipped.len() as u64 == all,
            "{} of {all} orders have come; has another worker the partitions?",
            shipped.len()
        );
        let report = Report::of(&shipped);
        println!("{name:9} {report}\nso:       {}", report.verdict());
    }
    Ok(())
}
// ANCHOR_END: story

async fn all_shipped(desk: &Desk, all: u64) {
    // One that cannot be read ends by itself.
    while desk.count().map_or(all, u64::from) < all {
        sleep(Duration::from_millis(20)).await;
    }
}

// ---- Topics and brokers ----------------------------------------------------

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

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        let known = |name: &_| metadata.topics().iter().any(|it| it.name() == *name);
        if TOPICS.iter().all(known) {
            return Ok(());
        }
        let topics = TOPICS
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&topics, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before is
        // told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {TOPICS:?}; ask who may describe it")
}

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
