//! One result for each order, whatever comes twice, too late or never, and whoever is
//! killed.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use fastrand::Rng;
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    message::Delivery,
    options::{BasicAckOptions, BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use patterns::splitter_aggregator::{
    Answer, End, Label, Orders, Report, Rule, Word, basket, header, now, split,
};
use rdkafka::{
    ClientConfig, Message as _,
    message::{Header, Headers as _, OwnedHeaders, OwnedMessage},
    producer::{FutureProducer, FutureRecord},
};
use rusqlite::Connection;
use tempfile::TempDir;
use tests::{Example, Supervised, observe, random, wait};
use tokio::{sync::Mutex, time::sleep};

use crate::common::{Pattern, Place, nowhere, on_each, stop};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_splitter_aggregator_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_splitter_aggregator_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_splitter_aggregator_nats"),
    topics: &[
        ("basket-orders", "basket-orders"),
        ("basket-lines", "basket-lines"),
        ("basket-answers", "basket-answers"),
        ("basket-results", "basket-results"),
        ("basket-aside", "basket-aside"),
    ],
    queues: &[
        "basket.orders",
        "basket.lines",
        "basket.answers",
        "basket.results",
        "basket.aside",
    ],
    streams: &["BASKET"],
};
const PARTITIONS: i32 = 4;

const WORKERS: [&str; 2] = ["ann", "bob"];
/// Milliseconds that are over when anybody looks.
const AT_ONCE: &str = "1";
/// Never reached in a test.
const HOUR: &str = "3600000";

/// Queues, topics and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn the_stories_end_with_one_result_for_each_order() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

// ---- A shop to test in -----------------------------------------------------

/// A message, as any broker has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    key: String,
    headers: BTreeMap<String, String>,
    payload: Vec<u8>,
}

impl Message {
    fn new(label: &Label, payload: &[u8]) -> Self {
        let headers = label.headers().into_iter();
        Self {
            key: label.order.clone(),
            headers: headers.map(|(key, text)| (key.to_owned(), text)).collect(),
            payload: payload.to_vec(),
        }
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Order and line.
    fn is_for(&self) -> (&str, u32) {
        let line = self.header(header::LINE).parse();
        (self.header(header::ORDER), line.unwrap_or(0))
    }

    fn from_record(record: &OwnedMessage) -> Self {
        let headers = record.headers().into_iter().flat_map(|all| all.iter());
        let headers = headers.map(|header| {
            let value = header.value.unwrap_or_default();
            (header.key.to_owned(), text(value))
        });
        Self {
            key: text(record.key().unwrap_or_default()),
            headers: headers.collect(),
            payload: record.payload().unwrap_or_default().to_vec(),
        }
    }

    fn from_delivery(delivery: &Delivery) -> Self {
        let headers = delivery.properties.headers().as_ref();
        let headers = headers.into_iter().flat_map(|all| all.inner());
        let headers = headers.filter_map(|(name, value)| {
            let value = value.as_long_string()?;
            Some((name.to_string(), text(value.as_bytes())))
        });
        Self {
            key: String::new(),
            headers: headers.collect(),
            payload: delivery.data.clone(),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A broker with nothing in it, and a folder for the database.
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
            folder: tempfile::tempdir()?,
        })
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("orders.db")
    }

    async fn supervised(&self, words: &[&str]) -> Result<Supervised> {
        let mut program = Supervised::start(self.binary, words, &[self.variable])?;
        program.prints("ready:").await?;
        Ok(program)
    }

    async fn splitter(&self) -> Result<Supervised> {
        self.supervised(&["splitter"]).await
    }

    /// Always both: on Kafka, the partitions of one that has gone are its own for a
    /// while.
    async fn workers(&self) -> Result<Vec<Supervised>> {
        let mut workers = Vec::new();
        for name in WORKERS {
            workers.push(self.supervised(&["worker", name]).await?);
        }
        Ok(workers)
    }

