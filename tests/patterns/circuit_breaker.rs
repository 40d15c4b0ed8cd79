//! While the gateway is down it is left alone, and no payment is lost, set aside or
//! charged twice. What the gateway was asked stands in the gateway's own ledger.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use patterns::circuit_breaker::{FAILURES, Ledger, payment};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer as _},
};
use tempfile::TempDir;
use tests::{Example, observe, wait};
use tokio::{sync::Mutex, task::spawn_blocking, try_join};

use crate::common::{Pattern, Place, nowhere, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_circuit_breaker_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_circuit_breaker_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_circuit_breaker_nats"),
    topics: &[("charges-due", "charger"), ("charges-aside", "nobody")],
    queues: &["charges.due", "charges.aside"],
    streams: &["CHARGES", "CHARGES_ASIDE"],
};

const DUE: Place = Place {
    topic: "charges-due",
    partitions: 2,
    group: "charger",
    queue: "charges.due",
    stream: "CHARGES",
};
const ASIDE: Place = Place {
    topic: "charges-aside",
    partitions: 2,
    group: "nobody",
    queue: "charges.aside",
    stream: "CHARGES_ASIDE",
};

/// Queues, topics and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker, and the place of a gateway.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
    folder: TempDir,
    /// Where the gateway listens, once it has.
    gateway: String,
}

impl Shop {
    async fn open(broker: Broker) -> Result<Self> {
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable: PATTERN.fresh(broker).await?,
            folder: TempDir::new()?,
            gateway: "127.0.0.1:0".to_owned(),
        })
    }

    /// Starts the gateway, at the place where it was before.
    async fn gateway(&mut self, words: &[&str]) -> Result<Example> {
        let file = self.folder.path().join("shop.db");
        let file = file.to_str().context("a path")?;
        let words = [&["gateway", file], words].concat();
        let mut gateway = self.start(&words)?;
        let ready = gateway.prints("ready:  gateway at ").await?;
        let address = ready.trim_start_matches("ready:  gateway at ");
        let address = address.trim_end_matches(", Ctrl-C to stop");
        address.clone_into(&mut self.gateway);
        Ok(gateway)
    }

    fn start(&self, words: &[&str]) -> Result<Example> {
        let variables = [self.variable, ("GATEWAY", self.gateway.as_str())];
        Example::start_with(self.binary, words, &variables)
    }

    async fn produce(&self, first: u64, last: u64) -> Result<()> {
        let words = ["producer", &first.to_string(), &last.to_string()];
        self.start(&words)?.end().await?.succeeded()?;
        Ok(())
    }

    async fn worker(&self, words: &[&str]) -> Result<Example> {
        let words = [&["worker"], words].concat();
        let mut worker = self.start(&words)?;
        worker.prints("ready:").await?;
        Ok(worker)
    }

    fn ledger(&self) -> Result<Ledger> {
        Ok(Ledger::open(&self.folder.path().join("shop.db"))?)
    }

    /// Waits until so many cards are charged, each once, and the broker has nothing
    /// left and nothing set aside.
    async fn all_charged(&self, count: u64) -> Result<()> {
        wait::until("all cards charged", async || {
            let charged = self.ledger()?.charged()?.len();
            ensure!(charged as u64 >= count, "{charged} are");
            Ok(())
        })
        .await?;
        let charged = self.ledger()?.charged()?;
        let each: HashSet<String> = (1..=count).map(|it| payment(it).id).collect();
        assert_eq!(charged.len() as u64, count, "{charged:?}");
        assert_eq!(charged.into_iter().collect::<HashSet<_>>(), each);
        self.has_left(0).await?;
        assert_eq!(self.aside().await?, 0);
        Ok(())
    }

    async fn has_left(&self, count: u64) -> Result<()> {
        wait::until("what is left", async || {
            let left = DUE.left(self.broker, self.variable.1).await?;
            ensure!(left == count, "{left}, not {count}");
            Ok(())
        })
        .await
    }

    async fn aside(&self) -> Result<u64> {
        ASIDE.left(self.broker, self.variable.1).await
    }

    /// Who is in the group of the workers, by the ids that Kafka gives to members: who
    /// leaves and comes back gets another.
    async fn members(&self) -> Result<Vec<String>> {
        if self.broker != Broker::Kafka {
            return Ok(Vec::new());
        }
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.variable.1)
            .create()?;
        spawn_blocking(move || {
            let patience = Duration::from_secs(10);
            let groups = client.fetch_group_list(Some("charger"), patience)?;
            let group = groups.groups().first().context("no group")?;
            let ids = group.members().iter().map(|it| it.id().to_owned());
            Ok(ids.collect())
        })
        .await?
    }

    /// How often NATS has delivered anything again.
    async fn redelivered(&self) -> Result<usize> {
        if self.broker != Broker::Nats {
            return Ok(0);
        }
        let jetstream = observe::nats::jetstream(self.variable.1).await?;
        let stream = jetstream.get_stream("CHARGES").await?;
        let consumer = stream.get_consumer("charger").await;
        let mut consumer: PullConsumer =
            consumer.map_err(anyhow::Error::from_boxed)?;
        let known = consumer.info().await?;
        // Each delivery has a number of its own, also that of the same message.
        let delivered = known.delivered;
        Ok((delivered.consumer_sequence - delivered.stream_sequence).try_into()?)
    }
}

