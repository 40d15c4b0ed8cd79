//! Splitter and aggregator: an order in pieces, and one result for it.
//!
//! Teaches: a splitter cuts an order into lines, workers reserve them, and an
//! aggregator makes one result of the answers, by the numbers of the lines and not by
//! their count. The answers are in one queue with a single active consumer: a second
//! aggregator waits until the first one is gone. The deadline of an order is a row;
//! when it has passed, the aggregator sends itself a reminder behind all answers in
//! the queue. Answer, end and result are one transaction, and the ack comes after it.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin splitter_aggregator_rabbitmq                       # the whole story
//! cargo run --bin splitter_aggregator_rabbitmq splitter              # terminal 1
//! cargo run --bin splitter_aggregator_rabbitmq worker ann            # terminal 2
//! cargo run --bin splitter_aggregator_rabbitmq worker bob            # terminal 3
//! cargo run --bin splitter_aggregator_rabbitmq aggregator orders.db  # terminal 4
//! cargo run --bin splitter_aggregator_rabbitmq order 1 20            # kill one
//! cargo run --bin splitter_aggregator_rabbitmq order 21 30 --within 500
//! cargo run --bin splitter_aggregator_rabbitmq show orders.db
//! cargo run --bin splitter_aggregator_rabbitmq aggregator orders.db --count-answers
//! cargo run --bin splitter_aggregator_rabbitmq aggregator --in-memory
//! ```
//!
//! Expected output:
//!
//! ```text
//! order-1    opened                     0 of 3
//! order-1    line 1: reserved           1 of 3
//! order-1    line 2: reserved           2 of 3
//! order-1    line 3: reserved           complete, reserved: 1 2 3
//! order-2    opened                     0 of 2
//! order-2    opened, again              0 of 2
//! order-2    line 1: reserved           1 of 2
//! order-2    line 2: reserved           complete, reserved: 1 2
//! order-2    line 1: reserved, again    complete
//! order-2    line 2: reserved, again    complete
//! order-3    opened                     0 of 4
//! order-3    line 1: reserved           1 of 4
//! order-3    line 2: sold out           2 of 4
//! order-3    line 3: reserved           3 of 4
//! order-3    deadline                   timeout, reserved: 1 3, sold out: 2, missing: 4
//! order-3    line 4: reserved, too late timeout
//! results:   order-1 complete, order-2 complete, order-3 timeout
//! ```
//!
//! Left out on purpose: the stock. A worker that is killed reserves a line again, so
//! its table has to know the line, as in idempotent_consumer_rabbitmq; and what was
//! reserved for an order that has timed out has to be released, as in
//! saga_orchestration_rabbitmq.

use std::{
    env,
    future::Future,
    num::NonZeroU32,
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
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::splitter_aggregator::{
    self as shop, Label, Orders, Place, Report, Rule, Taken, Word, basket, header,
    json, now,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
/// The queues are `basket.orders`, and so on.
const SHOP: &str = "basket";
/// The story has queues of its own, which it empties.
const STORY: &str = "basket-story";
/// Where orders wait for the splitter.
const ORDERS: &str = "orders";
/// Where lines wait for the workers.
const LINES: &str = "lines";
/// Where the aggregator hears of orders, answers and deadlines.
const ANSWERS: &str = "answers";
const RESULTS: &str = "results";
/// What nobody can read, as it came, with the reason in a header.
const ASIDE: &str = "aside";
const QUEUES: [&str; 5] = [ORDERS, LINES, ANSWERS, RESULTS, ASIDE];
/// How many messages may be on their way to a program. Few, so that there is
/// something left for the other workers.
const PREFETCH: u16 = 5;
/// How many messages are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long a customer waits, unless `--within` says otherwise.
const WITHIN: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: splitter_aggregator_rabbitmq [order FIRST [LAST] \
                     [--within MS] | splitter | worker NAME | \
                     aggregator FILE|--in-memory [--count-answers] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let Some(result) = run(&words).await else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing if the words say nothing that there is.
async fn run(words: &[&str]) -> Option<Result<()>> {
    let result = match *words {
        [] => story().await,
        ["order", ref words @ ..] => {
            let (first, last, within) = to_place(words)?;
            place(first, last, within).await
        }
        ["splitter"] => splitter().await,
        ["worker", name] if is_a_name(name) => worker(name).await,
        ["aggregator", file] => aggregator(file, Rule::EachLineAnswered).await,
        ["aggregator", file, "--count-answers"] => {
            aggregator(file, Rule::EnoughAnswers).await
        }
        ["show", file] => show(file),
        _ => return None,
    };
    Some(result)
}

/// Which orders, and how long their customers wait.
fn to_place(words: &[&str]) -> Option<(u64, u64, Duration)> {
    let (words, within) = match *words {
        [ref words @ .., "--within", milliseconds] => {
            let within: NonZeroU32 = milliseconds.parse().ok()?;
            (words, Duration::from_millis(within.get().into()))
        }
        ref words => (words, WITHIN),
    };
    let (first, last) = match *words {
        [number] => (number, number),
        [first, last] => (first, last),
        _ => return None,
    };
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last, within))
}

fn is_a_name(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|it| it.is_ascii_alphanumeric())
}

