//! Tests of the Kafka examples, by their binaries, against a real Kafka.

mod absent;
mod admin_topics;
mod at_least_once;
mod batch_consumer;
mod client_context;
mod commit_strategies;
mod compacted_table;
mod consumer;
mod consumer_groups;
mod custom_partitioner;
mod exactly_once;
mod headers;
mod idempotent_producer;
mod json_events;
mod keys_partitions;
mod lag_monitor;
mod leader_failover;
mod mock_cluster;
mod mock_limits;
mod mock_tests;
mod parallel_partitions;
mod pause_resume;
mod producer;
mod producer_batching;
mod producer_errors;
mod producer_pipelined;
mod rebalance;
mod rebalance_commit;
mod replay_by_time;
mod retry_dlq;
mod statistics;
mod throughput;
mod transactions;
// What needs TLS; `cargo lab test kafka` switches the feature on.
#[cfg(feature = "tls")]
mod mtls;
#[cfg(feature = "tls")]
mod oauth;
#[cfg(feature = "tls")]
mod sasl_scram;
#[cfg(feature = "tls")]
mod tls;

use anyhow::Result;
use lab::broker::Broker;
use tests::{Example, broker, observe};

const PRODUCER: &str = env!("CARGO_BIN_EXE_kafka_producer");
const CONSUMER: &str = env!("CARGO_BIN_EXE_kafka_consumer");
const MOCK_CLUSTER: &str = env!("CARGO_BIN_EXE_kafka_mock_cluster");

/// The shared Kafka, with the variable in which an example finds its address.
async fn kafka() -> Result<(&'static str, &'static str)> {
    Ok(("KAFKA_BROKERS", broker::shared(Broker::Kafka).await?))
}

/// Runs an example twice, with what an earlier run has left out of the way, and
/// returns the address of its Kafka.
async fn ran_twice(example: &str, topics: &[&str]) -> Result<&'static str> {
    let kafka = kafka().await?;
    for topic in topics {
        observe::kafka::forget(kafka.1, topic, "none").await?;
    }
    for _run in 0..2 {
        let ended = Example::start(example, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    Ok(kafka.1)
}

/// Producer and consumer share topic and group, so their tests take turns.
static FIRST_STEPS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const TOPIC: &str = "my-topic";
const GROUP: &str = "my-group";
