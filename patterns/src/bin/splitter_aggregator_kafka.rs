//! Splitter and aggregator: an order in pieces, and one result for it.
//!
//! Teaches: a splitter cuts an order into lines, workers reserve them, and an
//! aggregator makes one result of the answers, by the numbers of the lines and not by
//! their count. Answers and reminders have the order as their key, so they stand in
//! one partition. The deadline of an order is a row; when it has passed, the
//! aggregator sends itself a reminder behind all answers that Kafka has. Answer, end
//! and result are one transaction, and the offset is committed after it.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin splitter_aggregator_kafka                       # the whole story
//! cargo run --bin splitter_aggregator_kafka splitter              # terminal 1
//! cargo run --bin splitter_aggregator_kafka worker ann            # terminal 2
//! cargo run --bin splitter_aggregator_kafka worker bob            # terminal 3
//! cargo run --bin splitter_aggregator_kafka aggregator orders.db  # terminal 4
//! cargo run --bin splitter_aggregator_kafka order 1 20            # kill one
//! cargo run --bin splitter_aggregator_kafka order 21 30 --within 500
//! cargo run --bin splitter_aggregator_kafka show orders.db
//! cargo run --bin splitter_aggregator_kafka aggregator orders.db --count-answers
//! cargo run --bin splitter_aggregator_kafka aggregator --in-memory
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
//! its table has to know the line, as in idempotent_consumer_kafka; and what was
//! reserved for an order that has timed out has to be released, as in
//! saga_orchestration_kafka.

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

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::splitter_aggregator::{
    self as shop, Label, Orders, Place, Report, Rule, Taken, Word, basket, header,
    json, now,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
/// The topics are `basket-orders`, and so on.
const SHOP: &str = "basket";
/// The story has topics of its own: what it does is no business of others.
const STORY: &str = "basket-story";
const PARTITIONS: i32 = 4;
/// Where orders wait for the splitter.
const ORDERS: &str = "orders";
/// Where lines wait for the workers.
const LINES: &str = "lines";
/// Where the aggregator hears of orders, answers and deadlines.
const ANSWERS: &str = "answers";
const RESULTS: &str = "results";
/// What nobody can read, as it came, with the reason in a header.
const ASIDE: &str = "aside";
const TOPICS: [&str; 5] = [ORDERS, LINES, ANSWERS, RESULTS, ASIDE];
/// How many messages are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long a customer waits, unless `--within` says otherwise.
const WITHIN: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: splitter_aggregator_kafka [order FIRST [LAST] \
                     [--within MS] | splitter | worker NAME | \
                     aggregator FILE|--in-memory [--count-answers] | show FILE]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the next message of the story may take.
const LATEST: Duration = Duration::from_secs(30);

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
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        let order = place_one(&producer, SHOP, number, within).await?;
        println!("placed:    {order}");
    }
    Ok(())
}

async fn place_one(
    producer: &FutureProducer,
    shop: &str,
    number: u64,
    within: Duration,
) -> Result<String> {
    let within = i64::try_from(within.as_millis())?;
    let basket = basket(number, now().saturating_add(within));
    let (key, headers) = (basket.order.as_bytes(), OwnedHeaders::new());
    publish(producer, &topic(shop, ORDERS), key, headers, &json(&basket)).await?;
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
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let producer = producer(&brokers)?;
    let orders = consume(&brokers, ORDERS, "1")?;
    println!("ready:     orders, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            record = orders.recv() => received(record, &mut lost)?,
        };
        let Some(record) = record else { continue };
        match split(&producer, SHOP, &record).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&producer, SHOP, &record, &reason).await?,
        }
        commit(&orders, &record)?;
    }
    close(orders).await?;
    println!("stopped");
    Ok(())
}

