//! Express orders overtake the backlog, and standard ones are never left out. Waiting is
//! counted in orders that were shipped before, and not in seconds.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use patterns::priority::{Desk, IN_A_ROW, Lane, Order};
use rdkafka::{Message as _, message::Headers as _};
use tempfile::TempDir;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::common::{Pattern, Place, nowhere, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_priority_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_priority_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_priority_nats"),
    topics: &[
        ("dispatch-express", "dispatchers-express"),
        ("dispatch-standard", "dispatchers-standard"),
        ("dispatch-aside", "nobody"),
    ],
    queues: &[
        "dispatch.express",
        "dispatch.standard",
        "dispatch.by-priority",
        "dispatch.aside",
    ],
    streams: &["DISPATCH", "DISPATCH_ASIDE"],
};

const LANES: [Lane; 2] = [Lane::Express, Lane::Standard];

fn place_of(lane: Lane) -> Place {
    let (topic, group, queue) = match lane {
        Lane::Express => (
            "dispatch-express",
            "dispatchers-express",
            "dispatch.express",
        ),
        Lane::Standard => (
            "dispatch-standard",
            "dispatchers-standard",
            "dispatch.standard",
        ),
    };
    Place {
        topic,
        partitions: 2,
        group,
        queue,
        stream: "DISPATCH",
    }
}

/// Queues, topics and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker and a dispatch desk.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
    folder: TempDir,
}

impl Shop {
    async fn open(broker: Broker) -> Result<Self> {
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable: PATTERN.fresh(broker).await?,
            folder: TempDir::new()?,
        })
    }

    async fn worker(&self, rate: u32, flags: &[&str]) -> Result<Example> {
        let file = self.folder.path().join("shipped.db");
        let file = file.to_str().context("a path")?;
        let rate = rate.to_string();
        let words = [&["worker", file, "--rate", &rate], flags].concat();
        let mut worker = Example::start(self.binary, &words, self.variable)?;
        worker.prints("ready:").await?;
        Ok(worker)
    }

    /// Places orders. Returns what it said.
    async fn place(
        &self,
        first: u64,
        last: u64,
        service: &str,
        flags: &[&str],
    ) -> Result<String> {
        let (first, last) = (first.to_string(), last.to_string());
        let words = [&["place", &first, &last, service], flags].concat();
        let placing = Example::start(self.binary, &words, self.variable)?;
        Ok(placing.end().await?.succeeded()?.stdout)
    }

    /// So many standard orders, and then so many express ones.
    async fn backlog(
        &self,
        standard: u64,
        express: u64,
        flags: &[&str],
    ) -> Result<()> {
        self.place(1, standard, "standard", flags).await?;
        let all = standard + express;
        self.place(standard + 1, all, "express", flags).await?;
        Ok(())
    }

    fn shipped(&self) -> Result<Vec<Order>> {
        let file = self.folder.path().join("shipped.db");
        Ok(Desk::open(&file)?.shipped()?)
    }

    /// Waits until so many are shipped, and returns all that are.
    async fn shipped_at_least(&self, count: usize) -> Result<Vec<Order>> {
        wait::until("orders shipped", async || {
            let shipped = self.shipped()?;
            ensure!(shipped.len() >= count, "{} of {count} are", shipped.len());
            Ok(shipped)
        })
        .await
    }

    /// Waits until each of `order-1` to this one is shipped. Returns all that are.
    async fn all_shipped(&self, last: u64) -> Result<Vec<Order>> {
        let each: BTreeSet<String> =
            (1..=last).map(|it| format!("order-{it}")).collect();
        wait::until("each order shipped", async || {
            let shipped = self.shipped()?;
            let ids: BTreeSet<String> =
                shipped.iter().map(|it| it.id.clone()).collect();
            let missing: Vec<_> = each.difference(&ids).take(5).collect();
            ensure!(missing.is_empty(), "missing: {missing:?} and perhaps more");
            Ok(shipped)
        })
        .await
    }

    /// Waits until the broker has so many orders left in this lane, none of them with
    /// a worker.
    async fn has_left(&self, lane: Lane, count: u64) -> Result<()> {
        let address = self.variable.1;
        let place = place_of(lane);
        wait::until("what is left in a lane", async || {
            let left = match self.broker {
                Broker::Kafka | Broker::RabbitMq => {
                    place.left(self.broker, address).await?
                }
                Broker::Nats => {
                    let jetstream = observe::nats::jetstream(address).await?;
                    let stream = jetstream.get_stream(place.stream).await?;
                    let mut subjects =
                        stream.info_with_subjects(place.queue).await?;
                    let mut left = 0;
                    while let Some(subject) = subjects.next().await {
                        left += u64::try_from(subject?.1)?;
                    }
                    left
                }
            };
            ensure!(left == count, "{lane:?}: {left}, not {count}");
            Ok(())
        })
        .await
    }
}