#[tokio::test]
async fn the_stories_open_half_open_and_close() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// Five payments, then an outage with a backlog of 25. The outage gets the gateway, and
/// returns the one that is back.
async fn outage(
    broker: Broker,
    words: &[&str],
    outage: impl AsyncFnOnce(&mut Shop, Example, &mut Example) -> Result<Example>,
) -> Result<()> {
    let mut shop = Shop::open(broker).await?;
    let gateway = shop.gateway(&[]).await?;
    shop.produce(1, 5).await?;
    let mut worker = shop.worker(words).await?;
    shop.all_charged(5).await?;
    let members = shop.members().await?;

    let gateway = outage(&mut shop, gateway, &mut worker).await?;
    worker.prints("state:  closed").await?;
    shop.all_charged(30).await?;
    assert_eq!(shop.members().await?, members, "a rebalance");
    assert_eq!(shop.redelivered().await?, 0);

    worker.interrupt().await?;
    let said = worker.end().await?.succeeded()?.stdout;
    let count = |text| said.matches(text).count() as u32;
    // Three that opened it, and each probe but the last, which closed it.
    let failed = FAILURES + count("state:  half-open") - 1;
    assert_eq!(count("failed: payment-"), failed, "{said}");
    assert_eq!(count("state:  closed"), 1, "{said}");
    // What a frozen one finds in its socket, it answers when it goes on. And one call
    // may have met a gateway that was just being killed.
    let reached = count("503") + count("no answer");
    let calls = shop.ledger()?.calls()? - 30;
    ensure!((reached..=reached + 1).contains(&calls), "{calls}: {said}");
    ensure!(calls <= failed, "{calls}: {said}");
    gateway.interrupt().await?;
    gateway.end().await?.succeeded()?;
    Ok(())
}

/// Gone: calls are refused. Then there, and out of order: they are answered with 503.
#[tokio::test]
async fn a_gateway_that_is_down_gets_three_calls_and_the_probes() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        outage(broker, &[], async |shop, gateway, worker| {
            gateway.kill().await?;
            shop.produce(6, 30).await?;
            for _probe in 0..2 {
                worker.prints("state:  half-open, one probe").await?;
            }
            let failing = shop.gateway(&["--down"]).await?;
            for _probe in 0..3 {
                worker.prints("state:  half-open, one probe").await?;
            }
            failing.kill().await?;
            shop.gateway(&[]).await
        })
        .await
    })
    .await
}