/// Sends the lines of an order; afterwards its offset is committed. If the program
/// ends before, the order comes again, and its lines are there twice.
async fn split(
    producer: &FutureProducer,
    shop: &str,
    record: &BorrowedMessage<'_>,
) -> Result<Result<String, String>> {
    let split = match shop::split(record.payload().unwrap_or_default()) {
        Ok(split) => split,
        Err(reason) => return Ok(Err(reason)),
    };
    // First, so that its deadline runs whatever becomes of the lines.
    let (label, payload) = &split.opened;
    send(producer, &topic(shop, ANSWERS), label, payload).await?;
    for (label, payload) in &split.lines {
        send(producer, &topic(shop, LINES), label, payload).await?;
    }
    let lines = split.lines.len();
    Ok(Ok(format!("{:<10} {lines} lines", label.order)))
}
// ANCHOR_END: splitter

// ---- Worker ----------------------------------------------------------------

async fn worker(name: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let producer = producer(&brokers)?;
    let lines = consume(&brokers, LINES, name)?;
    println!("ready:     lines for {name}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            record = lines.recv() => received(record, &mut lost)?,
        };
        let Some(record) = record else { continue };
        match work(&producer, SHOP, &record).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&producer, SHOP, &record, &reason).await?,
        }
        commit(&lines, &record)?;
    }
    close(lines).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
