//! Each order is in one destination or in `unrouted`, also while a route changes and the
//! router is killed. What is where, each broker is asked behind the example's back.

use std::{
    collections::{BTreeMap, HashMap},
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{
    ErrorCode,
    stream::{self, RawMessageErrorKind},
};
use lab::broker::Broker;
use lapin::{BasicProperties, options::BasicPublishOptions};
use patterns::content_based_router::{Place, Reason, order};
use rdkafka::{Message as _, message::Headers as _};
use tests::{
    Example, broker,
    example::Ended,
    observe::{kafka, nats, rabbitmq},
    random, wait,
};
use tokio::{sync::Mutex, try_join};

use crate::common::{Pattern, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_content_based_router_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_content_based_router_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_content_based_router_nats"),
    topics: &[
        ("route-orders", "route-router"),
        ("route-table", "nobody"),
        ("route-review", "nobody"),
        ("route-berlin", "nobody"),
        ("route-lyon", "nobody"),
        ("route-unrouted", "route-again"),
    ],
    queues: &[
        "route.to.review",
        "route.to.berlin",
        "route.to.lyon",
        "route.to.unrouted",
    ],
    streams: &[
        "ROUTE_REVIEW",
        "ROUTE_BERLIN",
        "ROUTE_LYON",
        "ROUTE_UNROUTED",
    ],
};

/// Topics, queues and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

type Contents = BTreeMap<Place, Vec<Vec<u8>>>;

/// Which orders are in which place, in their order, and again if they are there again.
type Numbers = BTreeMap<Place, Vec<u64>>;

/// A broker without orders and without routes.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
}

impl Shop {
    async fn open(broker: Broker) -> Result<Self> {
        let variable = if broker == Broker::Kafka {
            // All at the same time: there are many, and each takes a while.
            let address = broker::shared(broker).await?;
            let forget = |index: usize| {
                let (topic, group) = PATTERN.topics[index];
                kafka::forget(address, topic, group)
            };
            try_join!(
                forget(0),
                forget(1),
                forget(2),
                forget(3),
                forget(4),
                forget(5)
            )?;
            (broker.address_var(), address)
        } else {
            PATTERN.fresh(broker).await?
        };
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable,
        })
    }

    /// One where Germany and France go to Berlin, and what is large to a person.
    async fn with_routes(broker: Broker) -> Result<Self> {
        let shop = Self::open(broker).await?;
        for route in [["large", "review"], ["DE", "berlin"], ["FR", "berlin"]] {
            shop.route(&route).await?;
        }
        Ok(shop)
    }

    fn start(&self, words: &[&str]) -> Result<Example> {
        Example::start(self.binary, words, self.variable)
    }

    /// A part of the program that ends by itself.
    async fn run(&self, words: &[&str]) -> Result<Ended> {
        self.start(words)?.end().await?.succeeded()
    }

    async fn route(&self, words: &[&str]) -> Result<()> {
        self.run(&[&["route"], words].concat()).await?;
        Ok(())
    }

    async fn publish(&self, numbers: RangeInclusive<u64>) -> Result<()> {
        let (first, last) = (numbers.start().to_string(), numbers.end().to_string());
        self.run(&["publish", &first, &last]).await?;
        Ok(())
    }

    /// On Kafka, the program that routes; elsewhere the broker does.
    async fn router(&self) -> Result<Option<Example>> {
        if self.broker != Broker::Kafka {
            return Ok(None);
        }
        let mut router = self.start(&["router"])?;
        router.prints("ready:").await?;
        Ok(Some(router))
    }

    /// Waits until everything is routed, and stops the router. Returns what it said on
    /// stderr.
    async fn settle(&self, router: Option<Example>) -> Result<String> {
        let Some(router) = router else {
            return Ok(String::new());
        };
        all_routed(self.variable.1).await?;
        router.interrupt().await?;
        let ended = router.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
        Ok(ended.stderr)
    }

    /// What is in each place. RabbitMQ gives it away.
    async fn contents(&self) -> Result<Contents> {
        let address = self.variable.1;
        let mut contents = Contents::new();
        for place in Place::ALL {
            let payloads = match self.broker {
                Broker::Kafka => in_topic(address, place).await?,
                Broker::RabbitMq => {
                    let queue = format!("route.to.{place}");
                    let messages = rabbitmq::drain(address, &queue).await?;
                    messages.into_iter().map(|it| it.data.clone()).collect()
                }
                Broker::Nats => in_stream(address, place).await?,
            };
            contents.insert(place, payloads);
        }
        Ok(contents)
    }

    /// As [`Self::contents`], by the numbers of the orders up to this one.
    async fn numbers(&self, last: u64) -> Result<Numbers> {
        by_number(self.contents().await?, last)
    }

    /// Ends a program at the pause in which there is time for it.
    async fn kill_in_pause(&self, words: &[&str], pause: &str) -> Result<()> {
        let mut program = self.start(words)?;
        program.prints(pause).await?;
        program.kill().await
    }
}

