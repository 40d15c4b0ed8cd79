//! Event replay: a service that is new, or made anew, reads the whole history.
//!
//! Teaches: a queue has nothing left of what was read; a stream keeps it. A service
//! that comes later builds its table from the first event on, and the same reader goes
//! on with what is live: no gap and no repeat at the seam. RabbitMQ keeps no position
//! of a reader over AMQP, so table and offset are in one transaction. A service that
//! sends mails is quiet up to where it was before.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin event_replay_rabbitmq                        # the whole story
//! cargo run --bin event_replay_rabbitmq publish 1 5000
//! cargo run --bin event_replay_rabbitmq mail shop.db           # then Ctrl-C
//! cargo run --bin event_replay_rabbitmq analytics shop.db      # kill it
//! cargo run --bin event_replay_rabbitmq publish 5001 5010      # live
//! cargo run --bin event_replay_rabbitmq mail shop.db --replay  # only the last ten
//! cargo run --bin event_replay_rabbitmq show shop.db
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: order-1 to order-4, 8 events
//! mail:      8 mails, one for each event
//! replay:    5 of 8 events, and analytics dies
//! published: order-5, 2 events, while analytics begins again
//! caught up: 3 events
//! live:      order-5 placed
//! live:      order-5 cancelled
//! revenue:   BR 1003, CN 1002, DE 1004, FR 1001 cents from 10 events
//! replay:    10 events for the mail service, from the first one on
//! mail:      to customer-5: order-5 is placed; 1 from you so far
//! mail:      to customer-5: order-5 is cancelled; 1 from you so far
//! caught up: 10 events
//! mails:     10, one for each event
//! ```
//!
//! Left out on purpose: a replay from a moment, which is an `x-stream-offset` that is a
//! time, and begins with the chunk in which that time is; an event that is published
//! twice, see idempotent_consumer_rabbitmq; the stream protocol, whose clients can ask
//! where a stream ends.

use std::{
    env,
    future::{Future, ready},
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
    Acker, BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::event_replay::{
    Care, Held, Place, Progress, Record, Service, Start, Tables, event,
};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const STREAM: &str = "order.events";
const STORY_STREAM: &str = "order.events.story";
/// At most so many events in a transaction.
const BATCH: usize = 100;
/// How many events may be on their way to a reader.
const PREFETCH: u16 = 200;
/// More than a chunk has, in which RabbitMQ stores what came at the same moment.
const CHUNK: u16 = 10_000;
const USAGE: &str = "usage: event_replay_rabbitmq [publish FIRST LAST | analytics FILE \
                     [--careless] | mail FILE [--replay [--careless]] | show FILE]";

const LOST: &str = "lost RabbitMQ; start it again, and it reads on";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a stream may take to show its last chunk before it counts as empty.
const EMPTY: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (analytics, mail) = (Service::Analytics, Service::Mail);
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if (1..=last).contains(&first) => {
                publish_all(first, last).await
            }
            _ => return usage(),
        },
        ["analytics", file] => {
            serve(analytics, file, Start::GoOn, Care::Taken).await
        }
        ["analytics", file, "--careless"] => {
            serve(analytics, file, Start::GoOn, Care::Late).await
        }
        ["mail", file] => serve(mail, file, Start::GoOn, Care::Taken).await,
        ["mail", file, "--replay"] => {
            serve(mail, file, Start::Anew, Care::Taken).await
        }
        ["mail", file, "--replay", "--careless"] => {
            serve(mail, file, Start::Anew, Care::Loud).await
        }
        ["show", file] => show(file),
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

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel, STREAM).await?;
    publish(&channel, STREAM, first, last).await?;
    connection.close(200, "done".into()).await?;
    println!("published: {} events", (last + 1).saturating_sub(first));
    Ok(())
}

// ANCHOR: publish
/// Returns when RabbitMQ has stored all events.
async fn publish(
    channel: &Channel,
    stream: &str,
    first: u64,
    last: u64,
) -> Result<()> {
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let mut numbers = first..=last;
    loop {
        // So many on their way, and no more.
        let mut on_their_way = Vec::new();
        for number in numbers.by_ref().take(BATCH) {
            let event = event(number);
            let payload = serde_json::to_vec(&event)?;
            let properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_message_id(event.id().into());
            let options = BasicPublishOptions {
                mandatory: true, // return it if no stream takes it
                ..BasicPublishOptions::default()
            };
            let confirm = channel
                .basic_publish(
                    "".into(),
                    stream.into(),
                    options,
                    &payload,
                    properties,
                )
                .await?;
            on_their_way.push(confirm);
        }
        if on_their_way.is_empty() {
            return Ok(());
        }
        for confirm in on_their_way {
            let answer = timeout(PATIENCE, confirm).await.context(
                "RabbitMQ has not confirmed within 8 s; it may be blocked",
            )??;
            match answer {
                Confirmation::Ack(None) => {}
                answer => bail!("RabbitMQ did not store an event: {answer:?}"),
            }
        }
    }
}
// ANCHOR_END: publish

// ---- Service ---------------------------------------------------------------

