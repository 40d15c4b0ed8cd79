//! Event replay: a service that is new, or made anew, reads the whole history.
//!
//! Teaches: Kafka keeps what was read, so a service that comes later builds its table
//! from the first event on, and the same reader goes on with what is live: no gap and
//! no repeat at the seam. Table and offset are in one transaction, and the group has
//! no part in it. A service that sends mails is quiet up to where it was before.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin event_replay_kafka                        # the whole story
//! cargo run --bin event_replay_kafka publish 1 5000
//! cargo run --bin event_replay_kafka mail shop.db           # terminal 1, then Ctrl-C
//! cargo run --bin event_replay_kafka analytics shop.db      # terminal 2: kill it
//! cargo run --bin event_replay_kafka publish 5001 5010      # live
//! cargo run --bin event_replay_kafka mail shop.db --replay  # only the last ten
//! cargo run --bin event_replay_kafka show shop.db
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
//! Left out on purpose: a replay from a moment, see kafka_replay_by_time; an event that
//! is published twice, see idempotent_consumer_kafka; partitions that are added, which
//! are seen at the next start; transactions, whose marks at the end of a partition look
//! like an event that is still to come.

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
use patterns::event_replay::{
    Care, Held, Place, Progress, Record, Service, Start, Tables, event,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "order-events";
const STORY_TOPIC: &str = "order-events-story";
const PARTITIONS: i32 = 3;
/// One: between partitions there is no order, and the story has to have one.
const STORY_PARTITIONS: i32 = 1;
/// At most so many events in a transaction.
const BATCH: usize = 100;
const USAGE: &str = "usage: event_replay_kafka [publish FIRST LAST | analytics FILE \
                     [--careless] | mail FILE [--replay [--careless]] | show FILE]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

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
    let brokers = brokers()?;
    ensure_topic(&brokers, TOPIC, PARTITIONS).await?;
    publish(&brokers, TOPIC, first, last).await?;
    println!("published: {} events", (last + 1).saturating_sub(first));
    Ok(())
}

