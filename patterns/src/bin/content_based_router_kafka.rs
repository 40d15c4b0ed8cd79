//! Content-based router: each order to one destination, by its country and its value.
//!
//! Teaches: Kafka looks into no record, so a program between two topics does. What it
//! writes to the destinations and how far it has read are one transaction: killed
//! anywhere, each order is in one destination, once. The route table is a compacted
//! topic. A row is one record, so there is no moment between the old route and the new
//! one. What no rule takes, and what nobody can read, goes to `route-unrouted`.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin content_based_router_kafka                        # the whole story
//! cargo run --bin content_based_router_kafka router                 # terminal 1
//! cargo run --bin content_based_router_kafka watch FR               # terminal 2
//! cargo run --bin content_based_router_kafka route large review     # terminal 3
//! cargo run --bin content_based_router_kafka route DE berlin
//! cargo run --bin content_based_router_kafka publish 1 10
//! cargo run --bin content_based_router_kafka show
//! cargo run --bin content_based_router_kafka route FR lyon          # at runtime
//! cargo run --bin content_based_router_kafka again                  # what is unrouted
//! cargo run --bin content_based_router_kafka router --slow          # time to kill it
//! cargo run --bin content_based_router_kafka router --careless      # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! route:    large to review
//! route:    DE to berlin
//! route:    FR to berlin
//! sent:     order-1 to order-10
//! review:   order-3, order-7
//! berlin:   order-1, order-2, order-4, order-5, order-8
//! lyon:     nothing
//! unrouted: order-6, no route for IS.small
//! unrouted: order-9, no route for IT.small
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! route:    FR to lyon
//! route:    IT to lyon
//! sent:     order-11 to order-20
//! again:    1 routed, 4 stay in unrouted
//! review:   order-3, order-7, order-13, order-17
//! berlin:   order-1, order-2, order-4, order-5, order-8, order-11, order-15, order-18
//! lyon:     order-9, order-12, order-14, order-19
//! unrouted: order-6, no route for IS.small
//! unrouted: order-16, no route for IS.small
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! ```
//!
//! Left out on purpose: a second router beside the first. It would be another member
//! of the group, with a `transactional.id` of its own.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    future::Future,
    ops::RangeInclusive,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::content_based_router::{
    Country, Place, Rule, Table, id, is_from, listing, name, numbers, order,
};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders, OwnedMessage},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{Instant, sleep, timeout, timeout_at},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
/// Its topics are `route-orders` and `route-table`, and one for each place:
/// `route-review`, `route-berlin`, `route-lyon`, `route-unrouted`. The groups are
/// `route-router` and, for what is routed again, `route-again`.
const SHOP: Shop = Shop("route");
/// The same, beside it: a route of the shop is not changed by a story.
const STORY: Shop = Shop("route-story");
const PARTITIONS: i32 = 3;
const USAGE: &str = "usage: content_based_router_kafka [router [--slow | --careless \
                     [--slow]] | publish FIRST LAST | route (large | COUNTRY) (review \
                     | berlin | lyon | unrouted) | again | show | watch COUNTRY]";

/// How many orders are one transaction, and how long to wait for the next.
const BATCH: usize = 100;
const LINGER: Duration = Duration::from_millis(20);
/// How many records of a publisher are on their way, at most.
const WINDOW: usize = 1000;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a transaction may take to be opened or committed.
const COMMIT: Duration = Duration::from_secs(30);
/// With `--slow`: how long there is time to kill the router.
const PAUSE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["router"] => router(Way::Transactions, Pace::Quick).await,
        ["router", "--slow"] => router(Way::Transactions, Pace::Slow).await,
        ["router", "--careless"] => router(Way::Careless, Pace::Quick).await,
        ["router", "--careless", "--slow"] => {
            router(Way::Careless, Pace::Slow).await
        }
        ["publish", first, last] => match numbers(first, last) {
            Some(numbers) => publish(numbers).await,
            None => return usage(),
        },
        ["route", rule, place] => match (rule.parse(), place.parse()) {
            (Ok(rule), Ok(place)) => route(&rule, place).await,
            _ => return usage(),
        },
        ["again"] => again().await,
        ["show"] => show().await,
        ["watch", country] => match country.parse() {
            Ok(country) => watch(&country).await,
            Err(_no_country) => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Transactions,
    /// The mistake, to see what it costs: to write, and then to commit.
    Careless,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    Quick,
    /// With a pause between what is written and its commit.
    Slow,
}

/// The topics and groups of a shop.
#[derive(Clone, Copy)]
struct Shop(&'static str);

impl Shop {
    fn name(self, part: &str) -> String {
        format!("{}-{part}", self.0)
    }

    fn topics(self) -> Vec<(String, i32)> {
        let mut topics = vec![
            (self.name("orders"), PARTITIONS),
            (self.name("table"), 1),
            (self.name("unrouted"), 1),
        ];
        let destinations = Place::DESTINATIONS.iter();
        topics.extend(destinations.map(|it| (self.name(it.name()), PARTITIONS)));
        topics
    }
}

// ---- Publisher -------------------------------------------------------------

async fn publish(numbers: RangeInclusive<u64>) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    send(&brokers, SHOP, numbers).await
}

/// The bytes as the partner sent them: what is in them is not the publisher's business.
async fn send(
    brokers: &str,
    shop: Shop,
    numbers: RangeInclusive<u64>,
) -> Result<()> {
    let producer = producer(brokers)?;
    let topic = shop.name("orders");
    let mut on_their_way = Vec::new();
    for number in numbers.clone() {
        let (key, payload) = (id(number), order(number)?);
        let record = FutureRecord::to(&topic).key(&key).payload(&payload);
        on_their_way.push(queued(producer.send_result(record))?);
        if on_their_way.len() == WINDOW {
            stored(&mut on_their_way).await?;
        }
    }
    stored(&mut on_their_way).await?;
    println!(
        "sent:     order-{} to order-{}",
        numbers.start(),
        numbers.end()
    );
    Ok(())
}

fn queued<R>(
    result: Result<DeliveryFuture, (KafkaError, R)>,
) -> Result<DeliveryFuture> {
    result.map_err(|(error, _record)| anyhow!("cannot send an order: {error}"))
}

async fn stored(on_their_way: &mut Vec<DeliveryFuture>) -> Result<()> {
    for delivery in on_their_way.drain(..) {
        let delivery = delivery.await.context("the producer has ended")?;
        delivery.map_err(|(error, record)| {
            anyhow!(
                "Kafka did not store an order in {}: {error}",
                record.topic()
            )
        })?;
    }
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "30000")
        .create()?;
    Ok(producer)
}

// ---- Route table -----------------------------------------------------------

async fn route(rule: &Rule, place: Place) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    set(&brokers, SHOP, rule, place).await?;
    println!("route:    {rule} to {place}");
    Ok(())
}

// ANCHOR: set
/// Writes one row of the table. Kafka keeps the last one of each rule. A row without a
/// payload says that there is no rule any more.
async fn set(brokers: &str, shop: Shop, rule: &Rule, place: Place) -> Result<()> {
    let (topic, rule) = (shop.name("table"), rule.to_string());
    let mut row = FutureRecord::<_, str>::to(&topic).key(&rule);
    if place != Place::Unrouted {
        row = row.payload(place.name());
    }
    // Not idempotent: that would cost half a second, and a row that is written twice is
    // the same row.
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("message.timeout.ms", "5000")
        .create()?;
    let written = producer.send(row, PATIENCE).await;
    written.map_err(|(error, _row)| anyhow!("the table is not changed: {error}"))?;
    Ok(())
}
// ANCHOR_END: set

// ANCHOR: read_table
/// Reads the whole table. What is written to it later comes out of the same consumer.
async fn read_table(brokers: &str, shop: Shop) -> Result<(Table, StreamConsumer)> {
    let rows: StreamConsumer = reader(brokers, &shop.name("table-reader"))
        // Says where the end is: there may be no route at all.
        .set("enable.partition.eof", "true")
        .create()?;
    let mut all = TopicPartitionList::new();
    all.add_partition_offset(&shop.name("table"), 0, Offset::Beginning)?;
    // Without a group: each router needs all of it, from the beginning.
    rows.assign(&all)?;
    let mut table = Table::default();
    loop {
        let row = timeout(COMMIT, rows.recv()).await;
        match row.context("the route table does not come")? {
            Ok(row) => {
                let _learned = learn(&mut table, &row);
            }
            Err(KafkaError::PartitionEOF(_)) => break,
            Err(error) => return Err(error).context("cannot read the route table"),
        }
    }
    Ok((table, rows))
}

/// Takes a row. One that cannot be read is no reason to stop all orders.
fn learn(table: &mut Table, row: &BorrowedMessage<'_>) -> Option<(Rule, Place)> {
    let learned = table.learn(row.key().unwrap_or_default(), row.payload());
    learned
        .inspect_err(|error| {
            eprintln!("a row of the route table is passed over: {error}");
        })
        .ok()
}
// ANCHOR_END: read_table

// ---- Router ----------------------------------------------------------------

struct Router {
    shop: Shop,
    orders: Arc<StreamConsumer>,
    producer: FutureProducer,
    table: Table,
    /// New rows of the table.
    rows: StreamConsumer,
    way: Way,
    pace: Pace,
    /// Kafka does not answer, and somebody has been told.
    lost: AtomicBool,
}

async fn router(way: Way, pace: Pace) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    // One at a time has this name, and keeps it when it is started again.
    let name = SHOP.name("router-1");
    let orders: StreamConsumer = reader(&brokers, &SHOP.name("router"))
        // It takes its old place at once. Without it the group waits until the
        // session of the dead one is over.
        .set("group.instance.id", &name)
        .create()?;
    orders.subscribe(&[&SHOP.name("orders")])?;
    let router = Router::open(&brokers, SHOP, orders, &name, way, pace);
    let mut router = router.await?;
    println!(
        "ready:    orders from {}, Ctrl-C to stop",
        SHOP.name("orders")
    );
    router.run(&mut stop_signal).await?;
    router.close().await?;
    println!("stopped");
    Ok(())
}

impl Router {
    async fn open(
        brokers: &str,
        shop: Shop,
        orders: StreamConsumer,
        name: &str,
        way: Way,
        pace: Pace,
    ) -> Result<Self> {
        // Before the first order: without a table all of them would be unrouted.
        let (table, rows) = read_table(brokers, shop).await?;
        let producer = if way == Way::Transactions {
            let producer: FutureProducer = ClientConfig::new()
                .set("bootstrap.servers", brokers)
                .set("transactional.id", name)
                .create()?;
            let init = producer.clone();
            // Ends what a router of this name has left open, and shuts it out if it
            // is still alive somewhere.
            spawn_blocking(move || init.init_transactions(COMMIT)).await??;
            producer
        } else {
            producer(brokers)?
        };
        Ok(Self {
            shop,
            orders: Arc::new(orders),
            producer,
            table,
            rows,
            way,
            pace,
            lost: AtomicBool::new(false),
        })
    }

    // ANCHOR: run
    async fn run(
        &mut self,
        stop: &mut (impl Future<Output = ()> + Unpin),
    ) -> Result<()> {
        loop {
            let first = tokio::select! {
                // In this order: a new route counts before the next order.
                biased;
                () = &mut *stop => return Ok(()),
                row = self.rows.recv() => {
                    if let Some(row) = self.readable(row)?
                        && let Some((rule, place)) = learn(&mut self.table, &row)
                    {
                        println!("learned:  {rule} to {place}");
                    }
                    continue;
                }
                order = self.orders.recv() => match self.readable(order)? {
                    Some(order) => order.detach(),
                    None => continue,
                },
            };
            // Outside of the `select!`: what is read and dropped would be lost.
            let batch = self.fill(first).await?;
            let counts = self.route(batch).await?;
            let each = counts.iter().map(|(place, it)| format!("{it} to {place}"));
            let each: Vec<String> = each.collect();
            if each.is_empty() {
                println!("aborted:  the same orders come again");
            } else {
                println!("routed:   {}", each.join(", "));
            }
        }
    }

    /// This order, and what else comes within a moment.
    async fn fill(&self, first: OwnedMessage) -> Result<Vec<OwnedMessage>> {
        let mut batch = vec![first];
        let end = Instant::now() + LINGER;
        while batch.len() < BATCH
            && let Ok(order) = timeout_at(end, self.orders.recv()).await
        {
            batch.extend(self.readable(order)?.map(|order| order.detach()));
        }
        Ok(batch)
    }
    // ANCHOR_END: run

    // ANCHOR: route
    /// All of the batch and how far it has read, or nothing of it. Returns how many
    /// have gone to each place.
    async fn route(
        &self,
        batch: Vec<OwnedMessage>,
    ) -> Result<BTreeMap<Place, usize>> {
        if self.way == Way::Transactions {
            self.producer.begin_transaction()?;
        }
        let (mut on_their_way, mut counts) = (Vec::new(), BTreeMap::new());
        for order in &batch {
            let (place, delivery) = self.send(order)?;
            on_their_way.push(delivery);
            *counts.entry(place).or_default() += 1;
        }
        // An error ends the program, and what it has left open is never seen.
        stored(&mut on_their_way).await?;
        if self.pace == Pace::Slow {
            println!("pause:    {} s, time to kill it", PAUSE.as_secs());
            sleep(PAUSE).await;
        }
        if !self.commit(batch).await? {
            // None of it is anywhere.
            counts.clear();
        }
        Ok(counts)
    }

    /// Writes an order to the place that the table says, key and bytes as they came.
    fn send(&self, order: &OwnedMessage) -> Result<(Place, DeliveryFuture)> {
        let headers = order.headers().into_iter().flat_map(|all| all.iter());
        // What was unrouted and is routed again has one from the last time.
        let mut headers = headers
            .filter(|header| header.key != "reason")
            .fold(OwnedHeaders::new(), |all, header| all.insert(header));
        let place = match self.table.decide(order.payload().unwrap_or_default()) {
            Ok(place) => place,
            Err(reason) => {
                headers = headers.insert(Header {
                    key: "reason",
                    value: Some(&reason.to_string()),
                });
                Place::Unrouted
            }
        };
        let topic = self.shop.name(place.name());
        let mut copy = FutureRecord::<[u8], [u8]>::to(&topic).headers(headers);
        (copy.key, copy.payload) = (order.key(), order.payload());
        // A batch is much smaller than the local queue.
        Ok((place, queued(self.producer.send_result(copy))?))
    }
    // ANCHOR_END: route

    // ANCHOR: commit
    /// Says whether it is committed. If not, the same orders come again.
    async fn commit(&self, batch: Vec<OwnedMessage>) -> Result<bool> {
        let next = positions(batch.iter(), 1);
        let next = TopicPartitionList::from_topic_map(&next)?;
        if self.way == Way::Careless {
            // Killed before this line, the next router writes all of it once more.
            let commit = || self.orders.commit(&next, CommitMode::Sync);
            block_in_place(commit).context("not committed")?;
            return Ok(true);
        }
        let (orders, producer) = (Arc::clone(&self.orders), self.producer.clone());
        // Each of these waits for Kafka, and blocks its thread.
        spawn_blocking(move || {
            // Asked for anew each time: by it Kafka refuses the offsets of a router
            // that has lost its partitions.
            let group = orders.group_metadata();
            let group = group.context("a consumer without a group")?;
            let committed = producer
                .send_offsets_to_transaction(&next, &group, COMMIT)
                .and_then(|()| producer.commit_transaction(COMMIT));
            match committed {
                Err(KafkaError::Transaction(error))
                    if error.txn_requires_abort() =>
                {
                    producer.abort_transaction(COMMIT)?;
                    // Nobody rewinds by itself. What another router has now is its
                    // business.
                    let mut first = positions(batch.iter().rev(), 0);
                    let ours = orders.assignment()?;
                    first.retain(|(topic, partition), _offset| {
                        ours.find_partition(topic, *partition).is_some()
                    });
                    let first = TopicPartitionList::from_topic_map(&first)?;
                    orders.seek_partitions(first, PATIENCE)?;
                    Ok(false)
                }
                // Fatal, another router has this name: to go on would be wrong.
                other => other.context("not committed").map(|()| true),
            }
        })
        .await?
    }
    // ANCHOR_END: commit

    /// The record, if there is one. The client connects again by itself; it says so
    /// with each attempt, and to hear it once is enough.
    fn readable<'a>(
        &self,
        record: Result<BorrowedMessage<'a>, KafkaError>,
    ) -> Result<Option<BorrowedMessage<'a>>> {
        match record {
            Ok(record) => {
                self.lost.store(false, Ordering::Relaxed);
                Ok(Some(record))
            }
            // All that there was.
            Err(KafkaError::PartitionEOF(_)) => Ok(None),
            Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            )) => {
                if !self.lost.swap(true, Ordering::Relaxed) {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                Ok(None)
            }
            Err(error) => Err(error).context("cannot read on"),
        }
    }

    /// Leaves the group. It blocks, hence a thread of its own.
    async fn close(self) -> Result<()> {
        spawn_blocking(move || drop(self)).await?;
        Ok(())
    }
}

type Positions = HashMap<(String, i32), Offset>;

/// For each partition the offset of the last of these orders, and so many more.
fn positions<'a>(
    orders: impl Iterator<Item = &'a OwnedMessage>,
    more: i64,
) -> Positions {
    let position = |order: &OwnedMessage| {
        let partition = (order.topic().to_owned(), order.partition());
        (partition, Offset::Offset(order.offset() + more))
    };
    orders.map(position).collect()
}

/// Each commit is made by hand, after the work. Only what is committed is read.
fn reader(brokers: &str, group: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "100");
    config
}

// ---- What is unrouted ------------------------------------------------------

async fn again() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    route_again(&brokers, SHOP).await
}

// ANCHOR: again
/// The same router with `unrouted` in front of it. It takes what is there now, and not
/// what it writes itself.
async fn route_again(brokers: &str, shop: Shop) -> Result<()> {
    let unrouted = shop.name("unrouted");
    let orders: StreamConsumer = reader(brokers, &shop.name("again"))
        .set("enable.partition.eof", "true")
        .create()?;
    // Without joining the group: one of these runs at a time.
    let (orders, end) = spawn_blocking(move || {
        let (begin, end) = unread(&orders, &unrouted)?;
        let mut at = TopicPartitionList::new();
        at.add_partition_offset(&unrouted, 0, Offset::Offset(begin))?;
        orders.assign(&at)?;
        Ok::<_, KafkaError>((orders, end))
    })
    .await??;
    let name = shop.name("again-1");
    let (way, pace) = (Way::Transactions, Pace::Quick);
    let router = Router::open(brokers, shop, orders, &name, way, pace).await?;
    let (mut routed, mut stay, mut over) = (0, 0, false);
    while !over {
        let mut batch = Vec::new();
        while batch.len() < BATCH && !over {
            let next = timeout(COMMIT, router.orders.recv()).await;
            match next.context("what is unrouted does not come")? {
                Ok(order) if order.offset() < end => batch.push(order.detach()),
                Ok(_) | Err(KafkaError::PartitionEOF(_)) => over = true,
                Err(error) => return Err(error).context("cannot read on"),
            }
        }
        if batch.is_empty() {
            break;
        }
        let counts = router.route(batch).await?;
        ensure!(!counts.is_empty(), "another one runs; start it again later");
        for (place, count) in counts {
            if place == Place::Unrouted {
                stay += count;
            } else {
                routed += count;
            }
        }
    }
    router.close().await?;
    println!("again:    {routed} routed, {stay} stay in unrouted");
    Ok(())
}

/// Where the group of `again` goes on in a topic of one partition, and its end.
fn unread(reader: &StreamConsumer, topic: &str) -> Result<(i64, i64), KafkaError> {
    let (low, end) = watermarks(reader, topic, 0)?;
    let mut at = TopicPartitionList::new();
    at.add_partition(topic, 0);
    let committed = reader.committed_offsets(at, PATIENCE)?;
    let committed = committed.find_partition(topic, 0);
    let committed = committed.and_then(|it| it.offset().to_raw());
    // What is older than the retention is gone.
    Ok((committed.unwrap_or(low).max(low), end))
}
// ANCHOR_END: again

// ---- Show and watch --------------------------------------------------------

async fn show() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    show_all(&brokers, SHOP, &Positions::new()).await
}

/// What is in each place, from these positions on.
async fn show_all(brokers: &str, shop: Shop, begin: &Positions) -> Result<()> {
    let reader: StreamConsumer = reader(brokers, &shop.name("again"))
        .set("enable.partition.eof", "true")
        .create()?;
    let places = Place::ALL.map(|place| shop.name(place.name()));
    let mut topics = shop.topics();
    topics.retain(|(topic, _partitions)| places.contains(topic));
    let mut ends_left: i32 = topics.iter().map(|(_topic, count)| count).sum();
    let mut at = Positions::new();
    for (topic, partitions) in topics {
        for id in 0..partitions {
            let partition = (topic.clone(), id);
            let begin = begin.get(&partition).copied();
            at.insert(partition, begin.unwrap_or(Offset::Beginning));
        }
    }
    let unrouted = shop.name("unrouted");
    let reader = spawn_blocking(move || {
        // From a log nothing is taken out: what is routed again counts as gone.
        let (begin, _end) = unread(&reader, &unrouted)?;
        at.insert((unrouted, 0), Offset::Offset(begin));
        reader.assign(&TopicPartitionList::from_topic_map(&at)?)?;
        Ok::<_, KafkaError>(reader)
    })
    .await??;
    let mut payloads: HashMap<String, Vec<Vec<u8>>> = HashMap::new();
    while ends_left > 0 {
        let record = timeout(COMMIT, reader.recv()).await;
        match record.context("no record and no end")? {
            Ok(record) => {
                let in_place = payloads.entry(record.topic().to_owned());
                let payload = record.payload().unwrap_or_default();
                in_place.or_default().push(payload.to_vec());
            }
            Err(KafkaError::PartitionEOF(_)) => ends_left -= 1,
            Err(error) => return Err(error).context("cannot read on"),
        }
    }
    spawn_blocking(move || drop(reader)).await?;
    for (place, topic) in Place::ALL.iter().zip(places) {
        let payloads = payloads.remove(&topic).unwrap_or_default();
        println!("{}", listing(*place, &payloads));
    }
    Ok(())
}

// ANCHOR: watch
/// The message filter: shows the orders of one country. Kafka has no filter, so all
/// orders travel here, and the rest is passed over.
async fn watch(country: &Country) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, SHOP).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let topic = SHOP.name("orders");
    let orders: StreamConsumer = reader(&brokers, &SHOP.name("watch")).create()?;
    let orders = spawn_blocking(move || {
        // From now on, and beside the router: it takes nothing from it.
        let ends = ends(&orders, &[(topic, PARTITIONS)])?;
        orders.assign(&TopicPartitionList::from_topic_map(&ends)?)?;
        Ok::<_, KafkaError>(orders)
    })
    .await??;
    println!("ready:    watching {country}, Ctrl-C to stop");
    let (mut came, mut seen) = (0, 0);
    loop {
        let order = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            order = orders.recv() => order.context("cannot read on")?,
        };
        came += 1;
        let payload = order.payload().unwrap_or_default();
        if is_from(country, payload) {
            seen += 1;
            println!("seen:     {}", name(payload));
        }
    }
    spawn_blocking(move || drop(orders)).await?;
    println!("stopped:  {came} came, {seen} from {country}");
    Ok(())
}
// ANCHOR_END: watch

/// The end of each partition of these topics.
fn ends(
    reader: &StreamConsumer,
    topics: &[(String, i32)],
) -> Result<Positions, KafkaError> {
    let mut ends = Positions::new();
    for (topic, partitions) in topics {
        for id in 0..*partitions {
            let (_low, end) = watermarks(reader, topic, id)?;
            ends.insert((topic.clone(), id), Offset::Offset(end));
        }
    }
    Ok(ends)
}

/// Begin and end of a partition. One that is new is known a moment before its leader is.
fn watermarks(
    reader: &StreamConsumer,
    topic: &str,
    partition: i32,
) -> Result<(i64, i64), KafkaError> {
    let latest = Instant::now() + PATIENCE;
    loop {
        match reader.fetch_watermarks(topic, partition, PATIENCE) {
            Err(KafkaError::MetadataFetch(
                RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable
                | RDKafkaErrorCode::UnknownTopicOrPartition,
            )) if Instant::now() < latest => {
                // Callers have a thread of their own.
                thread::sleep(Duration::from_millis(50));
            }
            found => return found,
        }
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, STORY).await?;
    let (orders, begin) = begin_here(&brokers).await?;
    let set = async |rule: &str, place| {
        let rule = rule.parse().map_err(anyhow::Error::msg)?;
        set(&brokers, STORY, &rule, place).await?;
        if place != Place::Unrouted {
            println!("route:    {rule} to {place}");
        }
        anyhow::Ok(())
    };
    // An earlier story has left one.
    set("IT", Place::Unrouted).await?;
    set("large", Place::Review).await?;
    set("DE", Place::Berlin).await?;
    set("FR", Place::Berlin).await?;

    let name = STORY.name("router-1");
    let (way, pace) = (Way::Transactions, Pace::Quick);
    let router = Router::open(&brokers, STORY, orders, &name, way, pace);
    let mut router = router.await?;
    send(&brokers, STORY, 1..=10).await?;
    work(&router, 10).await?;
    show_all(&brokers, STORY, &begin).await?;

    set("FR", Place::Lyon).await?;
    set("IT", Place::Lyon).await?;
    // It runs on with what it learns.
    let mut new = 2;
    while new > 0 {
        let row = timeout(COMMIT, router.rows.recv()).await;
        let row = router.readable(row.context("no row came")?)?;
        if row.is_some_and(|row| learn(&mut router.table, &row).is_some()) {
            new -= 1;
        }
    }
    send(&brokers, STORY, 11..=20).await?;
    work(&router, 10).await?;
    router.close().await?;
    route_again(&brokers, STORY).await?;
    show_all(&brokers, STORY, &begin).await
}
// ANCHOR_END: story

/// Routes so many.
async fn work(router: &Router, mut left: usize) -> Result<()> {
    while left > 0 {
        let order = timeout(COMMIT, router.orders.recv()).await;
        let order = order.context("no order came")??.detach();
        let batch = router.fill(order).await?;
        let counts = router.route(batch).await?;
        left = left.saturating_sub(counts.values().sum());
    }
    Ok(())
}

/// A consumer at the end of the orders, and the end of each topic: what an earlier run
/// has left is no part of the story. It joins no group, so nobody has to be waited for.
async fn begin_here(brokers: &str) -> Result<(StreamConsumer, Positions)> {
    let orders: StreamConsumer = reader(brokers, &STORY.name("router")).create()?;
    let again: StreamConsumer = reader(brokers, &STORY.name("again")).create()?;
    let begin = move || {
        let ends = ends(&orders, &STORY.topics())?;
        let only = |wanted: &str| {
            let mut ends = ends.clone();
            ends.retain(|(topic, _id), _end| *topic == STORY.name(wanted));
            TopicPartitionList::from_topic_map(&ends)
        };
        again.commit(&only("unrouted")?, CommitMode::Sync)?;
        orders.assign(&only("orders")?)?;
        Ok((orders, ends))
    };
    spawn_blocking(begin).await?
}

// ---- Topics and brokers ----------------------------------------------------

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str, shop: Shop) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    let topics = shop.topics();
    let table = shop.name("table");
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        let known =
            |name: &str| metadata.topics().iter().any(|it| it.name() == name);
        if topics.iter().all(|(name, _)| known(name)) {
            return Ok(());
        }
        let new = topics.iter().map(|(name, partitions)| {
            let topic = NewTopic::new(name, *partitions, TopicReplication::Fixed(1));
            if *name == table {
                // The last row of each rule stays, however old it is.
                topic.set("cleanup.policy", "compact")
            } else {
                topic
            }
        });
        let new: Vec<_> = new.collect();
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&new, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before is
        // told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {topics:?}; ask who may describe it")
}

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
}

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