/// Tells a worker to stop, and waits for its clean end.
async fn stop(worker: Example) -> Result<()> {
    worker.interrupt().await?;
    let said = worker.end().await?.succeeded()?.stdout;
    ensure!(said.ends_with("stopped\n"), "{said}");
    Ok(())
}

/// As which number the orders of this service were shipped.
fn numbers(shipped: &[Order], service: &str) -> Vec<usize> {
    let numbered = (1..).zip(shipped);
    let those = numbered.filter(|(_number, order)| order.service == service);
    those.map(|(number, _order)| number).collect()
}

/// The number that 99 of 100 orders of this service do not exceed.
fn p99(shipped: &[Order], service: &str) -> Result<usize> {
    let numbers = numbers(shipped, service);
    let index = (numbers.len() * 99).div_ceil(100).checked_sub(1);
    Ok(numbers[index.with_context(|| format!("no {service} orders"))?])
}

fn none_twice(shipped: &[Order]) -> Result<()> {
    let ids: BTreeSet<&str> = shipped.iter().map(|it| it.id.as_str()).collect();
    ensure!(ids.len() == shipped.len(), "some are shipped twice");
    Ok(())
}

#[tokio::test]
async fn the_stories_tell_the_three_ways_apart() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// All orders are there before the worker is.
#[tokio::test]
async fn express_waits_far_less_and_standard_is_in_each_window() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.backlog(300, 40, &[]).await?;
        let worker = shop.worker(200, &[]).await?;
        let shipped = shop.all_shipped(340).await?;
        stop(worker).await?;
        none_twice(&shipped)?;

        let express = p99(&shipped, "express")?;
        let standard = p99(&shipped, "standard")?;
        // 53 and 337, if the next order of both lanes is always there.
        ensure!(express * 2 < standard, "{express} and {standard}");
        let end = *numbers(&shipped, "standard").last().context("none")?;
        // With room for an order that is on its way when it could be chosen.
        let window = 3 * (IN_A_ROW as usize + 1);
        let without = shipped[..end].windows(window).find(|window| {
            let mut orders = window.iter();
            orders.all(|order| order.service == "express")
        });
        ensure!(without.is_none(), "no standard order in {without:?}");
        for lane in LANES {
            shop.has_left(lane, 0).await?;
        }
        Ok(())
    })
    .await
}

/// The control: one lane for all, first come, first served.
#[tokio::test]
async fn control_in_one_lane_express_waits_for_the_backlog() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.backlog(150, 20, &["--one-lane"]).await?;
        shop.has_left(Lane::Express, 0).await?;
        let worker = shop.worker(200, &[]).await?;
        let shipped = shop.all_shipped(170).await?;
        stop(worker).await?;
        let express = p99(&shipped, "express")?;
        let standard = p99(&shipped, "standard")?;
        ensure!(express * 2 > standard, "{express} and {standard}");
        // On Kafka the partitions of a topic are no one queue.
        let first = numbers(&shipped, "express")[0];
        ensure!(broker == Broker::Kafka || first > 150, "the first: {first}");
        Ok(())
    })
    .await
}

/// How many of the first hundred are standard, while far more express orders wait than
/// that.
async fn standard_of_a_hundred(
    shop: &Shop,
    placed: &[&str],
    works: &[&str],
) -> Result<usize> {
    shop.place(1, 60, "standard", placed).await?;
    shop.place(61, 360, "express", placed).await?;
    let worker = shop.worker(100, works).await?;
    let shipped = shop.shipped_at_least(100).await?;
    stop(worker).await?;
    Ok(numbers(&shipped[..100], "standard").len())
}

