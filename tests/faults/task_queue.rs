//! Four workers do each task, whichever of them dies; those that acknowledge first lose
//! what they have in hand. The observer counts what the workers have called done.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, AtLeastOnce, Control},
        Counts,
        Fault::WorkerKilled,
    },
};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tests::{Supervised, guarantees::tell, observe};

use crate::driver::{
    CHUNK, Places, Published, Scene, TIMES, cells, finish_all, rounds_of,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_task_queue_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_task_queue_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_task_queue_nats"),
    }
}

const PLACES: Places = Places {
    topic: "task-queue",
    partitions: 4,
    group: "task-workers",
    queue: "task_queue",
    stream: "TASK_QUEUE",
    consumer: None,
};
/// As many as Kafka has partitions for.
const WORKERS: usize = 4;
const READY: &str = "waiting for tasks";

/// Queues tasks that differ in their text, which those of the example do not from one
/// run to the next.
async fn queue(
    broker: Broker,
    address: &str,
    first: u64,
    last: u64,
) -> Result<Published> {
    let tasks = (first..=last).map(|number| (number, format!("Task {number}")));
    match broker {
        Broker::Kafka => {
            let producer: FutureProducer =
                observe::kafka::config(address).create()?;
            for (number, task) in tasks {
                let partition = (number % WORKERS as u64) as i32;
                let record = FutureRecord::<(), _>::to(PLACES.topic)
                    .partition(partition)
                    .payload(&task);
                let delivery = producer.send(record, Duration::from_secs(10)).await;
                delivery.map_err(|(error, _record)| error)?;
            }
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            channel
                .confirm_select(ConfirmSelectOptions::default())
                .await?;
            for (_number, task) in tasks {
                let persistent = BasicProperties::default().with_delivery_mode(2);
                let confirm = channel
                    .basic_publish(
                        "".into(),
                        PLACES.queue.into(),
                        BasicPublishOptions::default(),
                        task.as_bytes(),
                        persistent,
                    )
                    .await?
                    .await?;
                ensure!(confirm.is_ack(), "{confirm:?}");
            }
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            for (_number, task) in tasks {
                let subject = PLACES.queue;
                jetstream.publish(subject, task.into()).await?.await?;
            }
        }
    }
    Ok(Published::all(last - first + 1))
}

/// The numbers of the tasks that these lines tell of.
fn numbers(printed: &str, label: &str) -> Result<Vec<u64>> {
    let lines = printed.lines().filter_map(|line| line.strip_prefix(label));
    let words = lines.map(|line| line.split(' ').next().unwrap_or_default());
    words.map(|word| word.parse().context("a number")).collect()
}

async fn under(broker: Broker, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, WorkerKilled).await?;
    let careless = match (claim, broker) {
        (Control, Broker::Kafka) => &["worker", "--commit-first"][..],
        (Control, _) => &["worker", "--ack-first"],
        _ => &["worker"],
    };
    let (variable, address) = scene.direct();
    let mut workers = Vec::new();
    for _worker in 0..WORKERS {
        let variables = [(variable, address.as_str())];
        let worker = Supervised::start(binary(broker), careless, &variables)?;
        let mut worker = worker.says(READY);
        worker.prints(READY).await?;
        workers.push(worker);
    }
    scene.settle().await;

    let publish = async |first, last| queue(broker, &address, first, last).await;
    let sum = rounds_of(binary(broker), publish, async || {
        let worker = scene.random.usize(..WORKERS);
        let worker = &mut workers[worker];
        // A task takes longer than anybody needs to kill its worker in the middle.
        worker.pass_over();
        scene.strike(worker, "start:").await
    })
    .await?;
    finish_all(&mut workers, async || {
        PLACES.waiting(&scene.broker, broker).await
    })
    .await?;
    let mut printed = String::new();
    for worker in workers {
        printed.push_str(&worker.stop().await?.0);
    }

    let begun = numbers(&printed, "start: Task ")?;
    let done = numbers(&printed, "done:  Task ")?;
    let different = |numbers: &[u64]| {
        numbers.iter().copied().collect::<HashSet<u64>>().len() as u64
    };
    let received = different(&done);
    tell(&Cell {
        pattern: "task_queue".to_owned(),
        variant: careless[1..]
            .first()
            .map_or_else(String::new, |option| format!("worker {option}")),
        broker,
        fault: WorkerKilled,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received,
            lost: TIMES * CHUNK - received,
            repeated: Some(begun.len() as u64 - different(&begun)),
            doubled: done.len() as u64 - received,
            reordered: None,
        },
    })
}

cells! {
    under:
    kafka_worker_killed(Kafka, AtLeastOnce);
    kafka_control(Kafka, Control);
    rabbitmq_worker_killed(RabbitMq, AtLeastOnce);
    rabbitmq_control(RabbitMq, Control);
    nats_worker_killed(Nats, AtLeastOnce);
    nats_control(Nats, Control);
}