// ANCHOR: serve
/// Reads until Ctrl-C. Where history ends and live begins, nothing is switched.
async fn serve(
    service: Service,
    file: &str,
    start: Start,
    care: Care,
) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let mut tables = open(file, service)?;
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    declare(&channel, STREAM).await?;
    let begun = begin(&connection, &channel, STREAM, &mut tables, start).await;
    let (mut events, mut places) = begun.with_context(|| file.to_owned())?;
    let mut progress = Progress::new(&places);
    let history = progress.history();
    println!("ready:     {history} events in {STREAM}, Ctrl-C to stop");
    let mut batch = Batch::default();
    // Of nothing: it says so if nothing is history.
    apply(&mut tables, &[], &mut places, care, &mut progress)?;
    loop {
        let gathered = tokio::select! {
            // In this order: by default `select!` picks at random among what is ready.
            biased;
            // What is gathered and not in the table is read again.
            () = &mut stop_signal => break,
            gathered = gather(&mut events, &mut batch, BATCH) => gathered,
        };
        apply(
            &mut tables,
            &batch.records,
            &mut places,
            care,
            &mut progress,
        )?;
        gathered?;
        batch.make_room().await?;
    }
    if care == Care::Late {
        tables.write_late(&places)?;
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: serve

fn open(file: &str, service: Service) -> Result<Tables> {
    Tables::open(Path::new(file), service)
        .with_context(|| format!("cannot use {file}"))
}

// ANCHOR: begin
/// A reader that begins where the tables say.
async fn begin(
    connection: &Connection,
    channel: &Channel,
    stream: &str,
    tables: &mut Tables,
    start: Start,
) -> Result<(Consumer, [Place; 1])> {
    let empty = if tables.reached()?.is_some_and(|next| next > 0) {
        // Something was read of it, so it has something.
        PATIENCE
    } else {
        EMPTY
    };
    let held = held(connection, stream, empty).await?;
    let places = tables.begin(&[held], start)?;
    let [place] = places[..] else {
        bail!("a stream is one log");
    };
    let next = AMQPValue::LongLongInt(place.next);
    let events = consume(channel, stream, next, PREFETCH).await?;
    Ok((events, [place]))
}

/// What RabbitMQ has of the stream. There is no question for that in AMQP; but one can
/// look at the first message, and at the last chunk.
async fn held(
    connection: &Connection,
    stream: &str,
    empty: Duration,
) -> Result<Held> {
    let last = AMQPValue::LongString("last".into());
    let Some((_, end)) = look(connection, stream, last, CHUNK, empty).await? else {
        return Ok(Held {
            partition: 0,
            first: 0,
            end: 0,
        });
    };
    let first = AMQPValue::LongString("first".into());
    let first = look(connection, stream, first, 1, PATIENCE).await?;
    let (first, _) = first.context("RabbitMQ does not show its first event")?;
    Ok(Held {
        partition: 0,
        first,
        end,
    })
}

/// The offset of the first message that comes from there, and the one after the last
/// that comes with it.
async fn look(
    connection: &Connection,
    stream: &str,
    from: AMQPValue,
    prefetch: u16,
    patience: Duration,
) -> Result<Option<(i64, i64)>> {
    let channel = connection.create_channel().await?;
    let mut events = consume(&channel, stream, from, prefetch).await?;
    let Ok(event) = timeout(patience, events.next()).await else {
        channel.close(200, "empty".into()).await?;
        return Ok(None);
    };
    let first = offset(&event.context("the stream is gone")??)?;
    let mut end = first + 1;
    // The rest of its chunk was sent before the answer to this.
    channel
        .basic_cancel(events.tag(), BasicCancelOptions::default())
        .await?;
    while let Some(event) = events.next().await {
        end = offset(&event?)? + 1;
    }
    channel.close(200, "looked".into()).await?;
    Ok(Some((first, end)))
}
// ANCHOR_END: begin

// ANCHOR: consume
async fn consume(
    channel: &Channel,
    stream: &str,
    from: AMQPValue,
    prefetch: u16,
) -> Result<Consumer> {
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), from);
    let options = BasicConsumeOptions::default();
    let events = channel
        .basic_consume(stream.into(), "".into(), options, arguments)
        .await?;
    Ok(events)
}

fn offset(event: &Delivery) -> Result<i64> {
    let headers = event.properties.headers().as_ref();
    headers
        .and_then(|headers| headers.inner().get("x-stream-offset"))
        .and_then(AMQPValue::as_long_long_int)
        .context("a message without an offset; is this no stream?")
}
// ANCHOR_END: consume

// ANCHOR: gather
/// Events that were read, and what is needed to ask for more.
#[derive(Default)]
struct Batch {
    records: Vec<Record>,
    last: Option<Acker>,
}

impl Batch {
    /// For a stream, an acknowledgement is room for the next ones; RabbitMQ notes
    /// nothing.
    async fn make_room(&mut self) -> Result<()> {
        self.records.clear();
        if let Some(last) = self.last.take() {
            let all = BasicAckOptions { multiple: true };
            let ack = timeout(PATIENCE, last.ack(all)).await;
            ack.context(LOST)?.context(LOST)?;
        }
        Ok(())
    }
}