    async fn aggregator(&self) -> Result<Supervised> {
        let file = self.file();
        self.supervised(&["aggregator", &file.to_string_lossy()])
            .await
    }

    /// An aggregator that is not started again, with these words.
    async fn bare_aggregator(&self, words: &[&str]) -> Result<Example> {
        let words = [&["aggregator"], words].concat();
        let mut program = Example::start(self.binary, &words, self.variable)?;
        program.prints("ready:").await?;
        Ok(program)
    }

    async fn place(&self, first: u64, last: u64, within: &str) -> Result<()> {
        let (from, to) = (first.to_string(), last.to_string());
        let words = ["order", &from, &to, "--within", within];
        let placed = Example::start(self.binary, &words, self.variable)?;
        let placed = placed.end().await?.succeeded()?;
        let line = format!("placed:    order-{last}\n");
        ensure!(placed.stdout.ends_with(&line), "{}", placed.stdout);
        Ok(())
    }

    /// Behind the back of all programs.
    async fn send(&self, to: &str, messages: &[Message]) -> Result<()> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let producer: FutureProducer = ClientConfig::new()
                    .set("bootstrap.servers", address)
                    .create()?;
                let topic = format!("basket-{to}");
                for message in messages {
                    let headers = message.headers.iter().fold(
                        OwnedHeaders::new(),
                        |headers, (key, value)| {
                            let value = Some(value);
                            headers.insert(Header { key, value })
                        },
                    );
                    let record = FutureRecord::to(&topic)
                        .key(&message.key)
                        .headers(headers)
                        .payload(&message.payload);
                    let sent = producer.send(record, Duration::from_secs(10)).await;
                    sent.map_err(|(error, _record)| error)?;
                }
            }
            Broker::RabbitMq => {
                let (connection, channel) =
                    observe::rabbitmq::connect(address).await?;
                let confirms = ConfirmSelectOptions::default();
                channel.confirm_select(confirms).await?;
                let queue = format!("basket.{to}");
                for message in messages {
                    let mut headers = FieldTable::default();
                    for (name, value) in &message.headers {
                        let value = AMQPValue::LongString(value.as_str().into());
                        headers.insert(name.as_str().into(), value);
                    }
                    let properties =
                        BasicProperties::default().with_headers(headers);
                    channel
                        .basic_publish(
                            "".into(),
                            queue.as_str().into(),
                            BasicPublishOptions::default(),
                            &message.payload,
                            properties,
                        )
                        .await?
                        .await?;
                }
                connection.close(200, "".into()).await?;
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                for message in messages {
                    let mut headers = HeaderMap::new();
                    for (name, value) in &message.headers {
                        headers.insert(name.as_str(), value.as_str());
                    }
                    let payload = message.payload.clone().into();
                    let subject = format!("basket.{to}");
                    let stored =
                        jetstream.publish_with_headers(subject, headers, payload);
                    stored.await?.await?;
                }
            }
        }
        Ok(())
    }

    /// Takes out all that is there for somebody. Nobody else may be there.
    async fn take_out(&self, from: &str) -> Result<Vec<Message>> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let topic = format!("basket-{from}");
                let all = self.look_into(from).await?;
                observe::kafka::forget(address, &topic, &topic).await?;
                observe::kafka::create_topic_with(address, &topic, PARTITIONS, &[])
                    .await?;
                Ok(all)
            }
            Broker::RabbitMq => self.look_into(from).await,
            Broker::Nats => {
                let all = self.look_into(from).await?;
                let jetstream = observe::nats::jetstream(address).await?;
                let stream = jetstream.get_stream("BASKET").await?;
                stream.purge().filter(format!("basket.{from}")).await?;
                Ok(all)
            }
        }
    }

    /// All that is there, by another client. On RabbitMQ, nobody can look without
    /// taking it out.
    async fn look_into(&self, place: &str) -> Result<Vec<Message>> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let topic = format!("basket-{place}");
                let isolation = "read_committed";
                let all =
                    observe::kafka::read_all(address, &topic, PARTITIONS, isolation);
                Ok(all.await?.iter().map(Message::from_record).collect())
            }
            Broker::RabbitMq => {
                let queue = format!("basket.{place}");
                let mut all = Vec::new();
                // Until nothing is left: the last words of a killed program can come
                // when it is gone for long.
                loop {
                    let ready = observe::rabbitmq::ready(address, &queue).await?;
                    if ready == 0 {
                        return Ok(all);
                    }
                    let (connection, channel) =
                        observe::rabbitmq::connect(address).await?;
                    // Not by `basic_get`, which a single active consumer rules out.
                    let (options, arguments) = Default::default();
                    let mut deliveries = channel
                        .basic_consume(
                            queue.as_str().into(),
                            "".into(),
                            options,
                            arguments,
                        )
                        .await?;
                    for _message in 0..ready {
                        let delivery = deliveries.next().await;
                        let delivery = delivery.context("no more")??;
                        delivery.ack(BasicAckOptions::default()).await?;
                        all.push(Message::from_delivery(&delivery));
                    }
                    connection.close(200, "".into()).await?;
                }
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let stream = jetstream.get_stream("BASKET").await?;
                let state = stream.get_info().await?.state;
                let mut all = Vec::new();
                for sequence in state.first_sequence..=state.last_sequence {
                    // An error says that it is acknowledged.
                    let Ok(found) = stream.get_raw_message(sequence).await else {
                        continue;
                    };
                    if found.subject.as_str() != format!("basket.{place}") {
                        continue;
                    }
                    let headers = found.headers.iter().map(|(name, values)| {
                        let value = values.first().map(ToString::to_string);
                        (name.to_string(), value.unwrap_or_default())
                    });
                    all.push(Message {
                        key: String::new(),
                        headers: headers.collect(),
                        payload: found.payload.to_vec(),
                    });
                }
                Ok(all)
            }
        }
    }

    /// How many messages nobody has taken and acknowledged. On RabbitMQ without those
    /// that somebody holds.
    async fn left(&self, place: &str) -> Result<u64> {
        if self.broker == Broker::Nats {
            return Ok(self.look_into(place).await?.len() as u64);
        }
        let (topic, queue) = match place {
            "orders" => ("basket-orders", "basket.orders"),
            "lines" => ("basket-lines", "basket.lines"),
            _ => ("basket-answers", "basket.answers"),
        };
        let place = Place {
            topic,
            partitions: PARTITIONS,
            group: topic,
            queue,
            stream: "BASKET",
        };
        place.left(self.broker, self.variable.1).await
    }

    /// Waits until these programs have done all that is there, and stops them.
    async fn until_done(
        &self,
        place: &str,
        mut programs: Vec<Supervised>,
        start: impl AsyncFn() -> Result<Vec<Supervised>>,
    ) -> Result<()> {
        loop {
            wait::until(&format!("no more {place}"), async || {
                let left = self.left(place).await?;
                ensure!(left == 0, "{:?}: {left}", self.broker);
                Ok(())
            })
            .await?;
            stop(programs).await?;
            // What one had in hand on RabbitMQ is back now.
            if self.left(place).await? == 0 {
                return Ok(());
            }
            programs = start().await?;
        }
    }

    /// Waits until all answers are acknowledged. RabbitMQ does not tell that; there,
    /// a result comes behind the acknowledgements, on the same channel.
    async fn until_acknowledged(&self) -> Result<()> {
        wait::until("the acknowledgements", async || {
            if self.broker == Broker::RabbitMq {
                let results = self.look_into("results").await?;
                ensure!(!results.is_empty(), "no result");
            } else {
                let left = self.left("answers").await?;
                ensure!(left == 0, "{:?}: {left}", self.broker);
            }
            Ok(())
        })
        .await
    }

    fn orders(&self) -> Result<Orders> {
        Ok(Orders::open(&self.file(), Rule::EachLineAnswered)?)
    }

    fn report(&self, number: u64) -> Result<Option<Report>> {
        let id = format!("order-{number}");
        let mut all = self.orders()?.all()?.into_iter();
        Ok(all.find(|report| report.order == id))
    }

    async fn until(&self, number: u64, end: End) -> Result<Report> {
        wait::until("the end of an order", async || {
            let report = self.report(number)?.context("not opened")?;
            ensure!(report.end == Some(end), "{:?}: {report:?}", self.broker);
            Ok(report)
        })
        .await
    }

    /// Waits until so many orders have ended, and nothing waits to be sent.
    async fn until_ended(&self, count: usize) -> Result<()> {
        wait::until("the end of all orders", async || {
            let orders = self.orders()?;
            let all = orders.all()?;
            let ended = all.iter().filter(|it| it.end.is_some()).count();
            ensure!(ended == count, "{:?}: {ended} of {count}", self.broker);
            let waiting = orders.waiting(1)?;
            ensure!(waiting.is_empty(), "{waiting:?}");
            Ok(())
        })
        .await
    }

    /// How many lines have an answer in the table.
    fn answered(&self) -> Result<usize> {
        let all = self.orders()?.all()?.into_iter();
        Ok(all.map(|it| it.reserved.len() + it.sold_out.len()).sum())
    }

    /// The one result of each order that the broker has. Where it is sent more than
    /// once, by one that was killed before it crossed it off, it is the same.
    async fn results(&self) -> Result<BTreeMap<String, Report>> {
        let mut results = BTreeMap::new();
        for message in self.look_into("results").await? {
            let report: Report = serde_json::from_slice(&message.payload)?;
            assert_eq!(message.header(header::ORDER), report.order);
            let order = report.order.clone();
            let other = results.insert(order, report.clone());
            ensure!(other.is_none_or(|it| it == report), "two: {report:?}");
        }
        Ok(results)
    }
}

