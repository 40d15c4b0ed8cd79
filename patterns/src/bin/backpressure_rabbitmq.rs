//! Backpressure: a worker holds no more labels than it can print soon.
//!
//! Teaches: the prefetch is the bound. RabbitMQ sends no more than that without an
//! acknowledgement, and a label is acknowledged when it is printed. Inside the worker a
//! bounded channel passes it on: who takes waits for room before it takes. The
//! publisher has a window of labels without a confirm, and waits for the oldest.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin backpressure_rabbitmq                               # the whole story
//! cargo run --bin backpressure_rabbitmq worker printed.db             # terminal 1
//! cargo run --bin backpressure_rabbitmq producer 1 3000               # terminal 2
//! cargo run --bin backpressure_rabbitmq worker printed.db --rate 200  # a quicker printer
//! cargo run --bin backpressure_rabbitmq worker printed.db --unbounded # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels.due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  set, held no more than 16
//! sent:    60 labels, waited <n> times for room
//! ready:   labels from labels.due, Ctrl-C to stop
//! print:   50 printed, <n> held
//! stopped: 60 printed, at most <n> held, 0 given back
//! bounds:  none, held more than 16
//! ```
//!
//! Left out on purpose: a bound for the queue itself; see rabbitmq_max_length, where a
//! full queue refuses, and rabbitmq_blocked, where RabbitMQ stops a publisher.

use std::{
    collections::VecDeque,
    env,
    future::Future,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer, PublisherConfirm,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::backpressure::{HIGH, Held, LOW, Printer, label, name};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::block_in_place,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "labels.due";
const CONSUMER_TAG: &str = "label-printer";
const USAGE: &str = "usage: backpressure_rabbitmq [producer FIRST LAST | worker FILE \
                     [--rate LABELS_A_SECOND] [--unbounded]]";

/// How many labels the printer prints in a second.
const RATE: u32 = 10;
/// The same in the story, which has to end.
const STORY_RATE: u32 = 50;
/// How many labels the story sends, each time.
const STORY_LABELS: u64 = 60;
/// How many labels a publisher has on their way, at most.
const WINDOW: usize = 32;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the labels of the story may take.
const STORY: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => producer(first, last).await,
            _ => return usage(),
        },
        ["worker", file, ref flags @ ..] => {
            let (rate, bounds) = match flags {
                [] => (RATE, Bounds::Set),
                ["--unbounded"] => (RATE, Bounds::None),
                ["--rate", rate] => (rate.parse().unwrap_or(0), Bounds::Set),
                ["--rate", rate, "--unbounded"] => {
                    (rate.parse().unwrap_or(0), Bounds::None)
                }
                _ => return usage(),
            };
            if rate == 0 || rate > 1000 {
                return usage();
            }
            worker_until_signal(file, rate, bounds).await
        }
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
enum Bounds {
    Set,
    /// The mistake, to see what it costs.
    None,
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    let waits = send(&channel, first, last).await?;
    println!(
        "sent:    label-{first} to label-{last}, waited {waits} times for room"
    );
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: send
/// Sends labels as fast as RabbitMQ confirms them. Returns how often it waited
/// for room.
async fn send(channel: &Channel, first: u64, last: u64) -> Result<u32> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut on_their_way = VecDeque::new();
    let mut waits = 0;
    for number in first..=last {
        // The client itself has no bound: without this, it keeps all in memory that
        // the connection does not take.
        if on_their_way.len() == WINDOW {
            waits += 1;
            settle(&mut on_their_way).await?;
        }
        let properties = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions {
            mandatory: true, // return it if no queue takes it
            ..BasicPublishOptions::default()
        };
        let payload = label(number);
        let confirm = channel
            .basic_publish("".into(), QUEUE.into(), options, &payload, properties)
            .await?;
        on_their_way.push_back(confirm);
    }
    while !on_their_way.is_empty() {
        settle(&mut on_their_way).await?;
    }
    Ok(waits)
}

/// Waits for the oldest.
async fn settle(on_their_way: &mut VecDeque<PublisherConfirm>) -> Result<()> {
    let oldest = on_their_way.pop_front().context("nothing is on its way")?;
    let answer = timeout(PATIENCE, oldest)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store a label: {answer:?}"),
    }
}
// ANCHOR_END: send

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(file: &str, rate: u32, bounds: Bounds) -> Result<()> {
    let stop = stop_signal()?;
    let printer = Printer::open(Path::new(file));
    let printer = printer.with_context(|| format!("cannot print to {file}"))?;
    let held = Arc::new(Held::default());
    worker(printer, rate, bounds, &held, stop).await
}