async fn all_routed(address: &str) -> Result<()> {
    wait::until("all orders routed", async || {
        let group = "route-router";
        let left = kafka::lag(address, "route-orders", 3, group).await?;
        ensure!(left == 0, "{left} are not");
        Ok(())
    })
    .await
}

fn by_number(contents: Contents, last: u64) -> Result<Numbers> {
    let mut known = HashMap::new();
    for number in 1..=last {
        known.insert(order(number)?, number);
    }
    let mut numbers = Numbers::new();
    for (place, payloads) in contents {
        let in_place = numbers.entry(place).or_default();
        for payload in payloads {
            // By all its bytes: what is written anew is another order.
            let number = known.get(&payload);
            let number = number.with_context(|| {
                format!("in {place}: {}", payload.escape_ascii())
            })?;
            in_place.push(*number);
        }
        in_place.sort_unstable();
    }
    Ok(numbers)
}

/// What is committed. In `unrouted` what is routed again does not count any more.
async fn in_topic(address: &str, place: Place) -> Result<Vec<Vec<u8>>> {
    let topic = format!("route-{place}");
    let (partitions, begin) = if place == Place::Unrouted {
        let begin = kafka::committed(address, &topic, "route-again").await?;
        (1, begin.unwrap_or(0))
    } else {
        (3, 0)
    };
    let records =
        kafka::read_all(address, &topic, partitions, "read_committed").await?;
    let mut payloads = Vec::new();
    for record in records.iter().filter(|it| it.offset() >= begin) {
        let payload = record.payload().unwrap_or_default();
        let headers = record.headers().into_iter().flat_map(|all| all.iter());
        let reasons: Vec<_> = headers.filter(|it| it.key == "reason").collect();
        if place == Place::Unrouted {
            let reason = Reason::of(payload).to_string();
            ensure!(reasons.len() == 1, "{} reasons", reasons.len());
            ensure!(reasons[0].value == Some(reason.as_bytes()), "{reasons:?}");
        } else {
            ensure!(reasons.is_empty(), "in {place}: {reasons:?}");
        }
        payloads.push(payload.to_vec());
    }
    Ok(payloads)
}

