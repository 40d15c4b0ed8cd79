//! Tests of the RabbitMQ examples, by their binaries, against a real RabbitMQ.

mod absent;
mod acks;
mod blocked;
mod confirms;
mod consumer;
mod consumer_end;
mod consuming;
mod dead_letter;
mod fanout;
mod limits;
mod permissions;
mod publisher;
mod quorum_failover;
mod quorum_queue;
mod recovery;
mod routing;
mod rpc;
mod rpc_latency;
mod stream;
mod stream_offsets;
mod throughput;
mod tls;
mod tutorials;
mod unroutable;

use anyhow::Result;
use lab::broker::Broker;
use tests::{Example, broker, observe::rabbitmq::Management};

const PUBLISHER: &str = env!("CARGO_BIN_EXE_rabbitmq_publisher");
const CONSUMER: &str = env!("CARGO_BIN_EXE_rabbitmq_consumer");
const FANOUT: &str = env!("CARGO_BIN_EXE_rabbitmq_fanout");
const DIRECT_ROUTING: &str = env!("CARGO_BIN_EXE_rabbitmq_direct_routing");
const TOPICS: &str = env!("CARGO_BIN_EXE_rabbitmq_topics");
const MANDATORY: &str = env!("CARGO_BIN_EXE_rabbitmq_mandatory");
const ALTERNATE_EXCHANGE: &str = env!("CARGO_BIN_EXE_rabbitmq_alternate_exchange");

/// The shared RabbitMQ, with the variable in which an example finds its address.
async fn rabbitmq() -> Result<(&'static str, &'static str)> {
    Ok(("AMQP_URL", broker::shared(Broker::RabbitMq).await?))
}

/// The management API of the shared RabbitMQ, and the address of a vhost in it that
/// is the test's own.
async fn own_vhost() -> Result<(Management, String)> {
    let (_, address) = rabbitmq().await?;
    let management = broker::shared_management().await?;
    let own = management.own_vhost(address).await?;
    Ok((management, own))
}

/// Runs an example twice in a vhost of its own, and returns the vhost's address.
async fn ran_twice(example: &str) -> Result<String> {
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(example, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    Ok(address)
}

/// Publisher and consumer share a queue, so their tests take turns.
static FIRST_STEPS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const QUEUE: &str = "hello";