#[tokio::test]
async fn standard_goes_on_while_express_does_not_end() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let standard = standard_of_a_hundred(&shop, &[], &[]).await?;
        // 25: not none, and not every second one, as express goes first.
        ensure!((13..40).contains(&standard), "{standard} of 100");
        Ok(())
    })
    .await
}

/// The control: on RabbitMQ by its own priorities.
#[tokio::test]
async fn control_strictly_by_priority_standard_starves() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let placed: &[&str] = match broker {
            Broker::RabbitMq => &["--one-queue"],
            Broker::Kafka | Broker::Nats => &[],
        };
        let works = ["--strict"];
        let standard = standard_of_a_hundred(&shop, placed, &works).await?;
        // Not even one for each ten, with room for an express lane that was empty for
        // a moment.
        ensure!(standard < 10, "{standard} of 100");
        Ok(())
    })
    .await
}

/// How many orders a worker ships after five express ones were placed until the last
/// of them is shipped. It stands still while they are placed.
async fn overtaken(shop: &Shop, placed: &[&str], works: &[&str]) -> Result<usize> {
    shop.place(1, 300, "standard", placed).await?;
    let worker = shop.worker(25, works).await?;
    shop.shipped_at_least(5).await?;
    worker.signal("STOP").await?;
    let before = shop.shipped()?.len();
    shop.place(301, 305, "express", placed).await?;
    worker.signal("CONT").await?;
    let last = wait::until("five express orders", async || {
        let shipped = shop.shipped()?;
        let express = numbers(&shipped, "express");
        ensure!(express.len() == 5, "{} of {}", express.len(), shipped.len());
        Ok(express[4])
    })
    .await?;
    stop(worker).await?;
    Ok(last - before)
}

#[tokio::test]
async fn express_that_comes_in_the_middle_overtakes_the_backlog() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let overtaken = overtaken(&shop, &[], &[]).await?;
        // The five, a standard one between them, and the one in hand: 7.
        ensure!(overtaken <= 25, "after {overtaken} orders");
        Ok(())
    })
    .await
}

/// The control: a hundred at a time. RabbitMQ sorts by priority, and what the worker
/// has in advance is not there to be sorted.
#[tokio::test]
async fn control_with_many_taken_ahead_express_waits_for_them() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let placed: &[&str] = match broker {
            Broker::RabbitMq => &["--one-queue"],
            Broker::Kafka | Broker::Nats => &[],
        };
        if broker == Broker::RabbitMq {
            // With one at a time the same queue does overtake.
            let one = overtaken(&shop, placed, &["--strict"]).await?;
            ensure!(one <= 25, "after {one} orders");
        }
        let shop = Shop::open(broker).await?;
        let overtaken = overtaken(&shop, placed, &["--ahead"]).await?;
        ensure!(overtaken > 40, "after {overtaken} orders");
        Ok(())
    })
    .await
}

/// 120 orders in one lane take as long as 120 in both. Waiting for an empty lane each
/// time, if only for a tenth of a second, would take twenty times as long.
#[tokio::test]
async fn an_empty_lane_does_not_slow_the_other() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let worker = shop.worker(200, &[]).await?;
        let mut last = 0;
        let mut took = async |parts: &[(u64, &str)]| {
            // It stands still until all orders are there.
            worker.signal("STOP").await?;
            for (count, service) in parts {
                let first = last + 1;
                last += count;
                shop.place(first, last, service, &[]).await?;
            }
            worker.signal("CONT").await?;
            let start = Instant::now();
            shop.all_shipped(last).await?;
            anyhow::Ok(start.elapsed())
        };
        // Three to one, so that both end at the same time.
        let both = took(&[(90, "express"), (30, "standard")]).await?;
        for service in ["express", "standard"] {
            let alone = took(&[(120, service)]).await?;
            let limit = both * 4 + Duration::from_secs(2);
            ensure!(alone < limit, "{service} {alone:?}, both {both:?}");
        }
        stop(worker).await?;
        none_twice(&shop.shipped()?)
    })
    .await
}