async fn in_stream(address: &str, place: Place) -> Result<Vec<Vec<u8>>> {
    let stream = stream(address, place).await?;
    let state = stream.get_info().await?.state;
    let mut payloads = Vec::new();
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        match stream.get_raw_message(sequence).await {
            Ok(message) => payloads.push(message.payload.to_vec()),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(payloads)
}

async fn stream(address: &str, place: Place) -> Result<stream::Stream> {
    let jetstream = nats::jetstream(address).await?;
    let name = format!("ROUTE_{place}").to_uppercase();
    Ok(jetstream.get_stream(name).await?)
}

/// Where an order may be when small orders from France may be in these places.
fn right(number: u64, french: &[Place]) -> Vec<Place> {
    match number % 10 {
        3 | 7 => vec![Place::Review],
        2 | 4 => french.to_vec(),
        1 | 5 | 8 => vec![Place::Berlin],
        _ => vec![Place::Unrouted],
    }
}

/// How many orders are nowhere, and how many are somewhere once more.
fn faults(numbers: &Numbers, last: u64) -> (usize, usize) {
    let mut all: Vec<u64> = numbers.values().flatten().copied().collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    let lost = (1..=last).filter(|number| !all.contains(number)).count();
    (lost, count - all.len())
}

/// Each order up to this one is in one place, once, and it is a right one.
fn each_in_one(numbers: &Numbers, last: u64, french: &[Place]) -> Result<()> {
    let (lost, twice) = faults(numbers, last);
    ensure!(
        (lost, twice) == (0, 0),
        "of {last} {lost} lost, {twice} twice"
    );
    for (place, numbers) in numbers {
        for number in numbers {
            let right = right(*number, french);
            ensure!(right.contains(place), "order-{number} is in {place}");
        }
    }
    Ok(())
}

/// How many small orders from France are in a place.
fn french(numbers: &Numbers, place: Place) -> usize {
    let in_place = numbers.get(&place).into_iter().flatten();
    in_place.filter(|it| matches!(*it % 10, 2 | 4)).count()
}

#[tokio::test]
async fn the_stories_route_each_order_to_one_place() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// Bytes from somebody who is not the publisher of the example.
async fn send_foreign(shop: &Shop, payloads: &[&'static str]) -> Result<()> {
    let address = shop.variable.1;
    match shop.broker {
        Broker::Kafka => {
            for payload in payloads {
                kafka::produce(address, "route-orders", "foreign", payload).await?;
            }
        }
        Broker::RabbitMq => {
            let (connection, channel) = rabbitmq::connect(address).await?;
            for payload in payloads {
                let publish = channel.basic_publish(
                    "route.orders".into(),
                    "any.key.at.all".into(),
                    BasicPublishOptions::default(),
                    payload.as_bytes(),
                    BasicProperties::default(),
                );
                publish.await?.await?;
            }
            // Answered behind them.
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = nats::jetstream(address).await?;
            for payload in payloads {
                let subject = "route.unrouted.any.key.at.all";
                jetstream.publish(subject, (*payload).into()).await?.await?;
            }
        }
    }
    Ok(())
}

/// Among them are some that nobody can read.
#[tokio::test]
async fn each_order_is_in_one_destination_or_in_unrouted_with_its_bytes()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::with_routes(broker).await?;
        let router = shop.router().await?;
        let foreign = [
            "",
            "two cups,\r\nto Ghent",
            r#"{"id":"order-1","country":"F.R","total":1}"#,
            r#"{"id":"order-1","country":"*","total":1}"#,
            r#"{"id":"order-1","country":"FR","total":-1}"#,
        ];
        send_foreign(&shop, &foreign).await?;
        shop.publish(1..=200).await?;
        if let Some(mut router) = router {
            let address = shop.variable.1;
            all_routed(address).await?;
            // A row that is no route ends the one that was there, and nothing else.
            kafka::produce(address, "route-table", "FR", "nowhere").await?;
            kafka::produce(address, "route-table", "nobody", "lyon").await?;
            shop.route(&["IS", "lyon"]).await?;
            router.prints("learned:  IS to lyon").await?;
            let said = shop.settle(Some(router)).await?;
            let passed_over = "a row of the route table is passed over: ";
            assert_eq!(said.matches(passed_over).count(), 2, "{said}");
        }
        if broker == Broker::Nats {
            // It has lost the answer, and sends them again.
            let again = shop.run(&["publish", "1", "200"]).await?.stdout;
            ensure!(again.ends_with(", 200 known\n"), "{again}");
        }
        let mut contents = shop.contents().await?;
        let unrouted = contents.entry(Place::Unrouted).or_default();
        for payload in foreign {
            let place = unrouted.iter().position(|it| it == payload.as_bytes());
            unrouted.remove(place.with_context(|| payload.to_owned())?);
        }
        each_in_one(&by_number(contents, 200)?, 200, &[Place::Berlin])?;
        // Whether somebody can see it with the example itself.
        if broker != Broker::RabbitMq {
            let shown = shop.run(&["show"]).await?.stdout;
            ensure!(shown.contains("unrouted: order-6, no route for IS.small"));
            ensure!(shown.contains(", and 57 more"), "{shown}");
        }
        Ok(())
    })
    .await
}

