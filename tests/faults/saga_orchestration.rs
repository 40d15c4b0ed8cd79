//! Each order ends, completed or with all taken back, whichever of the four programs
//! dies; an orchestrator that keeps its table in memory forgets what it has begun. The
//! observer reads the books of the services.

use std::{collections::HashSet, path::Path, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{
        Cell,
        Claim::{self, Control, EffectivelyOnce},
        Counts,
        Fault::WorkerKilled,
    },
};
use patterns::saga_orchestration::{Participant, Sagas, Service, State, order};
use rusqlite::Connection;
use tests::{Supervised, TestBroker, guarantees::tell};

use crate::driver::{
    CHUNK, Places, Publisher, Scene, TIMES, cells, finish_all, folder, held, rounds,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_saga_orchestration_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_saga_orchestration_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_saga_orchestration_nats"),
    }
}

const QUEUES: [&str; 4] = [
    "saga.orchestrator",
    "saga.payment",
    "saga.stock",
    "saga.shipping",
];
const TOPICS: [&str; 4] = [
    "saga-orchestrator",
    "saga-payment",
    "saga-stock",
    "saga-shipping",
];
const PLACES: Places = Places {
    topic: TOPICS[0],
    partitions: 4,
    group: TOPICS[0],
    queue: QUEUES[0],
    stream: "SAGA",
    consumer: None,
};

/// Never reached: who forgets an order has no deadline that mends it.
const NO_DEADLINE: &str = "3600";

/// How many commands, answers and orders nobody has acknowledged.
async fn waiting(broker: &TestBroker, name: Broker) -> Result<u64> {
    let mut waiting = 0;
    match name {
        Broker::Kafka => {
            for topic in TOPICS {
                let places = Places {
                    topic,
                    group: topic,
                    ..PLACES
                };
                waiting += places.waiting(broker, name).await?;
            }
        }
        Broker::RabbitMq => waiting = held(broker, &QUEUES).await?,
        Broker::Nats => waiting = PLACES.waiting(broker, name).await?,
    }
    Ok(waiting)
}

/// How many orders have not ended, by the table of the orchestrator.
fn open(file: &Path) -> Result<u64> {
    let entries = Sagas::open(file, Duration::ZERO)?.history()?;
    let ended = |state| matches!(state, State::Completed | State::Compensated);
    let ended: HashSet<String> = entries
        .into_iter()
        .filter(|entry| entry.state.is_some_and(ended))
        .map(|entry| entry.order)
        .collect();
    Ok(TIMES * CHUNK - ended.len() as u64)
}

/// What the books say of all orders: how many have ended as they must, and how many
/// entries are there more than once.
fn books(folder: &Path) -> Result<(u64, u64)> {
    let file =
        |participant: Participant| folder.join(format!("{}.db", participant.name()));
    let mut services = Vec::new();
    for participant in Participant::ALL {
        services.push(Service::open(participant, &file(participant))?);
    }
    let payment = Connection::open(file(Participant::Payment))?;
    let mut asked = payment.prepare("SELECT 1 FROM answers WHERE id = ?1")?;
    let (mut ended, mut doubled) = (0, 0);
    for number in 1..=TIMES * CHUNK {
        let order = order(number);
        // Two of five are completed, as `order` has made them.
        let completed = matches!(number % 5, 1 | 4);
        let mut right = asked.exists([format!("{}.pay", order.id)])?;
        for (service, amount) in services.iter().zip([order.total, order.pieces, 1])
        {
            let books = service.books(&order.id)?;
            let different: HashSet<i64> = books.iter().copied().collect();
            doubled += (books.len() - different.len()) as u64;
            right &= match completed {
                true => different == HashSet::from([amount]),
                false => different.iter().sum::<i64>() == 0,
            };
        }
        ended += u64::from(right);
    }
    Ok((ended, doubled))
}

async fn under(broker: Broker, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, WorkerKilled).await?;
    let folder = folder()?;
    let file = |name: &str| folder.path().join(format!("{name}.db"));
    let path = |name: &str| file(name).to_string_lossy().into_owned();
    let (variable, address) = scene.direct();
    let start = |words: &[&str]| {
        Supervised::start(binary(broker), words, &[(variable, &address)])
    };
    let mut programs = Vec::new();
    for participant in Participant::ALL {
        let name = participant.name();
        programs.push(start(&["service", name, &path(name)])?);
    }
    let table = match claim {
        Control => "--in-memory".to_owned(),
        _ => path("orchestrator"),
    };
    let words = ["orchestrator", &table, "--deadline", NO_DEADLINE];
    programs.push(start(&words)?);
    for program in &mut programs {
        program.prints("ready:").await?;
    }
    scene.settle().await;

    let publisher = Publisher {
        word: "order",
        says: "placed:",
        ..Publisher::new(binary(broker), scene.direct())
    };
    let sum = rounds(&publisher, async || {
        // The orchestrator as often as all the others together; of the control always.
        let program = match claim {
            Control => 3,
            _ => scene.random.usize(..6).min(3),
        };
        programs[program].pass_over();
        scene.strike(&mut programs[program], "order-").await
    })
    .await?;
    finish_all(&mut programs, async || {
        let waiting = waiting(&scene.broker, broker).await?;
        Ok(match claim {
            Control => waiting,
            _ => waiting + open(&file("orchestrator"))?,
        })
    })
    .await?;
    let mut again = 0;
    for program in programs {
        let (printed, errors) = program.stop().await?;
        ensure!(errors.is_empty(), "{errors:?}");
        let told = printed.lines().filter(|line| {
            line.contains("as answered before") || line.contains("ignored")
        });
        again += told.count() as u64;
    }

    let (ended, doubled) = books(folder.path())?;
    tell(&Cell {
        pattern: "saga_orchestration".to_owned(),
        variant: match claim {
            Control => "orchestrator --in-memory".to_owned(),
            _ => String::new(),
        },
        broker,
        fault: WorkerKilled,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received: ended,
            lost: TIMES * CHUNK - ended,
            repeated: Some(again),
            doubled,
            // Each order is a story of its own.
            reordered: None,
        },
    })
}

cells! {
    under:
    kafka_program_killed(Kafka, EffectivelyOnce);
    kafka_control(Kafka, Control);
    rabbitmq_program_killed(RabbitMq, EffectivelyOnce);
    rabbitmq_control(RabbitMq, Control);
    nats_program_killed(Nats, EffectivelyOnce);
    nats_control(Nats, Control);
}
