//! What goes into a bridge comes out of it, whatever dies, and in its order; one that
//! acknowledges first loses some. The observer reads the other side.

use std::{collections::HashSet, time::Duration};

use anyhow::Result;
use lab::{
    broker::Broker,
    guarantees::{Cell, Claim, Counts, Fault},
};
use patterns::bridge::PartnerOrder;
use rdkafka::Message as _;
use tests::{Supervised, TestBroker, observe};
use tokio::time::sleep;

use crate::driver::{
    CHUNK, Published, Scene, TIMES, finish, publish, queue_length, reordered, tell,
};

/// Named by its source.
fn binary(source: Broker) -> &'static str {
    match source {
        Broker::Kafka => env!("CARGO_BIN_EXE_bridge_kafka"),
        Broker::Nats => env!("CARGO_BIN_EXE_bridge_nats"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_bridge_rabbitmq"),
    }
}

fn target(source: Broker) -> Broker {
    match source {
        Broker::Kafka => Broker::Nats,
        Broker::Nats => Broker::RabbitMq,
        Broker::RabbitMq => Broker::Kafka,
    }
}

/// How many messages of the source are not done with.
async fn left(source: &TestBroker, name: Broker) -> Result<u64> {
    let address = source.address();
    match name {
        Broker::Kafka => {
            let (topic, group) = ("partner-orders", "bridge-to-nats");
            let lag = observe::kafka::lag(address, topic, 4, group).await?;
            Ok(u64::try_from(lag)?)
        }
        Broker::RabbitMq => queue_length(source, "partner.orders").await,
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("PARTNER_ORDERS").await?;
            Ok(stream.info().await?.state.messages)
        }
    }
}

/// What has arrived: partner and number of each order, in its order.
async fn arrived(target: &Scene) -> Result<Vec<(String, u64)>> {
    let address = target.broker.address();
    let payloads: Vec<Vec<u8>> = match target.name {
        Broker::Kafka => {
            let (topic, isolation) = ("partner-orders", "read_committed");
            let records =
                observe::kafka::read_all(address, topic, 4, isolation).await?;
            let payloads = records.iter().filter_map(|record| record.payload());
            payloads.map(<[u8]>::to_vec).collect()
        }
        Broker::RabbitMq => {
            let messages =
                observe::rabbitmq::drain(address, "partner.orders").await?;
            messages
                .into_iter()
                .map(|message| message.delivery.data)
                .collect()
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("PARTNER_ORDERS").await?;
            let mut payloads = Vec::new();
            for sequence in 1..=stream.info().await?.state.last_sequence {
                let message = stream.get_raw_message(sequence).await?;
                payloads.push(message.payload.to_vec());
            }
            payloads
        }
    };
    payloads
        .iter()
        .map(|payload| {
            let order: PartnerOrder = serde_json::from_slice(payload)?;
            // The number of an order is its quantity.
            Ok((order.partner, order.quantity))
        })
        .collect()
}

/// The fault is that of the bridge or of its target.
async fn under(name: Broker, fault: Fault, claim: Claim) -> Result<()> {
    let source = TestBroker::start(name).await?;
    let mut scene = Scene::prepare(target(name), fault).await?;
    let words = match claim {
        Claim::Control => &["run", "--ack-first"][..],
        _ => &["run"],
    };
    let (variable, through) = scene.worker();
    let from = (name.address_var(), source.address());
    let variables = [from, (variable, through.as_str())];
    let mut bridge = Supervised::start(binary(name), words, &variables)?;
    bridge.prints("ready:").await?;
    scene.settle().await;

    let mut sum = Published::default();
    for round in 0..TIMES {
        let (first, last) = (round * CHUNK + 1, (round + 1) * CHUNK);
        let direct = (from.0, from.1.to_owned());
        let publisher = publish(binary(name).to_owned(), direct, first, last);
        let publishing = tokio::spawn(publisher);
        if claim == Claim::Control && fault == Fault::WorkerKilled {
            // What it publishes now does not arrive, and it has acknowledged already.
            bridge.prints("carried:").await?;
            scene.drop_what_is_sent()?;
            // Longer than Kafka's commits in the background are apart.
            sleep(Duration::from_secs(1)).await;
            bridge.kill().await?;
            scene.cut()?;
        } else {
            scene.strike(&mut bridge, "carried:").await?;
        }
        let published = publishing.await??;
        sum.attempted += published.attempted;
        sum.acknowledged += published.acknowledged;
        println!(
            "bridge_{} {} {}/{TIMES}",
            name.name(),
            fault.name(),
            round + 1
        );
    }
    finish(&mut bridge, async || left(&source, name).await).await?;
    bridge.stop().await?;

    let arrived = arrived(&scene).await?;
    let different: HashSet<u64> =
        arrived.iter().map(|(_, number)| *number).collect();
    let lost = (1..=TIMES * CHUNK).filter(|number| !different.contains(number));
    let order = arrived
        .iter()
        .map(|(partner, number)| (partner.as_str(), *number));
    tell(&Cell {
        pattern: "bridge".to_owned(),
        variant: match claim {
            Claim::Control => "run --ack-first".to_owned(),
            _ => String::new(),
        },
        broker: name,
        fault,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received: different.len() as u64,
            lost: lost.count() as u64,
            repeated: Some((arrived.len() - different.len()) as u64),
            doubled: 0,
            reordered: reordered(order),
        },
    })
}

macro_rules! cells {
    ($($name:ident: $broker:ident, $fault:ident, $claim:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() -> Result<()> {
                under(Broker::$broker, Fault::$fault, Claim::$claim).await
            }
        )*
    };
}

cells! {
    kafka_bridge_killed: Kafka, WorkerKilled, AtLeastOnce;
    kafka_connection_cut: Kafka, ConnectionCut, AtLeastOnce;
    kafka_target_killed: Kafka, BrokerKilled, AtLeastOnce;
    kafka_control: Kafka, WorkerKilled, Control;
    nats_bridge_killed: Nats, WorkerKilled, AtLeastOnce;
    nats_connection_cut: Nats, ConnectionCut, AtLeastOnce;
    nats_target_killed: Nats, BrokerKilled, AtLeastOnce;
    nats_control: Nats, WorkerKilled, Control;
    rabbitmq_bridge_killed: RabbitMq, WorkerKilled, AtLeastOnce;
    rabbitmq_target_killed: RabbitMq, BrokerKilled, AtLeastOnce;
    rabbitmq_control: RabbitMq, BrokerKilled, Control;
}