/// Publishes for as long as something else takes. Returns the last order.
async fn under_load(
    shop: &Shop,
    change: impl Future<Output = Result<()>>,
) -> Result<u64> {
    let over = AtomicBool::new(false);
    // With the first route.
    shop.publish(1..=50).await?;
    if shop.broker == Broker::Kafka {
        all_routed(shop.variable.1).await?;
    }
    let publish = async {
        let mut last = 50;
        while !over.load(Ordering::Relaxed) {
            shop.publish(last + 1..=last + 50).await?;
            last += 50;
        }
        Ok(last)
    };
    let change = async {
        let changed = change.await;
        over.store(true, Ordering::Relaxed);
        changed
    };
    let (last, ()) = try_join!(publish, change)?;
    // With the last route.
    shop.publish(last + 1..=last + 50).await?;
    Ok(last + 50)
}

#[tokio::test]
async fn a_route_is_changed_under_load_and_each_order_is_in_one_place() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::with_routes(broker).await?;
        let router = shop.router().await?;
        let change = async {
            for _time in 0..3 {
                shop.route(&["FR", "lyon"]).await?;
                shop.route(&["FR", "berlin"]).await?;
            }
            // So that orders come after each of the steps.
            match broker {
                Broker::Kafka => shop.route(&["FR", "lyon"]).await,
                _ => shop.route(&["FR", "lyon", "--slow"]).await,
            }
        };
        let last = under_load(&shop, change).await?;
        shop.settle(router).await?;

        if broker == Broker::Nats {
            // Some have come while no stream had the subject.
            let numbers = shop.numbers(last).await?;
            let places = [Place::Berlin, Place::Lyon, Place::Unrouted];
            each_in_one(&numbers, last, &places)?;
            ensure!(french(&numbers, Place::Unrouted) > 0, "none in between");
            shop.run(&["again"]).await?;
        }
        let numbers = shop.numbers(last).await?;
        each_in_one(&numbers, last, &[Place::Berlin, Place::Lyon])?;
        for place in [Place::Berlin, Place::Lyon] {
            ensure!(french(&numbers, place) > 0, "nothing for {place}");
        }
        // With the last route, none goes elsewhere.
        let newest = numbers[&Place::Lyon].last().copied();
        assert_eq!(newest, Some(last - 6));
        Ok(())
    })
    .await
}

/// Kills the router between what it has written and the commit, and at moments that
/// nobody has chosen, each time with another route. Returns the last order, and what is
/// where.
async fn under_kills(
    shop: &Shop,
    careless: &[&str],
    first: u64,
) -> Result<(u64, Numbers)> {
    let mut random = random::seeded();
    let slow = [&["router"], careless, &["--slow"]].concat();
    let quick = [&["router"], careless].concat();
    let routes = ["lyon", "berlin", "lyon"];
    shop.publish(first..=50).await?;
    for route in routes {
        shop.route(&["FR", route]).await?;
        shop.kill_in_pause(&slow, "pause:").await?;
    }
    shop.publish(51..=1050).await?;
    for route in routes {
        shop.route(&["FR", route]).await?;
        let mut router = shop.start(&quick)?;
        for _batch in 0..random.usize(1..=3) {
            router.prints("routed:").await?;
        }
        router.kill().await?;
    }
    shop.route(&["FR", "berlin"]).await?;
    shop.publish(1051..=1060).await?;
    let mut router = shop.start(&quick)?;
    router.prints("ready:").await?;
    shop.settle(Some(router)).await?;
    Ok((1060, shop.numbers(1060).await?))
}

#[tokio::test]
async fn on_kafka_a_router_that_is_killed_routes_each_order_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let shop = Shop::with_routes(Broker::Kafka).await?;
    let (last, numbers) = under_kills(&shop, &[], 1).await?;
    each_in_one(&numbers, last, &[Place::Berlin, Place::Lyon])?;
    for place in [Place::Berlin, Place::Lyon] {
        ensure!(french(&numbers, place) > 0, "nothing for {place}");
    }
    Ok(())
}

/// The control: the same kills, and no transaction.
#[tokio::test]
async fn control_on_kafka_a_careless_router_that_is_killed_routes_twice()
-> Result<()> {
    let _turn = TURN.lock().await;
    let shop = Shop::with_routes(Broker::Kafka).await?;
    // One order, as the book shows it.
    shop.publish(1..=1).await?;
    let careless = ["router", "--careless", "--slow"];
    shop.kill_in_pause(&careless, "pause:").await?;
    let router = shop.router().await?;
    shop.settle(router).await?;
    let shown = shop.run(&["show"]).await?;
    shown.printed_what_the_book_shows("careless")?;

    let (last, numbers) = under_kills(&shop, &["--careless"], 2).await?;
    let (lost, twice) = faults(&numbers, last);
    assert_eq!(lost, 0);
    ensure!(twice > 1, "none of {last} is twice but the first");
    // And some of them in two warehouses.
    let lyon = &numbers[&Place::Lyon];
    let both = numbers[&Place::Berlin]
        .iter()
        .filter(|it| lyon.contains(it));
    ensure!(both.count() > 0, "none is in both");
    Ok(())
}

