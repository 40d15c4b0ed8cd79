//! Scatter and gather: three carriers are asked, and the cheapest in time is taken.
//!
//! Teaches: each carrier is a consumer group of its own, so each gets every question.
//! The answers go to a partition of a second topic, which the asker has assigned before
//! it asks. It shares that partition with other askers and with its own earlier
//! questions, so it takes only what has the correlation id of this one. Kafka does not
//! say who listens: a question to nobody costs the whole deadline.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin scatter_gather_kafka                            # the whole story
//! cargo run --bin scatter_gather_kafka carrier swift 790          # terminal 1
//! cargo run --bin scatter_gather_kafka carrier snail 390 --slow   # terminal 2
//! cargo run --bin scatter_gather_kafka carrier nope 500 --refuses # or --garbled, --twice
//! cargo run --bin scatter_gather_kafka ask 2                      # 2 kg, by the deadline
//! cargo run --bin scatter_gather_kafka ask 2 10000                # within 10 s
//! cargo run --bin scatter_gather_kafka ask 2 10000 --first        # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready:    3 carriers on shipping-questions
//! asked:    2 kg, within 2500 ms
//! answered: 2 of 3, by the deadline: nope no, swift 1580
//! taken:    swift for 1580 cents
//! asked:    3 kg, within 10000 ms
//! passed:   snail, to another question
//! answered: 3 of 3, before the deadline: nope no, snail 1170, swift 2370
//! taken:    snail for 1170 cents
//! asked:    4 kg, within 500 ms
//! answered: 0 of 3, by the deadline
//! none:     no offer
//! ```
//!
//! Left out on purpose: several questions at a time in one carrier, and a partition of
//! one's own for each asker.

use std::{
    env,
    future::Future,
    num::NonZeroU32,
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::scatter_gather::{
    Carrier, DEADLINE, End, Gather, Question, Reply, Taken,
};
use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{
        BaseConsumer, Consumer as _, ConsumerContext, Rebalance, StreamConsumer,
    },
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout_at},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const QUESTIONS: &str = "shipping-questions";
const OFFERS: &str = "shipping-offers";
const TOPICS: [&str; 2] = [QUESTIONS, OFFERS];
const PARTITIONS: i32 = 4;
/// Neither questions nor offers are worth anything after that, in milliseconds.
const RETENTION: &str = "3600000";
/// The headers that say where the answer goes, to which question it is, and whose.
const REPLY_PARTITION: &str = "reply-partition";
const CORRELATION_ID: &str = "correlation-id";
const CARRIER: &str = "carrier";
const USAGE: &str = "usage: scatter_gather_kafka \
    [carrier NAME CENTS [--slow | --refuses | --garbled | --twice] \
    | ask KILOGRAMS [DEADLINE_MS] [--first]]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

/// The carriers of the story, with their cents for each kilogram.
const STORY: [&[&str]; 3] = [
    &["swift", "790"],
    &["snail", "390", "--slow"],
    &["nope", "500", "--refuses"],
];

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["carrier", ref carrier @ ..] => match Carrier::parse(carrier) {
            Some(carrier) => carrier_until_stopped(&carrier).await,
            None => return usage(),
        },
        ["ask", ref words @ ..] => match to_ask(words) {
            Some((weight, deadline, rule)) => ask_once(weight, deadline, rule).await,
            None => return usage(),
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

/// When the asker stops before its deadline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    AllHaveAnswered,
    /// The mistake: who is first is seldom the cheapest.
    FirstOffer,
}

/// Weight, deadline and rule from the words behind `ask`, if they are right.
fn to_ask(words: &[&str]) -> Option<(NonZeroU32, Duration, Rule)> {
    let (words, rule) = match words {
        [words @ .., "--first"] => (words, Rule::FirstOffer),
        words => (words, Rule::AllHaveAnswered),
    };
    let (weight, deadline) = match words {
        [weight] => (weight, DEADLINE),
        [weight, deadline] => {
            let deadline: NonZeroU32 = deadline.parse().ok()?;
            (weight, Duration::from_millis(deadline.get().into()))
        }
        _ => return None,
    };
    Some((weight.parse().ok()?, deadline, rule))
}

