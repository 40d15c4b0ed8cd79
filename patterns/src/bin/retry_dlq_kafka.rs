//! Retry and dead letters: tried again later, given up in time, sent back once mended.
//!
//! Teaches: a partition has no way around. So a parcel that fails is written to a topic
//! of those that wait, one topic for each delay, and only then committed; the parcels
//! behind it go on. One consumer reads them all: what is not due yet is put back by a
//! seek, and its partition pauses. After the last delay, or at once if no retry helps,
//! the bytes go to the dead letters, with all that is known of them. The redrive sends
//! back what was there when it began. The price is the order.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin retry_dlq_kafka                             # the whole story
//! cargo run --bin retry_dlq_kafka worker carrier.db           # terminal 1
//! cargo run --bin retry_dlq_kafka carrier carrier.db down 2   # terminal 2
//! cargo run --bin retry_dlq_kafka producer 1 5
//! cargo run --bin retry_dlq_kafka dead                        # what nobody could book
//! cargo run --bin retry_dlq_kafka carrier carrier.db mend
//! cargo run --bin retry_dlq_kafka redrive                     # or: redrive transient
//! cargo run --bin retry_dlq_kafka worker carrier.db --at-once # without a wait
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
//!           from parcels-story-booking 0 <offset>, first failed <time>
//! kept:     parcel-4, attempt 4 was the last, transient: Turin does not answer
//!           from parcels-story-booking 0 <offset>, first failed <time>
//! mended:   Turin answers, and Atlantis has a depot
//! redriven: parcel-3
//! redriven: parcel-4
//! booked:   parcel-3, attempt 1
//! booked:   parcel-4, attempt 1
//! left:     0 in parcels-story-dead; 5 parcels booked, each once
//! ```
//!
//! Left out on purpose: an outage that outlasts the ladder, for which a worker better
//! pauses than carries all its parcels to the dead letters; and a parcel that kills its
//! worker, see poison_message_kafka.

use std::{
    collections::HashMap,
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
use patterns::retry_dlq::{
    Answer, Carrier, DELAYS, Kind, Parcel, Past, Verdict, milliseconds, name, now,
    parcel, verdict,
};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const SHOP: Place = Place {
    line: "parcels-booking",
    waits: ["parcels-wait-500", "parcels-wait-1000", "parcels-wait-2000"],
    dead: "parcels-dead",
    workers: "parcels-worker",
    redrive: "parcels-redrive",
};
/// The story has topics of its own: its dead letters are not those of the shop.
const STORY: Place = Place {
    line: "parcels-story-booking",
    waits: [
        "parcels-story-wait-500",
        "parcels-story-wait-1000",
        "parcels-story-wait-2000",
    ],
    dead: "parcels-story-dead",
    workers: "parcels-story-worker",
    redrive: "parcels-story-redrive",
};
const PARTITIONS: i32 = 1;
/// Until when a parcel waits, in milliseconds since 1970.
const NOT_BEFORE: &str = "not-before";
const USAGE: &str = "usage: retry_dlq_kafka [producer FIRST LAST | worker FILE \
                     [--at-once | --slow] | dead | redrive [transient | permanent | \
                     --slow] | carrier FILE (down SECONDS | mend)]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the next parcel of the story may take.
const LATEST: Duration = Duration::from_secs(30);
/// With `--slow`: how long there is time to kill the program.
const PAUSE: Duration = Duration::from_secs(2);

/// A line of parcels, where they wait (one topic for each of `DELAYS`), where they end,
/// and the groups that read them.
struct Place {
    line: &'static str,
    waits: [&'static str; DELAYS.len()],
    dead: &'static str,
    workers: &'static str,
    redrive: &'static str,
}

impl Place {
    /// What a worker reads.
    fn worked_on(&self) -> Vec<&'static str> {
        [&[self.line], &self.waits[..]].concat()
    }

    fn topics(&self) -> Vec<&'static str> {
        [&self.worked_on()[..], &[self.dead]].concat()
    }
}

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
    let brokers = brokers()?;
    ensure_topics(&brokers, &SHOP).await?;
    send(&producer(&brokers)?, SHOP.line, first, last).await
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

