//! Killed at random points, the worker with transactions captures each payment
//! once and in order; the careless one does not.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    producer::{FutureProducer, FutureRecord},
};
use tests::{Example, observe, random, wait};
use tokio::{sync::Mutex, time::sleep};

use crate::kafka;

const EXACTLY_ONCE: &str = env!("CARGO_BIN_EXE_kafka_exactly_once");
const REQUESTED: &str = "eos.payments.requested";
const CAPTURED: &str = "eos.payments.captured";
const GROUP: &str = "eos-capture";

const CUSTOMERS: usize = 10;
const KILLS: usize = 20;
/// Between two kills; more than are written before a kill.
const PORTION: usize = 250;
const PAYMENTS: usize = KILLS * PORTION;

/// Topics and group belong to the example.
static TURN: Mutex<()> = Mutex::const_new(());

fn producer(address: &str) -> Result<FutureProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", address)
        .set("enable.idempotence", "true")
        .create()?)
}

/// Asks for these payments of a run.
async fn request(
    producer: &FutureProducer,
    run: &str,
    numbers: Range<usize>,
) -> Result<()> {
    let mut deliveries = Vec::new();
    for number in numbers {
        let customer = format!("customer-{}", number % CUSTOMERS);
        let payment = format!("{run} {customer} {number}");
        let record = FutureRecord::to(REQUESTED).key(&customer).payload(&payment);
        let delivery = producer.send_result(record);
        deliveries.push(delivery.map_err(|(error, _record)| error)?);
    }
    for delivery in deliveries {
        delivery.await?.map_err(|(error, _record)| error)?;
    }
    Ok(())
}

/// What a reader of committed records finds of a run: the numbers of each
/// customer, as they come.
async fn captured(address: &str, run: &str) -> Result<BTreeMap<String, Vec<usize>>> {
    let payments =
        observe::kafka::read_all(address, CAPTURED, 3, "read_committed").await?;
    let mut captured: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for payment in payments {
        let (key, text) = observe::kafka::text(&payment);
        let words: Vec<&str> = text.split(' ').collect();
        if let [of_run, customer, number] = words[..]
            && of_run == run
        {
            ensure!(key == customer, "{text} has the key {key}");
            captured.entry(key).or_default().push(number.parse()?);
        }
    }
    Ok(captured)
}

/// Counts what is written, committed or not, as soon as it is there: so a kill may
/// come between writing and committing.
struct Watch {
    written: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
}

impl Watch {
    fn start(address: &str) -> Result<Self> {
        let reader: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", address)
            .set("group.id", "observer")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_uncommitted")
            .set("fetch.wait.max.ms", "5")
            .create()?;
        reader.assign(&everything()?)?;
        let written = Arc::new(AtomicUsize::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (counter, stop) = (Arc::clone(&written), Arc::clone(&over));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Some(Ok(_)) = reader.poll(Duration::from_millis(50)) {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { written, over })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn everything() -> Result<TopicPartitionList> {
    let mut everything = TopicPartitionList::new();
    for partition in 0..3 {
        everything.add_partition_offset(CAPTURED, partition, Offset::Beginning)?;
    }
    Ok(everything)
}

/// Kills the worker again and again, then lets it finish.
async fn under_kills(way: &str) -> Result<BTreeMap<String, Vec<usize>>> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, REQUESTED, GROUP).await?;
    observe::kafka::forget(kafka.1, CAPTURED, GROUP).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let run = now.as_millis().to_string();
    let mut random = random::seeded();
    let producer = producer(kafka.1)?;
    let mut watch = None;
    for kill in 0..KILLS {
        let mut worker = Example::start(EXACTLY_ONCE, &[way], kafka)?;
        worker.prints("ready:").await?;
        if watch.is_none() {
            // The worker has made the topics.
            watch = Some(Watch::start(kafka.1)?);
        }
        // In portions: a worker that is quick, or killed late on a busy machine, would
        // have done all of them before the last kill.
        request(&producer, &run, kill * PORTION..(kill + 1) * PORTION).await?;
        let written = &watch.as_ref().context("a watch")?.written;
        let enough = written.load(Ordering::Relaxed) + random.usize(1..150);
        let deadline = Instant::now() + wait::DEADLINE;
        while written.load(Ordering::Relaxed) < enough {
            ensure!(
                Instant::now() < deadline,
                "kill {kill}: {} are written, and not {enough}",
                written.load(Ordering::Relaxed)
            );
            sleep(Duration::from_millis(1)).await;
        }
        worker.kill().await?;
    }
    drop(watch);
    let mut worker = Example::start(EXACTLY_ONCE, &[way], kafka)?;
    worker.prints("ready:").await?;
    let all = wait::until("all payments", async || {
        let captured = captured(kafka.1, &run).await?;
        let mut different: Vec<usize> =
            captured.values().flatten().copied().collect();
        different.sort_unstable();
        different.dedup();
        let count = different.len();
        ensure!(count == PAYMENTS, "{count} are captured");
        Ok(captured)
    })
    .await?;
    worker.terminate().await?;
    worker.end().await?.succeeded()?;
    Ok(all)
}

/// How many came more than once, and how many customers are out of order.
fn faults(captured: &BTreeMap<String, Vec<usize>>) -> (usize, usize) {
    let count = captured.values().map(Vec::len).sum::<usize>();
    let reordered = captured.values().filter(|numbers| !numbers.is_sorted());
    (count - PAYMENTS, reordered.count())
}

#[tokio::test]
async fn killed_twenty_times_each_payment_is_captured_once_and_in_order()
-> Result<()> {
    let _turn = TURN.lock().await;
    let captured = under_kills("worker").await?;
    assert_eq!(faults(&captured), (0, 0));
    Ok(())
}

#[tokio::test]
async fn control_without_transactions_payments_are_captured_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    // Some kills in twenty come between writing and committing; in none of sixty
    // would be a wonder.
    for _try in 0..3 {
        let (twice, reordered) = faults(&under_kills("careless").await?);
        println!("twice: {twice} payments, reordered: {reordered} customers");
        if twice > 0 {
            return Ok(());
        }
    }
    bail!("no kill came between writing and committing")
}

#[tokio::test]
async fn the_story_captures_each_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    for _run in 0..2 {
        let ended = Example::start(EXACTLY_ONCE, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let variable = ("KAFKA_BROKERS", "localhost:1");
    let ended = Example::start(EXACTLY_ONCE, &["nobody"], variable)?
        .end()
        .await?;
    assert_eq!(ended.status.code(), Some(2));
    ensure!(ended.stderr.starts_with("usage: kafka_exactly_once"));
    Ok(())
}
