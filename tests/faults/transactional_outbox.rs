//! Each committed order has its event, whatever dies, and no event is without its
//! order; with two writes some orders have none. The observers read the database and
//! what the broker has stored.

use std::{collections::HashSet, path::Path, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{
        Cell, Claim, Counts,
        Fault::{self, BrokerKilled, ConnectionCut, WorkerKilled},
    },
};
use patterns::transactional_outbox::OrderPlaced;
use rusqlite::Connection;
use tests::{Example, Supervised, guarantees::tell};
use tokio::time::sleep;

use crate::driver::{
    CHUNK, Places, Scene, TIMES, cells, finish, folder, name_of, reordered,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_transactional_outbox_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_transactional_outbox_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_transactional_outbox_nats"),
    }
}

fn ids(file: &Path, query: &str) -> Result<HashSet<String>> {
    let database = Connection::open(file)?;
    let mut query = database.prepare(query)?;
    let rows = query.query_map((), |row| row.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn orders(file: &Path) -> Result<HashSet<String>> {
    ids(file, "SELECT id FROM orders")
}

const PLACES: Places = Places {
    topic: "orders-placed",
    partitions: 4,
    group: "none",
    queue: "orders.placed",
    stream: "ORDERS_PLACED",
    consumer: None,
};

/// Counts what is in the broker and in the database.
async fn count(
    scene: &Scene,
    file: &Path,
    claim: Claim,
    attempted: u64,
) -> Result<()> {
    let orders = orders(file)?;
    let stored: Vec<OrderPlaced> = PLACES.stored(&scene.broker, scene.name).await?;
    let told: HashSet<String> =
        stored.iter().map(|event| event.order.clone()).collect();
    let invented = told.difference(&orders).count();
    ensure!(invented == 0, "{invented} events are of no order");
    let order = stored.iter().map(|event| {
        let number = event.order.strip_prefix("order-").unwrap_or_default();
        (event.customer.as_str(), number.parse().unwrap_or_default())
    });
    let reordered = reordered(order);
    // Also of the control: it publishes in turn as well.
    ensure!(reordered == 0, "{reordered} events are out of order");
    tell(&Cell {
        pattern: "transactional_outbox".to_owned(),
        variant: match claim {
            Claim::Control => "dual-write".to_owned(),
            _ => String::new(),
        },
        broker: scene.name,
        fault: scene.fault,
        times: TIMES,
        claim,
        counts: Counts {
            attempted,
            // Whoever placed an order was told that it is there.
            acknowledged: orders.len() as u64,
            received: told.len() as u64,
            lost: orders.difference(&told).count() as u64,
            repeated: Some((stored.len() - told.len()) as u64),
            doubled: 0,
            reordered: Some(reordered),
        },
    })
}

async fn relayed(broker: Broker, fault: Fault) -> Result<()> {
    let mut scene = Scene::prepare(broker, fault).await?;
    let folder = folder()?;
    let file = folder.path().join("shop.db");
    let shop = file.to_string_lossy();
    let words = ["relay", &*shop];
    let (variable, through) = scene.worker();
    let mut relay =
        Supervised::start(binary(broker), &words, &[(variable, &through)])?;
    relay.prints("ready:").await?;
    scene.settle().await;

    for round in 0..TIMES {
        let (first, last) = (round * CHUNK + 1, (round + 1) * CHUNK);
        let (first, last) = (first.to_string(), last.to_string());
        let words = ["place", &first, &last, &shop];
        // It needs no broker, and is not in the way of the relay.
        let customers = Example::start(binary(broker), &words, ("NO_BROKER", ""))?;
        scene.strike(&mut relay, "published:").await?;
        customers.end().await?.succeeded()?;
        println!(
            "{}: fault {} of {TIMES}",
            name_of(binary(broker)),
            round + 1
        );
    }
    finish(&mut relay, async || {
        Ok(ids(&file, "SELECT id FROM outbox")?.len() as u64)
    })
    .await?;
    let (printed, errors) = relay.stop().await?;
    let published = printed
        .lines()
        .filter(|line| line.starts_with("published:"));
    assert_eq!(orders(&file)?.len() as u64, TIMES * CHUNK);
    // A relay that ended with an error has tried one more.
    let tried = errors
        .iter()
        .filter(|error| !error.starts_with("error: no "));
    let attempted = published.count() + tried.count();
    count(&scene, &file, Claim::AtLeastOnce, attempted as u64).await
}

/// The control: the event is published by whoever placed the order.
async fn dual_write(broker: Broker, fault: Fault) -> Result<()> {
    let mut scene = Scene::prepare(broker, fault).await?;
    let folder = folder()?;
    let file = folder.path().join("shop.db");
    let shop = file.to_string_lossy();
    let (variable, through) = scene.worker();
    let mut next = 1;
    for round in 0..TIMES {
        let last = ((round + 1) * CHUNK).to_string();
        let first = next.to_string();
        let words = ["dual-write", &first, &last, &shop];
        let mut program =
            Example::start(binary(broker), &words, (variable, &through))?;
        for _order in 0..=scene.random.u64(0..20) {
            program.prints("placed:").await?;
        }
        if round == 0 {
            // Its queue is on the disk.
            scene.settle().await;
        }
        match fault {
            Fault::BrokerKilled => {
                scene.broker.kill().await?;
                // It waits for an answer that does not come.
                program.end().await?.reason()?;
                scene.broker.restart().await?;
            }
            _ => {
                scene.drop_what_is_sent()?;
                sleep(Duration::from_millis(200)).await;
                program.kill().await?;
                scene.cut()?;
            }
        }
        // Whoever comes next has another order; nobody places that one again.
        next = orders(&file)?.len() as u64 + 1;
        println!(
            "{}: fault {} of {TIMES}",
            name_of(binary(broker)),
            round + 1
        );
    }
    let (first, last) = (next.to_string(), (TIMES * CHUNK).to_string());
    let words = ["dual-write", &first, &last, &shop];
    let rest = Example::start(binary(broker), &words, (variable, &through))?;
    rest.end().await?.succeeded()?;
    count(&scene, &file, Claim::Control, TIMES * CHUNK).await
}

cells! {
    relayed:
    kafka_relay_killed(Kafka, WorkerKilled);
    kafka_broker_killed(Kafka, BrokerKilled);
    rabbitmq_relay_killed(RabbitMq, WorkerKilled);
    rabbitmq_connection_cut(RabbitMq, ConnectionCut);
    rabbitmq_broker_killed(RabbitMq, BrokerKilled);
    nats_relay_killed(Nats, WorkerKilled);
    nats_connection_cut(Nats, ConnectionCut);
    nats_broker_killed(Nats, BrokerKilled);
}

cells! {
    dual_write:
    kafka_control(Kafka, BrokerKilled);
    rabbitmq_control(RabbitMq, ConnectionCut);
    nats_control(Nats, ConnectionCut);
}