/// It is killed with an order in hand and one of each lane in front of it. Another
/// worker is there by then, and goes on.
#[tokio::test]
async fn a_killed_worker_loses_nothing_and_both_lanes_go_on() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.backlog(10, 10, &[]).await?;
        // An order takes it a second.
        let slow = shop.worker(1, &[]).await?;
        shop.shipped_at_least(1).await?;
        if broker == Broker::Kafka {
            // It commits every half second. Had it stored the order in hand as done, it
            // would be in this commit as well.
            wait::until("the first commit", async || {
                let address = shop.variable.1;
                let mut left = 0;
                for lane in LANES {
                    left += place_of(lane).left(broker, address).await?;
                }
                ensure!(left < 20, "{left} are left");
                Ok(())
            })
            .await?;
        }
        let other = shop.worker(100, &[]).await?;
        slow.kill().await?;
        let shipped = shop.all_shipped(20).await?;
        // The one that was shipped and not acknowledged. Kafka is told every half
        // second, so all since then.
        let again = shipped.len() - 20;
        ensure!(
            broker == Broker::Kafka || again <= 1,
            "{again} shipped again"
        );
        shop.place(21, 25, "standard", &[]).await?;
        shop.place(26, 30, "express", &[]).await?;
        shop.all_shipped(30).await?;
        stop(other).await?;
        for lane in LANES {
            shop.has_left(lane, 0).await?;
        }
        Ok(())
    })
    .await
}

/// What was held in front of it is at the broker again at once.
#[tokio::test]
async fn ctrl_c_gives_back_what_is_held_and_nothing_is_shipped_again() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.backlog(60, 60, &[]).await?;
        let worker = shop.worker(20, &[]).await?;
        shop.shipped_at_least(6).await?;
        stop(worker).await?;
        let shipped = shop.shipped()?;
        ensure!(shipped.len() < 120, "it was too late");
        for (lane, service) in
            [(Lane::Express, "express"), (Lane::Standard, "standard")]
        {
            let left = 60 - numbers(&shipped, service).len() as u64;
            shop.has_left(lane, left).await?;
        }
        let worker = shop.worker(200, &[]).await?;
        let shipped = shop.all_shipped(120).await?;
        stop(worker).await?;
        none_twice(&shipped)?;
        if broker == Broker::Nats {
            // It does not tell who has what. Not given back, they would come after
            // `ack_wait`, and so behind others.
            for service in ["express", "standard"] {
                let orders = shipped.iter().filter(|it| it.service == service);
                let ids: Vec<u64> = orders
                    .map(|order| Ok(order.id.replace("order-", "").parse()?))
                    .collect::<Result<_>>()?;
                ensure!(ids.is_sorted(), "{service}: {ids:?}");
            }
        }
        Ok(())
    })
    .await
}

const RUBBISH: &[u8] = b"\xff two cups";

/// Bytes that are no order, in this lane.
async fn send_rubbish(shop: &Shop, lane: Lane) -> Result<()> {
    let address = shop.variable.1;
    let place = place_of(lane);
    match shop.broker {
        Broker::Kafka => {
            let text = String::from_utf8_lossy(RUBBISH);
            observe::kafka::produce(address, place.topic, "order", &text).await?;
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            let confirms = ConfirmSelectOptions::default();
            channel.confirm_select(confirms).await?;
            let options = BasicPublishOptions::default();
            let properties = BasicProperties::default();
            channel
                .basic_publish(
                    "".into(),
                    place.queue.into(),
                    options,
                    RUBBISH,
                    properties,
                )
                .await?
                .await?;
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let stored = jetstream.publish(place.queue, RUBBISH.into()).await?;
            stored.await?;
        }
    }
    Ok(())
}

