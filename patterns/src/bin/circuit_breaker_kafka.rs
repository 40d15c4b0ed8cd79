//! Circuit breaker: while the payment gateway is down, nobody calls it.
//!
//! Teaches: after three failures in a row the breaker opens. The failed payment is given
//! back by a seek, and the partitions are paused. The worker polls on, so it stays in
//! the group, however long the outage is. When the wait is over the partitions are
//! resumed, and one payment is the probe. A rebalance ends every pause, so what comes
//! while the breaker is open is given back in the same way.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin circuit_breaker_kafka                         # the whole story
//! cargo run --bin circuit_breaker_kafka gateway shop.db         # terminal 1: kill it
//! cargo run --bin circuit_breaker_kafka worker                  # terminal 2
//! cargo run --bin circuit_breaker_kafka producer 1 1000         # terminal 3
//! cargo run --bin circuit_breaker_kafka gateway shop.db --down  # answers with 503
//! cargo run --bin circuit_breaker_kafka worker --wait 30        # the first wait
//! cargo run --bin circuit_breaker_kafka worker --no-breaker     # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:   5 payments to charges-due
//! ready:  payments from charges-due, Ctrl-C to stop
//! done:   payment-1, charged
//! done:   payment-2, charged
//! failed: payment-3, 503 out of order
//! failed: payment-3, 503 out of order
//! failed: payment-3, 503 out of order
//! state:  open, a probe in 500 ms
//! state:  half-open, one probe
//! failed: payment-3, 503 out of order
//! state:  open, a probe in 1000 ms
//! state:  half-open, one probe
//! state:  closed
//! done:   payment-3, charged
//! aside:  payment-1001, declined
//! done:   payment-4, charged
//! stopped
//! calls:  9, and 4 cards charged
//! ```
//!
//! Left out on purpose: several payments at a time, and a breaker that workers share:
//! each of them finds out for itself. The card is charged once because the gateway
//! knows the id; where it does not, see idempotent_consumer_kafka.

use std::{
    env,
    future::{Future, pending},
    ops::Range,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::circuit_breaker::{
    Answer, Breaker, FIRST_WAIT, Gateway, Ledger, Payment, charge, decode, payment,
};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, sleep_until, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const DEFAULT_GATEWAY: &str = "127.0.0.1:2626";
const TOPIC: &str = "charges-due";
const ASIDE: &str = "charges-aside";
const TOPICS: [&str; 2] = [TOPIC, ASIDE];
const PARTITIONS: i32 = 2;
const GROUP: &str = "charger";
const STORY_GROUP: &str = "charger-story";
const USAGE: &str = "usage: circuit_breaker_kafka [producer FIRST LAST | gateway FILE \
                     [--down] | worker [--wait SECONDS | --no-breaker]]";

/// How often the worker without a breaker tries each payment.
const ATTEMPTS: u32 = 3;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the payments of the story may take: a new group has to find its members.
const STORY: Duration = Duration::from_secs(40);

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
        ["gateway", file] => gateway(file, 0..0).await,
        ["gateway", file, "--down"] => gateway(file, 0..u64::MAX).await,
        ["worker"] => worker_until_signal(Care::Breaker(FIRST_WAIT)).await,
        ["worker", "--wait", seconds] => match seconds.parse::<u32>() {
            Ok(seconds) if seconds > 0 => {
                let wait = Duration::from_secs(seconds.into());
                worker_until_signal(Care::Breaker(wait)).await
            }
            _ => return usage(),
        },
        ["worker", "--no-breaker"] => worker_until_signal(Care::None).await,
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
enum Care {
    /// It is open for so long before the first probe.
    Breaker(Duration),
    /// The mistake, to see what it costs.
    None,
}

impl Care {
    fn breaker(self) -> Breaker {
        match self {
            Self::Breaker(wait) => Breaker::new(wait),
            // Is never asked.
            Self::None => Breaker::new(FIRST_WAIT),
        }
    }
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = new_producer(&brokers)?;
    for number in first..=last {
        send(&producer, &payment(number)).await?;
    }
    println!("sent:   payment-{first} to payment-{last} to {TOPIC}");
    Ok(())
}

fn new_producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

/// Returns partition and offset.
async fn send(producer: &FutureProducer, payment: &Payment) -> Result<(i32, i64)> {
    let payload = serde_json::to_vec(payment)?;
    let record = FutureRecord::to(TOPIC)
        .key(&payment.customer)
        .payload(&payload);
    let stored = producer.send(record, PATIENCE).await;
    let stored = stored.map_err(|(error, _record)| {
        anyhow!("Kafka did not store {}: {error}", payment.id)
    })?;
    Ok((stored.partition, stored.offset))
}

// ---- Gateway ---------------------------------------------------------------

async fn gateway(file: &str, down: Range<u64>) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let ledger = Ledger::open(Path::new(file));
    let ledger =
        ledger.with_context(|| format!("cannot keep a ledger in {file}"))?;
    let address = gateway_address();
    let gateway = Gateway::start(&address, ledger, down).await;
    let gateway = gateway.with_context(|| format!("cannot listen at {address}"))?;
    println!("ready:  gateway at {}, Ctrl-C to stop", gateway.address());
    let mut shown = 0;
    loop {
        tokio::select! {
            () = &mut stop_signal => break,
            more = gateway.until(shown + 1) => more?,
        }
        for call in &gateway.calls()[shown..] {
            println!("call:   {call}");
            shown += 1;
        }
    }
    println!("stopped");
    Ok(())
}