// ANCHOR: worker
async fn worker(
    printer: Printer,
    rate: u32,
    bounds: Bounds,
    held: &Arc<Held>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let connection = connect().await?;
    let (channel, mut deliveries) = take_labels(&connection, bounds).await?;
    println!("ready:   labels from {QUEUE}, Ctrl-C to stop");
    let room = match bounds {
        Bounds::Set => LOW,
        // As good as none.
        Bounds::None => Semaphore::MAX_PERMITS,
    };
    let (labels, to_print) = mpsc::channel(room);
    let (stop_printer, stopping) = oneshot::channel();
    let print = print(printer, rate, to_print, Arc::clone(held), stopping);
    let printing = tokio::spawn(print);
    tokio::pin!(stop);
    loop {
        let taken = async {
            // Room first: what is not taken waits in the client, and RabbitMQ counts it.
            // An error says that the printer has ended.
            let Ok(room) = labels.reserve().await else {
                return Ok(false);
            };
            let Some(delivery) = deliveries.next().await else {
                bail!("RabbitMQ ended it: is {QUEUE} deleted?");
            };
            held.take();
            room.send(delivery.context("lost RabbitMQ")?);
            Ok(true)
        };
        tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            () = labels.closed() => break,
            taken = taken => if !taken? { break },
        }
    }
    // Take no more, then finish the label that is begun, and give back the rest.
    let tag = CONSUMER_TAG.into();
    let cancel = channel.basic_cancel(tag, BasicCancelOptions::default());
    timeout(PATIENCE, cancel).await.context("lost RabbitMQ")??;
    drop((stop_printer, labels));
    let (count, mut back) = printing.await??;
    while let Some(delivery) = deliveries.next().await {
        give_back(&delivery.context("lost RabbitMQ")?).await?;
        back += 1;
    }
    // Neither ack nor nack has an answer. RabbitMQ takes what comes on a channel in
    // order: when it answers this, it has them.
    let asked = channel.basic_qos(1, BasicQosOptions::default());
    timeout(PATIENCE, asked).await.context("lost RabbitMQ")??;
    connection.close(200, "stopped".into()).await?;
    let most = held.most();
    println!("stopped: {count} printed, at most {most} held, {back} given back");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: print
/// The printer takes a label when it is ready for one, and no sooner. Returns how many
/// it has printed, and how many it has given back.
async fn print(
    printer: Printer,
    rate: u32,
    mut to_print: mpsc::Receiver<Delivery>,
    held: Arc<Held>,
    mut stopping: oneshot::Receiver<()>,
) -> Result<(u64, u64)> {
    let mut ready = interval(Duration::from_secs(1) / rate);
    // It does not print faster because it had nothing to do for a while.
    ready.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut count, mut back) = (0, 0);
    loop {
        let label = tokio::select! {
            biased;
            _dropped = &mut stopping => break,
            label = async {
                ready.tick().await;
                to_print.recv().await
            } => label,
        };
        let Some(label) = label else { break };
        let name = name(&label.data);
        block_in_place(|| printer.print(&name)).context("cannot print")?;
        // Makes room for one more at the broker.
        let ack = label.ack(BasicAckOptions::default());
        timeout(PATIENCE, ack).await.context("lost RabbitMQ")??;
        let now = held.release();
        count += 1;
        // About once a second.
        if count % u64::from(rate) == 0 {
            println!("print:   {count} printed, {now} held");
        }
    }
    to_print.close();
    while let Some(label) = to_print.recv().await {
        give_back(&label).await?;
        held.release();
        back += 1;
    }
    Ok((count, back))
}
// ANCHOR_END: print

async fn give_back(label: &Delivery) -> Result<()> {
    let options = BasicNackOptions {
        requeue: true, // by default it would be thrown away
        ..BasicNackOptions::default()
    };
    let nack = label.nack(options);
    timeout(PATIENCE, nack).await.context("lost RabbitMQ")??;
    Ok(())
}

// ANCHOR: take
async fn take_labels(
    connection: &Connection,
    bounds: Bounds,
) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    if bounds == Bounds::Set {
        // Without it RabbitMQ does not wait for an acknowledgement.
        let prefetch = u16::try_from(HIGH)?;
        channel
            .basic_qos(prefetch, BasicQosOptions::default())
            .await?;
    }
    let deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
}
// ANCHOR_END: take

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    channel
        .queue_purge(QUEUE.into(), QueuePurgeOptions::default())
        .await?;
    for bounds in [Bounds::Set, Bounds::None] {
        let waits = send(&channel, 1, STORY_LABELS).await?;
        println!("sent:    {STORY_LABELS} labels, waited {waits} times for room");
        let printer = Printer::open(Path::new(":memory:"))?;
        let held = Arc::new(Held::default());
        let all = async {
            let empty = async {
                while held.taken() < STORY_LABELS as usize || held.now() > 0 {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            // What has not come is missed below.
            let _came = timeout(STORY, empty).await;
        };
        worker(printer, STORY_RATE, bounds, &held, all).await?;
        ensure!(
            held.taken() == STORY_LABELS as usize,
            "not all have come; has another worker taken them?"
        );
        judge(bounds, &held);
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

fn judge(bounds: Bounds, held: &Held) {
    let set = match bounds {
        Bounds::Set => "set",
        Bounds::None => "none",
    };
    let than = if held.most() > HIGH {
        "more"
    } else {
        "no more"
    };
    println!("bounds:  {set}, held {than} than {HIGH}");
}

// ---- Queue and connection --------------------------------------------------

async fn declare(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    queue(channel, QUEUE, arguments).await
}

async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> Result<()> {
    channel
        .queue_declare(name.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {name} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
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

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
