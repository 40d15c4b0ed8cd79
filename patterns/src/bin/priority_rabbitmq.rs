//! Priority: express orders first, and standard ones not last for ever.
//!
//! Teaches: a quorum queue of RabbitMQ 4.3 has priorities of its own, and they are
//! strict: as long as express orders wait, no standard one is delivered. So each lane
//! is a queue, and the worker has a consumer for each. It holds the next order of both
//! and chooses: express, but after three of them a standard one if one waits. The
//! prefetch is small, as nothing overtakes what a worker holds already.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin priority_rabbitmq                               # the whole story
//! cargo run --bin priority_rabbitmq place 1 100 standard          # terminal 1
//! cargo run --bin priority_rabbitmq worker shipped.db             # terminal 2
//! cargo run --bin priority_rabbitmq place 101 110 express         # terminal 1
//! cargo run --bin priority_rabbitmq worker shipped.db --rate 50   # a quicker worker
//! cargo run --bin priority_rabbitmq place 1 9 express --one-lane  # a mistake
//! cargo run --bin priority_rabbitmq place 1 9 express --one-queue # with a priority
//! cargo run --bin priority_rabbitmq worker shipped.db --strict    # takes from there
//! cargo run --bin priority_rabbitmq worker shipped.db --ahead     # a hundred of them
//! ```
//!
//! Expected output:
//!
//! ```text
//! placed:   60 standard orders, then 20 express
//! weighted: express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express goes first, and standard goes on
//! placed:   60 standard orders, then 20 express
//! one lane: express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express waits as long as all others
//! placed:   60 standard orders, then 20 express
//! strict:   express shipped among the first <n> of 80, <n> in a row while standard waits
//! so:       express goes first, and standard stands still
//! ```
//!
//! Left out on purpose: an order that kills its worker, see poison_message_rabbitmq;
//! and an order that is shipped twice when a worker is killed, see
//! idempotent_consumer_rabbitmq.

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
use futures_lite::{StreamExt as _, future::poll_once};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer, PublisherConfirm,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
        BasicPublishOptions, BasicQosOptions, BasicRejectOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::priority::{Desk, Lane, Order, Placement, Report, Rule, Turns};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXPRESS: &str = "dispatch.express";
const STANDARD: &str = "dispatch.standard";
/// Orders of both services, by the priorities of RabbitMQ.
const BY_PRIORITY: &str = "dispatch.by-priority";
const ASIDE: &str = "dispatch.aside";
const USAGE: &str = "usage: priority_rabbitmq [place FIRST LAST SERVICE [--one-lane | \
                     --one-queue] | worker FILE [--rate ORDERS_A_SECOND] [--strict | \
                     --ahead]]";

/// How many orders a worker ships in a second.
const RATE: u32 = 10;
/// The same in the story, which has to end.
const STORY_RATE: u32 = 100;
/// How many orders the story places, each time.
const STORY_STANDARD: u64 = 60;
const STORY_EXPRESS: u64 = 20;
/// How many orders of a lane a worker holds: the one that it ships, and the next one
/// to choose from. With one, a lane would look empty after each acknowledgement.
const PREFETCH: u16 = 2;
/// From the one queue with priorities it holds no more than what it ships.
const ONE: u16 = 1;
/// The same with `--ahead`.
const MANY: u16 = 100;
/// In the one queue: from 0, which is that of all others, to 31.
const EXPRESS_PRIORITY: u8 = 9;
/// How many orders are on their way to RabbitMQ, at most.
const WINDOW: usize = 500;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the orders of the story may take.
const STORY: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["place", first, last, service, ref flags @ ..] => {
            let lanes = match flags {
                [] => Lanes::Two,
                ["--one-lane"] => Lanes::One,
                ["--one-queue"] => Lanes::OneQueue,
                _ => return usage(),
            };
            match Placement::parse(first, last, service) {
                Some(placement) => place(&placement, lanes).await,
                None => return usage(),
            }
        }
        ["worker", file, ref flags @ ..] => {
            let (rate, flags) = match flags {
                ["--rate", rate, flags @ ..] => (rate.parse().unwrap_or(0), flags),
                flags => (RATE, flags),
            };
            let take = match flags {
                [] => Take::Lanes,
                ["--strict"] => Take::ByPriority(ONE),
                ["--ahead"] => Take::ByPriority(MANY),
                _ => return usage(),
            };
            if rate == 0 || rate > 1000 {
                return usage();
            }
            worker_until_signal(file, rate, take).await
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

/// Where orders are placed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lanes {
    Two,
    /// The mistake, to see what it costs: all orders in that of the standard ones.
    One,
    /// One queue, and RabbitMQ orders it by priority.
    OneQueue,
}

/// Where a worker takes them from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    Lanes,
    /// From the one queue, so many at a time.
    ByPriority(u16),
}

// ---- Placing orders --------------------------------------------------------

