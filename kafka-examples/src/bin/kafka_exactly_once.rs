//! Exactly once: read, process and write in one transaction.
//!
//! Teaches: what a worker has written and how far it has read are committed
//! together, so a kill at any point leaves both or neither. Readers must ask for
//! it: `isolation.level=read_committed`. The careless worker writes, then commits
//! its offsets; killed between the two, it writes again.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_exactly_once               # the whole story
//! cargo run --bin kafka_exactly_once worker        # kill it as often as you like
//! cargo run --bin kafka_exactly_once careless      # the same without transactions
//! ```
//!
//! Expected output:
//!
//! ```text
//! requested: 300 payments of 10 customers
//! ready:     captures from eos.payments.requested
//! captured:  300 of 300 payments
//! twice:     0 payments
//! reordered: 0 customers
//! ```
//!
//! Left out on purpose: what is outside of Kafka. A mail that the worker sends
//! while it processes is sent again; only what is written to Kafka is exactly once.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const REQUESTED: &str = "eos.payments.requested";
const CAPTURED: &str = "eos.payments.captured";
const TOPICS: [&str; 2] = [REQUESTED, CAPTURED];
const PARTITIONS: i32 = 3;
const GROUP: &str = "eos-capture";
/// Each worker that runs at the same time needs one of its own, and keeps it over
/// a restart: by it Kafka ends what a dead worker has left open.
const WORKER: &str = "eos-capture-1";

/// How many payments are one transaction, and how long to wait for the next.
const BATCH: usize = 100;
const LINGER: Duration = Duration::from_millis(20);

const CUSTOMERS: usize = 10;
const PAYMENTS: usize = 300;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a transaction may take to be opened or committed.
const COMMIT: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["worker"] => worker(Way::Transactions).await,
        ["careless"] => worker(Way::Careless).await,
        _ => {
            eprintln!("usage: kafka_exactly_once [worker | careless]");
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

// ---- The worker ------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Transactions,
    Careless,
}

async fn worker(way: Way) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    let stop = Arc::new(Notify::new());
    let working = tokio::spawn(work(brokers, way, Arc::clone(&stop)));
    stop_signal.await;
    stop.notify_one();
    working.await??;
    println!("stopped");
    Ok(())
}

// ANCHOR: work
async fn work(brokers: String, way: Way, stop: Arc<Notify>) -> Result<()> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", GROUP)
        // A restarted worker takes its old place at once. Without it the group
        // waits until the dead one's session is over.
        .set("group.instance.id", WORKER)
        // The offsets are in the transaction, or committed by hand.
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        .create()?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &brokers);
    config.set("enable.idempotence", "true");
    if way == Way::Transactions {
        config.set("transactional.id", WORKER);
    }
    let producer: FutureProducer = config.create()?;
    if way == Way::Transactions {
        // Ends what a worker of this name has left open, and shuts it out if it is
        // still alive somewhere.
        let producer = producer.clone();
        spawn_blocking(move || producer.init_transactions(COMMIT)).await??;
    }
    consumer.subscribe(&[REQUESTED])?;
    println!("ready:     captures from {REQUESTED}");

    let consumer = Arc::new(consumer);
    loop {
        let batch = tokio::select! {
            biased;
            () = stop.notified() => break,
            batch = next_batch(&consumer) => batch?,
        };
        match way {
            Way::Transactions => capture(&consumer, &producer, batch).await?,
            Way::Careless => capture_carelessly(&consumer, &producer, batch).await?,
        }
    }
    // To leave the group blocks.
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// At least one payment, and what else comes within a moment.
async fn next_batch(consumer: &StreamConsumer) -> Result<Vec<OwnedMessage>> {
    let mut batch = vec![consumer.recv().await?.detach()];
    let end = Instant::now() + LINGER;
    while batch.len() < BATCH
        && let Ok(payment) = timeout_at(end, consumer.recv()).await
    {
        batch.push(payment?.detach());
    }
    Ok(batch)
}
// ANCHOR_END: work

// ANCHOR: capture
/// All of the batch with its offsets, or nothing of it.
async fn capture(
    consumer: &Arc<StreamConsumer>,
    producer: &FutureProducer,
    batch: Vec<OwnedMessage>,
) -> Result<()> {
    producer.begin_transaction()?;
    for payment in &batch {
        send(producer, payment)?;
    }
    let (consumer, producer) = (Arc::clone(consumer), producer.clone());
    // Each of these waits for Kafka, and blocks its thread.
    spawn_blocking(move || {
        let positions = TopicPartitionList::from_topic_map(&positions(&batch))?;
        // Asked for anew each time: it changes with each rebalance, and by it Kafka
        // refuses the offsets of a worker that has lost its partitions.
        let group = consumer.group_metadata();
        let group = group.context("a consumer without a group")?;
        let committed = producer
            .send_offsets_to_transaction(&positions, &group, COMMIT)
            // Flushes first, and fails if a record was not delivered.
            .and_then(|()| producer.commit_transaction(COMMIT));
        match committed {
            Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => {
                producer.abort_transaction(COMMIT)?;
                // What was read is to be read again. Nobody rewinds by itself.
                let batch = first_offsets(&batch);
                let start = TopicPartitionList::from_topic_map(&batch)?;
                consumer.seek_partitions(start, PATIENCE)?;
                Ok(())
            }
            // Fatal, another worker has this name: to go on would be wrong.
            other => other.context("the transaction is not committed"),
        }
    })
    .await?
}
// ANCHOR_END: capture