// ---- Carrier ---------------------------------------------------------------

async fn carrier_until_stopped(carrier: &Carrier) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let stop = stop_signal()?;
    serve(&brokers, carrier, |line| println!("{line}"), stop).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: carrier
async fn serve(
    brokers: &str,
    carrier: &Carrier,
    say: impl Fn(String),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let producer = producer(brokers)?;
    let questions = questions(brokers, &carrier.name)?;
    let mut ready = false;
    let mut lost = false;
    tokio::pin!(stop);
    loop {
        let question = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            () = questions.context().joined.notified(), if !ready => {
                say(format!("ready:    {} on {QUESTIONS}", carrier.name));
                ready = true;
                continue;
            }
            question = questions.recv() => question,
        };
        if let Some(question) = received(question, &mut lost)? {
            answer(&producer, carrier, &question, &say).await?;
            questions.store_offset_from_message(&question)?;
        }
    }
    // Leaves the group. It blocks, hence a thread of its own.
    spawn_blocking(move || drop(questions)).await?;
    Ok(())
}

/// A group for each carrier: within one, each question would go to one of them.
fn questions(brokers: &str, carrier: &str) -> Result<StreamConsumer<Group>> {
    let questions: StreamConsumer<Group> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", format!("carrier-{carrier}"))
        // What is too late is told by the question itself.
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false")
        // A carrier that was killed is missed sooner, and can come back sooner.
        .set("session.timeout.ms", "6000")
        .create_with_context(Group::default())?;
    questions.subscribe(&[QUESTIONS])?;
    Ok(questions)
}

async fn answer(
    producer: &FutureProducer,
    carrier: &Carrier,
    question: &BorrowedMessage<'_>,
    say: &impl Fn(String),
) -> Result<()> {
    let partition = header(question, REPLY_PARTITION);
    let partition = partition.and_then(|text| text.parse::<u16>().ok());
    let (Some(partition), Some(id)) = (partition, header(question, CORRELATION_ID))
    else {
        say("skipped:  nobody wants an answer".to_owned());
        return Ok(());
    };
    let payload = question.payload().unwrap_or_default();
    let Some(work) = carrier.work(payload, SystemTime::now())? else {
        say("skipped:  nobody waits any more".to_owned());
        return Ok(());
    };
    say(format!("asked:    {}", work.asked));
    sleep(work.takes).await;
    for reply in &work.replies {
        let headers = headers([(CORRELATION_ID, id), (CARRIER, &carrier.name)]);
        let reply: FutureRecord<'_, (), _> = FutureRecord::to(OFFERS)
            .partition(partition.into())
            .headers(headers)
            .payload(reply);
        match producer.send(reply, PATIENCE).await {
            Ok(_delivery) => {}
            // The partition is what somebody has written into a header.
            Err((
                KafkaError::MessageProduction(RDKafkaErrorCode::UnknownPartition),
                _,
            )) => {
                say("skipped:  there is no such partition for the answer".to_owned());
                return Ok(());
            }
            Err((error, _reply)) => bail!("not delivered to {OFFERS}: {error}"),
        }
    }
    say(format!("answered: {}", work.asked));
    Ok(())
}
// ANCHOR_END: carrier

/// Tells when the group has given this carrier its partitions. Before that it can be
/// asked, and answers when it has them.
#[derive(Default)]
struct Group {
    joined: Notify,
}

impl ClientContext for Group {}

impl ConsumerContext for Group {
    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance
            && partitions.count() > 0
        {
            self.joined.notify_one();
        }
    }
}

/// What has come; nothing while the client looks for Kafka. It connects again by
/// itself; it says so with each attempt, and to hear it once is enough.
fn received<'a>(
    record: KafkaResult<BorrowedMessage<'a>>,
    lost: &mut bool,
) -> Result<Option<BorrowedMessage<'a>>> {
    match record {
        Ok(record) => {
            *lost = false;
            Ok(Some(record))
        }
        Err(KafkaError::MessageConsumption(
            code @ (RDKafkaErrorCode::AllBrokersDown
            | RDKafkaErrorCode::BrokerTransportFailure),
        )) => {
            if !*lost {
                eprintln!("lost Kafka, still trying ({code})");
            }
            *lost = true;
            Ok(None)
        }
        Err(error) => Err(error).context("cannot read on"),
    }
}