/// Reserves a line and sends the answer; afterwards its offset is committed.
async fn work(
    producer: &FutureProducer,
    shop: &str,
    record: &BorrowedMessage<'_>,
) -> Result<Result<String, String>> {
    let payload = record.payload().unwrap_or_default();
    let (label, answer) = match shop::work(label(record), payload) {
        Ok(worked) => worked,
        Err(reason) => return Ok(Err(reason)),
    };
    let payload = Word::Answered(answer).to_json();
    send(producer, &topic(shop, ANSWERS), &label, &payload).await?;
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
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let producer = producer(&brokers)?;
    let answers = consume(&brokers, ANSWERS, "1")?;
    println!("ready:     answers, Ctrl-C to stop");
    let mut lost = false;
    loop {
        // First what a dead aggregator has left.
        send_waiting(&producer, SHOP, &mut orders).await?;
        // A database blocks its thread.
        let wait = block_in_place(|| orders.wait(now()))?;
        if wait.is_zero() {
            block_in_place(|| orders.remind(now()))?;
            continue;
        }
        tokio::select! {
            biased;
            () = &mut stop_signal => break,
            record = answers.recv() => {
                if let Some(record) = received(record, &mut lost)? {
                    take(&producer, SHOP, &mut orders, &record).await?;
                    commit(&answers, &record)?;
                }
            }
            () = sleep(wait) => {} // until a deadline has passed
        }
    }
    close(answers).await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the tables; afterwards its offset is committed. If the
/// program ends in between, it comes again and changes nothing.
async fn take(
    producer: &FutureProducer,
    shop: &str,
    orders: &mut Orders,
    record: &BorrowedMessage<'_>,
) -> Result<()> {
    let payload = record.payload().unwrap_or_default();
    let taken = block_in_place(|| orders.take(label(record), payload))
        .context("cannot write down what has come, it will come again")?;
    match taken {
        Taken::Noted(entry) => println!("{entry}"),
        Taken::SetAside(reason) => {
            set_aside(producer, shop, record, &reason).await?;
        }
    }
    Ok(())
}
// ANCHOR_END: aggregator

// ANCHOR: send
/// Sends what is in the outbox: results, and reminders to the aggregator itself.
async fn send_waiting(
    producer: &FutureProducer,
    shop: &str,
    orders: &mut Orders,
) -> Result<()> {
    loop {
        let waiting = block_in_place(|| orders.waiting(BATCH))?;
        if waiting.is_empty() {
            return Ok(());
        }
        for post in waiting {
            let to = match post.to {
                Place::Results => RESULTS,
                Place::Answers => ANSWERS,
            };
            send(producer, &topic(shop, to), &post.label, &post.payload).await?;
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
    let mut story = Story::begin().await?;
    story.place(1).await?;
    story.split(1).await?;
    story.work(3).await?;
    story.gather(4).await?;

    // The splitter dies before its commit, and the order comes again.
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
    story.end().await
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    producer: FutureProducer,
    orders: Orders,
    baskets: StreamConsumer,
    lines: StreamConsumer,
    answers: StreamConsumer,
    results: StreamConsumer,
}

impl Story {
    async fn begin() -> Result<Self> {
        let brokers = brokers()?;
        ensure_topics(&brokers, STORY).await?;
        Ok(Self {
            orders: open("--in-memory", Rule::EachLineAnswered)?,
            baskets: at_the_end(&brokers, ORDERS).await?,
            lines: at_the_end(&brokers, LINES).await?,
            answers: at_the_end(&brokers, ANSWERS).await?,
            results: at_the_end(&brokers, RESULTS).await?,
            producer: producer(&brokers)?,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let within = Duration::from_secs(1);
        place_one(&self.producer, STORY, number, within).await?;
        Ok(())
    }

    /// Splits the next order, so many times.
    async fn split(&self, times: u32) -> Result<()> {
        let record = next(&self.baskets).await?;
        for _time in 0..times {
            let said = split(&self.producer, STORY, &record).await?;
            said.map_err(|reason| anyhow!(reason))?;
        }
        commit(&self.baskets, &record)
    }

    async fn work(&self, lines: u32) -> Result<()> {
        for _line in 0..lines {
            let record = next(&self.lines).await?;
            let said = work(&self.producer, STORY, &record).await?;
            said.map_err(|reason| anyhow!(reason))?;
            commit(&self.lines, &record)?;
        }
        Ok(())
    }

    async fn gather(&mut self, messages: u32) -> Result<()> {
        for _message in 0..messages {
            let record = next(&self.answers).await?;
            take(&self.producer, STORY, &mut self.orders, &record).await?;
            commit(&self.answers, &record)?;
        }
        send_waiting(&self.producer, STORY, &mut self.orders).await
    }

    /// Waits for the deadline.
    async fn remind(&mut self) -> Result<()> {
        sleep(self.orders.wait(now())?).await;
        self.orders.remind(now())?;
        send_waiting(&self.producer, STORY, &mut self.orders).await
    }

    async fn show_results(&self) -> Result<()> {
        let mut results = Vec::new();
        for _result in 0..3 {
            let record = next(&self.results).await?;
            let payload = record.payload().unwrap_or_default();
            let report: Report = serde_json::from_slice(payload)?;
            results.push(report.summary());
        }
        // From several partitions they come in any order.
        results.sort();
        println!("results:   {}", results.join(", "));
        Ok(())
    }

    async fn end(self) -> Result<()> {
        for consumer in [self.baskets, self.lines, self.answers, self.results] {
            close(consumer).await?;
        }
        Ok(())
    }
}
// ANCHOR_END: story

/// The next record of this run.
async fn next(consumer: &StreamConsumer) -> Result<BorrowedMessage<'_>> {
    let record = timeout(LATEST, consumer.recv()).await;
    Ok(record.context("nothing came within 30 s")??)
}

/// A consumer of what is written from this moment on: what an earlier run has left
/// is no part of the story. Fixed here and not by `Offset::End`, which the client
/// would look up later.
async fn at_the_end(brokers: &str, name: &str) -> Result<StreamConsumer> {
    let topic = topic(STORY, name);
    let consumer = Arc::new(consumer(brokers, &topic, "1")?);
    let mut ends = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        // Not for ever. A broker that has just got a partition does not answer for
        // it at once.
        let mut looks = 0..100;
        let end = loop {
            let (asking, name) = (Arc::clone(&consumer), topic.clone());
            let ask = move || asking.fetch_watermarks(&name, partition, PATIENCE);
            match spawn_blocking(ask).await? {
                Ok((_first, end)) => break end,
                Err(error) if looks.next().is_none() => return Err(error.into()),
                Err(_not_yet) => sleep(Duration::from_millis(50)).await,
            }
        };
        ends.add_partition_offset(&topic, partition, Offset::Offset(end))?;
    }
    consumer.assign(&ends)?;
    Arc::into_inner(consumer).context("a consumer in use")
}

// ---- Topics and brokers ----------------------------------------------------

fn topic(shop: &str, name: &str) -> String {
    format!("{shop}-{name}")
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ANCHOR: publish
/// Sends what is about an order, with the order as its key: what is said of one order
/// stays in its order.
async fn send(
    producer: &FutureProducer,
    topic: &str,
    label: &Label,
    payload: &[u8],
) -> Result<()> {
    let headers = label.headers();
    let headers = headers
        .iter()
        .fold(OwnedHeaders::new(), |all, (name, value)| {
            with(all, name, value)
        });
    publish(producer, topic, label.order.as_bytes(), headers, payload).await
}

/// Returns when Kafka has stored the message.
async fn publish(
    producer: &FutureProducer,
    topic: &str,
    key: &[u8],
    headers: OwnedHeaders,
    payload: &[u8],
) -> Result<()> {
    let record = FutureRecord::to(topic)
        .key(key)
        .headers(headers)
        .payload(payload);
    let stored = producer.send(record, PATIENCE).await;
    stored.map_err(|(error, _record)| {
        anyhow!("Kafka did not store a message for {topic}: {error}")
    })?;
    Ok(())
}
// ANCHOR_END: publish

fn with(headers: OwnedHeaders, key: &str, value: &str) -> OwnedHeaders {
    let value = Some(value);
    headers.insert(Header { key, value })
}

/// Keeps what nobody can read, as it came, where a person can look at it. Its offset
/// is committed after that: nothing behind it waits for it.
async fn set_aside(
    producer: &FutureProducer,
    shop: &str,
    record: &BorrowedMessage<'_>,
    reason: &str,
) -> Result<()> {
    let headers = record.headers().map(|headers| headers.detach());
    let headers = with(headers.unwrap_or_default(), header::REASON, reason);
    let key = record.key().unwrap_or_default();
    let payload = record.payload().unwrap_or_default();
    publish(producer, &topic(shop, ASIDE), key, headers, payload).await?;
    eprintln!("set aside: {reason}");
    Ok(())
}

/// The label of a message, or what is wrong with it.
fn label(record: &BorrowedMessage<'_>) -> Result<Label, String> {
    Label::read(|name| {
        let headers = record.headers().into_iter().flat_map(|all| all.iter());
        let value = headers.filter(|header| header.key == name).last()?.value?;
        str::from_utf8(value).ok().map(str::to_owned)
    })
}

fn consume(brokers: &str, name: &str, member: &str) -> Result<StreamConsumer> {
    let topic = topic(SHOP, name);
    let consumer = consumer(brokers, &topic, member)?;
    consumer.subscribe(&[&topic])?;
    Ok(consumer)
}

fn consumer(brokers: &str, topic: &str, member: &str) -> Result<StreamConsumer> {
    let consumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", topic)
        // A restarted program takes its old place at once, and does not wait for the
        // end of the dead one's session. So each worker needs a name of its own.
        .set("group.instance.id", format!("{topic}-{member}"))
        // After so long the others do the work of a worker that does not come back.
        .set("session.timeout.ms", "6000")
        .set("auto.offset.reset", "earliest")
        // What is committed is done.
        .set("enable.auto.commit", "false")
        .create()?;
    Ok(consumer)
}

/// The next record; nothing while Kafka is lost. The client connects again by
/// itself; it says so with each attempt, and to hear it once is enough.
fn received<'a>(
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

/// This record is done.
fn commit(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<()> {
    block_in_place(|| consumer.commit_message(record, CommitMode::Sync))
        .context("cannot commit; it will come again")
}

/// Leaves the group. It blocks, hence a thread of its own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str, shop: &str) -> Result<()> {
    let topics = TOPICS.map(|name| topic(shop, name));
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
        let known =
            |name: &String| metadata.topics().iter().any(|it| it.name() == *name);
        if topics.iter().all(known) {
            return Ok(());
        }
        let new: Vec<_> = topics
            .iter()
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)))
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&new, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before
        // is told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {topics:?}; ask who may describe it")
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
