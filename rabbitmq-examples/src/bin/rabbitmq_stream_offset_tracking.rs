//! Stream offsets: go on where you were, without a gap and without doing it twice.
//!
//! Teaches: over AMQP, RabbitMQ does not remember how far a reader of a stream has
//! got; that is for the reader. Keep the offset in the database in which the work is
//! done, in the same transaction, and a program that is killed anywhere has done each
//! message once. Stored every so often, apart from the work, some are done again.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_stream_offset_tracking                 # the whole story
//! cargo run --bin rabbitmq_stream_offset_tracking publish 1000
//! cargo run --bin rabbitmq_stream_offset_tracking consume sales.db    # kill it
//! cargo run --bin rabbitmq_stream_offset_tracking consume sales.db --periodic
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:  10 sales in stream.sales
//! read:    4 sales, then the reader ends
//! resumed: at offset 4
//! total:   10 sales, 55 in all
//! ```
//!
//! Left out on purpose: a stream whose beginning was thrown away meanwhile; and the
//! stream protocol, whose clients can keep offsets in RabbitMQ.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use rusqlite::{OptionalExtension as _, params};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "stream.sales";
/// How many messages may be on their way to a consumer.
const PREFETCH: u16 = 100;
/// How often the careless reader stores its offset, in messages.
const PERIOD: i64 = 50;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let count = words.last().and_then(|word| word.parse().ok());
    let result = match (&words[..], count) {
        ([], _) => story().await,
        (["publish", _], Some(count)) => publish_many(count).await,
        (["consume", file], _) => consume(file, Store::WithTheWork).await,
        (["consume", file, "--periodic"], _) => {
            consume(file, Store::NowAndThen).await
        }
        _ => {
            eprintln!(
                "usage: rabbitmq_stream_offset_tracking [publish COUNT | consume \
                 FILE [--periodic]]"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    WithTheWork,
    /// The mistake, to see what it costs: work and offset, each by itself.
    NowAndThen,
}

// ANCHOR: database
/// What is made of the sales, and how far.
struct Totals(rusqlite::Connection);

impl Totals {
    fn new(database: rusqlite::Connection) -> Result<Self> {
        database.execute_batch(
            "CREATE TABLE IF NOT EXISTS total (sales INTEGER, amount INTEGER);
             INSERT INTO total SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM total);
             CREATE TABLE IF NOT EXISTS next (stream TEXT PRIMARY KEY, next INTEGER);",
        )?;
        Ok(Self(database))
    }

    /// The offset to go on at.
    fn next(&self) -> Result<i64> {
        let ask = "SELECT next FROM next WHERE stream = ?";
        let next = self.0.query_row(ask, [STREAM], |row| row.get(0));
        Ok(next.optional()?.unwrap_or(0))
    }

    /// The work and the offset behind it: both, or neither.
    fn add(&mut self, amount: i64, offset: i64) -> Result<()> {
        let transaction = self.0.transaction()?;
        add(&transaction, amount)?;
        store(&transaction, offset + 1)?;
        Ok(transaction.commit()?)
    }

    /// The work now, the offset now and then.
    fn add_carelessly(&mut self, amount: i64, offset: i64) -> Result<()> {
        add(&self.0, amount)?;
        if (offset + 1) % PERIOD == 0 {
            store(&self.0, offset + 1)?;
        }
        Ok(())
    }

    fn total(&self) -> Result<(i64, i64)> {
        let ask = "SELECT sales, amount FROM total";
        Ok(self
            .0
            .query_row(ask, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
    }
}

fn add(database: &rusqlite::Connection, amount: i64) -> Result<()> {
    let work = "UPDATE total SET sales = sales + 1, amount = amount + ?";
    database.execute(work, [amount])?;
    Ok(())
}

fn store(database: &rusqlite::Connection, next: i64) -> Result<()> {
    let upsert = "INSERT INTO next VALUES (?1, ?2)
                  ON CONFLICT (stream) DO UPDATE SET next = ?2";
    database.execute(upsert, params![STREAM, next])?;
    Ok(())
}
// ANCHOR_END: database

// ANCHOR: consume
async fn consume(file: &str, how: Store) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    let database = rusqlite::Connection::open(file)
        .with_context(|| format!("cannot open {file}"))?;
    let mut totals = Totals::new(database)?;
    let next = totals.next()?;
    let mut sales = read_from(&channel, next).await?;
    println!("ready:   sales from offset {next} on, Ctrl-C to stop");
    loop {
        let sale = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            sale = sales.next() => sale.context("the stream is gone")??,
        };
        let (amount, offset) = parse(&sale)?;
        // It waits for the disk, and tokio has to know.
        block_in_place(|| match how {
            Store::WithTheWork => totals.add(amount, offset),
            Store::NowAndThen => totals.add_carelessly(amount, offset),
        })?;
        // Room for the next; what was read is not what is acknowledged here.
        sale.ack(BasicAckOptions::default()).await?;
        println!("added:   sale at offset {offset}");
    }
    connection.close(200, "done".into()).await?;
    println!("stopped");
    Ok(())
}

async fn read_from(channel: &Channel, offset: i64) -> Result<Consumer> {
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let mut arguments = FieldTable::default();
    // One that does not exist yet is waited for.
    arguments.insert("x-stream-offset".into(), AMQPValue::LongLongInt(offset));
    let options = BasicConsumeOptions::default();
    let consumer = channel
        .basic_consume(STREAM.into(), "".into(), options, arguments)
        .await?;
    Ok(consumer)
}

/// The amount of a sale, and where in the stream it is.
fn parse(sale: &Delivery) -> Result<(i64, i64)> {
    let headers = sale.properties.headers().as_ref();
    let offset = headers
        .and_then(|headers| headers.inner().get("x-stream-offset"))
        .and_then(AMQPValue::as_long_long_int)
        .context("a sale without an offset")?;
    let text = std::str::from_utf8(&sale.data)?;
    Ok((text.parse()?, offset))
}
// ANCHOR_END: consume

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    channel
        .queue_delete(STREAM.into(), QueueDeleteOptions::default())
        .await?;
    declare(&channel).await?;
    publish(&channel, 1..=10).await?;
    println!("stored:  10 sales in {STREAM}");

    let mut totals = Totals::new(rusqlite::Connection::open_in_memory()?)?;
    read(&connection, &mut totals, 4).await?;
    println!("read:    4 sales, then the reader ends");
    println!("resumed: at offset {}", totals.next()?);
    read(&connection, &mut totals, 6).await?;
    let (sales, amount) = totals.total()?;
    println!("total:   {sales} sales, {amount} in all");
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Reads so many from where the totals are, with a consumer of its own.
async fn read(
    connection: &Connection,
    totals: &mut Totals,
    count: usize,
) -> Result<()> {
    let channel = connection.create_channel().await?;
    let mut sales = read_from(&channel, totals.next()?).await?;
    for _sale in 0..count {
        let sale = timeout(PATIENCE, sales.next()).await;
        let sale = sale.context("no sale came within 8 s")?;
        let sale = sale.context("the stream is gone")??;
        let (amount, offset) = parse(&sale)?;
        totals.add(amount, offset)?;
        sale.ack(BasicAckOptions::default()).await?;
    }
    // Others were on their way to it already; nobody has seen them.
    channel.close(200, "".into()).await?;
    Ok(())
}
// ANCHOR_END: story

async fn publish_many(count: i64) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    publish(&channel, 1..=count).await?;
    println!("stored:  {count} sales in {STREAM}");
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Sales of these amounts, all confirmed in the end.
async fn publish(
    channel: &Channel,
    amounts: std::ops::RangeInclusive<i64>,
) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut confirms = Vec::new();
    for amount in amounts {
        let sale = amount.to_string();
        let confirm = channel.basic_publish(
            "".into(),
            STREAM.into(),
            BasicPublishOptions::default(),
            sale.as_bytes(),
            BasicProperties::default(),
        );
        confirms.push(confirm.await?);
    }
    for confirm in confirms {
        let answer = timeout(PATIENCE, confirm)
            .await
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
        ensure!(answer.is_ack(), "RabbitMQ did not store a sale");
    }
    Ok(())
}

async fn declare(channel: &Channel) -> Result<()> {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    arguments.insert("x-max-age".into(), text("7D"));
    channel
        .queue_declare(STREAM.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| anyhow!("cannot declare the stream {STREAM} ({error})"))?;
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
