//! Graceful shutdown: a worker that is told to stop finishes what it has begun.
//!
//! Teaches: on SIGTERM, call `recv` no more, finish what has come, commit it, leave the
//! group. What the client has fetched ahead and not handed out was never begun. Several
//! mails at a time end in any order, and a commit means all before it: so it goes no
//! further than the first that is not sent, and behind one that the deadline cuts off
//! all of its partition comes again. A second signal ends the worker at once.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin graceful_shutdown_kafka                      # the whole story
//! cargo run --bin graceful_shutdown_kafka mail-server          # terminal 1
//! cargo run --bin graceful_shutdown_kafka worker               # terminal 2
//! cargo run --bin graceful_shutdown_kafka producer 1 1000      # terminal 3
//! cargo run --bin graceful_shutdown_kafka worker --deadline 5
//! cargo run --bin graceful_shutdown_kafka worker --no-drain    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued:  12 mails in mails-outgoing
//! ready:   4 mails at a time, Ctrl-C to stop
//! stop:    <n> being sent, 20 s to finish
//! stopped: sent <n>; given back <n>
//! ready:   4 mails at a time, Ctrl-C to stop
//! stop:    <n> being sent, 20 s to finish
//! stopped: sent <n>; given back <n>
//! done:    12 mails, 0 of them sent twice
//! ```
//!
//! Left out on purpose: a worker that joins while this one is not told to stop. It takes
//! partitions over whose mails are being sent; see kafka_rebalance_commit.

use std::{
    collections::{HashMap, HashSet},
    env,
    future::Future,
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::graceful_shutdown::{Hold, MailServer, Progress, line, mail, send};
use rdkafka::{
    ClientConfig, Message,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::Notify,
    task::{Id, JoinError, JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const DEFAULT_MAIL_SERVER: &str = "localhost:2525";
const TOPIC: &str = "mails-outgoing";
const TOPICS: [&str; 1] = [TOPIC];
const PARTITIONS: i32 = 4;
const GROUP: &str = "mail-workers";
const USAGE: &str = "usage: graceful_shutdown_kafka [producer FIRST LAST | \
                     mail-server | worker [--deadline SECONDS | --no-drain]]";

/// How many mails a worker sends at the same time, of whatever partitions.
const AT_ONCE: usize = 4;

/// How long a worker that is told to stop may take. Less than the patience of who
/// told it: Kubernetes kills after 30 s, `docker stop` after 10.
const DEADLINE: Duration = Duration::from_secs(20);

/// How long the mail server takes for a mail.
const MAIL: Duration = Duration::from_millis(300);

/// How many mails the story sends.
const MAILS: u64 = 12;

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the mails of the story may take to come: a new group has to find its
/// members.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => producer(first, last).await,
            _ => return usage(),
        },
        ["mail-server"] => mail_server().await,
        ["worker"] => worker_until_signal(DEADLINE, AtSignal::Drain).await,
        ["worker", "--deadline", seconds] => match seconds.parse() {
            Ok(seconds) => {
                let deadline = Duration::from_secs(seconds);
                worker_until_signal(deadline, AtSignal::Drain).await
            }
            Err(_) => return usage(),
        },
        ["worker", "--no-drain"] => {
            worker_until_signal(DEADLINE, AtSignal::End).await
        }
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
enum AtSignal {
    Drain,
    /// The mistake, to see what it costs: the signal ends the loop, and the mails
    /// that are being sent end with it.
    End,
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    queue_mails(&brokers, (first..=last).map(mail)).await?;
    println!("queued:  mail-{first} to mail-{last} in {TOPIC}");
    Ok(())
}

async fn queue_mails(
    brokers: &str,
    mails: impl Iterator<Item = String>,
) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create()?;
    for (mail, partition) in mails.zip((0..PARTITIONS).cycle()) {
        let record = FutureRecord::<(), _>::to(TOPIC)
            .payload(&mail)
            // In turns: no order is promised, and all partitions have work.
            .partition(partition);
        let delivery = producer.send(record, PATIENCE).await;
        delivery.map_err(|(error, _record)| {
            anyhow!("not delivered to {TOPIC}: {error}")
        })?;
    }
    Ok(())
}

// ---- Mail server -----------------------------------------------------------

async fn mail_server() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let address = mail_server_address();
    let server = MailServer::start(&address, MAIL, Hold::Nobody).await;
    let server = server.with_context(|| format!("cannot listen at {address}"))?;
    println!(
        "ready:   mail server at {}, Ctrl-C to stop",
        server.address()
    );
    let mut shown = 0;
    loop {
        tokio::select! {
            () = &mut stop_signal => break,
            more = server.until(|mails| mails.len() > shown) => more?,
        }
        let mails = server.mails();
        while let Some(mail) = mails.get(shown) {
            let twice = if mails[..shown].contains(mail) {
                ", not for the first time"
            } else {
                ""
            };
            println!("mail:    {mail}{twice}");
            shown += 1;
        }
    }
    println!("stopped");
    Ok(())
}

