//! Delayed message: a reminder that comes when it is due, unless it is cancelled.
//!
//! Teaches: a queue without a consumer, whose messages have a limit of time and then go
//! to the queue of what is due, is a delay. It takes one queue for each delay:
//! RabbitMQ looks at the first message of a queue alone, so with a limit for each
//! message (`expiration`) a short delay behind a long one comes late. And no message can
//! be taken out of the middle of a queue by its id. So it is cancelled where it arrives:
//! whoever sends the mail asks first whether the invoice is paid.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin delayed_message_rabbitmq                     # the whole story
//! cargo run --bin delayed_message_rabbitmq remind shop.db      # terminal 1
//! cargo run --bin delayed_message_rabbitmq plan 1 5 10         # terminal 2
//! cargo run --bin delayed_message_rabbitmq cancel 3 shop.db
//! cargo run --bin delayed_message_rabbitmq plan 6 6 10 --one-queue
//! cargo run --bin delayed_message_rabbitmq plan 7 7 1 --one-queue  # late
//! ```
//!
//! Expected output:
//!
//! ```text
//! planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s
//! cancelled: invoice-3, which is paid
//! due:       invoice-2, not before its time
//! dropped:   invoice-3, which is paid
//! due:       invoice-1, not before its time
//! never:     invoice-3
//! ```
//!
//! Left out on purpose: a plan that moves. The old message comes all the same; give each
//! plan a number, and drop what does not bear the last one.

use std::{
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
    Consumer,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::delayed_message::{Payments, Reminder, invoice, now};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const SHOP: Place = Place {
    planned: "reminders.planned",
    due: "reminders.due",
};
/// The story has queues of its own: what it plans is no business of those who remind
/// beside it.
const STORY: Place = Place {
    planned: "reminders-story.planned",
    due: "reminders-story.due",
};
/// The delays that there are, in seconds, with a queue for each. In production, some
/// days: the queues are named after them.
const DELAYS: [u64; 5] = [1, 2, 4, 10, 20];
/// Where the mistake puts all delays together.
const ONE_QUEUE: &str = "reminders.planned-mixed";
/// Where what nobody can read is kept.
const UNREADABLE: &str = "reminders.unreadable";
const CONSUMER_TAG: &str = "reminder-mail";
/// How many reminders may be on their way to the one who sends the mail.
const PREFETCH: u16 = 20;
const USAGE: &str = "usage: delayed_message_rabbitmq [plan FIRST LAST SECONDS \
                     [--one-queue] | cancel NUMBER FILE | remind FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a reminder may let wait for itself.
const LATEST: Duration = Duration::from_secs(30);

/// Where plans lie, and where they appear when they are due.
struct Place {
    /// The first part of a name; the delay is the second.
    planned: &'static str,
    due: &'static str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["plan", first, last, seconds, ref rest @ ..] => {
            let queues = match rest {
                [] => Queues::OneForEachDelay,
                ["--one-queue"] => Queues::One,
                _ => return usage(),
            };
            match (first.parse(), last.parse(), seconds.parse()) {
                (Ok(first), Ok(last), Ok(seconds)) if first <= last => {
                    plan_all(first, last, seconds, queues).await
                }
                _ => return usage(),
            }
        }
        ["cancel", number, file] => match number.parse() {
            Ok(number) => cancel_one(number, file),
            Err(_no_number) => return usage(),
        },
        ["remind", file] => remind(file).await,
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

/// Where planned reminders lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Queues {
    OneForEachDelay,
    /// The mistake, to see what it costs.
    One,
}

// ---- Plan and cancel -------------------------------------------------------

