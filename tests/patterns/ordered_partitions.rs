//! The states of an order come one after the other, and several orders at the same
//! time. Ten kills are in tests/faults.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use rdkafka::Message as _;
use rusqlite::Connection;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::common::Pattern;

const QUEUES: [&str; 4] = [
    "orders.states.0",
    "orders.states.1",
    "orders.states.2",
    "orders.states.3",
];

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_ordered_partitions_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_ordered_partitions_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_ordered_partitions_nats"),
    topics: &[
        ("order-states", "order-journal"),
        ("order-states", "order-journal-story"),
    ],
    queues: &[
        QUEUES[0],
        QUEUES[1],
        QUEUES[2],
        QUEUES[3],
        "orders.states.unordered",
    ],
    streams: &["ORDER_STATES", "ORDER_STATES_UNORDERED"],
};

/// Topic, queues and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_keep_each_order_in_its_order() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// The changes in the order in which they were written: order, step, worker.
fn changes(file: &Path) -> Result<Vec<(String, u64, u64)>> {
    let database = Connection::open(file)?;
    let mut query = database
        .prepare("SELECT order_name, step, worker FROM changes ORDER BY position")?;
    let rows = query.query_map((), |row| {
        let (step, worker): (u32, u32) = (row.get(1)?, row.get(2)?);
        Ok((row.get(0)?, step.into(), worker.into()))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many changes came after a later one of the same order.
fn late(file: &Path) -> Result<usize> {
    let mut latest = BTreeMap::new();
    let mut count = 0;
    for (order, step, _) in changes(file)? {
        let latest = latest.entry(order).or_insert(step);
        count += usize::from(step < *latest);
        *latest = step.max(*latest);
    }
    Ok(count)
}

/// Publishes so many changes at a time, each time the next.
struct Publisher {
    binary: &'static str,
    variable: (&'static str, &'static str),
    more: &'static [&'static str],
    published: usize,
}

impl Publisher {
    async fn publish(&mut self, count: usize) -> Result<()> {
        let first = (self.published + 1).to_string();
        self.published += count;
        let last = self.published.to_string();
        let words =
            [&["publish", first.as_str(), last.as_str()], self.more].concat();
        let publisher = Example::start(self.binary, &words, self.variable)?;
        publisher.end().await?.succeeded()?;
        Ok(())
    }
}

#[tokio::test]
async fn a_killed_worker_leaves_its_orders_to_another_in_their_order() -> Result<()>
{
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        let journal = file.to_string_lossy();
        let mut workers = BTreeMap::new();
        for number in [1, 2] {
            let words = ["work", &journal, &number.to_string()];
            let mut worker = Example::start(binary, &words, variable)?;
            worker.prints("ready:").await?;
            workers.insert(number, worker);
        }
        let mut publisher = Publisher {
            binary,
            variable,
            more: &[],
            published: 0,
        };
        wait::until("work for both", async || {
            publisher.publish(50).await?;
            let changes = changes(&file)?;
            let who: HashSet<u64> = changes.iter().map(|change| change.2).collect();
            ensure!(who.len() == 2, "{broker:?}: {who:?}");
            Ok(())
        })
        .await?;

        let before = changes(&file)?.len();
        publisher.publish(50).await?;
        let busy = wait::until("a worker at work", async || {
            let changes = changes(&file)?;
            ensure!(changes.len() > before, "nothing");
            changes.last().map(|last| last.2).context("no change")
        })
        .await?;
        workers.remove(&busy).context("a worker")?.kill().await?;
        publisher.publish(50).await?;
        wait::until("all changes", async || {
            let done = changes(&file)?.len();
            ensure!(done == publisher.published, "{broker:?}: {done}");
            Ok(())
        })
        .await?;
        let (_, other) = workers.pop_first().context("the other")?;
        other.interrupt().await?;
        other.end().await?.succeeded()?;

        let mut steps: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for (order, step, _) in changes(&file)? {
            steps.entry(order).or_default().push(step);
        }
        for (order, steps) in steps {
            assert_eq!(steps, [1, 2, 3, 4, 5], "{broker:?}: {order}");
        }
        wait::until("nothing to be left", async || {
            let left = waiting(broker, variable.1).await?;
            ensure!(left == 0, "{broker:?}: {left}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// How much the broker would still deliver.
async fn waiting(broker: Broker, address: &str) -> Result<u64> {
    match broker {
        Broker::Kafka => {
            let (topic, group) = ("order-states", "order-journal");
            let lag = observe::kafka::lag(address, topic, 4, group).await?;
            Ok(u64::try_from(lag)?)
        }
        Broker::RabbitMq => {
            let mut sum = 0;
            for queue in QUEUES {
                sum += observe::rabbitmq::ready(address, queue).await?;
            }
            Ok(sum.into())
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("ORDER_STATES").await?;
            Ok(stream.info().await?.state.messages)
        }
    }
}

/// With Kafka it is the producer that loses the order, and with the others the worker
/// as well.
fn careless(broker: Broker) -> &'static [&'static str] {
    match broker {
        Broker::Kafka => &[],
        Broker::RabbitMq | Broker::Nats => &["--unordered"],
    }
}

#[tokio::test]
async fn control_without_partitions_orders_go_back_in_time() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        let journal = file.to_string_lossy();
        let mut workers = Vec::new();
        for number in ["1", "2"] {
            let words = [&["work", &*journal, number], careless(broker)].concat();
            let mut worker = Example::start(binary, &words, variable)?;
            worker.prints("ready:").await?;
            workers.push(worker);
        }
        let mut publisher = Publisher {
            binary,
            variable,
            more: &["--unordered"],
            published: 0,
        };
        // Nobody dies. The first change of an order takes longest, so the second comes
        // before it wherever it can.
        wait::until("a late change", async || {
            publisher.publish(50).await?;
            let late = late(&file)?;
            ensure!(late > 0, "{broker:?}: {late}");
            Ok(())
        })
        .await?;
        for worker in workers {
            worker.interrupt().await?;
            worker.end().await?.succeeded()?;
        }
    }
    Ok(())
}

/// A worker that stands still holds the first change of an order, and another worker
/// does the rest.
#[tokio::test]
async fn control_of_the_book_one_queue_for_two_workers() -> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::RabbitMq).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("bad.db");
    let journal = file.to_string_lossy();
    let start = |number| {
        let words = ["work", &journal, number, "--unordered"];
        Example::start(PATTERN.rabbitmq, &words, variable)
    };
    let mut first = start("1")?;
    first.prints("ready:").await?;
    first.signal("STOP").await?;
    let mut second = start("2")?;
    second.prints("ready:").await?;
    let words = ["publish", "1", "5", "--unordered"];
    let publisher = Example::start(PATTERN.rabbitmq, &words, variable)?;
    publisher.end().await?.succeeded()?;
    second.prints("order-1 delivered").await?;
    first.signal("CONT").await?;
    first.prints("late:      order-1 placed").await?;
    for worker in [first, second] {
        worker.interrupt().await?;
        worker.end().await?.succeeded()?;
    }
    let words = ["show", &journal];
    let ended = Example::start(PATTERN.rabbitmq, &words, variable)?
        .end()
        .await?;
    ended.succeeded()?.printed_what_the_book_shows("unordered")
}

/// What nobody can read would block all orders of its partition.
#[tokio::test]
async fn noise_is_set_aside_and_blocks_no_order() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let mut publisher = Publisher {
            binary,
            variable,
            more: &[],
            published: 0,
        };
        publisher.publish(1).await?;
        noise(broker, variable.1).await?;
        publisher.publish(4).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        let words = ["work", &file.to_string_lossy(), "1"];
        let mut worker = Example::start(binary, &words, variable)?;
        worker.prints("changed:   order-1 delivered").await?;
        worker.interrupt().await?;
        let ended = worker.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        assert_eq!(ended.stderr, "not a change, set aside\n", "{broker:?}");
        let count = "SELECT count(*) FROM unreadable";
        let database = Connection::open(&file)?;
        let kept: i64 = database.query_row(count, (), |row| row.get(0))?;
        assert_eq!(kept, 1, "{broker:?}");
    }
    Ok(())
}

async fn noise(broker: Broker, address: &str) -> Result<()> {
    match broker {
        Broker::Kafka => {
            // To the partition of order-1, wherever that is.
            let topic = "order-states";
            let (records, noise) = (
                observe::kafka::read_all(address, topic, 4, "read_committed"),
                "\u{1}",
            );
            let place = records.await?.last().context("order-1")?.partition();
            observe::kafka::produce_to(address, topic, place, noise, None).await?;
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            let (options, properties) = Default::default();
            channel
                .basic_publish(
                    "orders.states".into(),
                    "order-1".into(),
                    options,
                    b"\xff",
                    properties,
                )
                .await?;
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let noise = b"\xff"[..].into();
            jetstream
                .publish("order-states.order-1", noise)
                .await?
                .await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 4] = [
        &["publish", "1", "many"],
        &["work", "shop.db"],
        &["work", "shop.db", "first"],
        &["show"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