async fn place(placement: &Placement, lanes: Lanes) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    send(&channel, placement, lanes).await?;
    println!("placed:   {placement}");
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: send
/// Stores orders in their lane, or in the one queue with a priority.
async fn send(channel: &Channel, placement: &Placement, lanes: Lanes) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let properties = BasicProperties::default().with_delivery_mode(2);
    let (queue, properties) = match (lanes, Lane::of(&placement.service)) {
        (Lanes::Two, Lane::Express) => (EXPRESS, properties),
        (Lanes::Two, Lane::Standard) | (Lanes::One, _) => (STANDARD, properties),
        (Lanes::OneQueue, Lane::Standard) => (BY_PRIORITY, properties),
        (Lanes::OneQueue, Lane::Express) => {
            (BY_PRIORITY, properties.with_priority(EXPRESS_PRIORITY))
        }
    };
    let mut on_their_way = VecDeque::new();
    for order in placement.orders() {
        if on_their_way.len() == WINDOW {
            settle(&mut on_their_way).await?;
        }
        let options = BasicPublishOptions {
            mandatory: true, // return it if no queue takes it
            ..BasicPublishOptions::default()
        };
        let (payload, properties) = (order.write()?, properties.clone());
        let confirm = channel
            .basic_publish("".into(), queue.into(), options, &payload, properties)
            .await?;
        on_their_way.push_back(confirm);
    }
    while !on_their_way.is_empty() {
        settle(&mut on_their_way).await?;
    }
    Ok(())
}
// ANCHOR_END: send

/// Waits for the oldest.
async fn settle(on_their_way: &mut VecDeque<PublisherConfirm>) -> Result<()> {
    let oldest = on_their_way.pop_front().context("nothing is on its way")?;
    let answer = timeout(PATIENCE, oldest)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store an order: {answer:?}"),
    }
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(file: &str, rate: u32, take: Take) -> Result<()> {
    let stop = stop_signal()?;
    let desk = Desk::open(Path::new(file));
    let desk = desk.with_context(|| format!("cannot keep the book {file}"))?;
    let connection = connect().await?;
    let orders = Orders::open(&connection, take).await?;
    let from = match take {
        Take::Lanes => format!("{EXPRESS} and {STANDARD}"),
        Take::ByPriority(many) => format!("{BY_PRIORITY}, {many} at a time"),
    };
    println!("ready:    orders from {from}, Ctrl-C to stop");
    worker(orders, &desk, rate, |line| println!("{line}"), stop).await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
async fn worker(
    mut orders: Orders,
    desk: &Desk,
    rate: u32,
    say: impl Fn(String),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    tokio::pin!(stop);
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            next = orders.next() => next?,
        };
        // Begun, it is finished: also after a Ctrl-C.
        match Order::read(&delivery.data) {
            Ok(order) => {
                sleep(Duration::from_secs(1) / rate).await;
                block_in_place(|| desk.ship(&order)).context("cannot ship")?;
                let ack = delivery.ack(BasicAckOptions::default());
                timeout(PATIENCE, ack).await.context("lost RabbitMQ")??;
                say(format!("shipped:  {}, {}", order.id, order.service));
            }
            Err(error) => {
                // RabbitMQ moves the bytes as they came, and says whence in `x-death`.
                let aside = BasicRejectOptions { requeue: false };
                let reject = timeout(PATIENCE, delivery.reject(aside));
                reject.await.context("lost RabbitMQ")??;
                let bytes = delivery.data.len();
                say(format!("aside:    {bytes} bytes, no order: {error}"));
            }
        }
    }
    orders.close().await
}
// ANCHOR_END: worker

// ANCHOR: both
/// Both lanes, and whose turn it is.
struct Both {
    express: Line,
    standard: Line,
    turns: Turns,
}

impl Both {
    /// The next order, as soon as there is one. Cancel-safe: what has come is in a
    /// field of `self` at once.
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            // What is there by now. Not waited for: that would stop the other lane.
            for line in [&mut self.express, &mut self.standard] {
                poll_once(line.fill()).await.transpose()?;
            }
            let express = self.express.next.is_some();
            let standard = self.standard.next.is_some();
            let order = match self.turns.next(express, standard) {
                Some(Lane::Express) => self.express.next.take(),
                Some(Lane::Standard) => self.standard.next.take(),
                None => None,
            };
            if let Some(order) = order {
                return Ok(order);
            }
            // Both are empty, so the first order that comes is the next one.
            tokio::select! {
                filled = self.express.fill() => filled?,
                filled = self.standard.fill() => filled?,
            }
        }
    }
}

/// A queue, and the order at its head.
struct Line {
    queue: &'static str,
    deliveries: Consumer,
    next: Option<Delivery>,
}

impl Line {
    /// Waits for the next order, unless there is one.
    async fn fill(&mut self) -> Result<()> {
        if self.next.is_none() {
            let order = self.deliveries.next().await;
            let order = order.with_context(|| {
                format!("RabbitMQ ended it: is {} deleted?", self.queue)
            })?;
            let lost = "lost RabbitMQ; what is not acknowledged will come again";
            self.next = Some(order.context(lost)?);
        }
        Ok(())
    }
}
// ANCHOR_END: both

