//! Retry and dead letters: tried again later, given up in time, sent back once mended.
//!
//! Teaches: a nak with a delay is all that a retry takes; NATS keeps the parcel, counts
//! the attempts, and the parcels behind it go on. A nak carries no note, so the time of
//! the first failure stands in a key-value bucket. After the last delay, or at once if
//! no retry helps, the bytes are stored in a stream for dead letters, with all that is
//! known of them, and then ended with a term. The redrive sends back what was there
//! when it began. The price is the order.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin retry_dlq_nats                             # the whole story
//! cargo run --bin retry_dlq_nats worker carrier.db           # terminal 1
//! cargo run --bin retry_dlq_nats carrier carrier.db down 2   # terminal 2
//! cargo run --bin retry_dlq_nats producer 1 5
//! cargo run --bin retry_dlq_nats dead                        # what nobody could book
//! cargo run --bin retry_dlq_nats carrier carrier.db mend
//! cargo run --bin retry_dlq_nats redrive                     # or: redrive transient
//! cargo run --bin retry_dlq_nats worker carrier.db --at-once # without a wait
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
//!           from PARCELS <sequence>, first failed <time>
//! kept:     parcel-4, attempt 4 was the last, transient: Turin does not answer
//!           from PARCELS <sequence>, first failed <time>
//! mended:   Turin answers, and Atlantis has a depot
//! redriven: parcel-3
//! redriven: parcel-4
//! booked:   parcel-3, attempt 1
//! booked:   parcel-4, attempt 1
//! left:     0 in PARCELS_DEAD; 5 parcels booked, each once
//! ```
//!
//! Left out on purpose: an outage that outlasts the ladder, for which a worker better
//! pauses than carries all its parcels to the dead letters; and a parcel that kills its
//! worker, see poison_message_nats.

use std::{
    env,
    future::Future,
    ops::RangeInclusive,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{AckPolicy, pull, pull::MessagesErrorKind},
        kv::{self, CreateErrorKind},
        message::{PublishMessage, StreamMessage},
        stream::{self, RawMessageErrorKind},
    },
};
use futures_lite::StreamExt as _;
use patterns::retry_dlq::{
    Answer, Carrier, DELAYS, Failure, Kind, Parcel, Past, Verdict, name, now,
    parcel, verdict,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PARCELS";
const LINE: &str = "parcels.booking";
const DEAD: &str = "PARCELS_DEAD";
const DEAD_SUBJECT: &str = "parcels.dead";
const CONSUMER: &str = "carrier-booking";
/// When each parcel failed first, by its place in the stream.
const FAILURES: &str = "PARCELS_FAILURES";
/// For how long that is kept: longer than all delays together.
const REMEMBER: Duration = Duration::from_secs(24 * 60 * 60);
/// After this time NATS delivers again what a dead worker had.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// How many parcels may wait at the same time. Beyond it NATS delivers nothing more,
/// and the line stands: 1000 by default.
const MAX_ACK_PENDING: i64 = 100_000;
const USAGE: &str = "usage: retry_dlq_nats [producer FIRST LAST | worker FILE \
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    send(&jetstream, first, last).await?;
    client.drain().await?;
    Ok(())
}

async fn send(jetstream: &jetstream::Context, first: u64, last: u64) -> Result<()> {
    for number in first..=last {
        let payload = serde_json::to_vec(&parcel(number))?;
        // Without an id: NATS would drop what is sent a second time.
        let message = PublishMessage::build().payload(payload.into());
        jetstream.send_publish(LINE, message).await?.await?;
    }
    println!("sent:     parcel-{first} to parcel-{last}");
    Ok(())
}

// ---- Worker ----------------------------------------------------------------

