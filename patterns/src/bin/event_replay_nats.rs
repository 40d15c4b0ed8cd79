//! Event replay: a service that is new, or made anew, reads the whole history.
//!
//! Teaches: JetStream keeps what was read, so a service that comes later builds its
//! table from the first event on, and the same reader goes on with what is live: no gap
//! and no repeat at the seam. The consumer acknowledges nothing, and when the server has
//! forgotten it, a new one begins at the sequence in the table: both are in one
//! transaction. A service that sends mails is quiet up to where it was before.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin event_replay_nats                        # the whole story
//! cargo run --bin event_replay_nats publish 1 5000
//! cargo run --bin event_replay_nats mail shop.db           # terminal 1, then Ctrl-C
//! cargo run --bin event_replay_nats analytics shop.db      # terminal 2: kill it
//! cargo run --bin event_replay_nats publish 5001 5010      # live
//! cargo run --bin event_replay_nats mail shop.db --replay  # only the last ten
//! cargo run --bin event_replay_nats show shop.db
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
//! Left out on purpose: a replay from a moment, which is `DeliverPolicy::ByStartTime`;
//! an event that is published again after two minutes, see idempotent_consumer_nats.

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

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Message,
        consumer::{AckPolicy, DeliverPolicy, pull},
        message::PublishMessage,
        stream::{self, ConsumerError, ConsumerErrorKind},
    },
};
use futures_lite::StreamExt as _;
use patterns::event_replay::{
    Care, Held, Place, Progress, Record, Service, Start, Tables, event,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ORDER_EVENTS";
const STORY_STREAM: &str = "ORDER_EVENTS_STORY";
const SUBJECT: &str = "order.events";
const STORY_SUBJECT: &str = "order.events-story";
/// At most so many events in a transaction.
const BATCH: usize = 100;
const USAGE: &str = "usage: event_replay_nats [publish FIRST LAST | analytics FILE \
                     [--careless] | mail FILE [--replay [--careless]] | show FILE]";

/// NATS has to show so often that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long after a lost reader a new one is made.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, STREAM, SUBJECT).await?;
    publish(&jetstream, SUBJECT, first, last).await?;
    client.drain().await?;
    println!("published: {} events", (last + 1).saturating_sub(first));
    Ok(())
}

// ANCHOR: publish
/// Returns when NATS has stored all events.
async fn publish(
    jetstream: &jetstream::Context,
    subject: &'static str,
    first: u64,
    last: u64,
) -> Result<()> {
    let mut numbers = first..=last;
    loop {
        // So many on their way, and no more.
        let mut on_their_way = Vec::new();
        for number in numbers.by_ref().take(BATCH) {
            let event = event(number);
            let message = PublishMessage::build()
                // Published again within two minutes, it is in the stream once.
                .message_id(event.id())
                .payload(serde_json::to_vec(&event)?.into());
            on_their_way.push(jetstream.send_publish(subject, message).await?);
        }
        if on_their_way.is_empty() {
            return Ok(());
        }
        for stored in on_their_way {
            stored.await.context("NATS did not store an event")?;
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let stream = declare(&jetstream, STREAM, SUBJECT).await?;
    let begun = begin(stream, &mut tables, start).await;
    let (mut reader, mut places) = begun.with_context(|| file.to_owned())?;
    let mut progress = Progress::new(&places);
    let history = progress.history();
    println!("ready:     {history} events in {STREAM}, Ctrl-C to stop");
    let (mut batch, mut lost) = (Vec::new(), false);
    // Of nothing: it says so if nothing is history.
    apply(&mut tables, &batch, &mut places, care, &mut progress)?;
    loop {
        let next = places[0].next;
        let gathered = tokio::select! {
            // In this order: by default `select!` picks at random among what is ready.
            biased;
            // What is gathered and not in the table is read again.
            () = &mut stop_signal => break,
            gathered = reader.gather(next, &mut batch, BATCH) => gathered,
        };
        apply(&mut tables, &batch, &mut places, care, &mut progress)?;
        batch.clear();
        // To hear it once is enough.
        match gathered? {
            Some(reason) if !lost => eprintln!("lost NATS, still trying ({reason})"),
            _ => {}
        }
        lost = reader.events.is_none();
    }
    if care == Care::Late {
        tables.write_late(&places)?;
    }
    client.drain().await?;
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
    mut stream: stream::Stream,
    tables: &mut Tables,
    start: Start,
) -> Result<(Reader, [Place; 1])> {
    let state = &stream.info().await?.state;
    // Sequences begin at 1, also those of a stream that has none yet.
    let first = i64::try_from(state.first_sequence.max(1))?;
    let end = i64::try_from(state.last_sequence)? + 1;
    let held = Held {
        partition: 0,
        first,
        end,
    };
    let places = tables.begin(&[held], start)?;
    let [place] = places[..] else {
        bail!("a stream is one log");
    };
    let events = Some(read_from(&stream, place.next).await?);
    Ok((Reader { stream, events }, [place]))
}

/// A consumer without a name: the server forgets it when nobody asks, and keeps no
/// position for it.
async fn read_from(stream: &stream::Stream, next: i64) -> Result<pull::Stream> {
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: u64::try_from(next)?,
            },
            ack_policy: AckPolicy::None,
            ..pull::Config::default()
        })
        .await?;
    let events = consumer
        .stream()
        .max_messages_per_batch(2 * BATCH)
        .heartbeat(HEARTBEAT);
    Ok(events.messages().await?)
}
// ANCHOR_END: begin

