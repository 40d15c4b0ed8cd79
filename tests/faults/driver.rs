//! How a fault is done, and what the tests of all patterns count in the same way.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    slice,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use lab::{broker::Broker, guarantees::Fault};
use rdkafka::Message as _;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tests::{
    Example, Proxy, Supervised, TestBroker,
    observe::{self, rabbitmq::QUEUE_IS_WRITTEN},
    random, wait,
};
use tokio::{
    time::{sleep, timeout},
    try_join,
};

/// How often a fault is done.
pub const TIMES: u64 = 10;
/// How many messages there are for each of them.
pub const CHUNK: u64 = 100;

/// How long a frozen broker answers nobody.
const FROZEN_BROKER: Duration = Duration::from_secs(1);
/// How long a worker may take for one more message before its connection is cut.
const FROZEN_CONNECTION: Duration = Duration::from_millis(300);
/// How long a frozen worker does nothing: longer than NATS waits for it, see `ACK_WAIT`
/// of the examples.
const FROZEN_WORKER: Duration = Duration::from_secs(3);
/// How long a program may publish without success: a broker is restarted meanwhile.
const PUBLISHING: Duration = Duration::from_secs(120);
/// How long after one look at what is left the next one follows.
const ASK_AGAIN: Duration = Duration::from_millis(300);

/// A folder for the databases of the examples. In memory where the system has such a
/// place: what a killed program has written is there all the same, and the tests would
/// wait for the disk most of the time.
pub fn folder() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(match memory.is_dir() {
        true => TempDir::new_in(memory)?,
        false => TempDir::new()?,
    })
}

/// A broker of this fault's own, and a way to it that can be cut.
pub struct Scene {
    pub broker: TestBroker,
    pub fault: Fault,
    pub random: Rng,
    proxy: Option<Proxy>,
    pub name: Broker,
    /// The address by which the worker comes.
    through: String,
}

impl Scene {
    pub async fn prepare(name: Broker, fault: Fault) -> Result<Self> {
        let broker = TestBroker::start(name).await?;
        let direct = broker.address().to_owned();
        // Kafka's brokers tell their clients where to connect, and it is not here.
        let (proxy, through) = if name == Broker::Kafka {
            (None, direct)
        } else {
            let (proxy, through) = proxied(&direct).await?;
            (Some(proxy), through)
        };
        Ok(Self {
            broker,
            fault,
            random: random::seeded(),
            proxy,
            name,
            through,
        })
    }

    /// How the worker finds the broker.
    pub fn worker(&self) -> (&'static str, String) {
        (self.name.address_var(), self.through.clone())
    }

    /// How everybody else does.
    pub fn direct(&self) -> (&'static str, String) {
        (self.name.address_var(), self.broker.address().to_owned())
    }

    /// What a worker has declared is on the disk: a brand-new queue is another story,
    /// told on the page of the task queue.
    pub async fn settle(&self) {
        if self.name == Broker::RabbitMq {
            sleep(QUEUE_IS_WRITTEN).await;
        }
    }

    /// Does the fault once, while the worker has something to do. A line with `works`
    /// is printed by a worker that does.
    pub async fn strike(
        &mut self,
        worker: &mut Supervised,
        works: &str,
    ) -> Result<()> {
        for _message in 0..=self.random.u64(0..20) {
            worker.prints(works).await?;
        }
        sleep(Duration::from_millis(self.random.u64(0..10))).await;
        match self.fault {
            Fault::WorkerKilled => worker.kill().await,
            Fault::WorkerFrozen => {
                worker.signal("STOP").await?;
                sleep(FROZEN_WORKER).await;
                worker.signal("CONT").await
            }
            Fault::BrokerKilled => {
                self.broker.kill().await?;
                self.broker.restart().await
            }
            Fault::BrokerFrozen => {
                self.broker.freeze().await?;
                let silent = self.is_silent().await;
                sleep(FROZEN_BROKER).await;
                self.broker.thaw().await?;
                ensure!(silent, "the broker has answered while it was frozen");
                Ok(())
            }
            Fault::ConnectionCut => {
                self.drop_what_is_sent()?;
                worker.pass_over();
                // The acknowledgement of this one gets lost; but NATS sends no more than
                // was asked for, and the worker may have had all of that.
                let next = timeout(FROZEN_CONNECTION, worker.prints(works)).await;
                self.cut()?;
                next.unwrap_or(Ok(()))
            }
            Fault::LeaderKilled => bail!("one broker has nobody beside it to lead"),
        }
    }

