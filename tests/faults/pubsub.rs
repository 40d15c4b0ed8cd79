//! A service hears of each order, whatever dies; one that listens to core NATS does
//! not. The observer counts what the service has said that it heard.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, AtLeastOnce, Control},
        Counts,
        Fault::{self, BrokerKilled, WorkerKilled},
    },
};
use tests::{Supervised, guarantees::tell};

use crate::driver::{
    CHUNK, Places, Publisher, Scene, TIMES, cells, finish, reordered, rounds,
    rounds_half_dead,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_pubsub_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_pubsub_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_pubsub_nats"),
    }
}

const PLACES: Places = Places {
    topic: "orders-events",
    partitions: 1,
    group: "orders-events-mail",
    queue: "orders.events.mail",
    stream: "ORDERS_EVENTS",
    consumer: Some("mail"),
};

async fn under(broker: Broker, fault: Fault, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, fault).await?;
    let words = match claim {
        Claim::Control => &["subscribe", "mail", "--core"][..],
        _ => &["subscribe", "mail"],
    };
    let (variable, through) = scene.worker();
    let mut mail =
        Supervised::start(binary(broker), words, &[(variable, &through)])?;
    mail.prints("ready:").await?;
    scene.settle().await;

    let publisher = Publisher::new(binary(broker), scene.direct());
    let sum = if fault == WorkerKilled {
        rounds_half_dead(&publisher, &mut mail).await?
    } else {
        rounds(&publisher, async || scene.strike(&mut mail, "heard:").await).await?
    };
    if claim != Claim::Control {
        finish(&mut mail, async || {
            PLACES.waiting(&scene.broker, broker).await
        })
        .await?;
    }
    let (printed, _errors) = mail.stop().await?;

    let heard: Vec<u64> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("heard:     order-"))
        .map(|number| number.parse().context("a number"))
        .collect::<Result<_>>()?;
    let different: HashSet<u64> = heard.iter().copied().collect();
    let lost = (1..=TIMES * CHUNK).filter(|number| !different.contains(number));
    tell(&Cell {
        pattern: "pubsub".to_owned(),
        variant: match claim {
            Claim::Control => "subscribe --core".to_owned(),
            _ => String::new(),
        },
        broker,
        fault,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received: different.len() as u64,
            lost: lost.count() as u64,
            repeated: Some((heard.len() - different.len()) as u64),
            doubled: 0,
            reordered: Some(reordered(heard.iter().map(|number| ("mail", *number)))),
        },
    })
}

cells! {
    under:
    kafka_service_killed(Kafka, WorkerKilled, AtLeastOnce);
    kafka_broker_killed(Kafka, BrokerKilled, AtLeastOnce);
    rabbitmq_service_killed(RabbitMq, WorkerKilled, AtLeastOnce);
    rabbitmq_broker_killed(RabbitMq, BrokerKilled, AtLeastOnce);
    nats_service_killed(Nats, WorkerKilled, AtLeastOnce);
    nats_broker_killed(Nats, BrokerKilled, AtLeastOnce);
    nats_control(Nats, WorkerKilled, Control);
}