// ANCHOR: gather
struct Reader {
    stream: stream::Stream,
    /// None after something went wrong: the next call makes a new one.
    events: Option<pull::Stream>,
}

impl Reader {
    /// Waits for an event, and takes what is there with it. What it has taken is in the
    /// batch also when it fails, or is not waited for. Returns why the events have
    /// ended, if they have: the server is away, or has forgotten the consumer.
    async fn gather(
        &mut self,
        next: i64,
        batch: &mut Vec<Record>,
        room: usize,
    ) -> Result<Option<String>> {
        let events = match &mut self.events {
            Some(events) => events,
            None => {
                sleep(AGAIN).await;
                match read_from(&self.stream, next).await {
                    Ok(events) => self.events.insert(events),
                    Err(error) if refused(&error) => return Err(error),
                    Err(error) => return Ok(Some(format!("{error:#}"))),
                }
            }
        };
        let mut next = events.next().await;
        loop {
            match next {
                Some(Ok(message)) => batch.push(record(&message)?),
                Some(Err(error)) => {
                    self.events = None;
                    return Ok(Some(error.to_string()));
                }
                None => bail!("NATS ended the deliveries"),
            }
            if batch.len() == room {
                return Ok(None);
            }
            next = tokio::select! {
                biased;
                next = events.next() => next,
                () = ready(()) => return Ok(None),
            };
        }
    }
}

/// The server is there and says no, as when the stream is deleted.
fn refused(error: &Error) -> bool {
    let error = error.downcast_ref::<ConsumerError>();
    error.is_some_and(|it| matches!(it.kind(), ConsumerErrorKind::JetStream(_)))
}

fn record(message: &Message) -> Result<Record> {
    let info = message.info().map_err(Error::from_boxed)?;
    Ok(Record {
        partition: 0,
        offset: i64::try_from(info.stream_sequence)?,
        payload: message.payload.to_vec(),
    })
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STORY_STREAM).await;
    declare(&jetstream, STORY_STREAM, STORY_SUBJECT).await?;
    publish(&jetstream, STORY_SUBJECT, 1, 8).await?;
    println!("published: order-1 to order-4, 8 events");
    let mut mail = open(":memory:", Service::Mail)?;
    read(&jetstream, &mut mail, Start::GoOn, 8, async || Ok(())).await?;
    let mails = mail.mails()?.len();
    println!("mail:      {mails} mails, one for each event");

    let mut analytics = open(":memory:", Service::Analytics)?;
    read(&jetstream, &mut analytics, Start::GoOn, 5, async || Ok(())).await?;
    println!("replay:    5 of 8 events, and analytics dies");
    let meanwhile = async || {
        publish(&jetstream, STORY_SUBJECT, 9, 10).await?;
        println!("published: order-5, 2 events, while analytics begins again");
        Ok(())
    };
    let said = read(&jetstream, &mut analytics, Start::GoOn, 5, meanwhile).await?;
    println!("{said}");
    println!("revenue:   {}", revenue(&analytics)?);

    println!("replay:    10 events for the mail service, from the first one on");
    let said = read(&jetstream, &mut mail, Start::Anew, 10, async || Ok(())).await?;
    println!("{said}");
    println!("mails:     {}, one for each event", mail.mails()?.len());
    client.drain().await?;
    Ok(())
}

/// A reader of its own that takes so many events and ends. Returns what it has to say.
async fn read(
    jetstream: &jetstream::Context,
    tables: &mut Tables,
    start: Start,
    count: usize,
    meanwhile: impl AsyncFnOnce() -> Result<()>,
) -> Result<String> {
    let stream = jetstream.get_stream(STORY_STREAM).await?;
    let (mut reader, mut places) = begin(stream, tables, start).await?;
    meanwhile().await?;
    let mut progress = Progress::new(&places);
    let (mut left, mut said) = (count, Vec::new());
    while left > 0 {
        let mut batch = Vec::new();
        let gathered = reader.gather(places[0].next, &mut batch, left);
        let gathered = timeout(PATIENCE, gathered).await;
        let ended = gathered.context("no event came within 8 s")??;
        ensure!(ended.is_none(), "lost NATS");
        left -= batch.len();
        let applied =
            block_in_place(|| tables.apply(&batch, &mut places, Care::Taken))?;
        said.extend(progress.lines(applied, &places));
    }
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
/// Declares the stream, on both sides. It keeps everything: there is no replay of what
/// a limit, or a work queue's acknowledgement, has deleted.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // The defaults: until a limit is reached, and without limits.
            retention: stream::RetentionPolicy::Limits,
            max_age: Duration::ZERO,
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
    async_nats::connect(server)
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