    /// From now on nothing that the worker sends arrives, until [`Self::cut`].
    pub fn drop_what_is_sent(&self) -> Result<()> {
        self.proxy.as_ref().context("no way to cut")?.freeze();
        Ok(())
    }

    /// Cuts the worker's connection; the next one works.
    pub fn cut(&self) -> Result<()> {
        self.proxy.as_ref().context("no way to cut")?.cut();
        Ok(())
    }

    /// Does nobody get an answer?
    async fn is_silent(&self) -> bool {
        let address = self.broker.address();
        let ask = async {
            match self.name {
                Broker::Kafka => observe::kafka::topics(address).await.map(drop),
                Broker::RabbitMq => {
                    observe::rabbitmq::connect(address).await.map(drop)
                }
                Broker::Nats => observe::nats::connect(address).await.map(drop),
            }
        };
        !matches!(timeout(Duration::from_millis(500), ask).await, Ok(Ok(())))
    }
}

/// The same address by way of a proxy, which comes with it.
async fn proxied(address: &str) -> Result<(Proxy, String)> {
    let (scheme, rest) = address.split_once("://").context("a scheme")?;
    let (user, place) = match rest.rsplit_once('@') {
        Some((user, place)) => (format!("{user}@"), place),
        None => (String::new(), rest),
    };
    let (server, path) = match place.split_once('/') {
        Some((server, path)) => (server, format!("/{path}")),
        None => (place, String::new()),
    };
    let proxy = Proxy::start(server).await?;
    let through = format!("{scheme}://{user}{}{path}", proxy.address());
    Ok((proxy, through))
}

/// What a publisher was told.
#[derive(Clone, Copy, Default)]
pub struct Published {
    pub attempted: u64,
    pub acknowledged: u64,
}

impl Published {
    /// So many without a failure.
    pub fn all(count: u64) -> Self {
        Self {
            attempted: count,
            acknowledged: count,
        }
    }

    fn add(&mut self, other: Self) {
        self.attempted += other.attempted;
        self.acknowledged += other.acknowledged;
    }
}

/// An example that publishes messages by their numbers.
pub struct Publisher {
    pub binary: &'static str,
    /// How it finds the broker.
    pub variable: (&'static str, String),
    /// The role, in front of the first number and the last.
    pub word: &'static str,
    /// The words after them.
    pub more: &'static [&'static str],
    /// How the line begins that it prints for each message that is acknowledged.
    pub says: &'static str,
}

impl Publisher {
    /// Of `publish FIRST LAST`.
    pub fn new(binary: &'static str, variable: (&'static str, String)) -> Self {
        Self {
            binary,
            variable,
            word: "publish",
            more: &[],
            says: "published:",
        }
    }

    /// Runs it until each of these messages is acknowledged: after an error it goes on
    /// with the one that it has no answer for.
    async fn publish(&self, first: u64, last: u64) -> Result<Published> {
        let mut published = Published::default();
        let variable = (self.variable.0, self.variable.1.as_str());
        let all = async {
            let mut next = first;
            while next <= last {
                let (from, to) = (next.to_string(), last.to_string());
                let words = [&[self.word, &from, &to], self.more].concat();
                let ended = Example::start(self.binary, &words, variable)?;
                let ended = ended.end().await?;
                let lines = ended.stdout.lines();
                let count = lines.filter(|it| it.starts_with(self.says)).count();
                published.acknowledged += count as u64;
                published.attempted += count as u64;
                next += count as u64;
                if !ended.status.success() {
                    let reason = ended.reason()?;
                    // One that did not get in has tried nothing.
                    let came_in = ["error: no ", "refuses the connection"]
                        .iter()
                        .all(|words| !reason.contains(words));
                    published.attempted += u64::from(came_in);
                    sleep(Duration::from_millis(200)).await;
                }
            }
            Ok::<_, anyhow::Error>(())
        };
        let all = timeout(PUBLISHING, all).await;
        all.context("the publisher has not come through")??;
        ensure!(
            published.acknowledged == last - first + 1,
            "not all is published"
        );
        Ok(published)
    }
}