async fn send(
    producer: &FutureProducer,
    topic: &str,
    first: u64,
    last: u64,
) -> Result<()> {
    for number in first..=last {
        let parcel = parcel(number);
        let payload = serde_json::to_vec(&parcel)?;
        let record = FutureRecord::to(topic).key(&parcel.id).payload(&payload);
        let stored = producer.send(record, PATIENCE).await;
        stored.map_err(|(error, _record)| {
            anyhow!("Kafka did not store {}: {error}", parcel.id)
        })?;
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
    let brokers = brokers()?;
    ensure_topics(&brokers, &SHOP).await?;
    let producer = producer(&brokers)?;
    let consumer: StreamConsumer = reader(&brokers, SHOP.workers)
        // A restarted worker takes its old place at once, and does not wait for the
        // end of the dead one's session. Each worker has a name of its own.
        .set("group.instance.id", "parcels-worker-1")
        .create()?;
    consumer.subscribe(&SHOP.worked_on())?;
    println!("ready:    parcels from {}, Ctrl-C to stop", SHOP.line);
    let mut pauses = Pauses::default();
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            record = next_due(&consumer, &mut pauses) => record?,
        };
        // Begun, it is finished: also after a Ctrl-C.
        let past = attempt(&mut carrier, &record, pace)?;
        if let Some((past, verdict)) = past {
            if pace == Pace::Slow {
                time_to_kill().await;
            }
            pass_on(&producer, &SHOP, &record, &past, &verdict, pace).await?;
        }
        commit(&consumer, &record)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

// ANCHOR: attempt
/// Asks the carrier once. If it fails: what is known of the parcel now, and what is to
/// become of it.
fn attempt(
    carrier: &mut Carrier,
    record: &BorrowedMessage<'_>,
    pace: Pace,
) -> Result<Option<(Past, Verdict)>> {
    let payload = record.payload().unwrap_or_default();
    let name = name(payload);
    let earlier = Past::read(|key| header(record, key));
    let attempt = earlier.as_ref().map_or(0, |past| past.attempts) + 1;
    let answer = match Parcel::read(payload) {
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
    let (topic, partition) = (record.topic(), record.partition());
    let origin = format!("{topic} {partition} {}", record.offset());
    Ok(Some((
        Past::after(earlier, failure, origin, now()),
        verdict,
    )))
}
// ANCHOR_END: attempt

// ANCHOR: pass_on
/// Returns when Kafka has it in the next topic. Killed after that and before the
/// commit, the parcel is there twice, and the carrier books it once.
async fn pass_on(
    producer: &FutureProducer,
    place: &Place,
    record: &BorrowedMessage<'_>,
    past: &Past,
    verdict: &Verdict,
    pace: Pace,
) -> Result<()> {
    let mut headers = past
        .headers()
        .into_iter()
        .fold(theirs(record), |headers, (key, value)| {
            with(headers, key, &value)
        });
    let topic = match verdict {
        Verdict::Again(rung) => {
            let delay = match pace {
                Pace::AtOnce => Duration::ZERO,
                Pace::Ladder | Pace::Slow => DELAYS[*rung],
            };
            let due = now() + milliseconds(delay);
            headers = with(headers, NOT_BEFORE, &due.to_string());
            place.waits[*rung]
        }
        Verdict::Dead => place.dead,
    };
    copy(producer, topic, record, headers).await
}

/// The bytes as they came, and the key, so that one parcel stays in one partition.
async fn copy(
    producer: &FutureProducer,
    topic: &str,
    record: &BorrowedMessage<'_>,
    headers: OwnedHeaders,
) -> Result<()> {
    let copy = FutureRecord::to(topic)
        .key(record.key().unwrap_or_default())
        .payload(record.payload().unwrap_or_default())
        .headers(headers);
    let stored = producer.send(copy, PATIENCE).await;
    stored.map_err(|(error, _record)| {
        anyhow!("not stored in {topic}, so it stays where it is: {error}")
    })?;
    Ok(())
}
// ANCHOR_END: pass_on

// ANCHOR: next_due
/// The partitions that pause, and until when.
#[derive(Default)]
struct Pauses {
    until: HashMap<(String, i32), i64>,
    /// Whether Kafka was lost, to say it once.
    lost: bool,
}

/// The next parcel whose time has come. Nothing is lost when it is dropped on the way.
async fn next_due<'a>(
    consumer: &'a StreamConsumer,
    pauses: &mut Pauses,
) -> Result<BorrowedMessage<'a>> {
    loop {
        let first = pauses.until.values().min();
        let wait = first.map_or(Duration::MAX, |first| {
            Duration::from_millis(u64::try_from(first - now()).unwrap_or(0))
        });
        let record = tokio::select! {
            biased;
            () = sleep(wait) => {
                resume(consumer, pauses)?;
                continue;
            }
            record = consumer.recv() => record,
        };
        let record = match record {
            Ok(record) => record,
            // The client connects again by itself; it says so with each attempt, and
            // to hear it once is enough.
            Err(KafkaError::MessageConsumption(
                code @ (RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure),
            )) => {
                if !pauses.lost {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                pauses.lost = true;
                continue;
            }
            Err(error) => return Err(error).context("cannot read on"),
        };
        pauses.lost = false;
        let due = header(&record, NOT_BEFORE).and_then(|due| due.parse().ok());
        match due {
            Some(due) if due > now() => pause(consumer, pauses, &record, due)?,
            _ => return Ok(record),
        }
    }
}

/// All that lies in a topic waits for the same time, so what is behind this record is
/// not due before it. A consumer that just slept would be taken for dead after
/// `max.poll.interval.ms`, and would keep the other topics waiting.
fn pause(
    consumer: &StreamConsumer,
    pauses: &mut Pauses,
    record: &BorrowedMessage<'_>,
    due: i64,
) -> Result<()> {
    let (topic, partition) = (record.topic(), record.partition());
    consumer.pause(&only(topic, partition))?;
    // It has been handed out; back to it, or it would be skipped.
    let here = Offset::Offset(record.offset());
    block_in_place(|| consumer.seek(topic, partition, here, PATIENCE))?;
    pauses.until.insert((topic.to_owned(), partition), due);
    Ok(())
}

fn resume(consumer: &StreamConsumer, pauses: &mut Pauses) -> Result<()> {
    let now = now();
    for ((topic, partition), _due) in
        pauses.until.extract_if(|_partition, due| *due <= now)
    {
        consumer.resume(&only(&topic, partition))?;
    }
    Ok(())
}
// ANCHOR_END: next_due

fn only(topic: &str, partition: i32) -> TopicPartitionList {
    let mut only = TopicPartitionList::new();
    only.add_partition(topic, partition);
    only
}

/// What has become of the record stands in Kafka. If the program ends before this
/// line, it is handled once more.
fn commit(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<()> {
    let mut done = TopicPartitionList::new();
    let next = Offset::Offset(record.offset() + 1);
    done.add_partition_offset(record.topic(), record.partition(), next)?;
    block_in_place(|| consumer.commit(&done, CommitMode::Sync))
        .context("cannot commit; the parcel will come again")
}

fn header(record: &BorrowedMessage<'_>, key: &str) -> Option<String> {
    let mut headers = record.headers()?.iter();
    let value = headers.find(|header| header.key == key)?.value?;
    str::from_utf8(value).ok().map(str::to_owned)
}

/// What the producer wrote, without what this program has added.
fn theirs(record: &BorrowedMessage<'_>) -> OwnedHeaders {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    headers
        .filter(|it| !Past::owns(it.key) && it.key != NOT_BEFORE)
        .fold(OwnedHeaders::new(), |headers, it| headers.insert(it))
}

fn with(headers: OwnedHeaders, key: &str, value: &str) -> OwnedHeaders {
    headers.insert(Header {
        key,
        value: Some(value),
    })
}

/// Each commit is made by hand, after the work.
fn reader(brokers: &str, group: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        // What is resumed is asked for when the last question is answered: 0.5 s by
        // default, when nothing comes.
        .set("fetch.wait.max.ms", "100");
    config
}

/// Leaves the group. It blocks, hence a thread of its own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// Says when to kill the program, to see what becomes of the parcel in hand.
async fn time_to_kill() {
    println!("pause:    {} s, time to kill it", PAUSE.as_secs());
    sleep(PAUSE).await;
}

// ---- Dead letters ----------------------------------------------------------

async fn show_dead() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, &SHOP).await?;
    let letters = DeadLetters::open(&brokers, &SHOP).await?;
    let count = letters.show().await?;
    println!("left:     {count} in {}", SHOP.dead);
    close(letters.reader).await
}