// ANCHOR: worker
async fn worker(file: &str, pace: Pace) -> Result<()> {
    let mut carrier = open(file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let shop = declare(&jetstream::new(client.clone())).await?;
    let mut parcels = take_parcels(&shop.line).await?;
    println!("ready:    parcels from {LINE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = next(&mut parcels) => delivery?,
        };
        // Begun, it is finished: also after a Ctrl-C.
        match attempt(&mut carrier, &delivery, pace)? {
            None => done(&shop, &delivery).await?,
            Some((failure, verdict)) => {
                if pace == Pace::Slow {
                    time_to_kill().await;
                }
                pass_on(&shop, &delivery, failure, &verdict, pace).await?;
            }
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: attempt
/// Asks the carrier once. If it fails: why, and what is to become of the parcel.
fn attempt(
    carrier: &mut Carrier,
    delivery: &Message,
    pace: Pace,
) -> Result<Option<(Failure, Verdict)>> {
    let name = name(&delivery.payload);
    let attempt = attempts(delivery)?;
    let answer = match Parcel::read(&delivery.payload) {
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
    Ok(Some((failure, verdict)))
}

/// The server counts, also what a dead worker had: the first is 1.
fn attempts(delivery: &Message) -> Result<u32> {
    let info = delivery.info().map_err(Error::from_boxed)?;
    Ok(u32::try_from(info.delivered)?)
}
// ANCHOR_END: attempt

// ANCHOR: pass_on
/// Killed before the nak or the term, NATS delivers the parcel again after
/// `ACK_WAIT`; it has not left the stream.
async fn pass_on(
    shop: &Shop,
    delivery: &Message,
    failure: Failure,
    verdict: &Verdict,
    pace: Pace,
) -> Result<()> {
    let first_failure = first_failure(shop, delivery).await?;
    match verdict {
        Verdict::Again(rung) => {
            let delay = (pace != Pace::AtOnce).then_some(DELAYS[*rung]);
            let nak = delivery.ack_with(AckKind::Nak(delay));
            nak.await.map_err(Error::from_boxed)
        }
        Verdict::Dead => {
            let info = delivery.info().map_err(Error::from_boxed)?;
            let origin = format!("{STREAM} {}", info.stream_sequence);
            let past = Past {
                attempts: attempts(delivery)?,
                kind: failure.kind,
                error: failure.error,
                origin,
                first_failure,
            };
            keep(shop, delivery, &past).await?;
            let term = delivery.double_ack_with(AckKind::Term);
            term.await.map_err(Error::from_boxed)?;
            forget(shop, delivery).await
        }
    }
}

/// Returns when NATS has the dead letter. Killed after that, the next worker stores it
/// again; NATS knows the id and keeps one, within two minutes.
async fn keep(shop: &Shop, delivery: &Message, past: &Past) -> Result<()> {
    let mut headers = theirs(delivery.headers.as_ref());
    for (key, value) in past.headers() {
        headers.insert(key, value);
    }
    let message = PublishMessage::build()
        .headers(headers)
        // The bytes as they came.
        .payload(delivery.payload.clone())
        .message_id(place(delivery)?);
    let stored = shop.jetstream.send_publish(DEAD_SUBJECT, message).await?;
    stored
        .await
        .context("not stored in the dead letters; the parcel stays in the line")?;
    Ok(())
}
// ANCHOR_END: pass_on

// ANCHOR: first_failure
/// The time of the first failure, which is now if none is noted.
async fn first_failure(shop: &Shop, delivery: &Message) -> Result<i64> {
    let (key, now) = (place(delivery)?, now());
    match shop.failures.create(&key, now.to_string().into()).await {
        Ok(_revision) => Ok(now),
        Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
            let noted = shop.failures.get(&key).await?;
            let noted = noted.and_then(|it| str::from_utf8(&it).ok()?.parse().ok());
            Ok(noted.unwrap_or(now))
        }
        Err(error) => Err(error).context("cannot note the failure"),
    }
}

/// Where a parcel is, and since when: a stream that is made anew counts from 1 again.
fn place(delivery: &Message) -> Result<String> {
    let info = delivery.info().map_err(Error::from_boxed)?;
    let time = info.published.unix_timestamp_nanos();
    Ok(format!("{STREAM}.{}.{time}", info.stream_sequence))
}
// ANCHOR_END: first_failure

async fn done(shop: &Shop, delivery: &Message) -> Result<()> {
    delivery.double_ack().await.map_err(Error::from_boxed)?;
    if attempts(delivery)? > 1 {
        forget(shop, delivery).await?;
    }
    Ok(())
}

async fn forget(shop: &Shop, delivery: &Message) -> Result<()> {
    let purge = shop.failures.purge(place(delivery)?).await;
    purge.context("cannot delete the note of a failure")
}

/// What the publisher wrote, without what this program has added. The headers of NATS
/// are orders to a server, and have been carried out.
fn theirs(headers: Option<&HeaderMap>) -> HeaderMap {
    headers
        .into_iter()
        .flat_map(|headers| headers.iter())
        .filter(|(name, _values)| {
            let name: &str = name.as_ref();
            !name.starts_with("Nats-") && !Past::owns(name)
        })
        .flat_map(|(name, values)| values.iter().map(move |value| (name, value)))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// What waits in the client of a busy worker is out of reach for others.
async fn take_parcels(line: &stream::Stream) -> Result<pull::Stream> {
    let consumer = line
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: MAX_ACK_PENDING,
            // No `max_deliver`: beyond it nobody is given the parcel any more, also
            // not to make a dead letter of it. No `backoff` either: it is for those
            // that nobody has answered for, and a nak does not heed it.
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the workers")?;
    let deliveries = consumer.stream().max_messages_per_batch(1).messages();
    Ok(deliveries.await?)
}

async fn next(parcels: &mut pull::Stream) -> Result<Message> {
    loop {
        match parcels.next().await.context("NATS ended the deliveries")? {
            Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                // The client reconnects, and pulls again, by itself.
                eprintln!("nothing heard from NATS; waiting for it");
            }
            message => {
                return message.context(
                    "cannot take parcels; is the stream or its consumer deleted?",
                );
            }
        }
    }
}

/// Says when to kill the program, to see what becomes of the parcel in hand.
async fn time_to_kill() {
    println!("pause:    {} s, time to kill it", PAUSE.as_secs());
    sleep(PAUSE).await;
}

// ---- Dead letters ----------------------------------------------------------

async fn show_dead() -> Result<()> {
    let client = connect().await?;
    let shop = declare(&jetstream::new(client.clone())).await?;
    show(&shop).await?;
    println!("left:     {} in {DEAD}", count(&shop).await?);
    client.drain().await?;
    Ok(())
}

/// Shows them, and leaves them where they are.
async fn show(shop: &Shop) -> Result<()> {
    let info = shop.dead.get_info().await?;
    for sequence in sequences(&info) {
        if let Some(letter) = letter(&shop.dead, sequence).await? {
            let past = past(&letter);
            let past =
                past.map_or("nothing is known".to_owned(), |it| it.to_string());
            println!("kept:     {}, {past}", name(&letter.payload));
        }
    }
    Ok(())
}

/// `only` is the kind to send back, with nothing all of them.
async fn redrive(only: Option<Kind>, pace: Pace) -> Result<()> {
    let client = connect().await?;
    let shop = declare(&jetstream::new(client.clone())).await?;
    redrive_all(&shop, only, pace).await?;
    println!("left:     {} in {DEAD}", count(&shop).await?);
    client.drain().await?;
    Ok(())
}

// ANCHOR: redrive
/// Sends back what was there at the beginning, and nothing of what comes meanwhile: a
/// carrier that is still down would keep it going for ever.
async fn redrive_all(shop: &Shop, only: Option<Kind>, pace: Pace) -> Result<()> {
    let info = shop.dead.get_info().await?;
    for sequence in sequences(&info) {
        let Some(letter) = letter(&shop.dead, sequence).await? else {
            continue;
        };
        let past = past(&letter);
        if only.is_some_and(|only| past.is_none_or(|past| past.kind != only)) {
            continue;
        }
        // Without the past: it begins anew, with its first attempt.
        let time = letter.time.unix_timestamp_nanos();
        let message = PublishMessage::build()
            .headers(theirs(Some(&letter.headers)))
            .payload(letter.payload.clone())
            .message_id(format!("{DEAD}.{sequence}.{time}"));
        shop.jetstream.send_publish(LINE, message).await?.await?;
        println!("redriven: {}", name(&letter.payload));
        if pace == Pace::Slow {
            time_to_kill().await;
        }
        // Stored there, so it may go here. Killed before this line, it is sent again:
        // NATS drops it for two minutes, and after them it is booked once.
        shop.dead.delete_message(sequence).await?;
    }
    Ok(())
}

/// Those that there are now. A stream that never had any begins at 0, which is none.
fn sequences(info: &stream::Info) -> RangeInclusive<u64> {
    info.state.first_sequence.max(1)..=info.state.last_sequence
}

/// Nothing, if somebody has deleted it.
async fn letter(
    dead: &stream::Stream,
    sequence: u64,
) -> Result<Option<StreamMessage>> {
    match dead.get_raw_message(sequence).await {
        Ok(letter) => Ok(Some(letter)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
            Ok(None)
        }
        Err(error) => Err(error).context("cannot read a dead letter"),
    }
}
// ANCHOR_END: redrive

fn past(letter: &StreamMessage) -> Option<Past> {
    Past::read(|key| letter.headers.get(key).map(ToString::to_string))
}

async fn count(shop: &Shop) -> Result<u64> {
    Ok(shop.dead.get_info().await?.state.messages)
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // What an earlier run has left is no part of the story.
    for name in [STREAM, DEAD] {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(name).await;
    }
    let shop = declare(&jetstream).await?;
    let mut parcels = take_parcels(&shop.line).await?;
    let mut carrier = open(":memory:")?;
    // Two attempts fail for the one town, and each for the other.
    carrier.fail("Ghent", 2)?;
    carrier.fail("Turin", 1000)?;

    send(&jetstream, 1, 5).await?;
    // Five parcels, and five times one of them again.
    work(&mut carrier, &mut parcels, &shop, 10).await?;
    show(&shop).await?;

    carrier.mend()?;
    println!("mended:   Turin answers, and Atlantis has a depot");
    redrive_all(&shop, None, Pace::Ladder).await?;
    work(&mut carrier, &mut parcels, &shop, 2).await?;

    let requests = carrier.requests()?;
    let booked = requests.iter().filter(|request| request.booked).count();
    println!(
        "left:     {} in {DEAD}; {booked} parcels booked, each once",
        count(&shop).await?
    );
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// So many attempts.
async fn work(
    carrier: &mut Carrier,
    parcels: &mut pull::Stream,
    shop: &Shop,
    attempts: usize,
) -> Result<()> {
    let pace = Pace::Ladder;
    for _attempt in 0..attempts {
        let delivery = timeout(PATIENCE, next(parcels)).await;
        let delivery =
            delivery.context("no parcel came; has another taken it?")??;
        match attempt(carrier, &delivery, pace)? {
            None => done(shop, &delivery).await?,
            Some((failure, verdict)) => {
                pass_on(shop, &delivery, failure, &verdict, pace).await?;
            }
        }
    }
    Ok(())
}

// ---- Streams and connection ------------------------------------------------

struct Shop {
    jetstream: jetstream::Context,
    line: stream::Stream,
    dead: stream::Stream,
    failures: kv::Store,
}

// ANCHOR: declare
/// Makes what is missing. Every part does it, so that any of them may come first.
async fn declare(jetstream: &jetstream::Context) -> Result<Shop> {
    let keep = stream::RetentionPolicy::Limits;
    let until_done = stream::RetentionPolicy::WorkQueue;
    let bucket = kv::Config {
        bucket: FAILURES.to_owned(),
        max_age: REMEMBER,
        ..kv::Config::default()
    };
    Ok(Shop {
        dead: queue(jetstream, DEAD, DEAD_SUBJECT, keep).await?,
        line: queue(jetstream, STREAM, LINE, until_done).await?,
        failures: jetstream
            .create_key_value(bucket)
            .await
            .with_context(|| format!("cannot have the bucket {FAILURES}"))?,
        jetstream: jetstream.clone(),
    })
}
// ANCHOR_END: declare

async fn queue(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
    retention: stream::RetentionPolicy,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            retention,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
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

async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    // Otherwise a worker that waits hears of it only when a heartbeat is missing.
    let options = ConnectOptions::new().event_callback(async |event| {
        if event == Event::Disconnected {
            eprintln!("lost NATS, still trying");
        }
    });
    options
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
