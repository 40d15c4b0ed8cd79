//! Retry and dead letters: tried again later, given up in time, sent back once mended.
//!
//! Teaches: a queue without a consumer, with a time to live and a way back, is a delay.
//! A parcel that fails is published there, one queue for each delay, and acknowledged
//! when RabbitMQ has confirmed it; the parcels behind it go on. After the last delay,
//! or at once if no retry helps, the bytes go to the dead letters, with all that is
//! known of them. The redrive sends back what was there when it began. The price is
//! the order.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin retry_dlq_rabbitmq                             # the whole story
//! cargo run --bin retry_dlq_rabbitmq worker carrier.db           # terminal 1
//! cargo run --bin retry_dlq_rabbitmq carrier carrier.db down 2   # terminal 2
//! cargo run --bin retry_dlq_rabbitmq producer 1 5
//! cargo run --bin retry_dlq_rabbitmq dead                     # what nobody could book
//! cargo run --bin retry_dlq_rabbitmq carrier carrier.db mend
//! cargo run --bin retry_dlq_rabbitmq redrive                     # redrive transient
//! cargo run --bin retry_dlq_rabbitmq worker carrier.db --at-once # without a wait
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:     parcel-1 to parcel-5
//! booked:   parcel-1, attempt 1
//! failed:   parcel-2, attempt 1, Ghent does not answer; again in 500 ms
//! failed:   parcel-3, attempt 1, no depot in Atlantis; to the dead letters
//! failed:   parcel-4, attempt 1, Turin does not answer; again in 500 ms
//! booked:   parcel-5, attempt 1
//! failed:   parcel-2, attempt 2, Ghent does not answer; again in 1000 ms
//! failed:   parcel-4, attempt 2, Turin does not answer; again in 1000 ms
//! booked:   parcel-2, attempt 3
//! failed:   parcel-4, attempt 3, Turin does not answer; again in 2000 ms
//! failed:   parcel-4, attempt 4, Turin does not answer; to the dead letters
//! kept:     parcel-3, attempt 1 was the last, permanent: no depot in Atlantis
//!           from parcels.booking, first failed <time>
//! kept:     parcel-4, attempt 4 was the last, transient: Turin does not answer
//!           from parcels.booking, first failed <time>
//! mended:   Turin answers, and Atlantis has a depot
//! redriven: parcel-3
//! redriven: parcel-4
//! booked:   parcel-3, attempt 1
//! booked:   parcel-4, attempt 1
//! left:     0 in parcels.dead; 5 parcels booked, each once
//! ```
//!
//! Left out on purpose: an outage that outlasts the ladder, for which a worker better
//! pauses than carries all its parcels to the dead letters; and the delayed retry of
//! quorum queues since RabbitMQ 4.3 (`x-delayed-retry-type`), which needs no ladder
//! and keeps no error.

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

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::{BasicGetMessage, Delivery},
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions,
        BasicNackOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::retry_dlq::{
    Answer, Carrier, DELAYS, Kind, Parcel, Past, Verdict, name, now, parcel, verdict,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const LINE: &str = "parcels.booking";
/// One for each of `DELAYS`.
const WAITS: [&str; DELAYS.len()] =
    ["parcels.wait-500", "parcels.wait-1000", "parcels.wait-2000"];
const DEAD: &str = "parcels.dead";
const CONSUMER_TAG: &str = "carrier-booking";
const USAGE: &str = "usage: retry_dlq_rabbitmq [producer FIRST LAST | worker FILE \
                     [--at-once | --slow] | dead | redrive [transient | permanent | \
                     --slow] | carrier FILE (down SECONDS | mend)]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// With `--slow`: how long there is time to kill the program.
const PAUSE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => produce(first, last).await,
            _ => return usage(),
        },
        ["worker", file] => worker(file, Pace::Ladder).await,
        ["worker", file, "--at-once"] => worker(file, Pace::AtOnce).await,
        ["worker", file, "--slow"] => worker(file, Pace::Slow).await,
        ["dead"] => show_dead().await,
        ["redrive"] => redrive(None, Pace::Ladder).await,
        ["redrive", "--slow"] => redrive(None, Pace::Slow).await,
        ["redrive", kind] => match kind.parse() {
            Ok(kind) => redrive(Some(kind), Pace::Ladder).await,
            Err(()) => return usage(),
        },
        ["carrier", file, "mend"] => mend(file),
        ["carrier", file, "down", seconds] => match seconds.parse() {
            Ok(seconds) => go_down(file, Duration::from_secs(seconds)),
            Err(_no_number) => return usage(),
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
enum Pace {
    Ladder,
    /// With a pause in which to kill the program: after a failure and before anything
    /// has come of it, or between the two halves of a redrive.
    Slow,
    /// The mistake, to see what it costs: as many attempts, and no time between them.
    AtOnce,
}

// ---- Producer --------------------------------------------------------------

async fn produce(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    let channel = open_channel(&connection).await?;
    send(&channel, first, last).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn send(channel: &Channel, first: u64, last: u64) -> Result<()> {
    for number in first..=last {
        let parcel = parcel(number);
        let payload = serde_json::to_vec(&parcel)?;
        let properties = BasicProperties::default()
            .with_message_id(parcel.id.into())
            .with_content_type("application/json".into())
            .with_delivery_mode(2); // persistent
        publish(channel, LINE, &payload, properties).await?;
    }
    println!("sent:     parcel-{first} to parcel-{last}");
    Ok(())
}

/// Returns when RabbitMQ has stored it.
async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
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

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(file: &str, pace: Pace) -> Result<()> {
    let mut carrier = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let channel = open_channel(&connection).await?;
    let mut parcels = take_parcels(&channel).await?;
    println!("ready:    parcels from {LINE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = parcels.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {LINE} deleted?"))?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        // Begun, it is finished: also after a Ctrl-C.
        let past = attempt(&mut carrier, &delivery, pace)?;
        if let Some((past, verdict)) = past {
            if pace == Pace::Slow {
                time_to_kill().await;
            }
            pass_on(&channel, &delivery, &past, &verdict, pace).await?;
        }
        ack(&delivery).await?;
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: attempt
/// Asks the carrier once. If it fails: what is known of the parcel now, and what is to
/// become of it.
fn attempt(
    carrier: &mut Carrier,
    delivery: &Delivery,
    pace: Pace,
) -> Result<Option<(Past, Verdict)>> {
    let name = name(&delivery.data);
    let earlier = Past::read(|key| header(delivery, key));
    let attempt = earlier.as_ref().map_or(0, |past| past.attempts) + 1;
    let answer = match Parcel::read(&delivery.data) {
        // A database blocks its thread.
        Ok(parcel) => block_in_place(|| carrier.book(&parcel, now()))
            .with_context(|| format!("cannot ask the carrier for {name}"))?,
        Err(failure) => Err(failure),
    };
    let failure = match answer {
        Ok(Answer::Booked) => {
            println!("booked:   {name}, attempt {attempt}");
            return Ok(None);
        }
        Ok(Answer::Known) => {
            println!("known:    {name}, not booked again");
            return Ok(None);
        }
        Err(failure) => failure,
    };
    let verdict = verdict(attempt, failure.kind);
    let then = verdict.words(pace == Pace::AtOnce);
    println!(
        "failed:   {name}, attempt {attempt}, {}; {then}",
        failure.error
    );
    let origin = LINE.to_owned();
    Ok(Some((
        Past::after(earlier, failure, origin, now()),
        verdict,
    )))
}
// ANCHOR_END: attempt

// ANCHOR: pass_on
/// Returns when RabbitMQ has it in the next queue. Killed after that and before the
/// acknowledgement, the parcel is there twice, and the carrier books it once.
async fn pass_on(
    channel: &Channel,
    delivery: &Delivery,
    past: &Past,
    verdict: &Verdict,
    pace: Pace,
) -> Result<()> {
    let mut headers = theirs(delivery);
    for (key, value) in past.headers() {
        headers.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    let queue = match verdict {
        Verdict::Again(_) if pace == Pace::AtOnce => LINE,
        Verdict::Again(rung) => WAITS[*rung],
        Verdict::Dead => DEAD,
    };
    copy(channel, queue, delivery, headers)
        .await
        .context("the parcel stays where it is")
}

/// The bytes as they came.
async fn copy(
    channel: &Channel,
    queue: &str,
    delivery: &Delivery,
    headers: FieldTable,
) -> Result<()> {
    let mut properties = BasicProperties::default()
        .with_headers(headers)
        .with_delivery_mode(2); // persistent
    if let Some(id) = delivery.properties.message_id() {
        properties = properties.with_message_id(id.clone());
    }
    if let Some(format) = delivery.properties.content_type() {
        properties = properties.with_content_type(format.clone());
    }
    publish(channel, queue, &delivery.data, properties).await
}
// ANCHOR_END: pass_on

async fn ack(delivery: &Delivery) -> Result<()> {
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
    Ok(())
}

fn header(delivery: &Delivery, key: &str) -> Option<String> {
    let headers = delivery.properties.headers().as_ref()?.inner();
    let value = headers.get(key)?.as_long_string()?;
    Some(value.to_string())
}

/// What the producer wrote, without what this program and RabbitMQ have added.
fn theirs(delivery: &Delivery) -> FieldTable {
    let mut theirs = FieldTable::default();
    let headers = delivery.properties.headers().iter();
    for (key, value) in headers.flat_map(|headers| headers.inner()) {
        if !Past::owns(key.as_str()) && !key.as_str().starts_with("x-") {
            theirs.insert(key.clone(), value.clone());
        }
    }
    theirs
}

async fn take_parcels(channel: &Channel) -> Result<Consumer> {
    // One: what waits in a worker that dies counts as delivered, and nothing is to be
    // moved by the limit of the queue that no worker has begun.
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let deliveries = channel
        .basic_consume(
            LINE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(deliveries)
}

/// Says when to kill the program, to see what becomes of the parcel in hand.
async fn time_to_kill() {
    println!("pause:    {} s, time to kill it", PAUSE.as_secs());
    sleep(PAUSE).await;
}

// ---- Dead letters ----------------------------------------------------------

async fn show_dead() -> Result<()> {
    let connection = connect().await?;
    let channel = open_channel(&connection).await?;
    let count = show(&channel).await?;
    println!("left:     {count} in {DEAD}");
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Shows them, and leaves them where they are.
async fn show(channel: &Channel) -> Result<usize> {
    let mut letters = Vec::new();
    for _letter in 0..count(channel).await? {
        let Some(letter) = take(channel).await? else {
            break;
        };
        let past = Past::read(|key| header(&letter, key));
        let past = past.map_or("nothing is known".to_owned(), |it| it.to_string());
        println!("kept:     {}, {past}", name(&letter.data));
        letters.push(letter);
    }
    give_back(channel, &letters).await?;
    Ok(letters.len())
}

/// `only` is the kind to send back, with nothing all of them.
async fn redrive(only: Option<Kind>, pace: Pace) -> Result<()> {
    let connection = connect().await?;
    let channel = open_channel(&connection).await?;
    redrive_all(&channel, only, pace).await?;
    println!("left:     {} in {DEAD}", count(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: redrive
/// Sends back as many as were there at the beginning, and nothing of what comes
/// meanwhile: a carrier that is still down would keep it going for ever.
async fn redrive_all(
    channel: &Channel,
    only: Option<Kind>,
    pace: Pace,
) -> Result<()> {
    let mut stay = Vec::new();
    for _letter in 0..count(channel).await? {
        let Some(letter) = take(channel).await? else {
            break;
        };
        let past = Past::read(|key| header(&letter, key));
        if only.is_some_and(|only| past.is_none_or(|past| past.kind != only)) {
            // Held until the end, or it would come again next.
            stay.push(letter);
            continue;
        }
        // Without the past: it begins anew, with its first attempt.
        copy(channel, LINE, &letter, theirs(&letter)).await?;
        println!("redriven: {}", name(&letter.data));
        if pace == Pace::Slow {
            time_to_kill().await;
        }
        // Stored there, so it may go here. Killed before this line, it is sent twice
        // and booked once.
        ack(&letter).await?;
    }
    give_back(channel, &stay).await
}
// ANCHOR_END: redrive

async fn count(channel: &Channel) -> Result<u32> {
    let passive = QueueDeclareOptions::durable().passive();
    let none = FieldTable::default();
    let queue = channel.queue_declare(DEAD.into(), passive, none).await?;
    Ok(queue.message_count())
}

async fn take(channel: &Channel) -> Result<Option<BasicGetMessage>> {
    let get = channel.basic_get(DEAD.into(), BasicGetOptions::default());
    Ok(timeout(PATIENCE, get).await.context("lost RabbitMQ")??)
}

/// To where they were. Who is killed before has the same done by the end of the
/// connection.
async fn give_back(channel: &Channel, letters: &[BasicGetMessage]) -> Result<()> {
    for letter in letters {
        let options = BasicNackOptions {
            requeue: true,
            ..BasicNackOptions::default()
        };
        let nack = timeout(PATIENCE, letter.nack(options));
        nack.await.context("lost RabbitMQ")??;
    }
    // A nack has no answer, and the queue counts them a moment later. Not for ever:
    // somebody else may take them.
    for _look in 0..100 {
        if count(channel).await? as usize >= letters.len() {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

// ---- Carrier ---------------------------------------------------------------

fn open(file: &str) -> Result<Carrier> {
    Carrier::open(Path::new(file)).with_context(|| format!("cannot use {file}"))
}

fn mend(file: &str) -> Result<()> {
    open(file)?.mend()?;
    println!("mended:   the carrier of {file}");
    Ok(())
}

fn go_down(file: &str, lasts: Duration) -> Result<()> {
    open(file)?.go_down(lasts)?;
    println!(
        "down:     from the next request on, for {} s",
        lasts.as_secs()
    );
    Ok(())
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = open_channel(&connection).await?;
    // What an earlier run has left is no part of the story.
    for queue in [&[LINE, DEAD], &WAITS[..]].concat() {
        let purge = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), purge).await?;
    }
    let mut parcels = take_parcels(&channel).await?;
    let mut carrier = open(":memory:")?;
    // Two attempts fail for the one town, and each for the other.
    carrier.fail("Ghent", 2)?;
    carrier.fail("Turin", 1000)?;

    send(&channel, 1, 5).await?;
    // Five parcels, and five times one of them again.
    work(&mut carrier, &mut parcels, &channel, 10).await?;
    show(&channel).await?;

    carrier.mend()?;
    println!("mended:   Turin answers, and Atlantis has a depot");
    redrive_all(&channel, None, Pace::Ladder).await?;
    work(&mut carrier, &mut parcels, &channel, 2).await?;

    let requests = carrier.requests()?;
    let booked = requests.iter().filter(|request| request.booked).count();
    println!(
        "left:     {} in {DEAD}; {booked} parcels booked, each once",
        count(&channel).await?
    );
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

/// So many attempts.
async fn work(
    carrier: &mut Carrier,
    parcels: &mut Consumer,
    channel: &Channel,
    attempts: usize,
) -> Result<()> {
    let pace = Pace::Ladder;
    for _attempt in 0..attempts {
        let delivery = timeout(PATIENCE, parcels.next()).await;
        let delivery = delivery.context("no parcel came; has another taken it?")?;
        let delivery = delivery.context("RabbitMQ ended the consumer")??;
        if let Some((past, verdict)) = attempt(carrier, &delivery, pace)? {
            pass_on(channel, &delivery, &past, &verdict, pace).await?;
        }
        ack(&delivery).await?;
    }
    Ok(())
}

// ---- Queues and connection -------------------------------------------------

/// A channel that confirms, and all the queues.
async fn open_channel(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    declare(&channel).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: declare
async fn declare(channel: &Channel) -> Result<()> {
    // By default a quorum queue drops what was delivered 20 times; here is nowhere to
    // go from.
    let mut arguments = quorum();
    arguments.insert("x-delivery-limit".into(), (-1).into());
    queue(channel, DEAD, arguments).await?;
    // What kills worker after worker ends there as well, by the limit of the queue.
    queue(channel, LINE, leads_to(DEAD)).await?;
    for (name, delay) in WAITS.iter().zip(DELAYS) {
        let delay = u32::try_from(delay.as_millis())?;
        let mut arguments = leads_to(LINE);
        // Of the queue, and not of each message: only the first one is looked at, and
        // a short delay would wait behind a long one.
        arguments.insert("x-message-ttl".into(), AMQPValue::LongUInt(delay));
        queue(channel, name, arguments).await?;
    }
    Ok(())
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    arguments
}

/// A queue that hands over what it gives up.
fn leads_to(next: &str) -> FieldTable {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = quorum();
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(next));
    // Kept here until it is stored there; by default it may be lost on its way.
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
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