/// `only` is the kind to send back, with nothing all of them.
async fn redrive(only: Option<Kind>, pace: Pace) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers, &SHOP).await?;
    let producer = producer(&brokers)?;
    let letters = DeadLetters::open(&brokers, &SHOP).await?;
    letters.redrive(&producer, &SHOP, only, pace).await?;
    close(letters.reader).await?;
    let letters = DeadLetters::open(&brokers, &SHOP).await?;
    println!("left:     {} in {}", letters.count(), SHOP.dead);
    close(letters.reader).await
}

/// What lies between the commit of the redrive and the end of the topic, at the moment
/// of a look. From a log nothing is taken out: what is committed counts as gone.
struct DeadLetters {
    reader: StreamConsumer,
    /// Begin and end of each partition that has some.
    spans: HashMap<i32, (i64, i64)>,
}

impl DeadLetters {
    async fn open(brokers: &str, place: &'static Place) -> Result<Self> {
        let reader: StreamConsumer = reader(brokers, place.redrive).create()?;
        let look = move || {
            let mut spans = HashMap::new();
            let mut all = TopicPartitionList::new();
            all.add_partition_range(place.dead, 0, PARTITIONS - 1);
            for at in reader.committed_offsets(all, PATIENCE)?.elements() {
                let id = at.partition();
                let (low, end) =
                    reader.fetch_watermarks(place.dead, id, PATIENCE)?;
                // What is older than the retention is gone.
                let begin = at.offset().to_raw().unwrap_or(low).max(low);
                if begin < end {
                    spans.insert(id, (begin, end));
                }
            }
            let mut begin = TopicPartitionList::new();
            for (id, (first, _end)) in &spans {
                let first = Offset::Offset(*first);
                begin.add_partition_offset(place.dead, *id, first)?;
            }
            // Not as a member of the group: there is one redrive at a time.
            reader.assign(&begin)?;
            Ok(Self { reader, spans })
        };
        spawn_blocking(look).await?
    }