impl Shop {
    /// No panic, which would keep the other brokers from telling what they found.
    fn is_right(&self, right: &Report, found: Option<&Report>) -> Result<()> {
        let broker = self.broker;
        ensure!(found == Some(right), "{broker:?}: {found:?}, not {right:?}");
        Ok(())
    }
}

/// What is to come of an order of which nobody answers these lines.
fn expected(number: u64, without: &BTreeSet<u32>) -> Report {
    let basket = basket(number, 0);
    let mut report = Report {
        order: basket.order,
        end: Some(match without.is_empty() {
            true => End::Complete,
            false => End::Timeout,
        }),
        reserved: Vec::new(),
        sold_out: Vec::new(),
        missing: without.iter().copied().collect(),
    };
    for (line, item) in (1..).zip(basket.items) {
        if without.contains(&line) {
            continue;
        }
        match item.as_str() {
            "teapot" => report.sold_out.push(line),
            _ => report.reserved.push(line),
        }
    }
    report
}

/// That an order is opened, and the answer for each of its lines, as they travel.
fn messages(number: u64, until: i64) -> Result<Vec<Message>> {
    let basket = serde_json::to_vec(&basket(number, until))?;
    let split = split(&basket).map_err(anyhow::Error::msg)?;
    let opened = Message::new(&split.opened.0, &split.opened.1);
    let reserved = Word::Answered(Answer::Reserved).to_json();
    let answers = split.lines.iter();
    let answers = answers.map(|(label, _)| Message::new(label, &reserved));
    Ok([opened].into_iter().chain(answers).collect())
}