/// The calls that had no answer charge all the same, when it goes on, and it knows
/// them when they come again. On Kafka the breaker is open for longer than a member of
/// the group may go without a poll.
#[tokio::test]
async fn a_frozen_gateway_is_a_timeout_and_charges_once() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let words: &[&str] = match broker {
            Broker::Kafka => &["--wait", "8"],
            Broker::RabbitMq | Broker::Nats => &[],
        };
        outage(broker, words, async |shop, gateway, worker| {
            gateway.signal("STOP").await?;
            shop.produce(6, 30).await?;
            worker.prints("state:  open, a probe in").await?;
            if broker != Broker::Kafka {
                // A probe that fails, too.
                worker.prints("state:  open, a probe in").await?;
            }
            gateway.signal("CONT").await?;
            Ok(gateway)
        })
        .await
    })
    .await
}

/// No gateway, and a worker whose breaker has opened for the longest wait.
async fn open_for_long(shop: &mut Shop) -> Result<Example> {
    // A place for the gateway that nobody else has.
    shop.gateway(&[]).await?.kill().await?;
    shop.produce(1, 10).await?;
    let mut worker = shop.worker(&[]).await?;
    worker.prints("state:  open, a probe in 2000 ms").await?;
    Ok(worker)
}

#[tokio::test]
async fn ctrl_c_while_it_is_open_does_not_wait_for_the_probe() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let mut shop = Shop::open(broker).await?;
        let worker = open_for_long(&mut shop).await?;
        worker.interrupt().await?;
        let said = worker.end().await?.succeeded()?.stdout;
        let last = "state:  open, a probe in 2000 ms\nstopped\n";
        ensure!(said.ends_with(last), "{said}");
        shop.has_left(10).await?;
        if broker == Broker::RabbitMq {
            let address = shop.variable.1;
            for message in observe::rabbitmq::drain(address, "charges.due").await? {
                let headers = message.properties.headers().clone();
                let headers = headers.unwrap_or_default();
                let count = headers.inner().get("x-delivery-count").cloned();
                let count = count.and_then(|count| count.as_long_long_int());
                assert_eq!(count.unwrap_or(0), 0, "it counts");
            }
            shop.produce(1, 10).await?;
        }
        let _gateway = shop.gateway(&[]).await?;
        let worker = shop.worker(&[]).await?;
        shop.all_charged(10).await?;
        worker.interrupt().await?;
        worker.end().await?.succeeded()?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_worker_killed_while_it_is_open_loses_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let mut shop = Shop::open(broker).await?;
        open_for_long(&mut shop).await?.kill().await?;
        let _gateway = shop.gateway(&[]).await?;
        let worker = shop.worker(&[]).await?;
        shop.all_charged(10).await?;
        worker.interrupt().await?;
        worker.end().await?.succeeded()?;
        Ok(())
    })
    .await
}

/// A second worker joins while the first one's breaker is open, and Kafka shares the
/// partitions out anew: the pause is over, and what comes is given back.
async fn a_rebalance() -> Result<()> {
    let mut shop = Shop::open(Broker::Kafka).await?;
    let mut first = open_for_long(&mut shop).await?;
    let mut second = shop.worker(&[]).await?;
    for worker in [&mut first, &mut second] {
        worker.prints("state:  open, a probe in").await?;
    }
    let gateway = shop.gateway(&[]).await?;
    shop.all_charged(10).await?;
    for worker in [first, second] {
        worker.interrupt().await?;
        let said = worker.end().await?.succeeded()?.stdout;
        let count = |text| said.matches(text).count();
        let probes = count("state:  half-open") - count("state:  closed");
        assert_eq!(count("failed: "), FAILURES as usize + probes, "{said}");
    }
    gateway.kill().await
}