    // ANCHOR: redrive
    /// Sends back what was there at the look, and nothing of what comes meanwhile: a
    /// carrier that is still down would keep it going for ever.
    async fn redrive(
        &self,
        producer: &FutureProducer,
        place: &Place,
        only: Option<Kind>,
        pace: Pace,
    ) -> Result<()> {
        for _letter in 0..self.count() {
            let letter = self.next().await?;
            let past = Past::read(|key| header(&letter, key));
            let chosen = only.is_none_or(|only| {
                past.as_ref().is_some_and(|past| past.kind == only)
            });
            if chosen {
                // Without the past: it begins anew, with its first attempt.
                copy(producer, place.line, &letter, theirs(&letter)).await?;
                let payload = letter.payload().unwrap_or_default();
                println!("redriven: {}", name(payload));
                if pace == Pace::Slow {
                    time_to_kill().await;
                }
            } else {
                // A log has one position and no gaps: what stays moves to the end.
                let headers = letter.headers().map(|it| it.detach());
                let headers = headers.unwrap_or_default();
                copy(producer, place.dead, &letter, headers).await?;
            }
            // Stored there, so it may go here. Killed before this line, it is sent
            // twice and booked once.
            commit(&self.reader, &letter)?;
        }
        Ok(())
    }
    // ANCHOR_END: redrive

    /// Shows them, and leaves them where they are.
    async fn show(&self) -> Result<i64> {
        for _letter in 0..self.count() {
            let letter = self.next().await?;
            let past = Past::read(|key| header(&letter, key));
            let past =
                past.map_or("nothing is known".to_owned(), |it| it.to_string());
            let payload = letter.payload().unwrap_or_default();
            println!("kept:     {}, {past}", name(payload));
        }
        Ok(self.count())
    }

    fn count(&self) -> i64 {
        self.spans.values().map(|(begin, end)| end - begin).sum()
    }

