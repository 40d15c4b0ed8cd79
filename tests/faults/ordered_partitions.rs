//! The states of an order come one after the other, whichever worker dies; without
//! partitions some overtake others. The observer reads the journal's database.

use std::{collections::HashSet, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, InOrder, OrderControl},
        Counts,
        Fault::WorkerKilled,
    },
};
use patterns::ordered_partitions::Change;
use rusqlite::Connection;
use tests::{Supervised, TestBroker, guarantees::tell, wait};
use tokio::time::sleep;

use crate::driver::{
    CHUNK, Places, Publisher, Scene, TIMES, cells, finish_all, folder, held,
    reordered, rounds,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_ordered_partitions_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_ordered_partitions_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_ordered_partitions_nats"),
    }
}

/// After this time a queue of RabbitMQ has turned to the consumer with the highest
/// priority, which has come back.
///
/// RabbitMQ 4.3.6 now and then takes a consumer that dies meanwhile for alive: it stays
/// the active one, with the change that it had, though its channel is gone, and nobody
/// gets anything from that queue any more. The page of the pattern tells how it looks.
const HANDED_OVER: Duration = Duration::from_secs(1);

/// The changes in their order: order, step, and the worker that wrote it.
fn changes(file: &Path) -> Result<Vec<(String, u64, usize)>> {
    let database = Connection::open(file)?;
    let mut query = database
        .prepare("SELECT order_name, step, worker FROM changes ORDER BY position")?;
    let rows = query.query_map((), |row| {
        let (step, worker): (u32, u32) = (row.get(1)?, row.get(2)?);
        Ok((row.get(0)?, u64::from(step), worker as usize))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many changes have not been written.
fn missing(file: &Path, last: u64) -> Result<u64> {
    let written: HashSet<(String, u64)> = changes(file)?
        .into_iter()
        .map(|(order, step, _)| (order, step))
        .collect();
    let missing = (1..=last).map(Change::numbered).filter(|change| {
        !written.contains(&(change.order.clone(), u64::from(change.step)))
    });
    Ok(missing.count() as u64)
}

const QUEUES: [&str; 4] = [
    "orders.states.0",
    "orders.states.1",
    "orders.states.2",
    "orders.states.3",
];

const PLACES: Places = Places {
    topic: "order-states",
    partitions: 4,
    group: "order-journal",
    queue: QUEUES[0],
    stream: "ORDER_STATES",
    consumer: None,
};

const UNORDERED: Places = Places {
    queue: "orders.states.unordered",
    stream: "ORDER_STATES_UNORDERED",
    ..PLACES
};

/// How many messages the broker would still deliver.
async fn waiting(broker: &TestBroker, name: Broker, claim: Claim) -> Result<u64> {
    match (name, claim) {
        (_, OrderControl) => UNORDERED.waiting(broker, name).await,
        (Broker::RabbitMq, _) => held(broker, &QUEUES).await,
        _ => PLACES.waiting(broker, name).await,
    }
}

async fn under(broker: Broker, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, WorkerKilled).await?;
    let folder = folder()?;
    let file = folder.path().join("shop.db");
    let journal = file.to_string_lossy();
    let careless: &'static [&'static str] = match claim {
        OrderControl => &["--unordered"],
        _ => &[],
    };
    // With Kafka it is the producer that decides.
    let of_worker = match broker {
        Broker::Kafka => &[],
        _ => careless,
    };
    let (variable, address) = scene.direct();
    let mut workers = Vec::new();
    for number in ["1", "2"] {
        let words = [&["work", &*journal, number], of_worker].concat();
        let variables = [(variable, address.as_str())];
        let mut worker = Supervised::start(binary(broker), &words, &variables)?;
        worker.prints("ready:").await?;
        workers.push(worker);
    }
    scene.settle().await;

    let publisher = Publisher {
        more: careless,
        ..Publisher::new(binary(broker), scene.direct())
    };
    let random = &mut scene.random;
    let sum = rounds(&publisher, async || {
        let before = changes(&file)?.len();
        let enough = before + random.usize(1..20);
        // The one that has written last is in the middle of its work.
        let number = wait::until("some changes", async || {
            let changes = changes(&file)?;
            ensure!(changes.len() >= enough, "{} of {enough}", changes.len());
            changes.last().map(|last| last.2).context("no change")
        })
        .await?;
        sleep(Duration::from_millis(random.u64(0..10))).await;
        let worker = &mut workers[number - 1];
        worker.kill().await?;
        if broker == Broker::RabbitMq {
            worker.prints("ready:").await?;
            sleep(HANDED_OVER).await;
        }
        Ok(())
    })
    .await?;
    let last = TIMES * CHUNK;
    finish_all(&mut workers, async || {
        let waiting = waiting(&scene.broker, broker, claim).await?;
        Ok(missing(&file, last)? + waiting)
    })
    .await?;
    let mut known = 0;
    for worker in workers {
        let (printed, _errors) = worker.stop().await?;
        let lines = printed.lines().filter(|line| line.starts_with("known:"));
        known += lines.count() as u64;
    }

    let changes = changes(&file)?;
    let who: HashSet<usize> = changes.iter().map(|(.., worker)| *worker).collect();
    ensure!(who.len() == 2, "{who:?} did all alone");
    let different: HashSet<_> = changes
        .iter()
        .map(|(order, step, _)| (order, step))
        .collect();
    let received = different.len() as u64;
    let order = changes
        .iter()
        .map(|(order, step, _)| (order.as_str(), *step));
    tell(&Cell {
        pattern: "ordered_partitions".to_owned(),
        variant: careless.concat(),
        broker,
        fault: WorkerKilled,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received,
            lost: missing(&file, last)?,
            repeated: Some(known),
            doubled: changes.len() as u64 - received,
            reordered: Some(reordered(order)),
        },
    })
}

cells! {
    under:
    kafka_worker_killed(Kafka, InOrder);
    kafka_control(Kafka, OrderControl);
    rabbitmq_worker_killed(RabbitMq, InOrder);
    rabbitmq_control(RabbitMq, OrderControl);
    nats_worker_killed(Nats, InOrder);
    nats_control(Nats, OrderControl);
}