fn doubled(messages: Vec<Message>, random: &mut Rng) -> Vec<Message> {
    let mut doubled = Vec::new();
    for message in messages {
        for _copy in 0..random.usize(1..3) {
            doubled.push(message.clone());
        }
    }
    random.shuffle(&mut doubled);
    doubled
}

/// On the three brokers at the same time.
async fn on_each_shop(test: impl AsyncFn(Shop) -> Result<()>) -> Result<()> {
    on_each(async |broker| test(Shop::open(broker).await?).await).await
}

// ---- The promises ----------------------------------------------------------

/// All are there at the same time, and each dies again and again.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_each_order_has_one_result() -> Result<()> {
    const ORDERS: u64 = 30;
    const KILLS: usize = 10;
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut random = random::seeded();
        let mut programs = shop.workers().await?;
        programs.push(shop.splitter().await?);
        programs.push(shop.aggregator().await?);
        shop.place(1, ORDERS, HOUR).await?;
        let lines = (1..=ORDERS).map(|it| basket(it, 0).items.len());
        let lines = lines.sum::<usize>();
        for kill in 0..KILLS {
            wait::until("the orders to go on", async || {
                let found = shop.answered()?;
                ensure!(found >= kill * lines / KILLS, "{found} lines");
                Ok(())
            })
            .await?;
            sleep(Duration::from_millis(random.u64(0..20))).await;
            // Everybody, and then by chance.
            let at = match kill {
                0..4 => kill,
                _ => random.usize(..4),
            };
            programs[at].kill().await?;
        }
        shop.until_ended(usize::try_from(ORDERS)?).await?;
        stop(programs).await?;
        let results = shop.results().await?;
        assert_eq!(results.len() as u64, ORDERS);
        for number in 1..=ORDERS {
            let right = expected(number, &BTreeSet::new());
            shop.is_right(&right, results.get(&right.order))?;
            shop.is_right(&right, shop.report(number)?.as_ref())?;
        }
        Ok(())
    })
    .await
}