    /// The next one that was there at the look.
    async fn next(&self) -> Result<BorrowedMessage<'_>> {
        loop {
            let letter = timeout(LATEST, self.reader.recv()).await;
            let letter = letter.context("a dead letter does not come")??;
            let span = self.spans.get(&letter.partition());
            if span.is_some_and(|(_begin, end)| letter.offset() < *end) {
                return Ok(letter);
            }
        }
    }
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
    let brokers = brokers()?;
    ensure_topics(&brokers, &STORY).await?;
    let producer = producer(&brokers)?;
    let consumer = begin_here(&brokers).await?;
    let mut carrier = open(":memory:")?;
    // Two attempts fail for the one town, and each for the other.
    carrier.fail("Ghent", 2)?;
    carrier.fail("Turin", 1000)?;

    send(&producer, STORY.line, 1, 5).await?;
    // Five parcels, and five times one of them again.
    work(&mut carrier, &consumer, &producer, 10).await?;
    let letters = DeadLetters::open(&brokers, &STORY).await?;
    letters.show().await?;
    close(letters.reader).await?;

    carrier.mend()?;
    println!("mended:   Turin answers, and Atlantis has a depot");
    let letters = DeadLetters::open(&brokers, &STORY).await?;
    letters
        .redrive(&producer, &STORY, None, Pace::Ladder)
        .await?;
    close(letters.reader).await?;
    work(&mut carrier, &consumer, &producer, 2).await?;
    close(consumer).await?;

    let letters = DeadLetters::open(&brokers, &STORY).await?;
    let requests = carrier.requests()?;
    let booked = requests.iter().filter(|request| request.booked).count();
    println!(
        "left:     {} in {}; {booked} parcels booked, each once",
        letters.count(),
        STORY.dead
    );
    close(letters.reader).await
}
// ANCHOR_END: story

/// So many attempts.
async fn work(
    carrier: &mut Carrier,
    consumer: &StreamConsumer,
    producer: &FutureProducer,
    attempts: usize,
) -> Result<()> {
    let mut pauses = Pauses::default();
    let pace = Pace::Ladder;
    for _attempt in 0..attempts {
        let record = timeout(LATEST, next_due(consumer, &mut pauses)).await;
        let record = record.context("no parcel came; has another taken it?")??;
        if let Some((past, verdict)) = attempt(carrier, &record, pace)? {
            pass_on(producer, &STORY, &record, &past, &verdict, pace).await?;
        }
        commit(consumer, &record)?;
    }
    Ok(())
}

/// A consumer at the end of each topic: what an earlier run has left is no part of the
/// story. It joins no group, so nobody has to be waited for.
async fn begin_here(brokers: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = reader(brokers, STORY.workers).create()?;
    let redrive: StreamConsumer = reader(brokers, STORY.redrive).create()?;
    let begin = move || {
        let end = |topic| {
            let mut at = TopicPartitionList::new();
            for id in 0..PARTITIONS {
                let (_low, end) = consumer.fetch_watermarks(topic, id, PATIENCE)?;
                at.add_partition_offset(topic, id, Offset::Offset(end))?;
            }
            Ok::<_, KafkaError>(at)
        };
        redrive.commit(&end(STORY.dead)?, CommitMode::Sync)?;
        let mut ends = TopicPartitionList::new();
        for topic in STORY.worked_on() {
            for at in end(topic)?.elements() {
                ends.add_partition_offset(topic, at.partition(), at.offset())?;
            }
        }
        consumer.assign(&ends)?;
        Ok(consumer)
    };
    spawn_blocking(begin).await?
}

// ---- Topics and brokers ----------------------------------------------------

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str, place: &Place) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    let names = place.topics();
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        let known = |name: &_| metadata.topics().iter().any(|it| it.name() == *name);
        if names.iter().all(known) {
            return Ok(());
        }
        let topics = names.iter().map(|name| {
            let topic = NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1));
            if *name == place.dead {
                // A week, the default, is short for what waits for a person.
                topic.set("retention.ms", "-1")
            } else {
                topic
            }
        });
        let topics: Vec<_> = topics.collect();
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&topics, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before is
        // told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {names:?}; ask who may describe it")
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

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
