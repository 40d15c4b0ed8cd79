//! Each parcel is booked once, or is among the dead letters, whenever the worker dies:
//! also between the queue that it comes from and the next. The observer reads the
//! carrier's database and the dead letters.

use std::{collections::HashSet, path::Path};

use anyhow::{Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{Cell, Claim::AtLeastOnce, Counts, Fault::WorkerKilled},
};
use patterns::retry_dlq::{Carrier, Parcel, parcel};
use tests::{Example, Supervised, TestBroker, guarantees::tell};

use crate::driver::{
    CHUNK, Places, Published, Scene, TIMES, cells, finish_all, folder, held,
    rounds_of,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_retry_dlq_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_retry_dlq_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_retry_dlq_nats"),
    }
}

const LINE: Places = Places {
    topic: "parcels-booking",
    partitions: 1,
    group: "parcels-worker",
    queue: "parcels.booking",
    stream: "PARCELS",
    consumer: None,
};
const TOPICS: [&str; 4] = [
    "parcels-booking",
    "parcels-wait-500",
    "parcels-wait-1000",
    "parcels-wait-2000",
];
const QUEUES: [&str; 4] = [
    "parcels.booking",
    "parcels.wait-500",
    "parcels.wait-1000",
    "parcels.wait-2000",
];
const DEAD: Places = Places {
    topic: "parcels-dead",
    partitions: 1,
    group: "nobody",
    queue: "parcels.dead",
    stream: "PARCELS_DEAD",
    consumer: None,
};

/// How many requests to each of two towns fail, so that some parcels of the two hundred
/// for each are tried again, and some until they are given up.
const FAILING: [(&str, u32); 2] = [("Ghent", 250), ("Turin", 500)];

/// How many parcels are to be booked yet, now or later.
async fn left(broker: &TestBroker, name: Broker) -> Result<u64> {
    let mut left = 0;
    match name {
        Broker::Kafka => {
            for topic in TOPICS {
                left += Places { topic, ..LINE }.waiting(broker, name).await?;
            }
        }
        Broker::RabbitMq => left = held(broker, &QUEUES).await?,
        Broker::Nats => left = LINE.waiting(broker, name).await?,
    }
    Ok(left)
}

async fn worker_killed(broker: Broker) -> Result<()> {
    let mut scene = Scene::prepare(broker, WorkerKilled).await?;
    let folder = folder()?;
    let file = folder.path().join("carrier.db");
    let carrier = Carrier::open(&file)?;
    for (town, times) in FAILING {
        carrier.fail(town, times)?;
    }
    let (variable, address) = scene.direct();
    let variable = (variable, address.as_str());
    let words = ["worker", &file.to_string_lossy()];
    let mut worker = [Supervised::start(binary(broker), &words, &[variable])?];
    worker[0].prints("ready:").await?;
    scene.settle().await;

    let publish = async |first: u64, last: u64| {
        let words = ["producer", &first.to_string(), &last.to_string()];
        let producer = Example::start(binary(broker), &words, variable)?;
        producer.end().await?.succeeded()?;
        Ok(Published::all(last - first + 1))
    };
    let sum = rounds_of(binary(broker), publish, async || {
        scene.strike(&mut worker[0], ":").await
    })
    .await?;
    finish_all(&mut worker, async || left(&scene.broker, broker).await).await?;
    let [worker] = worker;
    let (printed, _errors) = worker.stop().await?;

    let dead: Vec<Parcel> = DEAD.stored(&scene.broker, broker).await?;
    let dead: Vec<String> = dead.into_iter().map(|parcel| parcel.id).collect();
    let booked = booked(&file)?;
    let different: HashSet<&String> = booked.iter().chain(&dead).collect();
    let received = different.len() as u64;
    let expected: HashSet<String> = (1..=TIMES * CHUNK)
        .map(|number| parcel(number).id)
        .collect();
    let lost = expected.iter().filter(|id| !different.contains(id)).count();
    let known = printed
        .lines()
        .filter(|line| line.starts_with("known:"))
        .count();
    // Booked twice, given up twice, or both.
    let doubled = (booked.len() + dead.len()) as u64 - received;
    // Each way has been gone.
    for (way, count) in [("booked", booked.len()), ("given up", dead.len())] {
        ensure!(count > 100, "{count} are {way}");
    }
    tell(&Cell {
        pattern: "retry_dlq".to_owned(),
        variant: String::new(),
        broker,
        fault: WorkerKilled,
        times: TIMES,
        claim: AtLeastOnce,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received,
            lost: lost as u64,
            repeated: Some(known as u64 + doubled),
            doubled,
            // What is tried again loses its place, which the page says.
            reordered: None,
        },
    })
}

/// The parcels that the carrier has booked, each as often as it was.
fn booked(file: &Path) -> Result<Vec<String>> {
    let requests = Carrier::open(file)?.requests()?;
    let booked = requests.into_iter().filter(|request| request.booked);
    Ok(booked.map(|request| request.parcel).collect())
}

cells! {
    worker_killed:
    kafka_worker_killed(Kafka);
    rabbitmq_worker_killed(RabbitMq);
    nats_worker_killed(Nats);
}
