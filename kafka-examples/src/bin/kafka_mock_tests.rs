//! Mock cluster: your own Kafka code, tested without Kafka.
//!
//! Teaches: code that speaks to Kafka decides what an error means, and errors are hard
//! to get from a real cluster when a test wants them. The mock cluster gives them on
//! demand: an error for the next two requests, a broker that is down and comes back.
//! Each test has a cluster of its own, and takes as long as its timeouts.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_mock_tests
//! cargo test --bin kafka_mock_tests      # needs no Kafka
//! ```
//!
//! Expected output:
//!
//! ```text
//! a lamp:        placed
//! a large order: refused (MessageSizeTooLarge)
//! ```
//!
//! Left out on purpose: idempotence. The mock cluster loses a record when it is on and
//! an error is injected; see the table in the book.

use std::{env, fmt, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{task::spawn_blocking, time::sleep};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "mock-tests.orders";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 1;

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

async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let orders = Orders::connect(&brokers, PATIENCE)?;
    println!("a lamp:        {}", orders.place("a lamp").await);
    let large = "lamp ".repeat(1_000_000);
    println!("a large order: {}", orders.place(&large).await);
    Ok(())
}

// ANCHOR: orders
/// The part of the shop that speaks to Kafka.
struct Orders {
    producer: FutureProducer,
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Placed,
    /// It is not in Kafka, and never will be.
    Refused(RDKafkaErrorCode),
    /// It may be in Kafka: to place it again could be to place it twice.
    InDoubt,
}

impl Orders {
    /// `patience` is the time for one order, with all attempts.
    fn connect(brokers: &str, patience: Duration) -> Result<Self> {
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("acks", "all")
            .set("delivery.timeout.ms", patience.as_millis().to_string())
            .set("reconnect.backoff.max.ms", "500")
            .create()?;
        Ok(Self { producer })
    }

    async fn place(&self, order: &str) -> Outcome {
        let record = FutureRecord::to(TOPIC).key("shop").payload(order);
        let Err((error, _record)) = self.producer.send(record, PATIENCE).await
        else {
            return Outcome::Placed;
        };
        match error {
            KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut) => {
                Outcome::InDoubt
            }
            error => Outcome::Refused(
                error
                    .rdkafka_error_code()
                    .unwrap_or(RDKafkaErrorCode::Unknown),
            ),
        }
    }
}
// ANCHOR_END: orders

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Placed => f.write_str("placed"),
            Self::Refused(code) => write!(f, "refused ({code:?})"),
            Self::InDoubt => f.write_str("in doubt"),
        }
    }
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

// ANCHOR: tests
#[cfg(test)]
mod tests {
    use rdkafka::{
        consumer::{BaseConsumer, Consumer as _},
        mocking::MockCluster,
        producer::DefaultProducerContext,
        types::{RDKafkaApiKey, RDKafkaRespErr},
    };
    use tokio::time::Instant;

    use super::*;

    const BROKER: i32 = 1;
    const PATIENCE: Duration = Duration::from_secs(2);

    fn shop() -> Result<(MockCluster<'static, DefaultProducerContext>, Orders)> {
        let cluster = MockCluster::new(1)?;
        // It knows no `AdminClient`: topics are made by the cluster itself.
        cluster.create_topic(TOPIC, 1, 1)?;
        let orders = Orders::connect(&cluster.bootstrap_servers(), PATIENCE)?;
        Ok((cluster, orders))
    }

    /// How many orders another client finds.
    fn stored(brokers: &str) -> Result<i64> {
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .create()?;
        let (_first, end) = client.fetch_watermarks(TOPIC, 0, PATIENCE)?;
        Ok(end)
    }

    #[tokio::test]
    async fn an_error_that_passes_is_not_seen() -> Result<()> {
        let (cluster, orders) = shop()?;
        let passing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
        cluster.request_errors(RDKafkaApiKey::Produce, &[passing, passing]);
        assert_eq!(orders.place("a lamp").await, Outcome::Placed);
        assert_eq!(stored(&cluster.bootstrap_servers())?, 1);
        Ok(())
    }

    #[tokio::test]
    async fn an_error_that_stays_refuses_the_order() -> Result<()> {
        let (cluster, orders) = shop()?;
        let stays = RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
        cluster.request_errors(RDKafkaApiKey::Produce, &[stays]);
        let refused = Outcome::Refused(RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(orders.place("a lamp").await, refused);
        assert_eq!(stored(&cluster.bootstrap_servers())?, 0);
        // It was the error, and nothing else.
        assert_eq!(orders.place("a lamp").await, Outcome::Placed);
        Ok(())
    }

    #[tokio::test]
    async fn without_a_broker_an_order_is_in_doubt() -> Result<()> {
        let (cluster, orders) = shop()?;
        cluster.broker_down(BROKER)?;
        let start = Instant::now();
        assert_eq!(orders.place("a lamp").await, Outcome::InDoubt);
        assert!(start.elapsed() >= PATIENCE, "{:?}", start.elapsed());
        Ok(())
    }

    #[tokio::test]
    async fn a_broker_that_comes_back_in_time_gets_the_order() -> Result<()> {
        let (cluster, orders) = shop()?;
        cluster.broker_down(BROKER)?;
        let back = async {
            sleep(PATIENCE / 4).await;
            cluster.broker_up(BROKER)
        };
        let (outcome, back) = tokio::join!(orders.place("a lamp"), back);
        back?;
        assert_eq!(outcome, Outcome::Placed);
        assert_eq!(stored(&cluster.bootstrap_servers())?, 1);
        Ok(())
    }
}
// ANCHOR_END: tests