/// All deadlines have passed before anybody hears of an order. So what the broker has
/// is in time, however late the aggregator is, and only what is lost is missing.
#[tokio::test(flavor = "multi_thread")]
async fn of_lines_in_any_order_twice_or_never_each_order_has_its_one_result()
-> Result<()> {
    const ORDERS: u64 = 24;
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut random = random::seeded();

        // The splitter is killed in the middle of orders.
        shop.place(1, ORDERS, AT_ONCE).await?;
        let mut splitter = shop.splitter().await?;
        for _kill in 0..3 {
            splitter.prints(" lines").await?;
            sleep(Duration::from_millis(random.u64(0..20))).await;
            splitter.kill().await?;
        }
        let splitters = async || Ok(vec![shop.splitter().await?]);
        shop.until_done("orders", vec![splitter], splitters).await?;

        // Every third order loses some lines, in all their copies, and one loses all.
        let lines = shop.take_out("lines").await?;
        let mut lost: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
        for number in (1..=ORDERS).step_by(3) {
            let total = u32::try_from(basket(number, 0).items.len())?;
            let count = random.u32(1..=total);
            let mut all: Vec<u32> = (1..=total).collect();
            random.shuffle(&mut all);
            let count = if number == 1 { total } else { count };
            lost.insert(number, all.into_iter().take(count as usize).collect());
        }
        let is_lost = |message: &Message| {
            lost.iter().any(|(number, lines)| {
                let (order, line) = message.is_for();
                order == format!("order-{number}") && lines.contains(&line)
            })
        };
        let kept = lines.into_iter().filter(|it| !is_lost(it)).collect();
        shop.send("lines", &doubled(kept, &mut random)).await?;

        // The workers are killed in the middle of lines.
        let mut workers = shop.workers().await?;
        for kill in 0..4 {
            workers[kill % 2].prints(": reserved").await?;
            sleep(Duration::from_millis(random.u64(0..20))).await;
            workers[kill % 2].kill().await?;
        }
        shop.until_done("lines", workers, async || shop.workers().await)
            .await?;

        // And the aggregator in the middle of answers.
        let answers = shop.take_out("answers").await?;
        shop.send("answers", &doubled(answers, &mut random)).await?;
        let mut aggregator = shop.aggregator().await?;
        for kill in 1..=5 {
            wait::until("the answers to go on", async || {
                let found = shop.answered()?;
                ensure!(found >= 8 * kill, "{:?}: {found}", shop.broker);
                Ok(())
            })
            .await?;
            sleep(Duration::from_millis(random.u64(0..20))).await;
            aggregator.kill().await?;
        }
        shop.until_ended(usize::try_from(ORDERS)?).await?;
        stop([aggregator]).await?;

        let results = shop.results().await?;
        assert_eq!(results.len() as u64, ORDERS);
        for number in 1..=ORDERS {
            let without = lost.get(&number).cloned().unwrap_or_default();
            let right = expected(number, &without);
            shop.is_right(&right, results.get(&right.order))?;
            shop.is_right(&right, shop.report(number)?.as_ref())?;
        }
        assert_eq!(shop.look_into("aside").await?, []);
        Ok(())
    })
    .await
}