async fn plan_all(
    first: u64,
    last: u64,
    seconds: u64,
    queues: Queues,
) -> Result<()> {
    ensure!(
        queues == Queues::One || DELAYS.contains(&seconds),
        "no queue waits for {seconds} s; there are queues for {DELAYS:?}"
    );
    let connection = connect().await?;
    let channel = publisher(&connection, &SHOP).await?;
    for number in first..=last {
        plan(&channel, &SHOP, number, seconds, queues).await?;
        println!("planned:   {} in {seconds} s", invoice(number));
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: cancel
/// In the database of the shop: to RabbitMQ there is nothing to say.
fn cancel_one(number: u64, file: &str) -> Result<()> {
    let mut payments = open(file)?;
    let invoice = invoice(number);
    payments
        .pay(&invoice)
        .with_context(|| format!("{invoice} is not cancelled"))?;
    println!("cancelled: {invoice}");
    Ok(())
}
// ANCHOR_END: cancel

async fn publisher(connection: &Connection, place: &Place) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare(&channel, place).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: plan
/// Returns when RabbitMQ has stored the reminder: from now on it does not depend on
/// this program.
async fn plan(
    channel: &Channel,
    place: &Place,
    number: u64,
    seconds: u64,
    queues: Queues,
) -> Result<()> {
    let delay = Duration::from_secs(seconds);
    let reminder = Reminder::after(number, now(), delay);
    let payload = serde_json::to_vec(&reminder)?;
    let properties = BasicProperties::default().with_content_type(JSON.into());
    match queues {
        Queues::OneForEachDelay => {
            let queue = delay_queue(place, seconds);
            publish(channel, &queue, &payload, properties).await
        }
        // A limit of its own for the message; the queue has none.
        Queues::One => {
            let limit = delay.as_millis().to_string();
            let properties = properties.with_expiration(limit.into());
            publish(channel, ONE_QUEUE, &payload, properties).await
        }
    }
}
// ANCHOR_END: plan

const JSON: &str = "application/json";

async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
    let properties = properties.with_delivery_mode(2); // persistent
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

// ---- Wait ------------------------------------------------------------------

// ANCHOR: declare
/// RabbitMQ waits by itself: the queues are all that there is to it.
async fn declare(channel: &Channel, place: &Place) -> Result<()> {
    queue(channel, place.due, FieldTable::default()).await?;
    queue(channel, UNREADABLE, FieldTable::default()).await?;
    for seconds in DELAYS {
        let mut arguments = leads_to(place.due);
        let limit = i64::try_from(seconds * 1000)?;
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(limit));
        queue(channel, &delay_queue(place, seconds), arguments).await?;
    }
    queue(channel, ONE_QUEUE, leads_to(SHOP.due)).await
}

/// What is over its time goes to this queue, through the default exchange.
fn leads_to(due: &str) -> FieldTable {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(due));
    // The message stays until its next queue has confirmed it.
    let strategy = text("at-least-once");
    arguments.insert("x-dead-letter-strategy".into(), strategy);
    // Without this, RabbitMQ falls back to `at-most-once`.
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

fn delay_queue(place: &Place, seconds: u64) -> String {
    format!("{}-{seconds}s", place.planned)
}
// ANCHOR_END: declare

// ---- Remind ----------------------------------------------------------------

// ANCHOR: remind
async fn remind(file: &str) -> Result<()> {
    let payments = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, mut deliveries) = take_due(&connection, &SHOP).await?;
    println!("ready:     reminders from {}, Ctrl-C to stop", SHOP.due);
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {} gone?", SHOP.due))?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        match Reminder::read(&delivery.data) {
            Some(reminder) => {
                // The clocks of two machines differ: who is early, waits.
                sleep(reminder.wait(now())).await;
                let invoice = &reminder.invoice;
                // As late as possible. A database blocks its thread.
                if block_in_place(|| payments.is_paid(invoice))? {
                    println!("dropped:   {invoice}, which is paid");
                } else {
                    println!("due:       {invoice}");
                }
            }
            None => {
                eprintln!("not a reminder, set aside in {UNREADABLE}");
                let properties = delivery.properties.clone();
                publish(&channel, UNREADABLE, &delivery.data, properties).await?;
            }
        }
        // If the program ends before this line, the customer is reminded twice.
        let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
        ack.await.context("lost RabbitMQ")??;
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: remind

async fn take_due(
    connection: &Connection,
    place: &Place,
) -> Result<(Channel, Consumer)> {
    let channel = publisher(connection, place).await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let deliveries = channel
        .basic_consume(
            place.due.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
}

fn open(file: &str) -> Result<Payments> {
    Payments::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection, &STORY).await?;
    // What an earlier run has left is no part of the story.
    let delays = DELAYS.map(|seconds| delay_queue(&STORY, seconds));
    for queue in delays.iter().map(String::as_str).chain([STORY.due]) {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    let mut payments = open(":memory:")?;

    for (number, seconds) in [(1, 4), (2, 1), (3, 2)] {
        let queues = Queues::OneForEachDelay;
        plan(&channel, &STORY, number, seconds, queues).await?;
    }
    println!("planned:   invoice-1 in 4 s, invoice-2 in 1 s, invoice-3 in 2 s");
    payments.pay("invoice-3")?;
    println!("cancelled: invoice-3, which is paid");

    let (_channel, mut deliveries) = take_due(&connection, &STORY).await?;
    for _reminder in 0..3 {
        let delivery = timeout(LATEST, deliveries.next()).await;
        let delivery = delivery.context("no reminder came within 30 s")?;
        let delivery = delivery.context("RabbitMQ ended the consumer")??;
        let reminder = Reminder::read(&delivery.data).context("not a reminder")?;
        let (invoice, early) = (&reminder.invoice, reminder.wait(now()));
        ensure!(early.is_zero(), "{invoice} came {early:?} before its time");
        if payments.is_paid(invoice)? {
            println!("dropped:   {invoice}, which is paid");
        } else {
            println!("due:       {invoice}, not before its time");
        }
        delivery.ack(BasicAckOptions::default()).await?;
    }
    // It was due before the last one that came.
    println!("never:     invoice-3");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn queue(
    channel: &Channel,
    queue: &str,
    mut arguments: FieldTable,
) -> Result<()> {
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {queue} ({error}); if it was made with \
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
