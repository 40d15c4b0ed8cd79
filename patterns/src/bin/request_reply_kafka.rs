//! Request and reply: a hundred questions at a time, and each gets its own answer.
//!
//! Teaches: Kafka has topics and nothing for answers, so it takes a second topic, of
//! which a client reads one partition and says so in its questions. It has to know
//! where that partition ends before it asks, or it may miss the answer. Neither the
//! broker nor the server tells that nobody answers: only the time limit ends the
//! waiting.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin request_reply_kafka             # the whole story
//! cargo run --bin request_reply_kafka serve       # terminal 1, and 2
//! cargo run --bin request_reply_kafka ask 100     # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! asked:    100 questions at the same time
//! answered: 100, each with its own answer
//! late:     a question whose deadline has passed has no answer
//! nobody:   no answer within 300ms
//! ```
//!
//! Left out on purpose: a partition of one's own for each client. Those that share one
//! get each other's answers too, and pass over them.

use std::{
    collections::HashMap,
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::request_reply::{
    Answer, DEADLINE, answer, deadline, is_late, question,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::{Notify, oneshot},
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const REQUESTS: &str = "price-requests";
const REPLIES: &str = "price-replies";
const TOPICS: [&str; 2] = [REQUESTS, REPLIES];
const PARTITIONS: i32 = 4;
const GROUP: &str = "price-servers";
/// The headers that say where the answer goes, and whose it is.
const REPLY_PARTITION: &str = "reply-partition";
const CORRELATION_ID: &str = "correlation-id";
const USAGE: &str = "usage: request_reply_kafka [serve | ask COUNT]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one waits that is not answered in the story.
const IMPATIENCE: Duration = Duration::from_millis(300);
/// How long the first answer may take: a new group has to find its members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["serve"] => serve_until_stopped().await,
        ["ask", count] => match count.parse() {
            Ok(count) => ask_many(count).await,
            Err(_) => return usage(),
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

// ---- Server ----------------------------------------------------------------

async fn serve_until_stopped() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let producer = producer(&brokers)?;
    let consumer = questions(&brokers)?;
    println!("ready:    answers to {REQUESTS}, Ctrl-C to stop");
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
        println!("{}", serve(&producer, &record).await?);
        consumer.store_offset_from_message(&record)?;
    }
    spawn_blocking(move || drop(consumer)).await?;
    println!("stopped");
    Ok(())
}

fn questions(brokers: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false")
        .create()?;
    consumer.subscribe(&[REQUESTS])?;
    Ok(consumer)
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        // A question does not wait for others to go with.
        .set("linger.ms", "0")
        // Each to a partition by chance, and so to any of the servers. By default those
        // of 10 ms go to the same one.
        .set("sticky.partitioning.linger.ms", "0")
        .create()?;
    Ok(producer)
}

// ANCHOR: serve
async fn serve(
    producer: &FutureProducer,
    record: &BorrowedMessage<'_>,
) -> Result<&'static str> {
    if is_late(header(record, DEADLINE), SystemTime::now()) {
        return Ok("skipped:  nobody waits any more");
    }
    let partition = header(record, REPLY_PARTITION);
    let partition = partition.and_then(|text| text.parse::<u16>().ok());
    let (Some(partition), Some(id)) = (partition, header(record, CORRELATION_ID))
    else {
        return Ok("skipped:  nobody wants an answer");
    };
    let headers = OwnedHeaders::new().insert(Header {
        key: CORRELATION_ID,
        value: Some(id),
    });
    let answer = serde_json::to_vec(&answer(record.payload().unwrap_or_default()))?;
    let reply: FutureRecord<'_, (), _> = FutureRecord::to(REPLIES)
        .partition(partition.into())
        .headers(headers)
        .payload(&answer);
    match producer.send(reply, PATIENCE).await {
        Ok(_delivery) => Ok("answered: a question"),
        // The partition is what somebody has written into a header.
        Err((
            KafkaError::MessageProduction(RDKafkaErrorCode::UnknownPartition),
            _,
        )) => Ok("skipped:  there is no such partition for the answer"),
        Err((error, _reply)) => Err(anyhow!("not delivered to {REPLIES}: {error}")),
    }
}
// ANCHOR_END: serve

fn header<'a>(record: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a str> {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let value = headers.filter(|header| header.key == name).last()?.value?;
    str::from_utf8(value).ok()
}

// ---- Client ----------------------------------------------------------------

async fn ask_many(count: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let caller = Arc::new(Caller::new(&brokers).await?);
    let answered = ask_all(&caller, count).await?;
    println!("answered: {answered} of {count}, each with its own answer");
    Ok(())
}

// ANCHOR: ask
/// Who waits for which answer, by correlation id.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>>;

struct Caller {
    producer: FutureProducer,
    /// The partition in which it reads its answers.
    partition: i32,
    /// What is different from other callers of this partition.
    name: String,
    waiting: Waiting,
}

