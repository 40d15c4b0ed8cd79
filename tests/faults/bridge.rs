//! What goes into a bridge comes out of it, whatever dies, and in its order; one that
//! acknowledges first loses some. The observer reads the other side.

use std::{collections::HashSet, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, AtLeastOnce, Control},
        Counts,
        Fault::{self, BrokerKilled, ConnectionCut, WorkerKilled},
    },
};
use patterns::bridge::PartnerOrder;
use tests::{Supervised, TestBroker, guarantees::tell};
use tokio::time::sleep;

use crate::driver::{
    CHUNK, Places, Publisher, Scene, TIMES, cells, finish, reordered, rounds,
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

/// The same on both sides, but for Kafka's group, which only a source has.
const PLACES: Places = Places {
    topic: "partner-orders",
    partitions: 4,
    group: "bridge-to-nats",
    queue: "partner.orders",
    stream: "PARTNER_ORDERS",
    consumer: None,
};

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

    let publisher = Publisher::new(binary(name), (from.0, from.1.to_owned()));
    let sum = rounds(&publisher, async || {
        if claim != Control || fault != WorkerKilled {
            return scene.strike(&mut bridge, "carried:").await;
        }
        // What it publishes now does not arrive, and it has acknowledged already.
        bridge.prints("carried:").await?;
        scene.drop_what_is_sent()?;
        // Longer than Kafka's commits in the background are apart.
        sleep(Duration::from_secs(1)).await;
        bridge.kill().await?;
        scene.cut()
    })
    .await?;
    finish(&mut bridge, async || PLACES.waiting(&source, name).await).await?;
    bridge.stop().await?;

    let arrived: Vec<PartnerOrder> =
        PLACES.stored(&scene.broker, scene.name).await?;
    // The number of an order is its quantity.
    let different: HashSet<u64> =
        arrived.iter().map(|order| order.quantity).collect();
    let lost = (1..=TIMES * CHUNK).filter(|number| !different.contains(number));
    let reordered = reordered(
        arrived
            .iter()
            .map(|order| (order.partner.as_str(), order.quantity)),
    );
    ensure!(reordered == 0, "{reordered} orders are out of order");
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
            reordered: Some(reordered),
        },
    })
}

cells! {
    under:
    kafka_bridge_killed(Kafka, WorkerKilled, AtLeastOnce);
    kafka_connection_cut(Kafka, ConnectionCut, AtLeastOnce);
    kafka_target_killed(Kafka, BrokerKilled, AtLeastOnce);
    kafka_control(Kafka, WorkerKilled, Control);
    nats_bridge_killed(Nats, WorkerKilled, AtLeastOnce);
    nats_connection_cut(Nats, ConnectionCut, AtLeastOnce);
    nats_target_killed(Nats, BrokerKilled, AtLeastOnce);
    nats_control(Nats, WorkerKilled, Control);
    rabbitmq_bridge_killed(RabbitMq, WorkerKilled, AtLeastOnce);
    rabbitmq_target_killed(RabbitMq, BrokerKilled, AtLeastOnce);
    rabbitmq_control(RabbitMq, BrokerKilled, Control);
}