/// After each step of a change, and then somebody wants another route.
#[tokio::test]
async fn a_change_that_is_killed_leaves_each_order_in_one_place() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let pauses: &[&str] = match broker {
            // One record: it is there or not.
            Broker::Kafka => return Ok(()),
            Broker::RabbitMq => &["after step 1", "after step 2", "after step 3"],
            Broker::Nats => &["FR has no route"],
        };
        let shop = Shop::with_routes(broker).await?;
        let mut last = 0;
        for pause in pauses {
            shop.kill_in_pause(&["route", "FR", "lyon", "--slow"], pause)
                .await?;
            shop.publish(last + 1..=last + 10).await?;
            // RabbitMQ may not have noticed yet that the other one is gone.
            let change = async {
                wait::until("the lock", async || shop.route(&["FR", "berlin"]).await)
                    .await
            };
            change.await?;
            shop.publish(last + 11..=last + 20).await?;
            last += 20;
        }
        let numbers = shop.numbers(last).await?;
        let (in_between, last_route) = (
            |it: &u64| (*it - 1) % 20 < 10,
            |it: &u64| (*it - 1) % 20 >= 10,
        );
        let (place, elsewhere) = match broker {
            // The new queue had them already.
            Broker::RabbitMq => (Place::Lyon, Place::Unrouted),
            _ => (Place::Unrouted, Place::Lyon),
        };
        each_in_one(&numbers, last, &[Place::Berlin, place])?;
        assert_eq!(french(&numbers, elsewhere), 0);
        let only = |place: Place, which: &dyn Fn(&u64) -> bool| {
            let mut only = numbers.clone();
            only.entry(place).or_default().retain(which);
            french(&only, place)
        };
        assert_eq!(only(place, &in_between), 2 * pauses.len());
        assert_eq!(only(Place::Berlin, &last_route), 2 * pauses.len());
        assert_eq!(only(place, &last_route), 0);
        Ok(())
    })
    .await
}

/// The control: a change within one exchange, and a publisher that asks for no answer.
#[tokio::test]
async fn control_careless_changes_double_and_careless_publishers_lose() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = match broker {
            Broker::Kafka => return Ok(()),
            _ => Shop::with_routes(broker).await?,
        };
        if broker == Broker::RabbitMq {
            let careless = ["route", "FR", "lyon", "--careless"];
            shop.kill_in_pause(&careless, "pause:").await?;
            shop.publish(1..=10).await?;
        } else {
            shop.run(&["publish", "1", "10", "--careless"]).await?;
        }
        let shown = shop.run(&["show"]).await?;
        shown.printed_what_the_book_shows("careless")?;
        let faults = faults(&shop.numbers(10).await?, 10);
        match broker {
            Broker::RabbitMq => assert_eq!(faults, (0, 2)),
            _ => assert_eq!(faults, (3, 0)),
        }
        Ok(())
    })
    .await
}