/// Waits for an event, and takes what is there with it. What it has taken is in the
/// batch also when it fails, or is not waited for.
async fn gather(
    events: &mut Consumer,
    batch: &mut Batch,
    room: usize,
) -> Result<()> {
    let mut next = events.next().await;
    loop {
        let event = next.context("RabbitMQ ended it: is the stream deleted?")?;
        let event = event.context(LOST)?;
        batch.records.push(Record {
            partition: 0,
            offset: offset(&event)?,
            payload: event.data,
        });
        batch.last = Some(event.acker);
        if batch.records.len() == room {
            return Ok(());
        }
        next = tokio::select! {
            biased;
            next = events.next() => next,
            () = ready(()) => return Ok(()),
        };
    }
}
// ANCHOR_END: gather

/// Brings a batch into the table, and says what there is to say.
fn apply(
    tables: &mut Tables,
    batch: &[Record],
    places: &mut [Place],
    care: Care,
    progress: &mut Progress,
) -> Result<()> {
    // A database blocks its thread.
    let applied = block_in_place(|| tables.apply(batch, places, care));
    let applied = applied.context("not in the table; it will be read again")?;
    if applied.aside > 0 {
        eprintln!("set aside: {} that nobody can read", applied.aside);
    }
    for line in progress.lines(applied, places) {
        println!("{line}");
    }
    Ok(())
}

fn show(file: &str) -> Result<()> {
    ensure!(Path::new(file).exists(), "there is no {file}");
    let tables = open(file, Service::Analytics)?;
    for country in tables.countries()? {
        println!("country:   {country}");
    }
    println!("mails:     {}", tables.mails()?.len());
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    channel
        .queue_delete(STORY_STREAM.into(), QueueDeleteOptions::default())
        .await?;
    declare(&channel, STORY_STREAM).await?;
    publish(&channel, STORY_STREAM, 1, 8).await?;
    println!("published: order-1 to order-4, 8 events");
    let mut mail = open(":memory:", Service::Mail)?;
    read(&connection, &mut mail, Start::GoOn, 8, async || Ok(())).await?;
    let mails = mail.mails()?.len();
    println!("mail:      {mails} mails, one for each event");

    let mut analytics = open(":memory:", Service::Analytics)?;
    read(&connection, &mut analytics, Start::GoOn, 5, async || Ok(())).await?;
    println!("replay:    5 of 8 events, and analytics dies");
    let meanwhile = async || {
        publish(&channel, STORY_STREAM, 9, 10).await?;
        println!("published: order-5, 2 events, while analytics begins again");
        Ok(())
    };
    let said = read(&connection, &mut analytics, Start::GoOn, 5, meanwhile).await?;
    println!("{said}");
    println!("revenue:   {}", revenue(&analytics)?);

    println!("replay:    10 events for the mail service, from the first one on");
    let said =
        read(&connection, &mut mail, Start::Anew, 10, async || Ok(())).await?;
    println!("{said}");
    println!("mails:     {}, one for each event", mail.mails()?.len());
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// A reader of its own that takes so many events and ends. Returns what it has to say.
async fn read(
    connection: &Connection,
    tables: &mut Tables,
    start: Start,
    count: usize,
    meanwhile: impl AsyncFnOnce() -> Result<()>,
) -> Result<String> {
    let channel = connection.create_channel().await?;
    let begun = begin(connection, &channel, STORY_STREAM, tables, start).await?;
    let (mut events, mut places) = begun;
    meanwhile().await?;
    let mut progress = Progress::new(&places);
    let (mut left, mut said) = (count, Vec::new());
    while left > 0 {
        let mut batch = Batch::default();
        let gathered =
            timeout(PATIENCE, gather(&mut events, &mut batch, left)).await;
        gathered.context("no event came within 8 s")??;
        left -= batch.records.len();
        let applied = block_in_place(|| {
            tables.apply(&batch.records, &mut places, Care::Taken)
        })?;
        said.extend(progress.lines(applied, &places));
        batch.make_room().await?;
    }
    channel.close(200, "read".into()).await?;
    Ok(said.join("\n"))
}

fn revenue(analytics: &Tables) -> Result<String> {
    let countries = analytics.countries()?;
    let events = countries
        .iter()
        .map(|it| it.placed + it.paid + it.cancelled);
    let events: i64 = events.sum();
    let all = countries
        .iter()
        .map(|it| format!("{} {}", it.country, it.revenue));
    let all = all.collect::<Vec<_>>().join(", ");
    Ok(format!("{all} cents from {events} events"))
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

// ANCHOR: declare
/// Declares the stream, on both sides.
async fn declare(channel: &Channel, stream: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    // A queue has only what nobody has acknowledged yet. And no `x-max-age` and no
    // `x-max-length-bytes`: there is no replay of what is deleted.
    let kind = AMQPValue::LongString("stream".into());
    arguments.insert("x-queue-type".into(), kind);
    channel
        .queue_declare(stream.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
}
// ANCHOR_END: declare

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