fn gateway_address() -> String {
    env::var("GATEWAY").unwrap_or_else(|_| DEFAULT_GATEWAY.to_owned())
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(care: Care) -> Result<()> {
    let stop = stop_signal()?;
    let gateway = gateway_address();
    let worker = Worker::start(GROUP, &gateway, care).await?;
    worker.run(None, stop).await
}

struct Worker<'a> {
    consumer: StreamConsumer,
    producer: FutureProducer,
    gateway: &'a str,
    care: Care,
}

impl<'a> Worker<'a> {
    async fn start(group: &str, gateway: &'a str, care: Care) -> Result<Self> {
        let brokers = brokers()?;
        ensure_topics(&brokers).await?;
        Ok(Self {
            consumer: take_payments(&brokers, group)?,
            producer: new_producer(&brokers)?,
            gateway,
            care,
        })
    }

    // ANCHOR: worker
    /// Works until it is told to stop. `begin` is the partition and the first offset of
    /// the story: what others have left is no part of it.
    async fn run(
        self,
        begin: Option<(i32, i64)>,
        stop: impl Future<Output = ()>,
    ) -> Result<()> {
        println!("ready:  payments from {TOPIC}, Ctrl-C to stop");
        let mut breaker = self.care.breaker();
        let mut lost = false;
        tokio::pin!(stop);
        loop {
            let record = tokio::select! {
                // In this order: by default `select!` picks at random.
                biased;
                () = &mut stop => break,
                () = probe_due(breaker) => {
                    breaker = turn(breaker, breaker.at(Instant::now()));
                    self.consumer.resume(&self.consumer.assignment()?)?;
                    continue;
                }
                // Also while it is open: to poll is to be a member.
                record = self.consumer.recv() => readable(record, &mut lost)?,
            };
            let Some(record) = record else { continue };
            if begin.is_some_and(|(partition, first)| {
                record.partition() != partition || record.offset() < first
            }) {
                continue;
            }
            // Open, and something comes all the same: there was a rebalance.
            if !breaker.is_open() {
                self.work(&mut breaker, &record).await?;
            }
            if breaker.is_open() {
                self.give_back(&record)?;
            }
        }
        // Leaves the group. It blocks, hence a thread of its own.
        let Self { consumer, .. } = self;
        spawn_blocking(move || drop(consumer)).await?;
        println!("stopped");
        Ok(())
    }
    // ANCHOR_END: worker

    /// Decides a payment, unless the breaker opens.
    async fn work(
        &self,
        breaker: &mut Breaker,
        record: &BorrowedMessage<'_>,
    ) -> Result<()> {
        let payload = record.payload().unwrap_or_default();
        let payment = match decode(payload) {
            Ok(payment) => payment,
            Err(error) => {
                let name = format!("{} bytes", payload.len());
                let reason = format!("no payment: {error}");
                return self.set_aside(record, &name, &reason).await;
            }
        };
        let answer = match self.care {
            Care::Breaker(_) => call(self.gateway, breaker, &payment).await,
            Care::None => call_without_breaker(self.gateway, &payment).await,
        };
        match answer {
            Some(Answer::Declined) => {
                self.set_aside(record, &payment.id, "declined").await
            }
            Some(answer) => {
                self.commit(record)?;
                println!("done:   {}, {answer}", payment.id);
                Ok(())
            }
            // It is about the gateway and not about the payment.
            None if self.care != Care::None => Ok(()),
            None => {
                let reason = format!("no answer, {ATTEMPTS} attempts");
                self.set_aside(record, &payment.id, &reason).await
            }
        }
    }

    // ANCHOR: give_back
    /// Nothing comes until the partitions are resumed, and this payment comes first in
    /// its partition.
    fn give_back(&self, record: &BorrowedMessage<'_>) -> Result<()> {
        let (topic, partition) = (record.topic(), record.partition());
        let offset = Offset::Offset(record.offset());
        // Before the pause, which notes from where to go on.
        let seek = || self.consumer.seek(topic, partition, offset, PATIENCE);
        let sought = block_in_place(seek);
        let assignment = self.consumer.assignment()?;
        // Otherwise another has the partition now, and the payment with it.
        if assignment.find_partition(topic, partition).is_some() {
            sought.context("cannot go back; not committed, it will come again")?;
        }
        self.consumer.pause(&assignment)?;
        Ok(())
    }
    // ANCHOR_END: give_back