fn producer(brokers: &str) -> Result<FutureProducer> {
    let producer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Not idempotent, which would cost the first question half a second. One that
        // is written twice is answered twice, and the second answer does not count.
        .set("message.timeout.ms", "5000")
        // A question does not wait for others to go with.
        .set("linger.ms", "0")
        .create()?;
    Ok(producer)
}

fn header<'a>(record: &'a BorrowedMessage<'_>, name: &str) -> Option<&'a str> {
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let value = headers.filter(|header| header.key == name).last()?.value?;
    str::from_utf8(value).ok()
}

fn headers<const N: usize>(headers: [(&str, &str); N]) -> OwnedHeaders {
    headers
        .into_iter()
        .fold(OwnedHeaders::new(), |headers, (key, value)| {
            let value = Some(value);
            headers.insert(Header { key, value })
        })
}

// ---- Asker -----------------------------------------------------------------

async fn ask_once(weight: NonZeroU32, deadline: Duration, rule: Rule) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let mut asker = Asker::new(&brokers).await?;
    asker.ask(weight, deadline, rule).await?;
    asker.close().await
}

// ANCHOR: asker
struct Asker {
    producer: FutureProducer,
    /// All that come in its partition, whoever has asked.
    replies: Arc<StreamConsumer>,
    partition: i32,
    /// What is different from other askers of this partition.
    name: String,
    questions: u32,
}

impl Asker {
    async fn new(brokers: &str) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let partition = i32::try_from(now / 1000 % PARTITIONS as u128)?;
        let replies: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            // A consumer needs one; this one commits nothing.
            .set("group.id", "shipping-askers")
            .set("enable.auto.commit", "false")
            .create()?;
        let replies = Arc::new(replies);
        // Where it begins is settled before the first question: "from the end" would be
        // settled some time later, and an answer could be there by then. And assigned,
        // not subscribed: no group has to agree first.
        let end = end_of_partition(&replies, partition).await?;
        let mut assignment = TopicPartitionList::new();
        let begin = Offset::Offset(end);
        assignment.add_partition_offset(OFFERS, partition, begin)?;
        replies.assign(&assignment)?;
        let producer = producer(brokers)?;
        // Connects before the first deadline begins.
        let connecting = producer.clone();
        let connect = move || {
            let client = connecting.client();
            client.fetch_metadata(Some(QUESTIONS), PATIENCE).map(drop)
        };
        spawn_blocking(connect).await??;
        Ok(Self {
            producer,
            replies,
            partition,
            name: format!("asker-{now}-{}", process::id()),
            questions: 0,
        })
    }
}
// ANCHOR_END: asker

/// Where the partition ends. A new one has no leader for a moment, who could tell.
async fn end_of_partition(
    replies: &Arc<StreamConsumer>,
    partition: i32,
) -> Result<i64> {
    for _look in 0..100 {
        let asking = Arc::clone(replies);
        let ask = move || asking.fetch_watermarks(OFFERS, partition, PATIENCE);
        match spawn_blocking(ask).await? {
            Ok((_first, end)) => return Ok(end),
            Err(KafkaError::MetadataFetch(
                RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable,
            )) => sleep(Duration::from_millis(50)).await,
            Err(error) => return Err(error).context("cannot read the offers"),
        }
    }
    bail!("partition {partition} of {OFFERS} has no leader")
}