impl Caller {
    async fn new(brokers: &str) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let partition = i32::try_from(now / 1000 % PARTITIONS as u128)?;
        let answers: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            // A consumer needs one; this one commits nothing.
            .set("group.id", "price-callers")
            .set("enable.auto.commit", "false")
            .create()?;
        let answers = Arc::new(answers);
        // Where it begins is settled before the first question: "from the end" would be
        // settled some time later, and an answer could be there by then. And assigned,
        // not subscribed: no group has to agree first.
        let end = end_of_partition(&answers, partition).await?;
        let mut assignment = TopicPartitionList::new();
        let begin = Offset::Offset(end);
        assignment.add_partition_offset(REPLIES, partition, begin)?;
        answers.assign(&assignment)?;
        let waiting = Waiting::default();
        let of_answers = Arc::clone(&waiting);
        // Ends with the program.
        tokio::spawn(async move {
            loop {
                // An error is told to nobody: whoever waits has a time limit.
                let Ok(record) = answers.recv().await else {
                    continue;
                };
                let id = header(&record, CORRELATION_ID);
                let waits = id.and_then(|id| lock(&of_answers).remove(id));
                // One that nobody waits for is late, a second one, or somebody else's.
                if let Some(waits) = waits {
                    let answer = record.payload().unwrap_or_default();
                    let _gone = waits.send(answer.to_vec());
                }
            }
        });
        Ok(Self {
            producer: producer(brokers)?,
            partition,
            name: format!("caller-{now}"),
            waiting,
        })
    }

    async fn ask(&self, number: u64, patience: Duration) -> Result<Answer> {
        let until = deadline(SystemTime::now(), patience);
        self.ask_until(number, patience, &until).await
    }

    async fn ask_until(
        &self,
        number: u64,
        patience: Duration,
        until: &str,
    ) -> Result<Answer> {
        let (sender, answer) = oneshot::channel();
        let id = format!("{}-{number}", self.name);
        lock(&self.waiting).insert(id.clone(), sender);
        let partition = self.partition.to_string();
        let header = |key, value| Header {
            key,
            value: Some(value),
        };
        let headers = OwnedHeaders::new()
            .insert(header(REPLY_PARTITION, partition.as_str()))
            .insert(header(CORRELATION_ID, &id))
            .insert(header(DEADLINE, until));
        let payload = serde_json::to_vec(&question(number))?;
        let request: FutureRecord<'_, (), _> = FutureRecord::to(REQUESTS)
            .headers(headers)
            .payload(&payload);
        let delivery = self.producer.send(request, PATIENCE).await;
        delivery.map_err(|(error, _request)| {
            anyhow!("not delivered to {REQUESTS}: {error}")
        })?;
        let answer = timeout(patience, answer).await;
        lock(&self.waiting).remove(&id);
        let answer = answer
            .map_err(|_elapsed| {
                anyhow!("no answer from {REQUESTS} within {patience:?}")
            })?
            .context("nobody reads the answers any more")?;
        Ok(serde_json::from_slice(&answer)?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
// ANCHOR_END: ask

/// Where the partition of the answers ends. A new one has no leader for a moment, who
/// could tell.
async fn end_of_partition(
    answers: &Arc<StreamConsumer>,
    partition: i32,
) -> Result<i64> {
    for _look in 0..100 {
        let asking = Arc::clone(answers);
        let ask = move || asking.fetch_watermarks(REPLIES, partition, PATIENCE);
        match spawn_blocking(ask).await? {
            Ok((_first, end)) => return Ok(end),
            Err(KafkaError::MetadataFetch(
                RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable,
            )) => sleep(Duration::from_millis(50)).await,
            Err(error) => return Err(error).context("cannot read the answers"),
        }
    }
    bail!("partition {partition} of {REPLIES} has no leader")
}

/// Asks so many questions at the same time, and compares each answer with its question.
async fn ask_all(caller: &Arc<Caller>, count: u64) -> Result<u64> {
    let mut questions = JoinSet::new();
    for number in 1..=count {
        let caller = Arc::clone(caller);
        questions.spawn(async move {
            let answer = caller.ask(number, PATIENCE).await?;
            let own = answer == Answer::Price(number * 10);
            ensure!(own, "{number} labels: somebody else's answer, {answer:?}");
            Ok(())
        });
    }
    let mut answered = 0;
    while let Some(question) = questions.join_next().await {
        question??;
        answered += 1;
    }
    Ok(answered)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let (stop, stopped) = oneshot::channel::<()>();
    let answering = tokio::spawn(serve_until(brokers.clone(), stopped));
    let caller = Arc::new(Caller::new(&brokers).await?);
    // The first answer takes as long as the group of the servers takes to form.
    caller.ask(0, FIRST).await?;
    println!("asked:    100 questions at the same time");
    let answered = ask_all(&caller, 100).await?;
    println!("answered: {answered}, each with its own answer");

    // Its deadline has passed before it is sent, as if it had lain for long.
    match caller.ask_until(1, IMPATIENCE, "0").await {
        Err(error) if error.to_string().starts_with("no answer") => {
            println!("late:     a question whose deadline has passed has no answer");
        }
        other => bail!("a late question got {other:?}"),
    }

    let _gone = stop.send(());
    answering.await??;
    match caller.ask(1, IMPATIENCE).await {
        Err(error) if error.to_string().starts_with("no answer") => {
            println!("nobody:   no answer within {IMPATIENCE:?}");
        }
        other => bail!("without a server there is {other:?}"),
    }
    Ok(())
}

async fn serve_until(
    brokers: String,
    mut stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let producer = producer(&brokers)?;
    let consumer = questions(&brokers)?;
    loop {
        let record = tokio::select! {
            biased;
            _stop = &mut stopped => break,
            record = consumer.recv() => record?,
        };
        serve(&producer, &record).await?;
        consumer.store_offset_from_message(&record)?;
    }
    // Leaves the group. It blocks, hence a thread of its own.
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Topics and brokers ----------------------------------------------------

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