// ANCHOR: careless
/// Each step is right, and between the two a kill leaves the first alone.
async fn capture_carelessly(
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    batch: Vec<OwnedMessage>,
) -> Result<()> {
    let mut deliveries = Vec::new();
    for payment in &batch {
        deliveries.push(send(producer, payment)?);
    }
    for delivery in deliveries {
        delivery.await?.map_err(|(error, _record)| error)?;
    }
    let positions = TopicPartitionList::from_topic_map(&positions(&batch))?;
    consumer.commit(&positions, CommitMode::Sync)?;
    Ok(())
}
// ANCHOR_END: careless

fn send(
    producer: &FutureProducer,
    payment: &OwnedMessage,
) -> Result<rdkafka::producer::DeliveryFuture, KafkaError> {
    let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(CAPTURED)
        .key(payment.key().unwrap_or_default())
        .payload(payment.payload().unwrap_or_default());
    // A batch is much smaller than the local queue.
    producer
        .send_result(record)
        .map_err(|(error, _record)| error)
}

type Positions = HashMap<(String, i32), Offset>;

/// Where to go on: after the last of each partition.
fn positions(batch: &[OwnedMessage]) -> Positions {
    let position = |payment: &OwnedMessage| {
        let partition = (payment.topic().to_owned(), payment.partition());
        (partition, Offset::Offset(payment.offset() + 1))
    };
    batch.iter().map(position).collect()
}

/// Where the batch began.
fn first_offsets(batch: &[OwnedMessage]) -> Positions {
    let offset = |payment: &OwnedMessage| {
        let partition = (payment.topic().to_owned(), payment.partition());
        (partition, Offset::Offset(payment.offset()))
    };
    batch.iter().rev().map(offset).collect()
}

// ---- The story -------------------------------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    // The topics keep what earlier runs have left; this run looks at its own.
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let run = now.as_millis().to_string();
    request(&brokers, &run).await?;
    println!("requested: {PAYMENTS} payments of {CUSTOMERS} customers");

    let stop = Arc::new(Notify::new());
    let working = work(brokers.clone(), Way::Transactions, Arc::clone(&stop));
    let working = tokio::spawn(working);
    let captured = captured(brokers, run).await?;
    stop.notify_one();
    working.await??;

    let mut numbers: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (customer, number) in &captured {
        numbers.entry(customer).or_default().push(*number);
    }
    let mut different = captured.clone();
    different.sort();
    different.dedup();
    let reordered = numbers.values().filter(|numbers| !numbers.is_sorted());
    println!("captured:  {} of {PAYMENTS} payments", different.len());
    println!("twice:     {} payments", captured.len() - different.len());
    println!("reordered: {} customers", reordered.count());
    Ok(())
}
// ANCHOR_END: story

/// Numbers the payments of each customer, who is the key: so they stay in order.
async fn request(brokers: &str, run: &str) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .create()?;
    let mut deliveries = Vec::new();
    for number in 0..PAYMENTS {
        let customer = format!("customer-{}", number % CUSTOMERS);
        let payment = format!("{run} {customer} {}", number / CUSTOMERS);
        let record = FutureRecord::to(REQUESTED).key(&customer).payload(&payment);
        let delivery = producer.send_result(record);
        deliveries.push(delivery.map_err(|(error, _record)| error)?);
    }
    for delivery in deliveries {
        delivery.await?.map_err(|(error, _record)| error)?;
    }
    Ok(())
}

// ANCHOR: reader
/// Customer and number of each captured payment of this run, in the order of the
/// partitions.
async fn captured(brokers: String, run: String) -> Result<Vec<(String, usize)>> {
    let reader: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .set("group.id", "eos-audit")
        .set("enable.auto.commit", "false")
        // It is the default of librdkafka; of Kafka's own clients it is not.
        .set("isolation.level", "read_committed")
        .create()?;
    let mut everything = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        everything.add_partition_offset(CAPTURED, partition, Offset::Beginning)?;
    }
    reader.assign(&everything)?;
    // Blocks, hence a thread of its own.
    spawn_blocking(move || {
        let end = std::time::Instant::now() + COMMIT;
        let mut captured = Vec::new();
        loop {
            match reader.poll(Duration::from_millis(500)) {
                Some(payment) => {
                    let payment = payment?.detach();
                    let text = String::from_utf8_lossy(
                        payment.payload().unwrap_or_default(),
                    );
                    let words: Vec<&str> = text.split(' ').collect();
                    if let [of_run, customer, number] = words[..]
                        && of_run == run
                    {
                        captured.push((customer.to_owned(), number.parse()?));
                    }
                }
                // Nothing more comes.
                None if captured.len() >= PAYMENTS => return Ok(captured),
                None => ensure!(
                    std::time::Instant::now() < end,
                    "{} of {PAYMENTS} payments are captured",
                    captured.len()
                ),
            }
        }
    })
    .await?
}
// ANCHOR_END: reader

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