// ANCHOR: ask
impl Asker {
    /// Asks all, and says who has answered and whose offer is taken.
    async fn ask(
        &mut self,
        weight: NonZeroU32,
        patience: Duration,
        rule: Rule,
    ) -> Result<()> {
        println!("asked:    {weight} kg, within {} ms", patience.as_millis());
        let deadline = Instant::now() + patience;
        self.questions += 1;
        let id = format!("{}-{}", self.name, self.questions);
        let mut gather = Gather::new(&id);
        let question = Question::new(weight, patience, SystemTime::now());
        let sent = timeout_at(deadline, self.send(&id, &question)).await;
        sent.with_context(|| format!("not delivered to {QUESTIONS} in time"))??;
        let mut lost = false;
        let end = loop {
            if gather.is_complete() {
                break End::Complete;
            }
            if rule == Rule::FirstOffer && gather.best().is_some() {
                break End::First;
            }
            match timeout_at(deadline, self.replies.recv()).await {
                Ok(reply) => {
                    if let Some(reply) = received(reply, &mut lost)? {
                        count(&mut gather, &reply);
                    }
                }
                Err(_elapsed) => break End::Deadline,
            }
        };
        println!("{}", gather.report(end));
        Ok(())
    }
}
// ANCHOR_END: ask

impl Asker {
    async fn send(&self, id: &str, question: &Question) -> Result<()> {
        let partition = self.partition.to_string();
        let payload = serde_json::to_vec(question)?;
        let question: FutureRecord<'_, (), _> = FutureRecord::to(QUESTIONS)
            .headers(headers([
                (REPLY_PARTITION, &partition),
                (CORRELATION_ID, id),
            ]))
            .payload(&payload);
        let delivery = self.producer.send(question, PATIENCE).await;
        delivery.map_err(|(error, _question)| {
            anyhow!("not delivered to {QUESTIONS}: {error}")
        })?;
        Ok(())
    }

    /// Dropping a consumer blocks, hence a thread of its own.
    async fn close(self) -> Result<()> {
        Ok(spawn_blocking(move || drop(self)).await?)
    }
}

fn count(gather: &mut Gather, record: &BorrowedMessage<'_>) {
    let carrier = header(record, CARRIER);
    let taken = gather.take(&Reply {
        id: header(record, CORRELATION_ID),
        carrier,
        payload: record.payload().unwrap_or_default(),
    });
    let carrier = carrier.unwrap_or("somebody").escape_debug();
    match taken {
        Taken::Counted => {}
        Taken::Again => println!("passed:   {carrier}, a second time"),
        Taken::Elsewhere => println!("passed:   {carrier}, to another question"),
        Taken::Nameless => println!("passed:   an answer without a name"),
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let mut asker = Asker::new(&brokers).await?;
    let (stop, stopped) = watch::channel(());
    let (said, mut lines) = mpsc::unbounded_channel();
    let mut carriers = JoinSet::new();
    for words in STORY {
        let carrier = Carrier::parse(words).context("a carrier of the story")?;
        let (said, mut stopped) = (said.clone(), stopped.clone());
        let brokers = brokers.clone();
        carriers.spawn(async move {
            let say = |line| {
                // The story may have failed.
                let _gone = said.send(line);
            };
            let stop = async {
                // Dropped, that is its end too.
                let _dropped = stopped.changed().await;
            };
            serve(&brokers, &carrier, say, stop).await
        });
    }
    all_ready(&mut lines, &mut carriers).await?;
    println!("ready:    {} carriers on {QUESTIONS}", STORY.len());

    let rule = Rule::AllHaveAnswered;
    let kilograms = |weight| NonZeroU32::new(weight).context("no weight");
    asker.ask(kilograms(2)?, DEADLINE, rule).await?;
    let patient = Duration::from_secs(10);
    asker.ask(kilograms(3)?, patient, rule).await?;
    drop(stop);
    while let Some(carrier) = carriers.join_next().await {
        carrier??;
    }
    let short = Duration::from_millis(500);
    asker.ask(kilograms(4)?, short, rule).await?;
    asker.close().await
}
// ANCHOR_END: story

/// Waits until each carrier can be asked, unless one of them ends.
async fn all_ready(
    lines: &mut mpsc::UnboundedReceiver<String>,
    carriers: &mut JoinSet<Result<()>>,
) -> Result<()> {
    let mut ready = 0;
    while ready < STORY.len() {
        tokio::select! {
            Some(line) = lines.recv() => {
                ready += usize::from(line.starts_with("ready:"));
            }
            Some(ended) = carriers.join_next() => {
                ended??;
                bail!("a carrier has stopped");
            }
        }
    }
    Ok(())
}

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
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)))
            .map(|topic| topic.set("retention.ms", RETENTION));
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
