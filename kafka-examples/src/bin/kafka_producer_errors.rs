//! Errors of a producer: which are yours to handle, and when.
//!
//! Teaches: what may pass, the client retries by itself, and your future waits for
//! it, by default for five minutes. What comes to you is final: a record too large
//! for the client's limit, at once; a full local queue, at once, if you do not wait
//! for room; a time-out, when the time for the delivery is over. On a simulated
//! cluster, as no real one fails on demand.
//!
//! Run, without a broker:
//!
//! ```text
//! cargo run --bin kafka_producer_errors
//! ```
//!
//! Expected output:
//!
//! ```text
//! retried:   two errors of the broker, and the order is delivered
//! too large: MessageSizeTooLarge, at once
//! full:      QueueFull, at once; the record comes back
//! no broker: MessageTimedOut, after its 2 s
//! in doubt:  the broker is back, and has 1 order of 4
//! ```
//!
//! Left out on purpose: errors of permissions, see kafka_mtls; and the fatal ones of
//! a producer with transactions, see kafka_transactions.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig,
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    mocking::MockCluster,
    producer::{FutureProducer, FutureRecord, Producer as _},
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use tokio::task::spawn_blocking;

const TOPIC: &str = "errors.orders";
const BROKER: i32 = 1;
/// How long a delivery may take, with all retries.
const DELIVERY: Duration = Duration::from_secs(2);
/// How long to wait for room in the local queue.
const ROOM: Duration = Duration::from_secs(1);

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

// ANCHOR: story
async fn story() -> Result<()> {
    let cluster = MockCluster::new(1)
        .map_err(|error| anyhow!("cannot start the mock cluster: {error}"))?;
    cluster.create_topic(TOPIC, 1, 1)?;
    let brokers = cluster.bootstrap_servers();
    let producer = producer(&brokers)?;

    // As during the election of a leader.
    let passing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
    cluster.request_errors(RDKafkaApiKey::Produce, &[passing, passing]);
    let sent = send(&producer, "1 kettle").await;
    sent.map_err(|code| anyhow!("not delivered: {code}"))?;
    println!("retried:   two errors of the broker, and the order is delivered");

    let large = "x".repeat(2_000_000);
    let code = refused(send(&producer, &large).await)?;
    println!("too large: {code:?}, at once");

    cluster.broker_down(BROKER)?;
    let code = fill(&producer)?;
    println!("full:      {code:?}, at once; the record comes back");
    // What is in the queue has had its time too.
    let flush = {
        let producer = producer.clone();
        move || producer.flush(4 * DELIVERY)
    };
    spawn_blocking(flush).await??;

    let start = Instant::now();
    let code = refused(send(&producer, "1 lamp").await)?;
    ensure!(start.elapsed() >= DELIVERY, "after {:?}", start.elapsed());
    println!("no broker: {code:?}, after its {} s", DELIVERY.as_secs());

    cluster.broker_up(BROKER)?;
    let count = stored(&brokers).await?;
    println!("in doubt:  the broker is back, and has {count} order of 4");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: send
fn producer(brokers: &str) -> Result<FutureProducer<DefaultClientContext>> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Five minutes, if you say nothing.
        .set("delivery.timeout.ms", DELIVERY.as_millis().to_string())
        // The time is looked at before each attempt to connect, and the pause between
        // two of them may get to ten seconds by default.
        .set("reconnect.backoff.max.ms", "500")
        // Small, to be full soon; 100,000 by default.
        .set("queue.buffering.max.messages", "2")
        .create()?;
    Ok(producer)
}

/// The error code is what a program decides by. The record comes with it.
async fn send(
    producer: &FutureProducer,
    order: &str,
) -> Result<(), RDKafkaErrorCode> {
    let record = FutureRecord::to(TOPIC).key("order").payload(order);
    match producer.send(record, ROOM).await {
        Ok(_delivery) => Ok(()),
        Err((error, _record)) => Err(error
            .rdkafka_error_code()
            .unwrap_or(RDKafkaErrorCode::Unknown)),
    }
}

/// Without waiting for room: that is yours to do.
fn fill(producer: &FutureProducer) -> Result<RDKafkaErrorCode> {
    for _order in 0..3 {
        let record = FutureRecord::to(TOPIC).key("order").payload("1 toaster");
        match producer.send_result(record) {
            // On its way; nobody waits for the delivery here.
            Ok(delivery) => drop(delivery),
            Err((KafkaError::MessageProduction(code), record)) => {
                ensure!(record.payload == Some("1 toaster"), "another record");
                return Ok(code);
            }
            Err((error, _record)) => return Err(error.into()),
        }
    }
    bail!("there is room for three")
}
// ANCHOR_END: send

fn refused(sent: Result<(), RDKafkaErrorCode>) -> Result<RDKafkaErrorCode> {
    match sent {
        Err(code) => Ok(code),
        Ok(()) => bail!("it was delivered"),
    }
}

/// How many records the broker has.
async fn stored(brokers: &str) -> Result<i64> {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let ask = move || client.fetch_watermarks(TOPIC, 0, Duration::from_secs(5));
    let (first, end) = spawn_blocking(ask).await??;
    Ok(end - first)
}
