//! What a worker holds stays below its bound, however much waits, and so does its
//! memory. The broker is asked what is out, and the system what the process takes.

use std::{collections::HashSet, fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use lab::broker::Broker;
use patterns::backpressure::{HIGH, LABEL, Printer};
use tempfile::TempDir;
use tests::{Example, broker, observe, wait};
use tokio::sync::Mutex;

use crate::common::{Pattern, Place, nowhere, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_backpressure_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_backpressure_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_backpressure_nats"),
    topics: &[("labels-due", "label-printer")],
    queues: &["labels.due"],
    streams: &["LABELS_DUE"],
};

const LABELS_DUE: Place = Place {
    topic: "labels-due",
    partitions: 1,
    group: "label-printer",
    queue: "labels.due",
    stream: "LABELS_DUE",
};

/// 48 MB of them.
const LABELS: u64 = 1500;
const BACKLOG: u64 = LABELS * LABEL as u64;

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker and a printer.
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

    async fn worker(&self, flags: &[&str]) -> Result<Example> {
        let file = self.folder.path().join("printed.db");
        let file = file.to_str().context("a path")?;
        let words = [&["worker", file], flags].concat();
        let mut worker = Example::start(self.binary, &words, self.variable)?;
        worker.prints("ready:").await?;
        Ok(worker)
    }

    /// Sends so many, as fast as the broker takes them. Returns what it said.
    async fn produce(&self, labels: u64) -> Result<String> {
        let words = ["producer", "1", &labels.to_string()];
        let producer = Example::start(self.binary, &words, self.variable)?;
        Ok(producer.end().await?.succeeded()?.stdout)
    }

    fn printed(&self) -> Result<Vec<String>> {
        let file = self.folder.path().join("printed.db");
        Ok(Printer::open(&file)?.printed()?)
    }

    /// Waits until each of so many is printed. Returns how many are printed again.
    async fn all_printed(&self, labels: u64) -> Result<usize> {
        let each: HashSet<String> =
            (1..=labels).map(|it| format!("label-{it}")).collect();
        wait::until("each label printed", async || {
            let printed: HashSet<String> = self.printed()?.into_iter().collect();
            let missing = each.difference(&printed).count();
            ensure!(missing == 0, "{missing} are missing");
            Ok(())
        })
        .await?;
        Ok(self.printed()?.len() - each.len())
    }

    /// How many labels the broker has handed out and has no answer for. Kafka does not
    /// know.
    async fn out(&self) -> Result<u64> {
        let address = self.variable.1;
        Ok(match self.broker {
            Broker::Kafka => 0,
            Broker::RabbitMq => {
                let management = broker::shared_management().await?;
                let queue = management.queue(address, "labels.due").await?;
                queue["messages_unacknowledged"].as_u64().unwrap_or(0)
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let stream = jetstream.get_stream("LABELS_DUE").await?;
                let consumer = stream.get_consumer("label-printer").await;
                let mut consumer: PullConsumer =
                    consumer.map_err(anyhow::Error::from_boxed)?;
                consumer.info().await?.num_ack_pending.try_into()?
            }
        })
    }

    /// How many the broker still has to hand out or to hear of.
    async fn has_left(&self, count: u64) -> Result<()> {
        let address = self.variable.1;
        wait::until("what is left", async || {
            let left = LABELS_DUE.left(self.broker, address).await?;
            ensure!(left == count, "{left}, not {count}");
            Ok(())
        })
        .await
    }
}

/// The most memory that a process has had so far, in bytes.
fn peak(process: &Example) -> Result<u64> {
    let status = format!("/proc/{}/status", process.id()?);
    let status = fs::read_to_string(status).context("it needs Linux")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("VmHWM")?.parse::<u64>()? * 1024)
}

/// Tells a worker to stop. Returns how many it says that it has printed, held at most,
/// and given back.
async fn stop(worker: Example) -> Result<[u64; 3]> {
    worker.interrupt().await?;
    let ended = worker.end().await?.succeeded()?;
    let last = ended.stdout.lines().last().unwrap_or_default();
    let last = last.strip_prefix("stopped: ");
    let last = last.with_context(|| ended.stdout.clone())?;
    let numbers = last.split(' ').filter_map(|word| word.parse().ok());
    let numbers: Vec<u64> = numbers.collect();
    numbers.try_into().map_err(|_| anyhow::anyhow!("{last}"))
}