/// For each fault, publishes a chunk of messages and does the fault meanwhile.
pub async fn rounds(
    publisher: &Publisher,
    strike: impl AsyncFnMut() -> Result<()>,
) -> Result<Published> {
    let publish = async |first, last| publisher.publish(first, last).await;
    rounds_of(publisher.binary, publish, strike).await
}

/// As [`rounds`], with another way to publish the messages from the first to the last
/// of a chunk.
pub async fn rounds_of(
    binary: &str,
    mut publish: impl AsyncFnMut(u64, u64) -> Result<Published>,
    mut strike: impl AsyncFnMut() -> Result<()>,
) -> Result<Published> {
    let mut sum = Published::default();
    for round in 0..TIMES {
        let publishing = publish(round * CHUNK + 1, (round + 1) * CHUNK);
        let (published, ()) = try_join!(publishing, strike())?;
        sum.add(published);
        println!("{}: fault {} of {TIMES}", name_of(binary), round + 1);
    }
    Ok(sum)
}

/// As [`rounds`], with a worker that is killed each time. The first half of a chunk is
/// published before, and the other while it is dead.
pub async fn rounds_half_dead(
    publisher: &Publisher,
    worker: &mut Supervised,
) -> Result<Published> {
    let mut sum = Published::default();
    for round in 0..TIMES {
        let (first, last) = (round * CHUNK + 1, (round + 1) * CHUNK);
        let middle = first + CHUNK / 2;
        sum.add(publisher.publish(first, middle - 1).await?);
        sum.add(worker.dead_while(publisher.publish(middle, last)).await?);
        worker.prints("ready:").await?;
        let name = name_of(publisher.binary);
        println!("{name}: fault {} of {TIMES}", round + 1);
    }
    Ok(sum)
}

/// The name of an example, by the path of its binary.
pub fn name_of(binary: &str) -> &str {
    binary.rsplit('/').next().unwrap_or(binary)
}

/// Waits until there is nothing left to do, and starts the worker again if it ends.
pub async fn finish(
    worker: &mut Supervised,
    left: impl AsyncFnMut() -> Result<u64>,
) -> Result<()> {
    finish_all(slice::from_mut(worker), left).await
}

/// As [`finish`], with several workers.
pub async fn finish_all(
    workers: &mut [Supervised],
    mut left: impl AsyncFnMut() -> Result<u64>,
) -> Result<()> {
    wait::within(
        Duration::from_secs(120),
        "the end of the work",
        async || {
            for worker in workers.iter_mut() {
                worker.look_after().await?;
            }
            let left = left().await?;
            if left > 0 {
                // To ask takes the broker's time, and that of the other lines.
                sleep(ASK_AGAIN).await;
            }
            ensure!(left == 0, "{left} are left");
            Ok(())
        },
    )
    .await
}

/// How many of these, in the order of their effects, came after a later one with the
/// same key. Each as its key and its number; only its first effect counts.
pub fn reordered<'a>(effects: impl IntoIterator<Item = (&'a str, u64)>) -> u64 {
    let mut seen = HashSet::new();
    let mut latest = HashMap::new();
    let mut count = 0;
    for (key, number) in effects {
        if !seen.insert((key, number)) {
            continue;
        }
        let latest = latest.entry(key).or_insert(number);
        count += u64::from(number < *latest);
        *latest = number.max(*latest);
    }
    count
}

/// What a pattern calls its places on each broker.
pub struct Places {
    pub topic: &'static str,
    pub partitions: i32,
    pub group: &'static str,
    pub queue: &'static str,
    pub stream: &'static str,
    /// The durable consumer, of a stream that keeps what is acknowledged. None if the
    /// stream is a work queue, which does not.
    pub consumer: Option<&'static str>,
}

