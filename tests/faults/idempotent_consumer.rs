//! Each payment is charged once, whatever dies; without the inbox some are charged
//! twice. The observer reads the ledger's database.

use std::{collections::HashSet, path::Path};

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, Control, EffectivelyOnce},
        Counts,
        Fault::{
            self, BrokerFrozen, BrokerKilled, ConnectionCut, WorkerFrozen,
            WorkerKilled,
        },
    },
};
use patterns::idempotent_consumer::{id, payment};
use rusqlite::Connection;
use tests::{Supervised, guarantees::tell};

use crate::driver::{
    CHUNK, Places, Publisher, Scene, TIMES, cells, finish, folder, reordered, rounds,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_idempotent_consumer_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_idempotent_consumer_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_idempotent_consumer_nats"),
    }
}

/// The charges in their order: account, number of the payment, amount.
fn charges(file: &Path) -> Result<Vec<(String, u64, i64)>> {
    let database = Connection::open(file)?;
    let mut query = database
        .prepare("SELECT account, id, amount FROM charges ORDER BY number")?;
    let rows = query.query_map((), |row| {
        Ok((row.get(0)?, row.get::<_, String>(1)?, row.get(2)?))
    })?;
    rows.map(|row| {
        let (account, id, amount) = row?;
        let number = id.strip_prefix("payment-").context("an id")?.parse()?;
        Ok((account, number, amount))
    })
    .collect()
}

/// How many payments have not been charged at all.
fn missing(file: &Path, last: u64) -> Result<u64> {
    let charged: HashSet<u64> = charges(file)?
        .into_iter()
        .map(|(_, number, _)| number)
        .collect();
    let missing = (1..=last).filter(|number| !charged.contains(number));
    Ok(missing.count() as u64)
}

const PLACES: Places = Places {
    topic: "payments-due",
    partitions: 4,
    group: "ledger",
    queue: "payments.due",
    stream: "PAYMENTS_DUE",
    consumer: None,
};

async fn under(broker: Broker, fault: Fault, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, fault).await?;
    let folder = folder()?;
    let file = folder.path().join("ledger.db");
    let ledger = file.to_string_lossy();
    let words = match claim {
        Claim::Control => &["consume", &*ledger, "--no-inbox"][..],
        _ => &["consume", &*ledger],
    };
    let (variable, through) = scene.worker();
    let mut consumer =
        Supervised::start(binary(broker), words, &[(variable, &through)])?;
    consumer.prints("ready:").await?;
    scene.settle().await;

    let publisher = Publisher::new(binary(broker), scene.direct());
    let sum =
        rounds(&publisher, async || scene.strike(&mut consumer, ":").await).await?;
    let last = TIMES * CHUNK;
    finish(&mut consumer, async || {
        Ok(missing(&file, last)? + PLACES.waiting(&scene.broker, broker).await?)
    })
    .await?;
    let (printed, _errors) = consumer.stop().await?;

    let charges = charges(&file)?;
    let different: HashSet<u64> =
        charges.iter().map(|(_, number, _)| *number).collect();
    let received = different.len() as u64;
    let known = printed
        .lines()
        .filter(|line| line.starts_with("known:"))
        .count();
    let doubled = charges.len() as u64 - received;
    // What is charged is what was owed, account by account, to the cent.
    for (account, number, amount) in &charges {
        let owed = payment(*number);
        assert_eq!(
            (account, amount),
            (&owed.account, &owed.amount),
            "{}",
            id(*number)
        );
    }
    let order = charges
        .iter()
        .map(|(account, number, _)| (account.as_str(), *number));
    tell(&Cell {
        pattern: "idempotent_consumer".to_owned(),
        variant: match claim {
            Claim::Control => "--no-inbox".to_owned(),
            _ => String::new(),
        },
        broker,
        fault,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received,
            lost: missing(&file, last)?,
            repeated: Some(known as u64 + doubled),
            doubled,
            reordered: Some(reordered(order)),
        },
    })
}

cells! {
    under:
    kafka_worker_killed(Kafka, WorkerKilled, EffectivelyOnce);
    kafka_broker_killed(Kafka, BrokerKilled, EffectivelyOnce);
    kafka_broker_frozen(Kafka, BrokerFrozen, EffectivelyOnce);
    kafka_control(Kafka, WorkerKilled, Control);
    rabbitmq_worker_killed(RabbitMq, WorkerKilled, EffectivelyOnce);
    rabbitmq_connection_cut(RabbitMq, ConnectionCut, EffectivelyOnce);
    rabbitmq_broker_killed(RabbitMq, BrokerKilled, EffectivelyOnce);
    rabbitmq_broker_frozen(RabbitMq, BrokerFrozen, EffectivelyOnce);
    rabbitmq_control(RabbitMq, ConnectionCut, Control);
    nats_worker_killed(Nats, WorkerKilled, EffectivelyOnce);
    nats_worker_frozen(Nats, WorkerFrozen, EffectivelyOnce);
    nats_connection_cut(Nats, ConnectionCut, EffectivelyOnce);
    nats_broker_killed(Nats, BrokerKilled, EffectivelyOnce);
    nats_broker_frozen(Nats, BrokerFrozen, EffectivelyOnce);
    nats_control(Nats, ConnectionCut, Control);
}
