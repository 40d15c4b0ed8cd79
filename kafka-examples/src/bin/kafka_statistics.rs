//! Statistics: what librdkafka counts, as metrics.
//!
//! Teaches: with `statistics.interval.ms` a client reports all of its counters at every
//! interval: records and bytes sent, how long a broker takes to answer, how far a
//! consumer is behind. They are of this client, not of the topic or the group, and
//! begin at 0 with it. A monitor wants a few of them, in a form that it can read.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_statistics
//! ```
//!
//! Expected output:
//!
//! ```text
//! kafka_records_sent_total{topic="statistics.orders"} 10
//! kafka_round_trip_seconds{quantile="0.99"} <seconds>
//! kafka_consumer_position{topic="statistics.orders",partition="0"} <offset>
//! kafka_consumer_lag{topic="statistics.orders",partition="0"} 4
//! ```
//!
//! Left out on purpose: serving them over HTTP, for which the crates metrics and
//! metrics-exporter-prometheus are there.

use std::{
    env,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, Statistics,
    TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, ConsumerContext, StreamConsumer},
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "statistics.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;
const GROUP: &str = "statistics-billing";
const ORDERS: usize = 10;
/// So many are billed; the rest is the lag.
const BILLED: usize = 6;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: context
/// Keeps the last report.
#[derive(Default)]
struct Counters(Arc<Mutex<Option<Statistics>>>);

impl ClientContext for Counters {
    /// A producer calls it in its own thread; a consumer only while somebody waits in
    /// `recv`.
    fn stats(&self, statistics: Statistics) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(statistics);
    }
}

impl ConsumerContext for Counters {}

fn config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        // 0, the default, is never. A monitor wants seconds.
        .set("statistics.interval.ms", "200");
    config
}
// ANCHOR_END: context

type Reports = Arc<Mutex<Option<Statistics>>>;

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;

    let counters = Counters::default();
    let reports = Arc::clone(&counters.0);
    let producer: FutureProducer<Counters> = config(&brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create_with_context(counters)?;
    let first = place(&producer).await?;
    let all = |statistics: &Statistics| sent(statistics) == ORDERS as u64;
    for line in producer_metrics(&report(&reports, all).await?) {
        println!("{line}");
    }

    let counters = Counters::default();
    let reports = Arc::clone(&counters.0);
    let consumer = billing(&brokers, counters, first).await?;
    let position = first + BILLED as i64;
    let committed = |statistics: &Statistics| {
        let partitions = partitions(statistics);
        partitions.iter().any(|it| it.committed_offset == position)
    };
    // Paused: nothing comes, but `recv` is where reports are made.
    let last = tokio::select! {
        report = report(&reports, committed) => report?,
        record = consumer.recv() => bail!("came in a pause: {:?}", record?.offset()),
    };
    for line in consumer_metrics(&last) {
        println!("{line}");
    }
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

// ANCHOR: metrics
/// In the text format of Prometheus.
fn producer_metrics(statistics: &Statistics) -> Vec<String> {
    let mut lines = vec![format!(
        r#"kafka_records_sent_total{{topic="{TOPIC}"}} {}"#,
        sent(statistics)
    )];
    for broker in statistics.brokers.values() {
        // Addresses that were only asked for the others have sent no answer yet.
        if let Some(times) = &broker.rtt
            && times.cnt > 0
        {
            // Microseconds, since the report before.
            let seconds = times.p99 as f64 / 1e6;
            lines.push(format!(
                r#"kafka_round_trip_seconds{{quantile="0.99"}} {seconds}"#
            ));
        }
    }
    lines
}

fn consumer_metrics(statistics: &Statistics) -> Vec<String> {
    let mut lines = Vec::new();
    for it in partitions(statistics) {
        let labels = format!(r#"topic="{TOPIC}",partition="{}""#, it.partition);
        lines.push(format!(
            "kafka_consumer_position{{{labels}}} {}",
            it.committed_offset
        ));
        // -1 is "not known": nothing is committed, or nothing was fetched yet.
        if it.consumer_lag >= 0 {
            lines.push(format!(
                "kafka_consumer_lag{{{labels}}} {}",
                it.consumer_lag
            ));
        }
    }
    lines
}

fn sent(statistics: &Statistics) -> u64 {
    partitions(statistics).iter().map(|it| it.txmsgs).sum()
}

/// Without -1, which stands for records that have no partition yet.
fn partitions(statistics: &Statistics) -> Vec<&rdkafka::statistics::Partition> {
    let Some(topic) = statistics.topics.get(TOPIC) else {
        return Vec::new();
    };
    topic
        .partitions
        .values()
        .filter(|it| it.partition >= 0)
        .collect()
}
// ANCHOR_END: metrics

/// The first report of this kind.
async fn report(
    reports: &Reports,
    is_it: impl Fn(&Statistics) -> bool,
) -> Result<Statistics> {
    let start = Instant::now();
    loop {
        let report = reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match report {
            Some(report) if is_it(&report) => return Ok(report),
            _ => ensure!(start.elapsed() < PATIENCE, "no such report within 5 s"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Bills a part of the orders, commits, and pauses.
async fn billing(
    brokers: &str,
    counters: Counters,
    first: i64,
) -> Result<StreamConsumer<Counters>> {
    let consumer: StreamConsumer<Counters> = config(brokers)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .create_with_context(counters)?;
    let mut partition = TopicPartitionList::new();
    partition.add_partition_offset(TOPIC, 0, Offset::Offset(first))?;
    consumer.assign(&partition)?;
    for _order in 0..BILLED {
        let order = timeout(PATIENCE, consumer.recv()).await;
        let order = order.context("no order came within 5 s")??;
        consumer.commit_message(&order, CommitMode::Async)?;
    }
    consumer.pause(&partition)?;
    Ok(consumer)
}

/// Places all orders, and returns the offset of the first.
async fn place(producer: &FutureProducer<Counters>) -> Result<i64> {
    let mut first = None;
    for number in 0..ORDERS {
        let order = format!("order-{number}");
        let record = FutureRecord::to(TOPIC).key(&order).payload(&order);
        let delivery = producer.send(record, PATIENCE).await;
        let delivery = delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
        first.get_or_insert(delivery.offset);
    }
    first.context("no order to place")
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