/// The one payment is in hand for longer than NATS waits for a sign of life, and another
/// worker that asks gets nothing.
async fn another_worker_asks_nats() -> Result<()> {
    let mut shop = Shop::open(Broker::Nats).await?;
    shop.gateway(&[]).await?.kill().await?;
    shop.produce(1, 1).await?;
    let mut worker = shop.worker(&["--wait", "30"]).await?;
    worker.prints("state:  open, a probe in 30000 ms").await?;
    let jetstream = observe::nats::jetstream(shop.variable.1).await?;
    let stream = jetstream.get_stream("CHARGES").await?;
    let consumer = stream.get_consumer("charger").await;
    let consumer: PullConsumer = consumer.map_err(anyhow::Error::from_boxed)?;
    let ask = consumer.batch().max_messages(1);
    let mut asked = ask.expires(Duration::from_secs(7)).messages().await?;
    ensure!(asked.next().await.is_none(), "it is delivered again");
    // Told to stop, it gives it back.
    worker.interrupt().await?;
    worker.end().await?.succeeded()?;
    let _gateway = shop.gateway(&[]).await?;
    let worker = shop.worker(&[]).await?;
    shop.all_charged(1).await?;
    worker.interrupt().await?;
    worker.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn while_it_is_open_others_may_come_and_no_call_is_made() -> Result<()> {
    let _turn = TURN.lock().await;
    try_join!(a_rebalance(), another_worker_asks_nats())?;
    Ok(())
}

/// An answer is an answer.
#[tokio::test]
async fn a_declined_card_is_set_aside_and_opens_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let mut shop = Shop::open(broker).await?;
        let _gateway = shop.gateway(&[]).await?;
        shop.produce(1001, 1010).await?;
        let worker = shop.worker(&[]).await?;
        wait::until("ten set aside", async || {
            let aside = shop.aside().await?;
            ensure!(aside == 10, "{aside}");
            Ok(())
        })
        .await?;
        shop.has_left(0).await?;
        worker.interrupt().await?;
        let said = worker.end().await?.succeeded()?.stdout;
        ensure!(!said.contains("state:"), "{said}");
        assert_eq!(said.matches(", declined\n").count(), 10, "{said}");
        assert_eq!(shop.ledger()?.calls()?, 10);
        Ok(())
    })
    .await
}

/// Nothing is wrong with any of the payments.
#[tokio::test]
async fn control_without_a_breaker_all_is_called_and_all_is_set_aside() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        // Few where the book shows each line.
        let backlog = if broker == Broker::RabbitMq { 3 } else { 30 };
        let mut shop = Shop::open(broker).await?;
        let gateway = shop.gateway(&["--down"]).await?;
        shop.produce(1, backlog).await?;
        let worker = shop.worker(&["--no-breaker"]).await?;
        wait::until("all set aside", async || {
            let aside = shop.aside().await?;
            ensure!(aside == backlog, "{aside} are");
            Ok(())
        })
        .await?;
        shop.has_left(0).await?;
        worker.interrupt().await?;
        let ended = worker.end().await?.succeeded()?;
        if broker == Broker::RabbitMq {
            ended.printed_what_the_book_shows("no-breaker")?;
        }
        assert_eq!(u64::from(shop.ledger()?.calls()?), 3 * backlog);
        // The gateway comes back, and there is nothing left to do for it.
        assert_eq!(shop.ledger()?.charged()?.len(), 0);
        gateway.kill().await
    })
    .await
}

#[tokio::test]
async fn two_gateways_do_not_share_a_place_and_a_broken_ledger_is_told() -> Result<()>
{
    for (broker, binary) in PATTERN.binaries() {
        let mut shop = Shop {
            broker,
            binary,
            variable: (broker.address_var(), nowhere(broker)),
            folder: TempDir::new()?,
            gateway: "127.0.0.1:0".to_owned(),
        };
        let gateway = shop.gateway(&[]).await?;
        let file = shop.folder.path().join("other.db");
        let file = file.to_str().context("a path")?;
        let second = shop.start(&["gateway", file])?.end().await?;
        let line = second.one_line_error()?;
        ensure!(line.contains("cannot listen at 127.0.0.1:"), "{line}");
        let folder = shop.folder.path().to_str().context("a path")?;
        let broken = shop.start(&["gateway", folder])?.end().await?;
        let line = broken.one_line_error()?;
        ensure!(line.contains("cannot keep a ledger in"), "{line}");
        gateway.interrupt().await?;
        gateway.end().await?.succeeded()?;
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 7] = [
        &["producer", "5", "3"],
        &["producer", "1"],
        &["producer", "one", "2"],
        &["gateway"],
        &["gateway", "shop.db", "--up"],
        &["worker", "--breaker"],
        &["worker", "--wait", "0"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