// ANCHOR: publish
/// Returns when Kafka has stored all events.
async fn publish(brokers: &str, topic: &str, first: u64, last: u64) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // What the client sends again is in the log once.
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    let mut numbers = first..=last;
    loop {
        // So many on their way, and no more.
        let mut on_their_way = Vec::new();
        for number in numbers.by_ref().take(BATCH) {
            let event = event(number);
            let payload = serde_json::to_vec(&event)?;
            // The events of a customer stay in their order.
            let record = FutureRecord::to(topic)
                .key(&event.customer)
                .payload(&payload);
            let sent = producer.send_result(record);
            on_their_way.push(sent.map_err(|(error, _record)| error)?);
        }
        if on_their_way.is_empty() {
            return Ok(());
        }
        for delivery in on_their_way {
            delivery.await?.map_err(|(error, _record)| {
                anyhow!("Kafka did not store an event: {error}")
            })?;
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
    let brokers = brokers()?;
    ensure_topic(&brokers, TOPIC, PARTITIONS).await?;
    let begun = begin(&brokers, TOPIC, &mut tables, start).await;
    let (consumer, mut places) = begun.with_context(|| file.to_owned())?;
    let mut progress = Progress::new(&places);
    let history = progress.history();
    println!("ready:     {history} events in {TOPIC}, Ctrl-C to stop");
    let (mut batch, mut lost) = (Vec::new(), false);
    // Of nothing: it says so if nothing is history.
    apply(&mut tables, &batch, &mut places, care, &mut progress)?;
    loop {
        let gathered = tokio::select! {
            // In this order: by default `select!` picks at random among what is ready.
            biased;
            // What is gathered and not in the table is read again.
            () = &mut stop_signal => break,
            gathered = gather(&consumer, &mut batch, BATCH) => gathered,
        };
        apply(&mut tables, &batch, &mut places, care, &mut progress)?;
        if !batch.is_empty() {
            lost = false;
        }
        batch.clear();
        readable(gathered, &mut lost)?;
    }
    if care == Care::Late {
        tables.write_late(&places)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: serve

fn open(file: &str, service: Service) -> Result<Tables> {
    Tables::open(Path::new(file), service)
        .with_context(|| format!("cannot use {file}"))
}

// ANCHOR: begin
/// A reader that begins where the tables say. It commits nothing: a position that Kafka
/// keeps is written before the table or after it, never with it.
async fn begin(
    brokers: &str,
    topic: &'static str,
    tables: &mut Tables,
    start: Start,
) -> Result<(Arc<StreamConsumer>, Vec<Place>)> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // The client wants a name, also of one that joins no group.
        .set("group.id", "order-events-reader")
        .set("enable.auto.commit", "false")
        // A place that is deleted meanwhile is an error, and not a jump.
        .set("auto.offset.reset", "error")
        .create()?;
    let consumer = Arc::new(consumer);
    let asking = Arc::clone(&consumer);
    let held = spawn_blocking(move || held(&asking, topic)).await??;
    let places = tables.begin(&held, start)?;
    let mut assignment = TopicPartitionList::new();
    for place in &places {
        let next = Offset::Offset(place.next);
        assignment.add_partition_offset(topic, place.partition, next)?;
    }
    consumer.assign(&assignment)?;
    Ok((consumer, places))
}

/// What Kafka has of each partition at this moment.
fn held(consumer: &StreamConsumer, topic: &str) -> Result<Vec<Held>> {
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
    let topics = metadata.topics().iter();
    let mut held = Vec::new();
    for partition in topics.flat_map(|topic| topic.partitions()) {
        let partition = partition.id();
        let marks = consumer.fetch_watermarks(topic, partition, PATIENCE);
        let (first, end) = marks.context("cannot ask where the log ends")?;
        held.push(Held {
            partition,
            first,
            end,
        });
    }
    ensure!(
        !held.is_empty(),
        "Kafka does not show the partitions of {topic}"
    );
    Ok(held)
}
// ANCHOR_END: begin

// ANCHOR: gather
/// Waits for an event, and takes what is there with it. What it has taken is in the
/// batch also when it fails, or is not waited for.
async fn gather(
    consumer: &StreamConsumer,
    batch: &mut Vec<Record>,
    room: usize,
) -> Result<(), KafkaError> {
    batch.push(record(&consumer.recv().await?));
    while batch.len() < room {
        tokio::select! {
            biased;
            next = consumer.recv() => batch.push(record(&next?)),
            () = ready(()) => break,
        }
    }
    Ok(())
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    Record {
        partition: message.partition(),
        offset: message.offset(),
        payload: message.payload().unwrap_or_default().to_vec(),
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

/// The client connects again by itself; it says so with each attempt, and to hear it
/// once is enough.
fn readable(gathered: Result<(), KafkaError>, lost: &mut bool) -> Result<()> {
    match gathered {
        Ok(()) => Ok(()),
        Err(KafkaError::MessageConsumption(
            code @ (RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::BrokerTransportFailure),
        )) => {
            if !*lost {
                eprintln!("lost Kafka, still trying ({code})");
            }
            *lost = true;
            Ok(())
        }
        Err(error) => Err(error).context("cannot read on"),
    }
}

/// It blocks, hence a thread of its own.
async fn close(consumer: Arc<StreamConsumer>) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
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
    let brokers = brokers()?;
    ensure_topic(&brokers, STORY_TOPIC, STORY_PARTITIONS).await?;
    forget_story(&brokers).await?;
    publish(&brokers, STORY_TOPIC, 1, 8).await?;
    println!("published: order-1 to order-4, 8 events");
    let mut mail = open(":memory:", Service::Mail)?;
    read(&brokers, &mut mail, Start::GoOn, 8, async || Ok(())).await?;
    let mails = mail.mails()?.len();
    println!("mail:      {mails} mails, one for each event");

    let mut analytics = open(":memory:", Service::Analytics)?;
    read(&brokers, &mut analytics, Start::GoOn, 5, async || Ok(())).await?;
    println!("replay:    5 of 8 events, and analytics dies");
    let meanwhile = async || {
        publish(&brokers, STORY_TOPIC, 9, 10).await?;
        println!("published: order-5, 2 events, while analytics begins again");
        Ok(())
    };
    let said = read(&brokers, &mut analytics, Start::GoOn, 5, meanwhile).await?;
    println!("{said}");
    println!("revenue:   {}", revenue(&analytics)?);

    println!("replay:    10 events for the mail service, from the first one on");
    let said = read(&brokers, &mut mail, Start::Anew, 10, async || Ok(())).await?;
    println!("{said}");
    println!("mails:     {}, one for each event", mail.mails()?.len());
    Ok(())
}

/// A reader of its own that takes so many events and ends. Returns what it has to say.
async fn read(
    brokers: &str,
    tables: &mut Tables,
    start: Start,
    count: usize,
    meanwhile: impl AsyncFnOnce() -> Result<()>,
) -> Result<String> {
    let (consumer, mut places) = begin(brokers, STORY_TOPIC, tables, start).await?;
    meanwhile().await?;
    let mut progress = Progress::new(&places);
    let (mut left, mut said) = (count, Vec::new());
    while left > 0 {
        let mut batch = Vec::new();
        let gathered = timeout(PATIENCE, gather(&consumer, &mut batch, left)).await;
        gathered.context("no event came within 5 s")??;
        left -= batch.len();
        let applied =
            block_in_place(|| tables.apply(&batch, &mut places, Care::Taken))?;
        said.extend(progress.lines(applied, &places));
    }
    close(consumer).await?;
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

/// Deletes what an earlier story has left. The offsets go on, and the log begins later.
async fn forget_story(brokers: &str) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..STORY_PARTITIONS {
        all.add_partition_offset(STORY_TOPIC, partition, Offset::End)?;
    }
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    for deleted in admin.delete_records(&all, &options).await?.elements() {
        deleted.error().context("cannot empty the topic")?;
    }
    Ok(())
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

// ANCHOR: topic
/// Creates the topic, unless it is there, and waits until it is known.
async fn ensure_topic(brokers: &str, topic: &str, partitions: i32) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Arc::new(admin);
    // Not for ever: a topic that is there may be hidden from this user.
    for _look in 0..100 {
        // A blocking call, hence a thread of its own.
        let asking = Arc::clone(&admin);
        let ask = move || asking.inner().fetch_metadata(None, PATIENCE);
        let metadata = spawn_blocking(ask).await?.map_err(|error| {
            anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
        })?;
        if metadata.topics().iter().any(|it| it.name() == topic) {
            return Ok(());
        }
        let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1))
            // For ever. By default Kafka deletes what is older than a week, read or
            // not, and there is no replay of what is deleted.
            .set("retention.ms", "-1");
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics([&new], &options).await? {
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
    bail!("created, and Kafka does not show it: {topic}; ask who may describe it")
}
// ANCHOR_END: topic

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