fn mail_server_address() -> String {
    env::var("MAIL_SERVER").unwrap_or_else(|_| DEFAULT_MAIL_SERVER.to_owned())
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(deadline: Duration, at: AtSignal) -> Result<()> {
    let stop = stop_signal()?;
    worker(&mail_server_address(), deadline, at, stop).await
}

// ANCHOR: worker
async fn worker(
    mail_server: &str,
    deadline: Duration,
    at_signal: AtSignal,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let consumer = take_mails(&brokers)?;
    println!("ready:   {AT_ONCE} mails at a time, Ctrl-C to stop");
    let mut mails = Mails::new(mail_server);
    let mut lost = false;
    tokio::pin!(stop);
    while mails.failed.is_none() {
        tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            Some(ended) = mails.sending.join_next_with_id() => {
                mails.finish(ended, &consumer)?;
            }
            record = consumer.recv(), if mails.sending.len() < AT_ONCE => match record {
                Ok(record) => {
                    lost = false;
                    // Owned: a record that is held would keep the consumer from ending.
                    mails.begin(record.detach());
                }
                // The client connects again by itself; it says so with each attempt,
                // and to hear it once is enough.
                Err(KafkaError::MessageConsumption(
                    code @ (RDKafkaErrorCode::AllBrokersDown
                    | RDKafkaErrorCode::BrokerTransportFailure),
                )) => {
                    if !lost {
                        eprintln!("lost Kafka, still trying ({code})");
                    }
                    lost = true;
                }
                Err(error) => return Err(error).context("cannot read on"),
            }
        }
    }
    if at_signal == AtSignal::End {
        println!("stopped: in the middle of {} mails", mails.sending.len());
        // It says goodbye here, and commits what it has stored. A killed one cannot.
        spawn_blocking(move || drop(consumer)).await?;
        return Ok(());
    }

    let now = mails.sending.len();
    println!(
        "stop:    {now} being sent, {} s to finish",
        deadline.as_secs()
    );
    // Take no more: `recv` is not called again. As long as this worker does not call
    // it, it agrees to no rebalance either, so one that joins now has to wait.
    match timeout(deadline, mails.finish_all(&consumer)).await {
        Ok(finished) => finished?,
        Err(_elapsed) => mails.sending.shutdown().await,
    }
    let given_back = mails.give_back();
    // Both wait for Kafka, hence a thread of its own. The end of the consumer leaves
    // the group, so that another has the partitions at once.
    let commit = move || consumer.commit_consumer_state(CommitMode::Sync);
    match spawn_blocking(commit).await? {
        // There was nothing to commit.
        Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
        Err(error) => bail!("not committed ({error}), so mails may be sent again"),
    }
    let Mails { sent, failed, .. } = mails;
    println!("stopped: sent {sent}; given back {given_back}");
    failed.map_or(Ok(()), Err)
}
// ANCHOR_END: worker

// ANCHOR: mails
/// The mails that this worker has to do with.
struct Mails<'a> {
    server: &'a str,
    /// Each in a task of its own, and not more than [`AT_ONCE`].
    sending: JoinSet<io::Result<()>>,
    /// What to commit, by the task.
    held: HashMap<Id, OwnedMessage>,
    progress: Progress,
    sent: u32,
    /// Why no more mails can be sent.
    failed: Option<anyhow::Error>,
}