/// Each broker in its way: Kafka shuts out the elder of two routers, RabbitMQ the second
/// of two changes, NATS the second stream for a subject. A listener that is no stream it
/// does not shut out, but the publisher says so.
#[tokio::test]
async fn two_who_would_route_the_same_are_kept_apart() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::with_routes(broker).await?;
        match broker {
            Broker::Kafka => {
                let elder = shop.router().await?.context("a router")?;
                let younger = shop.router().await?;
                let ended = elder.end().await?;
                ended.reason()?;
                shop.publish(1..=20).await?;
                shop.settle(younger).await?;
                each_in_one(&shop.numbers(20).await?, 20, &[Place::Berlin])?;
            }
            Broker::RabbitMq => {
                let mut first = shop.start(&["route", "FR", "lyon", "--slow"])?;
                first.prints("pause:").await?;
                let second = shop.start(&["route", "FR", "berlin"])?.end().await?;
                second.refused("somebody else is changing the route table")?;
                first.end().await?.succeeded()?;
                shop.publish(1..=10).await?;
                each_in_one(&shop.numbers(10).await?, 10, &[Place::Lyon])?;
            }
            Broker::Nats => {
                let lyon = stream(shop.variable.1, Place::Lyon).await?;
                let mut config = lyon.cached_info().config.clone();
                config.subjects.push("route.orders.FR.small".to_owned());
                let jetstream = nats::jetstream(shop.variable.1).await?;
                let refused = jetstream.update_stream(&config).await;
                let refused = refused.err().context("two streams have it")?;
                let overlap = ErrorCode::STREAM_SUBJECT_OVERLAP.0.to_string();
                let refused = format!("{refused:?}");
                ensure!(refused.contains(&overlap), "{refused}");

                // A listener on the orders themselves takes away the error that would
                // have sent this one to `unrouted`. It must not look as if all were
                // well.
                let tap = nats::connect(shop.variable.1).await?;
                let _tap = nats::subscribe(&tap, "route.orders.>").await?;
                shop.publish(1..=5).await?;
                let ended = shop.start(&["publish", "6", "6"])?.end().await?;
                ended.refused("order-6 may be stored or not; who else listens")?;
            }
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn what_is_unrouted_is_routed_again_when_there_is_a_route() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        // A route can end as well. Without a table there is no destination.
        shop.route(&["FR", "lyon"]).await?;
        shop.route(&["FR", "unrouted"]).await?;
        let router = shop.router().await?;
        shop.publish(1..=300).await?;
        shop.settle(router).await?;
        let unrouted = &shop.contents().await?[&Place::Unrouted];
        assert_eq!(unrouted.len(), 300);
        if broker == Broker::RabbitMq {
            // The look has taken them.
            shop.publish(1..=300).await?;
        }
        for route in [["large", "review"], ["DE", "berlin"], ["FR", "lyon"]] {
            shop.route(&route).await?;
        }
        for (routed, stay) in [(210, 90), (0, 90)] {
            let again = shop.run(&["again"]).await?.stdout;
            let line = format!("again:    {routed} routed, {stay} stay in unrouted");
            ensure!(again.contains(&line), "{again}");
        }
        each_in_one(&shop.numbers(300).await?, 300, &[Place::Lyon])
    })
    .await
}

/// A copy for somebody who watches is no destination: on RabbitMQ and NATS, where he
/// matches what nobody else does, it is unrouted all the same.
#[tokio::test]
async fn a_filter_shows_one_country_and_takes_nothing_from_the_router() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::with_routes(broker).await?;
        let router = shop.router().await?;
        let mut watchers = Vec::new();
        for country in ["FR", "IS"] {
            let mut watcher = shop.start(&["watch", country])?;
            watcher.prints("ready:").await?;
            watchers.push(watcher);
        }
        shop.publish(1..=100).await?;
        let expected = [("FR", vec![2, 4, 7]), ("IS", vec![6])];
        for ((country, digits), mut watcher) in expected.into_iter().zip(watchers) {
            for _order in 0..digits.len() * 10 {
                watcher.prints("seen:").await?;
            }
            watcher.interrupt().await?;
            let said = watcher.end().await?.succeeded()?.stdout;
            let seen = said.lines().filter_map(|it| it.strip_prefix("seen:     "));
            let mut seen: Vec<u64> = seen
                .filter_map(|it| it.strip_prefix("order-")?.parse().ok())
                .collect();
            seen.sort_unstable();
            let all = (1..=100).filter(|it| digits.contains(&(it % 10)));
            assert_eq!(seen, all.collect::<Vec<u64>>(), "{country}");
            let last = said.lines().last().unwrap_or_default();
            ensure!(last.ends_with(&format!(" from {country}")), "{last}");
        }
        shop.settle(router).await?;
        each_in_one(&shop.numbers(100).await?, 100, &[Place::Berlin])
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 8] = [
        &["publish", "1"],
        &["publish", "0", "9"],
        &["publish", "9", "1"],
        &["route", "FR"],
        &["route", "F.", "lyon"],
        &["route", "FR", "paris"],
        &["watch", "france"],
        &["again", "FR"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