/// It passes while nobody is there who could see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_outlives_its_aggregator_and_what_is_late_changes_nothing()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut aggregator = shop.aggregator().await?;
        let splitter = shop.splitter().await?;
        shop.place(1, 1, "3000").await?;
        let after = now() + 3_000;
        wait::until("the order to be opened", async || {
            shop.report(1)?.context("not opened")?;
            Ok(())
        })
        .await?;
        aggregator
            .dead_while(wait::until("the deadline", async || {
                ensure!(now() > after, "not yet");
                Ok(())
            }))
            .await?;
        let timeout = shop.until(1, End::Timeout).await?;
        assert_eq!(timeout, expected(1, &BTreeSet::from([1, 2, 3])));

        // Now they answer.
        let workers = shop.workers().await?;
        for _line in 0..3 {
            aggregator.prints("reserved, too late timeout").await?;
        }
        // Goes on with others, and knows this one for ever.
        shop.place(2, 2, HOUR).await?;
        shop.until(2, End::Complete).await?;
        shop.until_ended(2).await?;
        aggregator.kill().await?;
        stop(workers.into_iter().chain([splitter, aggregator])).await?;
        assert_eq!(shop.report(1)?, Some(timeout.clone()));
        let results = shop.results().await?;
        let complete = expected(2, &BTreeSet::new());
        let right = [timeout, complete].map(|it| (it.order.clone(), it));
        assert_eq!(results, BTreeMap::from(right));
        Ok(())
    })
    .await
}

/// It is not lost, keeps nobody, and a person can look at it.
#[tokio::test(flavor = "multi_thread")]
async fn what_contradicts_or_cannot_be_read_is_set_aside_with_its_bytes()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let file = shop.file();
        let file = file.to_string_lossy();
        let mut aggregator = shop.bare_aggregator(&[&file]).await?;
        let mut programs = shop.workers().await?;
        programs.push(shop.splitter().await?);

        let until = now() + 3_600_000;
        let [opened, one, two, three] = &messages(1, until)?[..] else {
            anyhow::bail!("an order of three lines");
        };
        let with = |message: &Message, name: &str, value: &str| {
            let mut message = message.clone();
            message.headers.insert(name.to_owned(), value.to_owned());
            message
        };
        let mut noise = one.clone();
        noise.payload = b"\xff\x00\xfe".to_vec();
        let mut nameless = noise.clone();
        nameless.headers.clear();
        let wrong = [
            ("orders", &nameless, "not an order: "),
            ("lines", &noise, "not a line: "),
            ("answers", &noise, "not an answer: "),
            ("answers", &nameless, "no order"),
            (
                "answers",
                &with(two, header::TOTAL, "4"),
                "4 lines, and before it was 3",
            ),
            (
                "answers",
                &with(opened, header::TOTAL, "2"),
                "2 lines, and before it was 3",
            ),
            ("answers", &with(one, header::LINE, "4"), "line 4 of 3"),
            ("answers", &with(one, header::LINE, "0"), "line 0 of 3"),
        ];
        shop.send("answers", &[opened.clone(), one.clone()]).await?;
        for (place, message, _reason) in wrong {
            shop.send(place, std::slice::from_ref(message)).await?;
        }
        let rest = [two.clone(), three.clone()];
        shop.send("answers", &rest).await?;
        let complete = "complete, reserved: 1 2 3";
        aggregator.prints(complete).await?;
        // It goes on, for all of them.
        shop.place(2, 2, HOUR).await?;
        shop.until(2, End::Complete).await?;
        shop.until_ended(2).await?;
        stop(programs).await?;
        aggregator.interrupt().await?;
        let ended = aggregator.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        let lines: Vec<&str> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), 6, "{lines:?}");

        let aside = shop.look_into("aside").await?;
        assert_eq!(aside.len(), wrong.len(), "{aside:?}");
        for (_place, message, reason) in wrong {
            let found = aside.iter().any(|it| {
                let said = it.header(header::REASON).starts_with(reason);
                let mut headers = message.headers.iter();
                let same =
                    headers.all(|(name, value)| it.header(name) == value.as_str());
                said && same && it.payload == message.payload
            });
            ensure!(found, "{:?}: {reason:?} {aside:?}", shop.broker);
            if reason != "not an order: " && reason != "not a line: " {
                let line = format!("set aside: {reason}");
                let said = lines.iter().any(|it| it.starts_with(&line));
                ensure!(said, "{line:?} {lines:?}");
            }
        }
        assert_eq!(shop.results().await?.len(), 2);
        Ok(())
    })
    .await
}