impl Places {
    /// How many messages the broker would deliver, again or for the first time, to
    /// somebody who asked.
    pub async fn waiting(&self, broker: &TestBroker, name: Broker) -> Result<u64> {
        let address = broker.address();
        match name {
            Broker::Kafka => {
                let (topic, group) = (self.topic, self.group);
                let lag =
                    observe::kafka::lag(address, topic, self.partitions, group)
                        .await?;
                Ok(u64::try_from(lag)?)
            }
            Broker::RabbitMq => held(broker, &[self.queue]).await,
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let mut stream = jetstream.get_stream(self.stream).await?;
                let Some(consumer) = self.consumer else {
                    return Ok(stream.info().await?.state.messages);
                };
                let info = stream.consumer_info(consumer).await?;
                Ok(info.num_pending + info.num_ack_pending as u64)
            }
        }
    }

    /// All that the broker has stored, in its order. RabbitMQ's queue is empty then.
    pub async fn stored<T: DeserializeOwned>(
        &self,
        broker: &TestBroker,
        name: Broker,
    ) -> Result<Vec<T>> {
        let address = broker.address();
        let payloads: Vec<Vec<u8>> = match name {
            Broker::Kafka => {
                let (topic, isolation) = (self.topic, "read_committed");
                let records = observe::kafka::read_all(
                    address,
                    topic,
                    self.partitions,
                    isolation,
                );
                let records = records.await?;
                let payloads = records.iter().filter_map(|record| record.payload());
                payloads.map(<[u8]>::to_vec).collect()
            }
            Broker::RabbitMq => {
                let messages = observe::rabbitmq::drain(address, self.queue).await?;
                messages
                    .into_iter()
                    .map(|message| message.delivery.data)
                    .collect()
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let mut stream = jetstream.get_stream(self.stream).await?;
                let mut payloads = Vec::new();
                for sequence in 1..=stream.info().await?.state.last_sequence {
                    let message = stream.get_raw_message(sequence).await?;
                    payloads.push(message.payload.to_vec());
                }
                payloads
            }
        };
        let messages = payloads
            .iter()
            .map(|payload| serde_json::from_slice(payload));
        Ok(messages.collect::<Result<_, _>>()?)
    }
}

/// How many messages these RabbitMQ queues hold, those on their way to a consumer among
/// them. The management API would be quicker, and tells what was true some seconds ago.
pub async fn held(broker: &TestBroker, queues: &[&str]) -> Result<u64> {
    // Those that wait for a consumer: quickly told, and mostly enough.
    let mut ready = 0;
    for queue in queues {
        ready += observe::rabbitmq::ready(broker.address(), queue).await?;
    }
    if ready > 0 {
        return Ok(u64::from(ready));
    }
    // Starts a runtime of Erlang, so once for all of them.
    let words = [
        "list_queues",
        "--quiet",
        "--no-table-headers",
        "name",
        "messages",
    ];
    let printed = broker.rabbitmqctl(&words).await?;
    let lengths: HashMap<&str, &str> = printed
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .collect();
    let mut sum = 0;
    for queue in queues {
        let length = lengths.get(queue).context("no such queue")?;
        sum += length.trim().parse::<u64>()?;
    }
    Ok(sum)
}

/// A test for each line of the table: its name, and what its function is called with.
macro_rules! cells {
    ($run:ident: $($name:ident($broker:ident $(, $what:expr)*);)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() -> Result<()> {
                $run(Broker::$broker $(, $what)*).await
            }
        )*
    };
}
pub(crate) use cells;

#[test]
fn an_order_is_kept_or_not() {
    let kept = [("a", 1), ("b", 7), ("a", 2), ("a", 1), ("b", 8)];
    assert_eq!(reordered(kept), 0, "a repeated one is none");
    let lost = [("a", 1), ("a", 3), ("a", 2), ("b", 1), ("a", 4)];
    assert_eq!(reordered(lost), 1);
}