impl<'a> Mails<'a> {
    fn new(server: &'a str) -> Self {
        Self {
            server,
            sending: JoinSet::new(),
            held: HashMap::new(),
            progress: Progress::default(),
            sent: 0,
            failed: None,
        }
    }

    fn begin(&mut self, record: OwnedMessage) {
        self.progress.begin(record.partition(), record.offset());
        let server = self.server.to_owned();
        let mail = line(record.payload().unwrap_or_default());
        let task = self
            .sending
            .spawn(async move { send(&server, &mail).await });
        self.held.insert(task.id(), record);
    }

    /// Stores up to where all is sent. It is committed in the background, and at the
    /// end.
    fn finish(
        &mut self,
        ended: Result<(Id, io::Result<()>), JoinError>,
        consumer: &StreamConsumer,
    ) -> Result<()> {
        let (task, result) = ended?;
        if let Err(error) = result {
            // It stays in `held`, and is not committed.
            let what = format!("cannot send by the mail server {}", self.server);
            self.failed
                .get_or_insert(anyhow::Error::new(error).context(what));
            return Ok(());
        }
        let record = self.held.remove(&task).context("a task without a mail")?;
        let partition = record.partition();
        let last = self.progress.done(partition, record.offset());
        // What is committed is the one behind it, from which the next worker goes on.
        if let Err(error) = consumer.store_offset(TOPIC, partition, last) {
            // Another has the partition now, and will send it again.
            eprintln!("sent, and not ours any more: {error}");
        }
        self.sent += 1;
        Ok(())
    }

    /// Waits for what is being sent.
    async fn finish_all(&mut self, consumer: &StreamConsumer) -> Result<()> {
        while let Some(ended) = self.sending.join_next_with_id().await {
            self.finish(ended, consumer)?;
        }
        Ok(())
    }

    /// What is not committed comes again, and with it all of its partition that is
    /// behind it. Those that were being sent may be sent all the same.
    fn give_back(&self) -> usize {
        for record in self.held.values() {
            eprintln!("given back: {}", line(record.payload().unwrap_or_default()));
        }
        self.held.len()
    }
}
// ANCHOR_END: mails

fn take_mails(brokers: &str) -> Result<StreamConsumer> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        // Commits in the background what is stored, and stored is what is sent.
        .set("enable.auto.offset.store", "false")
        .set("auto.commit.interval.ms", "500")
        // After this time without a sign of life a worker counts as dead, and its
        // mails go to another. 45 s by default.
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "500")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    Ok(consumer)
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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let ids = (1..=MAILS).map(|number| format!("{run}-{}", mail(number)));
    let ids: HashSet<String> = ids.collect();
    queue_mails(&brokers, ids.iter().cloned()).await?;
    println!("queued:  {MAILS} mails in {TOPIC}");

    let server = MailServer::start("127.0.0.1:0", Duration::ZERO, Hold::Everybody);
    let server = server.await?;
    // The mail server answers nobody, and the first worker is told to stop when it
    // can begin no more.
    let busy = async {
        let busy = server.until(|mails| mails.len() == AT_ONCE);
        // What has not come is missed at the end.
        let _came = timeout(FIRST, busy).await;
        server.hold(Hold::Nobody);
    };
    worker(server.address(), DEADLINE, AtSignal::Drain, busy).await?;

    let all = async {
        let of_this_run = |mails: &[String]| ids.iter().all(|id| mails.contains(id));
        let _came = timeout(FIRST, server.until(of_this_run)).await;
    };
    worker(server.address(), DEADLINE, AtSignal::Drain, all).await?;

    let mut mails = server.mails();
    mails.retain(|mail| ids.contains(mail));
    let sent: HashSet<&String> = mails.iter().collect();
    ensure!(
        sent.len() == ids.len(),
        "not all came; has another worker taken them?"
    );
    let twice = mails.len() - sent.len();
    println!("done:    {MAILS} mails, {twice} of them sent twice");
    Ok(())
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