#[tokio::test]
async fn the_stories_hold_no_more_than_the_bound_and_more_without() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// A producer that does not wait for the printer, and a worker that does.
#[tokio::test]
async fn a_backlog_of_48_mb_leaves_the_worker_as_small_as_it_was() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        // RabbitMQ's counts are up to five seconds old, so there it takes longer.
        let rate = if broker == Broker::RabbitMq {
            "125"
        } else {
            "250"
        };
        let worker = shop.worker(&["--rate", rate]).await?;
        let idle = peak(&worker)?;
        let sent = shop.produce(LABELS).await?;
        ensure!(!sent.contains(" waited 0 times"), "{sent}");

        let mut most = 0;
        wait::until("all printed", async || {
            most = most.max(shop.out().await?);
            let printed = shop.printed()?.len() as u64;
            ensure!(printed >= LABELS, "{printed} are");
            Ok(())
        })
        .await?;
        ensure!(most <= HIGH as u64, "{most} were out");
        ensure!(broker == Broker::Kafka || most > 0, "nothing was out");
        let grown = peak(&worker)? - idle;
        ensure!(grown < BACKLOG / 3, "{grown} bytes more than {idle}");

        assert_eq!(shop.all_printed(LABELS).await?, 0);
        let [printed, held, back] = stop(worker).await?;
        ensure!(held <= HIGH as u64, "{held} were held");
        assert_eq!((printed, back), (LABELS, 0));
        shop.has_left(0).await
    })
    .await
}

/// The control: the same backlog, and all of it is in the worker.
#[tokio::test]
async fn control_without_bounds_the_worker_takes_the_whole_backlog() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let mut worker = shop.worker(&["--unbounded"]).await?;
        let idle = peak(&worker)?;
        shop.produce(LABELS).await?;
        // It says once a second how many it holds, and prints ten meanwhile.
        loop {
            let line = worker.prints(" held").await?;
            let held = line.split(' ').rev().find_map(|word| word.parse().ok());
            let held: u64 = held.with_context(|| line.clone())?;
            if held > LABELS * 3 / 4 {
                break;
            }
        }
        let grown = peak(&worker)? - idle;
        ensure!(grown > BACKLOG * 3 / 4, "{grown} bytes more than {idle}");
        let [printed, held, back] = stop(worker).await?;
        ensure!(held > LABELS * 3 / 4, "{held} were held");
        ensure!(back > 0, "it had printed all");
        shop.has_left(LABELS - printed).await
    })
    .await
}

/// Ends a worker in the middle, and returns how many labels the next one has printed
/// again.
async fn in_the_middle(
    shop: &Shop,
    end: impl AsyncFnOnce(Example) -> Result<()>,
) -> Result<usize> {
    shop.produce(100).await?;
    let worker = shop.worker(&["--rate", "50"]).await?;
    wait::until("some printed", async || {
        let printed = shop.printed()?.len();
        ensure!(printed >= 30, "{printed} are");
        Ok(())
    })
    .await?;
    end(worker).await?;
    ensure!(shop.printed()?.len() < 100, "it was too late");
    let worker = shop.worker(&["--rate", "250"]).await?;
    let again = shop.all_printed(100).await?;
    stop(worker).await?;
    shop.has_left(0).await?;
    Ok(again)
}

#[tokio::test]
async fn a_killed_worker_loses_no_label() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let again = in_the_middle(&shop, async |worker| worker.kill().await).await?;
        // The one that was printed and not acknowledged. Kafka is told every half
        // second, so all since then.
        ensure!(
            broker == Broker::Kafka || again <= 1,
            "{again} printed again"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn ctrl_c_gives_back_what_is_held_and_nothing_is_printed_again() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let end = async |worker| {
            let [_printed, held, back] = stop(worker).await?;
            ensure!(
                0 < back && back <= HIGH as u64,
                "{back} of {held} given back"
            );
            Ok(())
        };
        let again = in_the_middle(&shop, end).await?;
        assert_eq!(again, 0);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_printer_without_paper_is_told() -> Result<()> {
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let folder = TempDir::new()?;
        let path = Path::to_str(folder.path()).context("a path")?;
        let ended = Example::start(binary, &["worker", path], variable)?;
        let ended = ended.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("cannot print to"), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 6] = [
        &["producer", "5", "3"],
        &["producer", "1"],
        &["worker"],
        &["worker", "printed.db", "--bounded"],
        &["worker", "printed.db", "--rate", "0"],
        &["worker", "printed.db", "--rate", "many"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
