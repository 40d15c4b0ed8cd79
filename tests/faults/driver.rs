//! How a fault is done, and what the tests of all patterns count in the same way.

use std::{env, time::Duration};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use lab::{
    broker::Broker,
    guarantees::{Cell, Fault},
    workspace,
};
use tests::{
    Example, Proxy, Supervised, TestBroker,
    example::RECORD,
    observe::{self, rabbitmq::QUEUE_IS_WRITTEN},
    random, wait,
};
use tokio::time::{sleep, timeout};

/// How often a fault is done.
pub const TIMES: u64 = 10;
/// How many messages there are for each of them.
pub const CHUNK: u64 = 100;

/// How long a frozen broker answers nobody.
const FROZEN_BROKER: Duration = Duration::from_secs(1);
/// How long a worker may take for one more message before its connection is cut.
const FROZEN_CONNECTION: Duration = Duration::from_millis(300);
/// How long a frozen worker does nothing: longer than its broker waits for it, see
/// `ACK_WAIT` and `session.timeout.ms` of the examples.
const FROZEN_WORKER: Duration = Duration::from_secs(3);
/// How long a program may publish without success: a broker is restarted meanwhile.
const PUBLISHING: Duration = Duration::from_secs(120);

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
        sleep(Duration::from_millis(self.random.u64(0..30))).await;
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
            Fault::LeaderKilled => unreachable!("one node has no leader"),
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

/// Runs `publish FIRST LAST` until each of these messages is acknowledged: after an
/// error it goes on with the one that it has no answer for.
pub async fn publish(
    binary: String,
    variable: (&'static str, String),
    first: u64,
    last: u64,
) -> Result<Published> {
    let mut published = Published::default();
    let all = async {
        let mut next = first;
        while next <= last {
            let words = ["publish", &next.to_string(), &last.to_string()];
            let ended = Example::start(&binary, &words, (variable.0, &variable.1))?
                .end()
                .await?;
            let lines = ended.stdout.lines();
            let count = lines.filter(|line| line.starts_with("published:")).count();
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

/// Waits until there is nothing left to do, and starts the worker again if it ends.
pub async fn finish(
    worker: &mut Supervised,
    mut left: impl AsyncFnMut() -> Result<u64>,
) -> Result<()> {
    wait::within(
        Duration::from_secs(120),
        "the end of the work",
        async || {
            worker.look_after().await?;
            let left = left().await?;
            ensure!(left == 0, "{left} are left");
            Ok(())
        },
    )
    .await
}

/// How many of these, in the order of their effects, came after a later one with the
/// same key. Each as its key and its number; only its first effect counts.
pub fn reordered<'a>(effects: impl IntoIterator<Item = (&'a str, u64)>) -> u64 {
    let mut seen = std::collections::HashSet::new();
    let mut latest = std::collections::HashMap::new();
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

/// How many messages a RabbitMQ queue holds, those on their way to a consumer among
/// them. The management API would be quicker, and tells what was true some seconds ago.
pub async fn queue_length(broker: &TestBroker, queue: &str) -> Result<u64> {
    // Those that wait for a consumer: quickly told, and mostly enough.
    let ready = observe::rabbitmq::ready(broker.address(), queue).await?;
    if ready > 0 {
        return Ok(u64::from(ready));
    }
    let words = [
        "list_queues",
        "--quiet",
        "--no-table-headers",
        "name",
        "messages",
    ];
    let queues = broker.rabbitmqctl(&words).await?;
    let line = queues.lines().find_map(|line| {
        let (name, count) = line.split_once('\t')?;
        (name == queue).then_some(count)
    });
    Ok(line.context("no such queue")?.trim().parse()?)
}

/// Says what was counted, and writes it down or compares it with what is.
pub fn tell(cell: &Cell) -> Result<()> {
    let counts = cell.counts;
    println!(
        "{}_{} {} {} x {}: attempted {}, acknowledged {}, received {}, lost {}, \
         delivered again {:?}, effects again {}, out of order {}",
        cell.pattern,
        cell.broker.name(),
        cell.variant,
        cell.fault.name(),
        cell.times,
        counts.attempted,
        counts.acknowledged,
        counts.received,
        counts.lost,
        counts.repeated,
        counts.doubled,
        counts.reordered,
    );
    cell.holds()?;
    if env::var_os(RECORD).is_some() {
        cell.record(workspace::root())
    } else {
        cell.is_recorded(workspace::root())
    }
}

#[test]
fn an_order_is_kept_or_not() {
    let kept = [("a", 1), ("b", 7), ("a", 2), ("a", 1), ("b", 8)];
    assert_eq!(reordered(kept), 0, "a repeated one is none");
    let lost = [("a", 1), ("a", 3), ("a", 2), ("b", 1), ("a", 4)];
    assert_eq!(reordered(lost), 1);
}