/// It dies at the transaction, and what it had is not acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_be_written_comes_again() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let file = shop.file();
        let words = [&*file.to_string_lossy()];
        let aggregator = shop.bare_aggregator(&words).await?;
        let lock = Connection::open(&file)?;
        lock.execute_batch("BEGIN IMMEDIATE")?;
        // Without the word that it is opened, which may get lost without harm.
        let messages = messages(1, now() + 3_600_000)?;
        shop.send("answers", &messages[1..]).await?;
        let ended = aggregator.end().await?;
        let reason = ended.reason()?;
        let says = "cannot write down what has come, it will come again";
        ensure!(reason.contains(says), "{reason}");
        lock.execute_batch("ROLLBACK")?;
        assert_eq!(shop.answered()?, 0);

        let aggregator = shop.aggregator().await?;
        shop.until(1, End::Complete).await?;
        shop.until_ended(1).await?;
        stop([aggregator]).await
    })
    .await
}

/// The other one has a table of its own, to see what it gets.
#[tokio::test(flavor = "multi_thread")]
async fn on_rabbitmq_a_second_aggregator_waits_until_the_first_is_gone() -> Result<()>
{
    let _turn = TURN.lock().await;
    let shop = Shop::open(Broker::RabbitMq).await?;
    let other = shop.folder.path().join("other.db");
    let file = shop.file();
    let mut first = shop.bare_aggregator(&[&file.to_string_lossy()]).await?;
    let mut second = shop.bare_aggregator(&[&other.to_string_lossy()]).await?;
    for number in 1..=10 {
        let messages = messages(number, now() + 3_600_000)?;
        shop.send("answers", &messages).await?;
        let complete = format!("{:<10} line", format!("order-{number}"));
        while !first.prints(&complete).await?.contains("complete") {}
    }
    first.kill().await?;
    shop.send("answers", &messages(11, now() + 3_600_000)?)
        .await?;
    second.prints("complete, reserved: 1 2").await?;
    second.interrupt().await?;
    let said = second.end().await?.succeeded()?.stdout;
    let mut lines = said.lines().filter(|it| it.starts_with("order-"));
    // The first may have died before its last acknowledgement.
    let last =
        |line: &str| line.starts_with("order-11 ") || line.starts_with("order-10 ");
    ensure!(lines.all(last), "{said}");
    Ok(())
}