// ---- Orders ----------------------------------------------------------------

async fn place(first: u64, last: u64, within: Duration) -> Result<()> {
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    for number in first..=last {
        let order = place_one(&channel, SHOP, number, within).await?;
        println!("placed:    {order}");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn place_one(
    channel: &Channel,
    shop: &str,
    number: u64,
    within: Duration,
) -> Result<String> {
    let within = i64::try_from(within.as_millis())?;
    let basket = basket(number, now().saturating_add(within));
    let headers = FieldTable::default();
    publish(channel, &queue(shop, ORDERS), headers, &json(&basket)).await?;
    Ok(basket.order)
}

/// Prints how far each order is. No broker is needed for it.
fn show(file: &str) -> Result<()> {
    ensure!(Path::new(file).exists(), "there is no file {file}");
    for report in open(file, Rule::EachLineAnswered)?.all()? {
        println!("{:<10} {report}", report.order);
    }
    Ok(())
}

// ---- Splitter --------------------------------------------------------------

// ANCHOR: splitter
async fn splitter() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    let mut orders = consume(&channel, &queue(SHOP, ORDERS)).await?;
    println!("ready:     orders, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = orders.next() => received(delivery)?,
        };
        match split(&channel, SHOP, &delivery).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&channel, SHOP, &delivery, &reason).await?,
        }
        acknowledge(&delivery).await?;
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Sends the lines of an order; afterwards it is acknowledged. If the program ends
/// before, the order comes again, and its lines are there twice.
async fn split(
    channel: &Channel,
    shop: &str,
    delivery: &Delivery,
) -> Result<Result<String, String>> {
    let split = match shop::split(&delivery.data) {
        Ok(split) => split,
        Err(reason) => return Ok(Err(reason)),
    };
    // First, so that its deadline runs whatever becomes of the lines.
    let (label, payload) = &split.opened;
    send(channel, &queue(shop, ANSWERS), label, payload).await?;
    for (label, payload) in &split.lines {
        send(channel, &queue(shop, LINES), label, payload).await?;
    }
    let lines = split.lines.len();
    Ok(Ok(format!("{:<10} {lines} lines", label.order)))
}
// ANCHOR_END: splitter

// ---- Worker ----------------------------------------------------------------

async fn worker(name: &str) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    let mut lines = consume(&channel, &queue(SHOP, LINES)).await?;
    println!("ready:     lines for {name}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            delivery = lines.next() => received(delivery)?,
        };
        match work(&channel, SHOP, &delivery).await? {
            Ok(said) => println!("{said}"),
            Err(reason) => set_aside(&channel, SHOP, &delivery, &reason).await?,
        }
        acknowledge(&delivery).await?;
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: worker
/// Reserves a line and sends the answer; afterwards the line is acknowledged.
async fn work(
    channel: &Channel,
    shop: &str,
    delivery: &Delivery,
) -> Result<Result<String, String>> {
    let (label, answer) = match shop::work(label(delivery), &delivery.data) {
        Ok(worked) => worked,
        Err(reason) => return Ok(Err(reason)),
    };
    let payload = Word::Answered(answer).to_json();
    send(channel, &queue(shop, ANSWERS), &label, &payload).await?;
    let line = label.line.unwrap_or_default();
    Ok(Ok(format!("{:<10} line {line}: {answer}", label.order)))
}
// ANCHOR_END: worker

// ---- Aggregator ------------------------------------------------------------

