//! Claim check: a document of ten megabytes, and a message of a hundred bytes.
//!
//! Teaches: Kafka refuses a message above one megabyte, and one that it would take goes
//! through every log, cache and copy. So the document lies in a store, here a folder in
//! the place of S3, and the message says what it is: its SHA-256, which is also its
//! name, and its length. The document is on the disk before anybody is told of it, and
//! it is checked before it is used. A claim without its document goes to a topic of dead
//! ones, with the reason.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin claim_check_kafka                            # the whole story
//! cargo run --bin claim_check_kafka archive documents          # terminal 1
//! cargo run --bin claim_check_kafka publish 1 5 documents      # terminal 2
//! cargo run --bin claim_check_kafka publish 6 6 documents --die # an orphan
//! cargo run --bin claim_check_kafka sweep 86400 documents      # older than a day
//! cargo run --bin claim_check_kafka whole 10                   # in one message
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: invoice-1, a claim of 117 bytes for 10000000
//! archived:  invoice-1, 10000000 bytes, the right ones
//! published: invoice-2, a claim of 117 bytes for 10000000
//! dead:      another digest
//! published: invoice-3, a claim of 117 bytes for 10000000
//! dead:      no such document
//! published: a claim for ../../etc/passwd
//! dead:      not a claim
//! orphan:    invoice-4 is stored, and its publisher dies
//! swept:     3 documents
//! ```
//!
//! Left out on purpose: who may read the store. Whoever has the claim has the name of the
//! document, and that must not be enough.

use std::{
    env, fs,
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
use patterns::claim_check::{Claim, Fault, Folder, document, invoice};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
};
use tokio::{
    sync::Notify,
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "invoice-claims";
/// Where claims without their document are kept.
const DEAD: &str = "invoice-claims-dead";
/// Where the mistake puts the documents themselves.
const WHOLE: &str = "invoice-documents";
const TOPICS: [&str; 3] = [TOPIC, DEAD, WHOLE];
const PARTITIONS: i32 = 4;
const GROUP: &str = "invoice-archive";
/// The header that says why a claim is dead.
const REASON: &str = "reason";
/// What somebody sends who would like to read another file.
const CURIOUS: &str =
    r#"{"invoice":"invoice-0","sha256":"../../etc/passwd","length":9}"#;
const USAGE: &str = "usage: claim_check_kafka [publish FIRST LAST FOLDER [--die] | \
                     archive FOLDER | sweep SECONDS FOLDER | whole MEGABYTES]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last, folder, ref rest @ ..] => {
            let fate = match rest {
                [] => Fate::Lives,
                ["--die"] => Fate::Dies,
                _ => return usage(),
            };
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if first <= last => {
                    publish_all(first, last, folder, fate).await
                }
                _ => return usage(),
            }
        }
        ["archive", folder] => archive(folder).await,
        ["sweep", seconds, folder] => match seconds.parse() {
            Ok(seconds) => sweep(Duration::from_secs(seconds), folder),
            Err(_no_number) => return usage(),
        },
        ["whole", megabytes] => match megabytes.parse() {
            Ok(megabytes @ 1..=50) => whole(megabytes).await,
            _ => return usage(),
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

/// What becomes of a publisher between its two steps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lives,
    /// To see what is left then.
    Dies,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64, folder: &str, fate: Fate) -> Result<()> {
    let folder = open(folder)?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        check_in(&producer, &folder, number, fate).await?;
    }
    Ok(())
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    Ok(producer)
}

// ANCHOR: publish
/// Stores the document, and then tells of it. In this order: a document that nobody was
/// told of costs a place on the disk, a claim without a document costs the invoice.
async fn check_in(
    producer: &FutureProducer,
    folder: &Folder,
    number: u64,
    fate: Fate,
) -> Result<(Claim, Delivery)> {
    let document = document(number);
    let claim = Claim::new(invoice(number), &document);
    // A file blocks its thread.
    block_in_place(|| folder.put(&claim.sha256, &document))
        .with_context(|| format!("{} is not stored", claim.invoice))?;
    if fate == Fate::Dies {
        bail!("{} is stored, and its publisher dies", claim.invoice);
    }
    let payload = serde_json::to_vec(&claim)?;
    let delivery = publish(producer, TOPIC, &claim.invoice, &payload, None).await?;
    let (invoice, length) = (&claim.invoice, payload.len());
    println!(
        "published: {invoice}, a claim of {length} bytes for {}",
        claim.length
    );
    Ok((claim, delivery))
}
// ANCHOR_END: publish

async fn publish(
    producer: &FutureProducer,
    topic: &str,
    key: &str,
    payload: &[u8],
    reason: Option<&Fault>,
) -> Result<Delivery> {
    let mut record = FutureRecord::to(topic).key(key).payload(payload);
    let reason = reason.map(Fault::to_string);
    if let Some(reason) = &reason {
        record = record.headers(OwnedHeaders::new().insert(Header {
            key: REASON,
            value: Some(reason),
        }));
    }
    let delivery = producer.send(record, PATIENCE).await;
    delivery.map_err(|(error, _record)| {
        anyhow!("Kafka did not store {key} in {topic}: {error}")
    })
}

/// The mistake: the document itself as the message.
async fn whole(megabytes: usize) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // The client has a limit of its own, which is the same. Without it, to see that
        // of the broker.
        .set("message.max.bytes", "1000000000")
        .create()?;
    let document = vec![b'%'; megabytes * 1_000_000];
    match publish(&producer, WHOLE, "whole", &document, None).await {
        Ok(_delivery) => println!("taken:     {megabytes} MB in one message"),
        Err(error) => println!("refused:   {megabytes} MB in one message ({error})"),
    }
    Ok(())
}

