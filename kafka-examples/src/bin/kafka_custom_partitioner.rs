//! Keys: a partitioner of your own.
//!
//! Teaches: which partition a key goes to can be a rule of the business: orders of VIPs
//! into a partition of their own, which a worker of its own reads. rdkafka has it for
//! `BaseProducer` and `ThreadedProducer` only. And it crashes the process when no
//! property of a topic is set, such as `acks`: rdkafka 0.39 hands librdkafka no topic
//! settings then.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_custom_partitioner
//! cargo run --bin kafka_custom_partitioner careless      # crashes
//! ```
//!
//! Expected output:
//!
//! ```text
//! partition 0: 3 orders of VIPs, 0 of others
//! partition 1: 0 orders of VIPs, <n> of others
//! partition 2: 0 orders of VIPs, <n> of others
//! ```
//!
//! Left out on purpose: orders without a key, which librdkafka spreads by itself unless
//! `sticky.partitioning.linger.ms` is 0.

use std::{
    env,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
    producer::{
        BaseRecord, DeliveryResult, Partitioner, Producer as _, ProducerContext,
        ThreadedProducer,
    },
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "partitioner.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 3;
const VIPS: [&str; 3] = ["vip-1", "vip-2", "vip-3"];
const OTHERS: usize = 20;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(Settings::WithTopic).await,
        ["careless"] => story(Settings::Without).await,
        _ => {
            eprintln!("usage: kafka_custom_partitioner [careless]");
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

async fn story(settings: Settings) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let place = move || place(&brokers, settings);
    let placed = spawn_blocking(place).await??;
    for (partition, keys) in placed.iter().enumerate() {
        let vips = keys.iter().filter(|key| VIPS.contains(&&***key)).count();
        let others = keys.len() - vips;
        println!("partition {partition}: {vips} orders of VIPs, {others} of others");
    }
    Ok(())
}

// ANCHOR: partitioner
/// VIPs to partition 0, everybody else to the others by the hash of the key.
struct ByTier;

impl Partitioner for ByTier {
    /// In threads of librdkafka, perhaps several times for one order: quick, and always
    /// the same answer.
    fn partition(
        &self,
        _topic: &str,
        key: Option<&[u8]>,
        partitions: i32,
        _is_available: impl Fn(i32) -> bool,
    ) -> i32 {
        let key = key.unwrap_or_default();
        if key.starts_with(b"vip-") || partitions < 2 {
            return 0;
        }
        // The same in every release and every program, unlike the hash of Rust's maps;
        // librdkafka's own partitioner takes it too.
        let hash = crc32fast::hash(key);
        let other = hash % (partitions.unsigned_abs() - 1);
        1 + i32::try_from(other).unwrap_or_default()
    }
}

/// The keys that were delivered, for each partition.
type Placed = Vec<Vec<String>>;

struct Shop {
    by_tier: ByTier,
    placed: Arc<Mutex<Placed>>,
}

impl ClientContext for Shop {}

impl ProducerContext<ByTier> for Shop {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        // The number of those that are delivered is looked at in the end.
        let Ok(record) = result else { return };
        let key = record.key().unwrap_or_default();
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        placed[record.partition() as usize]
            .push(String::from_utf8_lossy(key).into_owned());
    }

    fn get_custom_partitioner(&self) -> Option<&ByTier> {
        Some(&self.by_tier)
    }
}

enum Settings {
    WithTopic,
    /// The crash.
    Without,
}

/// Places all orders. Blocks.
fn place(brokers: &str, settings: Settings) -> Result<Placed> {
    let placed = Arc::new(Mutex::new(vec![Vec::new(); PARTITIONS as usize]));
    let shop = Shop {
        by_tier: ByTier,
        placed: Arc::clone(&placed),
    };
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    if let Settings::WithTopic = settings {
        // Any property of a topic will do.
        config.set("message.timeout.ms", "5000");
    }
    let producer: ThreadedProducer<Shop, ByTier> =
        config.create_with_context(shop)?;
    let others = (0..OTHERS).map(|number| format!("customer-{number}"));
    let vips = VIPS.map(str::to_owned);
    for key in vips.into_iter().chain(others) {
        let record = BaseRecord::to(TOPIC).key(&key).payload("an order");
        let sent = producer.send(record);
        sent.map_err(|(error, _record)| anyhow!("not sent to {TOPIC}: {error}"))?;
    }
    producer.flush(2 * PATIENCE)?;
    let placed = placed
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let count = placed.iter().map(Vec::len).sum::<usize>();
    ensure!(
        count == VIPS.len() + OTHERS,
        "only {count} orders are delivered"
    );
    Ok(placed)
}
// ANCHOR_END: partitioner

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