// ANCHOR: aggregator
async fn aggregator(file: &str, rule: Rule) -> Result<()> {
    let mut orders = open(file, rule)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    let mut answers = consume(&channel, &queue(SHOP, ANSWERS)).await?;
    println!("ready:     answers, Ctrl-C to stop");
    loop {
        // First what a dead aggregator has left.
        send_waiting(&channel, SHOP, &mut orders).await?;
        // A database blocks its thread.
        let wait = block_in_place(|| orders.wait(now()))?;
        if wait.is_zero() {
            block_in_place(|| orders.remind(now()))?;
            continue;
        }
        tokio::select! {
            biased;
            () = &mut stop_signal => break,
            delivery = answers.next() => {
                let delivery = received(delivery)?;
                take(&channel, SHOP, &mut orders, &delivery).await?;
                acknowledge(&delivery).await?;
            }
            () = sleep(wait) => {} // until a deadline has passed
        }
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the tables; afterwards it is acknowledged. If the program
/// ends in between, it comes again and changes nothing.
async fn take(
    channel: &Channel,
    shop: &str,
    orders: &mut Orders,
    delivery: &Delivery,
) -> Result<()> {
    let taken = block_in_place(|| orders.take(label(delivery), &delivery.data))
        .context("cannot write down what has come, it will come again")?;
    match taken {
        Taken::Noted(entry) => println!("{entry}"),
        Taken::SetAside(reason) => {
            set_aside(channel, shop, delivery, &reason).await?;
        }
    }
    Ok(())
}
// ANCHOR_END: aggregator

// ANCHOR: send
/// Sends what is in the outbox: results, and reminders to the aggregator itself.
async fn send_waiting(
    channel: &Channel,
    shop: &str,
    orders: &mut Orders,
) -> Result<()> {
    loop {
        let waiting = block_in_place(|| orders.waiting(BATCH))?;
        if waiting.is_empty() {
            return Ok(());
        }
        for post in waiting {
            let to = match post.to {
                Place::Results => RESULTS,
                Place::Answers => ANSWERS,
            };
            send(channel, &queue(shop, to), &post.label, &post.payload).await?;
            // If the program ends before this line, it is sent again.
            block_in_place(|| orders.cross_off(&post))?;
        }
    }
}
// ANCHOR_END: send

fn open(file: &str, rule: Rule) -> Result<Orders> {
    // The mistake, to see what it costs: forgets when it is killed.
    let path = if file == "--in-memory" {
        ":memory:"
    } else {
        file
    };
    Orders::open(Path::new(path), rule).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let mut story = Story::begin(&connection).await?;
    story.place(1).await?;
    story.split(1).await?;
    story.work(3).await?;
    story.gather(4).await?;

    // The splitter dies before its ack, and the order comes again.
    story.place(2).await?;
    story.split(2).await?;
    story.work(4).await?;
    story.gather(6).await?;

    // Nobody takes the last line of four, until the customer has gone.
    story.place(3).await?;
    story.split(1).await?;
    story.work(3).await?;
    story.gather(4).await?;
    story.remind().await?;
    story.gather(1).await?;
    story.work(1).await?;
    story.gather(1).await?;
    story.show_results().await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    channel: Channel,
    orders: Orders,
    baskets: Consumer,
    lines: Consumer,
    answers: Consumer,
    results: Consumer,
}

impl Story {
    async fn begin(connection: &Connection) -> Result<Self> {
        let channel = open_channel(connection, STORY).await?;
        Ok(Self {
            orders: open("--in-memory", Rule::EachLineAnswered)?,
            baskets: story_queue(&channel, ORDERS).await?,
            lines: story_queue(&channel, LINES).await?,
            answers: story_queue(&channel, ANSWERS).await?,
            results: story_queue(&channel, RESULTS).await?,
            channel,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let within = Duration::from_secs(1);
        place_one(&self.channel, STORY, number, within).await?;
        Ok(())
    }

    /// Splits the next order, so many times.
    async fn split(&mut self, times: u32) -> Result<()> {
        let delivery = next(&mut self.baskets).await?;
        for _time in 0..times {
            let said = split(&self.channel, STORY, &delivery).await?;
            said.map_err(|reason| anyhow!(reason))?;
        }
        acknowledge(&delivery).await
    }

    async fn work(&mut self, lines: u32) -> Result<()> {
        for _line in 0..lines {
            let delivery = next(&mut self.lines).await?;
            let said = work(&self.channel, STORY, &delivery).await?;
            said.map_err(|reason| anyhow!(reason))?;
            acknowledge(&delivery).await?;
        }
        Ok(())
    }

    async fn gather(&mut self, messages: u32) -> Result<()> {
        for _message in 0..messages {
            let delivery = next(&mut self.answers).await?;
            take(&self.channel, STORY, &mut self.orders, &delivery).await?;
            acknowledge(&delivery).await?;
        }
        send_waiting(&self.channel, STORY, &mut self.orders).await
    }

    /// Waits for the deadline.
    async fn remind(&mut self) -> Result<()> {
        sleep(self.orders.wait(now())?).await;
        self.orders.remind(now())?;
        send_waiting(&self.channel, STORY, &mut self.orders).await
    }

    async fn show_results(&mut self) -> Result<()> {
        let mut results = Vec::new();
        for _result in 0..3 {
            let delivery = next(&mut self.results).await?;
            let report: Report = serde_json::from_slice(&delivery.data)?;
            results.push(report.summary());
            acknowledge(&delivery).await?;
        }
        println!("results:   {}", results.join(", "));
        Ok(())
    }
}
// ANCHOR_END: story

/// What an earlier run has left is no part of the story.
async fn story_queue(channel: &Channel, name: &str) -> Result<Consumer> {
    let queue = queue(STORY, name);
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(queue.as_str().into(), purge).await?;
    consume(channel, &queue).await
}

async fn next(deliveries: &mut Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    received(delivery.context("nothing came; has another taken it?")?)
}

// ---- Queues and connection -------------------------------------------------

fn queue(shop: &str, name: &str) -> String {
    format!("{shop}.{name}")
}

// ANCHOR: channel
/// A channel on which all queues are declared, and what is published is confirmed.
async fn open_channel(connection: &Connection, shop: &str) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    for name in QUEUES {
        let queue = queue(shop, name);
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        // No limit: by default a message is deleted after twenty programs that were
        // killed while they had it, and a line or an answer with it.
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(-1));
        // Of two aggregators, each would get some of the answers.
        let single = name == ANSWERS;
        arguments.insert("x-single-active-consumer".into(), single.into());
        channel
            .queue_declare(
                queue.as_str().into(),
                QueueDeclareOptions::durable(),
                arguments,
            )
            .await
            .map_err(|error| {
                anyhow!(
                    "cannot declare the queue {queue} ({error}); if it was made with \
                     other arguments, delete it first"
                )
            })?;
    }
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    Ok(channel)
}
// ANCHOR_END: channel

// ANCHOR: publish
/// Sends what is about an order, with its label in the headers.
async fn send(
    channel: &Channel,
    queue: &str,
    label: &Label,
    payload: &[u8],
) -> Result<()> {
    let mut headers = FieldTable::default();
    for (name, value) in label.headers() {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    publish(channel, queue, headers, payload).await
}

/// Returns when RabbitMQ has stored the message.
async fn publish(
    channel: &Channel,
    queue: &str,
    headers: FieldTable,
    payload: &[u8],
) -> Result<()> {
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let confirm = channel
        .basic_publish("".into(), queue.into(), options, payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store it in {queue}: {answer:?}"),
    }
}
// ANCHOR_END: publish

/// Keeps what nobody can read, as it came, where a person can look at it. It is
/// acknowledged after that: nothing behind it waits for it.
async fn set_aside(
    channel: &Channel,
    shop: &str,
    delivery: &Delivery,
    reason: &str,
) -> Result<()> {
    let headers = delivery.properties.headers().clone();
    let mut headers = headers.unwrap_or_default();
    let text = AMQPValue::LongString(reason.into());
    headers.insert(header::REASON.into(), text);
    publish(channel, &queue(shop, ASIDE), headers, &delivery.data).await?;
    eprintln!("set aside: {reason}");
    Ok(())
}

/// The label of a message, or what is wrong with it.
fn label(delivery: &Delivery) -> Result<Label, String> {
    Label::read(|name| {
        let headers = delivery.properties.headers().as_ref()?;
        let value = headers.inner().get(name)?.as_long_string()?;
        str::from_utf8(value.as_bytes()).ok().map(str::to_owned)
    })
}

async fn consume(channel: &Channel, queue: &str) -> Result<Consumer> {
    let deliveries = channel
        .basic_consume(
            queue.into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(deliveries)
}

fn received(delivery: Option<lapin::Result<Delivery>>) -> Result<Delivery> {
    delivery
        .context("RabbitMQ ended it: is the queue deleted?")?
        .context("lost RabbitMQ; what is not acknowledged will come again")
}

async fn acknowledge(delivery: &Delivery) -> Result<()> {
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
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