// ---- Consumer --------------------------------------------------------------

// ANCHOR: archive
async fn archive(folder: &str) -> Result<()> {
    let folder = open(folder)?;
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let consumer = take_claims(&brokers)?;
    println!("ready:     claims from {TOPIC}, Ctrl-C to stop");
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
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
                if !lost {
                    eprintln!("lost Kafka, still trying ({code})");
                }
                lost = true;
                continue;
            }
            Err(error) => return Err(error).context("cannot read on"),
        };
        lost = false;
        check_out(&producer, &folder, &record).await?;
        // If the program ends before this line, the claim comes again.
        consumer.store_offset_from_message(&record)?;
    }
    close(consumer).await?;
    println!("stopped");
    Ok(())
}

/// Returns when the document is archived, or the claim is kept among the dead ones. An
/// error says that neither could be done now.
async fn check_out(
    producer: &FutureProducer,
    folder: &Folder,
    record: &BorrowedMessage<'_>,
) -> Result<()> {
    let payload = record.payload().unwrap_or_default();
    let document = match Claim::read(payload) {
        Ok(claim) => block_in_place(|| folder.get(&claim))
            .with_context(|| format!("cannot read {}", claim.invoice))?
            .map(|document| (claim, document)),
        Err(fault) => Err(fault),
    };
    match document {
        Ok((claim, document)) => {
            let (invoice, length) = (claim.invoice, document.len());
            println!("archived:  {invoice}, {length} bytes, the right ones");
        }
        Err(fault) => {
            let key = record.key().unwrap_or_default();
            let key = String::from_utf8_lossy(key);
            publish(producer, DEAD, &key, payload, Some(&fault)).await?;
            println!("dead:      {fault}");
        }
    }
    Ok(())
}
// ANCHOR_END: archive

fn take_claims(brokers: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        // A restarted consumer takes its old place at once, and does not wait for the
        // end of the dead one's session.
        .set("group.instance.id", "invoice-archive-1")
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is done.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
}

/// Commits what is stored, and leaves the group. It blocks, hence a thread of its
/// own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

// ---- Store -----------------------------------------------------------------

// ANCHOR: sweep
/// Deletes the documents that are older than any claim can be: the retention of the
/// topics, that of the dead ones too, and then some. No consumer deletes: none knows
/// whether it is the last, and a claim may come twice.
fn sweep(age: Duration, folder: &str) -> Result<()> {
    let swept = open(folder)?.sweep(age);
    let swept = swept.with_context(|| format!("cannot sweep {folder}"))?;
    println!("swept:     {swept} documents");
    Ok(())
}
// ANCHOR_END: sweep

fn open(folder: &str) -> Result<Folder> {
    Folder::open(Path::new(folder)).with_context(|| format!("cannot use {folder}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let place = env::temp_dir().join(format!("claim_check-{}", std::process::id()));
    let name = place.to_string_lossy();
    let folder = open(&name)?;

    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        // A consumer needs one; this one commits nothing.
        .set("group.id", "invoice-story")
        .set("enable.auto.commit", "false")
        .create()?;

    let (_, delivery) = check_in(&producer, &folder, 1, Fate::Lives).await?;
    check_out(&producer, &folder, &read(&consumer, &delivery).await?).await?;

    let (claim, delivery) = check_in(&producer, &folder, 2, Fate::Lives).await?;
    // Somebody overwrites it with another document of the same length.
    folder.put(&claim.sha256, &document(9))?;
    check_out(&producer, &folder, &read(&consumer, &delivery).await?).await?;

    let (claim, delivery) = check_in(&producer, &folder, 3, Fate::Lives).await?;
    // Somebody sweeps too early.
    fs::remove_file(place.join(claim.sha256.as_str()))?;
    check_out(&producer, &folder, &read(&consumer, &delivery).await?).await?;

    let curious = CURIOUS.as_bytes();
    let delivery = publish(&producer, TOPIC, "invoice-0", curious, None).await?;
    println!("published: a claim for ../../etc/passwd");
    check_out(&producer, &folder, &read(&consumer, &delivery).await?).await?;

    let died = check_in(&producer, &folder, 4, Fate::Dies).await;
    println!("orphan:    {}", died.err().context("it lives")?);
    // Nobody can come with a claim any more. In production, never so soon.
    sweep(Duration::ZERO, &name)?;
    fs::remove_dir_all(&place)?;
    close(consumer).await
}

/// What was just published; what others publish is no part of the story.
async fn read<'a>(
    consumer: &'a StreamConsumer,
    delivery: &Delivery,
) -> Result<BorrowedMessage<'a>> {
    let mut place = TopicPartitionList::new();
    let offset = Offset::Offset(delivery.offset);
    place.add_partition_offset(TOPIC, delivery.partition, offset)?;
    consumer.assign(&place)?;
    let record = timeout(PATIENCE, consumer.recv()).await;
    Ok(record.context("no claim came within 5 s")??)
}
// ANCHOR_END: story

// ---- Topic and brokers -----------------------------------------------------

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
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
        let known = |name: &_| metadata.topics().iter().any(|it| it.name() == *name);
        if TOPICS.iter().all(known) {
            return Ok(());
        }
        let topics = TOPICS
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)));
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
    bail!("created, and Kafka does not show it: {TOPICS:?}; ask who may describe it")
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