/// The control: the table dies with the aggregator. Under the same conditions, the one
/// with a file goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn control_an_aggregator_with_its_table_in_memory_forgets_lines() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let file = shop.file();
        let file = file.to_string_lossy();
        for (table, number) in [("--in-memory", 1), (&*file, 4)] {
            let mut first = shop.bare_aggregator(&[table]).await?;
            let messages = messages(number, now() + 5_000)?;
            shop.send("answers", &messages[..3]).await?;
            shop.send("answers", &self::messages(number + 1, now())?)
                .await?;
            shop.until_acknowledged().await?;
            first.prints("line 2: reserved           2 of 3").await?;
            first.kill().await?;
            let mut second = shop.bare_aggregator(&[table]).await?;
            shop.send("answers", &messages[3..]).await?;
            let end = match table {
                "--in-memory" => "timeout, reserved: 3, missing: 1 2",
                _ => "complete, reserved: 1 2 3",
            };
            second.prints(end).await?;
            second.interrupt().await?;
            let second = second.end().await?.succeeded()?;
            if shop.broker == Broker::RabbitMq && table == "--in-memory" {
                second.printed_what_the_book_shows("in-memory")?;
            }
        }
        Ok(())
    })
    .await
}

/// The control: three answers for an order of three lines, all to its first one.
#[tokio::test(flavor = "multi_thread")]
async fn control_who_counts_answers_calls_an_order_complete_that_is_not()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let file = shop.file();
        let file = file.to_string_lossy();
        for (words, number, end) in [
            (
                &[&*file, "--count-answers"][..],
                1,
                "complete, reserved: 1, missing: 2 3",
            ),
            (&[&*file], 4, "line 1: reserved, again    1 of 3"),
        ] {
            let mut aggregator = shop.bare_aggregator(words).await?;
            let messages = messages(number, now() + 3_600_000)?;
            let [opened, one, _two, _three] = &messages[..] else {
                anyhow::bail!("an order of three lines");
            };
            let three_times = [opened, one, one, one].map(Clone::clone);
            shop.send("answers", &three_times).await?;
            aggregator.prints(end).await?;
            if number == 4 {
                // Twice again, and then it is still open.
                aggregator.prints(end).await?;
                let report = shop.report(4)?.context("not opened")?;
                assert_eq!(report.to_string(), "open, reserved: 1, missing: 2 3");
            }
            aggregator.interrupt().await?;
            let ended = aggregator.end().await?.succeeded()?;
            if shop.broker == Broker::RabbitMq && number == 1 {
                ended.printed_what_the_book_shows("count-answers")?;
            }
        }
        let results = shop.results().await?;
        assert_eq!(results.len(), 1, "{results:?}");
        assert_eq!(results["order-1"].missing, [2, 3]);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 12] = [
        &["order"],
        &["order", "many"],
        &["order", "2", "1"],
        &["order", "1", "--within", "0"],
        &["order", "1", "2", "--within"],
        &["order", "1", "2", "3"],
        &["splitter", "x"],
        &["worker"],
        &["worker", "a b"],
        &["aggregator"],
        &["aggregator", "x.db", "--careless"],
        &["show"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("some.db");
    std::fs::write(&file, "this is no database, but a text about one")?;
    let file = file.to_string_lossy();
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let words: [(&[&str], &str); 3] = [
            (&["aggregator", &file], "cannot use"),
            (&["show", &file], "cannot use"),
            (&["show", "no.db"], "there is no file no.db"),
        ];
        for (words, says) in words {
            let ended = Example::start(binary, words, variable)?.end().await?;
            ended.refused(says)?;
        }
    }
    Ok(())
}

/// No broker is needed to look.
#[tokio::test]
async fn the_table_is_shown() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("orders.db");
    let mut orders = Orders::open(&file, Rule::EachLineAnswered)?;
    for (number, count) in [(2, 3), (1, 2), (3, 1)] {
        for message in messages(number, 0)?.iter().take(count) {
            let label = Label::read(|name| message.headers.get(name).cloned());
            orders.take(label, &message.payload)?;
        }
    }
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let words = ["show", &file.to_string_lossy()];
        let ended = Example::start(binary, &words, variable)?.end().await?;
        let lines = "\
            order-2    complete, reserved: 1 2\n\
            order-1    open, reserved: 1, missing: 2 3\n\
            order-3    open, missing: 1 2 3 4\n";
        assert_eq!(ended.succeeded()?.stdout, lines);
    }
    Ok(())
}