/// What is set aside: the bytes, and what is known of their origin.
async fn aside(shop: &Shop) -> Result<Vec<(Vec<u8>, String)>> {
    let address = shop.variable.1;
    Ok(match shop.broker {
        Broker::Kafka => {
            let topic = "dispatch-aside";
            let level = "read_uncommitted";
            let records = observe::kafka::read_all(address, topic, 2, level).await?;
            let each = records.iter().map(|it| {
                let headers = it.headers().into_iter().flat_map(|all| all.iter());
                let values = headers.filter_map(|header| header.value);
                let values = values.map(String::from_utf8_lossy);
                let values = values.collect::<Vec<_>>().join(" ");
                (it.payload().unwrap_or_default().to_vec(), values)
            });
            each.collect()
        }
        Broker::RabbitMq => {
            // It moves them by itself, some time after they were rejected.
            wait::until("two messages aside", async || {
                let kept =
                    observe::rabbitmq::ready(address, "dispatch.aside").await?;
                ensure!(kept == 2, "{kept} are there");
                Ok(())
            })
            .await?;
            let kept = observe::rabbitmq::drain(address, "dispatch.aside").await?;
            let each = kept.iter().map(|it| {
                let headers = it.properties.headers().clone();
                let headers = headers.unwrap_or_default();
                let queue = headers.inner().get("x-first-death-queue");
                let queue = queue.and_then(|queue| queue.as_long_string());
                let queue = queue.map(ToString::to_string);
                (it.data.clone(), queue.unwrap_or_default())
            });
            each.collect()
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("DISPATCH_ASIDE").await?;
            let last = stream.info().await?.state.last_sequence;
            let mut all = Vec::new();
            for sequence in 1..=last {
                let it = stream.get_raw_message(sequence).await?;
                all.push((it.payload.to_vec(), format!("{:?}", it.headers)));
            }
            all
        }
    })
}

/// Rubbish is the first in both lanes, and stops neither.
#[tokio::test]
async fn an_unknown_service_is_standard_and_rubbish_is_set_aside() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let said = shop.place(1, 1, "overnight", &[]).await?;
        let told = "placed:   order-1 to order-1, overnight, which nobody knows here: \
                    treated as standard\n";
        ensure!(said == told, "{said}");
        shop.has_left(Lane::Express, 0).await?;
        shop.has_left(Lane::Standard, 1).await?;
        for lane in LANES {
            send_rubbish(&shop, lane).await?;
        }
        shop.place(2, 2, "standard", &[]).await?;
        shop.place(3, 3, "express", &[]).await?;
        let mut worker = shop.worker(100, &[]).await?;
        for _lane in LANES {
            let line = worker.prints("aside:").await?;
            ensure!(line.contains(" bytes, no order: "), "{line}");
        }
        let shipped = shop.all_shipped(3).await?;
        none_twice(&shipped)?;
        let unknown = numbers(&shipped, "overnight");
        ensure!(unknown.len() == 1, "it has lost the name of its service");
        stop(worker).await?;
        for lane in LANES {
            shop.has_left(lane, 0).await?;
        }

        let kept = aside(&shop).await?;
        ensure!(kept.len() == 2, "{} are aside", kept.len());
        for (bytes, _origin) in &kept {
            let bytes = String::from_utf8_lossy(bytes);
            ensure!(bytes == String::from_utf8_lossy(RUBBISH), "{bytes:?}");
        }
        for lane in LANES {
            let place = place_of(lane);
            let origin = match broker {
                Broker::Kafka => place.topic,
                Broker::RabbitMq | Broker::Nats => place.queue,
            };
            let from_there = kept.iter().any(|(_, it)| it.contains(origin));
            ensure!(from_there, "none from {origin}: {kept:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_desk_without_a_book_is_told() -> Result<()> {
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let folder = TempDir::new()?;
        let path = folder.path().to_str().context("a path")?;
        let ended = Example::start(binary, &["worker", path], variable)?;
        let ended = ended.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("cannot keep the book"), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 10] = [
        &["place"],
        &["place", "1", "5"],
        &["place", "5", "1", "express"],
        &["place", "one", "5", "express"],
        &["place", "1", "5", "--one-lane"],
        &["place", "1", "5", "express", "--two-lanes"],
        &["worker"],
        &["worker", "shipped.db", "--fifo"],
        &["worker", "shipped.db", "--rate", "0"],
        &["worker", "shipped.db", "--rate", "1001"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