impl Line {
    /// The queue is the tag of its consumer as well.
    async fn open(
        channel: &Channel,
        queue: &'static str,
        prefetch: u16,
    ) -> Result<Self> {
        // For each consumer that comes after it, not for the channel.
        channel
            .basic_qos(prefetch, BasicQosOptions::default())
            .await?;
        let deliveries = channel
            .basic_consume(
                queue.into(),
                queue.into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        Ok(Self {
            queue,
            deliveries,
            next: None,
        })
    }

    /// Takes no more, and gives back what is not shipped.
    async fn close(mut self, channel: &Channel) -> Result<()> {
        let options = BasicCancelOptions::default();
        let cancel = channel.basic_cancel(self.queue.into(), options);
        timeout(PATIENCE, cancel).await.context("lost RabbitMQ")??;
        loop {
            if let Some(order) = self.next.take() {
                let options = BasicNackOptions {
                    requeue: true, // by default it would be set aside
                    ..BasicNackOptions::default()
                };
                let nack = timeout(PATIENCE, order.nack(options));
                nack.await.context("lost RabbitMQ")??;
            }
            match self.deliveries.next().await {
                Some(order) => self.next = Some(order.context("lost RabbitMQ")?),
                None => return Ok(()),
            }
        }
    }
}

/// Where the orders of a worker come from.
struct Orders {
    channel: Channel,
    source: Source,
}

enum Source {
    Lanes(Box<Both>),
    ByPriority(Box<Line>),
}

impl Orders {
    async fn open(connection: &Connection, take: Take) -> Result<Self> {
        let channel = connection.create_channel().await?;
        declare(&channel).await?;
        let source = match take {
            Take::Lanes => Source::Lanes(Box::new(Both {
                express: Line::open(&channel, EXPRESS, PREFETCH).await?,
                standard: Line::open(&channel, STANDARD, PREFETCH).await?,
                turns: Turns::new(Rule::Weighted),
            })),
            Take::ByPriority(many) => {
                let line = Line::open(&channel, BY_PRIORITY, many).await?;
                Source::ByPriority(Box::new(line))
            }
        };
        Ok(Self { channel, source })
    }

    async fn next(&mut self) -> Result<Delivery> {
        match &mut self.source {
            Source::Lanes(both) => both.next().await,
            // RabbitMQ has chosen.
            Source::ByPriority(line) => {
                line.fill().await?;
                line.next.take().context("filled, and empty")
            }
        }
    }

    async fn close(self) -> Result<()> {
        let channel = &self.channel;
        match self.source {
            Source::Lanes(both) => {
                both.express.close(channel).await?;
                both.standard.close(channel).await?;
            }
            Source::ByPriority(line) => line.close(channel).await?,
        }
        // Neither ack nor nack has an answer. RabbitMQ takes what comes on a channel in
        // order: when it answers this, it has them.
        let closed = channel.close(200, "done".into());
        timeout(PATIENCE, closed).await.context("lost RabbitMQ")??;
        Ok(())
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    for queue in [EXPRESS, STANDARD, BY_PRIORITY] {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    for (name, lanes, take) in [
        ("weighted:", Lanes::Two, Take::Lanes),
        ("one lane:", Lanes::One, Take::Lanes),
        ("strict:", Lanes::OneQueue, Take::ByPriority(ONE)),
    ] {
        let all = STORY_STANDARD + STORY_EXPRESS;
        let standard = Placement::new(1..=STORY_STANDARD, "standard");
        let express = Placement::new(STORY_STANDARD + 1..=all, "express");
        for placement in [standard, express] {
            send(&channel, &placement, lanes).await?;
        }
        println!(
            "placed:   {STORY_STANDARD} standard orders, then {STORY_EXPRESS} express"
        );
        let desk = Desk::open(Path::new(":memory:"))?;
        let orders = Orders::open(&connection, take).await?;
        // What has not come is missed below.
        let stop = async {
            let _came = timeout(STORY, all_shipped(&desk, all)).await;
        };
        worker(orders, &desk, STORY_RATE, drop, stop).await?;
        let shipped = desk.shipped()?;
        ensure!(
            shipped.len() as u64 == all,
            "{} of {all} orders have come; has another worker taken the rest?",
            shipped.len()
        );
        let report = Report::of(&shipped);
        println!("{name:9} {report}\nso:       {}", report.verdict());
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

async fn all_shipped(desk: &Desk, all: u64) {
    // One that cannot be read ends by itself.
    while desk.count().map_or(all, u64::from) < all {
        sleep(Duration::from_millis(20)).await;
    }
}

// ---- Queues and connection -------------------------------------------------

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    // Orders by priority without being asked, since 4.3; where all have the same, by
    // their age.
    arguments.insert("x-queue-type".into(), text("quorum"));
    queue(channel, ASIDE, arguments.clone()).await?;
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(ASIDE));
    // Kept here until it is stored there; by default it may be lost on its way.
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    for name in [EXPRESS, STANDARD, BY_PRIORITY] {
        queue(channel, name, arguments.clone()).await?;
    }
    Ok(())
}
// ANCHOR_END: declare

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