    fn commit(&self, record: &BorrowedMessage<'_>) -> Result<()> {
        let mut position = TopicPartitionList::new();
        let next = Offset::Offset(record.offset() + 1);
        position.add_partition_offset(record.topic(), record.partition(), next)?;
        let commit = || self.consumer.commit(&position, CommitMode::Sync);
        match block_in_place(commit) {
            // The payment comes again to whoever has it now, and the gateway knows it.
            Err(KafkaError::ConsumerCommit(
                code @ (RDKafkaErrorCode::IllegalGeneration
                | RDKafkaErrorCode::RebalanceInProgress
                | RDKafkaErrorCode::UnknownMemberId),
            )) => {
                eprintln!("not committed, there was a rebalance ({code})");
                Ok(())
            }
            other => other.context("cannot commit; the payment will come again"),
        }
    }

    /// Stored first, then committed. Killed in between, it is stored once more.
    async fn set_aside(
        &self,
        record: &BorrowedMessage<'_>,
        name: &str,
        reason: &str,
    ) -> Result<()> {
        let origin = format!(
            "{} {} {}",
            record.topic(),
            record.partition(),
            record.offset()
        );
        let headers = [("origin", origin.as_str()), ("reason", reason)]
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| {
                let value = Some(*value);
                headers.insert(Header { key, value })
            });
        // The bytes as they came.
        let copy = FutureRecord::to(ASIDE)
            .key(record.key().unwrap_or_default())
            .payload(record.payload().unwrap_or_default())
            .headers(headers);
        self.producer
            .send(copy, PATIENCE)
            .await
            .map_err(|(error, _record)| {
                anyhow!("cannot set aside, the payment stays in {TOPIC}: {error}")
            })?;
        self.commit(record)?;
        println!("aside:  {name}, {reason}");
        Ok(())
    }
}

// ANCHOR: call
/// Calls the gateway until it answers, or until the breaker opens: then there is no
/// answer.
async fn call(
    gateway: &str,
    breaker: &mut Breaker,
    payment: &Payment,
) -> Option<Answer> {
    loop {
        match charge(gateway, payment).await {
            Ok(answer) => {
                *breaker = turn(*breaker, breaker.succeeded());
                return Some(answer);
            }
            Err(outage) => {
                println!("failed: {}, {outage}", payment.id);
                *breaker = turn(*breaker, breaker.failed(Instant::now()));
                if breaker.is_open() {
                    return None;
                }
            }
        }
    }
}

/// Says so if it is in another state now.
fn turn(breaker: Breaker, next: Breaker) -> Breaker {
    if next.turned(breaker) {
        println!("state:  {next}");
    }
    next
}

/// Waits until a probe is due; for ever, unless the breaker is open.
async fn probe_due(breaker: Breaker) {
    match breaker.probe_at() {
        Some(at) => sleep_until(at.into()).await,
        None => pending().await,
    }
}
// ANCHOR_END: call

// ANCHOR: no_breaker
/// The mistake: three attempts for each payment, whatever the ones before it have met.
async fn call_without_breaker(gateway: &str, payment: &Payment) -> Option<Answer> {
    for _attempt in 1..=ATTEMPTS {
        match charge(gateway, payment).await {
            Ok(answer) => return Some(answer),
            Err(outage) => println!("failed: {}, {outage}", payment.id),
        }
    }
    None
}
// ANCHOR_END: no_breaker

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

// ANCHOR: take
fn take_payments(brokers: &str, group: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        // Committed is what is decided.
        .set("enable.auto.commit", "false")
        // Who does not poll for so long is no member any more. Short, so that you can
        // see that an outage may take longer; five minutes by default.
        .set("max.poll.interval.ms", "6000")
        .set("session.timeout.ms", "6000")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}
// ANCHOR_END: take

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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = new_producer(&brokers)?;
    let mut begin = None;
    for number in [1, 2, 3, 1001, 4] {
        let mut payment = payment(number);
        // One customer, hence one partition, and one order.
        "customer-1".clone_into(&mut payment.customer);
        let stored = send(&producer, &payment).await?;
        begin.get_or_insert(stored);
    }
    println!("sent:   5 payments to {TOPIC}");

    let ledger = Ledger::open(Path::new(":memory:"))?;
    // Down for the third call and three more.
    let gateway = Gateway::start("127.0.0.1:0", ledger, 2..6).await?;
    let worker =
        Worker::start(STORY_GROUP, gateway.address(), Care::Breaker(FIRST_WAIT))
            .await?;
    let all = async {
        // What has not come is missed below.
        let _came = timeout(STORY, gateway.until(9)).await;
    };
    worker.run(begin, all).await?;
    let calls = gateway.calls();
    let charged = calls
        .iter()
        .filter(|call| call.ends_with("charged"))
        .count();
    println!("calls:  {}, and {charged} cards charged", calls.len());
    ensure!(
        charged == 4,
        "not all are charged; has another worker the partition?"
    );
    Ok(())
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

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
