//! Saga, orchestrated: each order ends completed or compensated.
//!
//! Teaches: an order is paid, taken out of the stock and shipped by three services,
//! and no transaction spans them. An orchestrator keeps the state of each order in a
//! table, writes it together with the next command, sends the command afterwards,
//! and acknowledges an answer when that is committed. So a kill forgets no step and
//! invents none. What cannot be finished is taken back, step by step, also what was
//! perhaps done by a service that is silent.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin saga_orchestration_kafka                          # the story
//! cargo run --bin saga_orchestration_kafka orchestrator saga.db     # terminal 1
//! cargo run --bin saga_orchestration_kafka service payment pay.db   # 2
//! cargo run --bin saga_orchestration_kafka service stock stock.db   # 3
//! cargo run --bin saga_orchestration_kafka service shipping ship.db # 4
//! cargo run --bin saga_orchestration_kafka order 1 20               # kill one
//! cargo run --bin saga_orchestration_kafka show saga.db
//! cargo run --bin saga_orchestration_kafka orchestrator --in-memory
//! ```
//!
//! Expected output:
//!
//! ```text
//! order-1    placed                           paying
//! order-1    pay: done                        reserving
//! order-1    reserve: done                    shipping
//! order-1    ship: done                       completed
//! order-2    placed                           paying
//! order-2    pay: done                        reserving
//! order-2    reserve: out of stock            refunding
//! order-2    refund: done                     compensated
//! order-3    placed                           paying
//! order-3    pay: done                        reserving
//! order-3    reserve: done                    shipping
//! order-3    ship: no carrier goes there      releasing
//! order-3    release: done                    refunding
//! order-3    refund: done                     compensated
//! order-4    placed                           paying
//! order-4    pay: no answer in time           refunding
//! order-4    pay: done, ignored               refunding
//! order-4    refund: done                     compensated
//! books:     2500 cents paid, 2 pieces taken, 1 parcel shipped
//! ```
//!
//! Left out on purpose: a second orchestrator, for the case that the first machine
//! fails. Both need one database then, and a lease decides who runs, as in
//! nats_kv_lease.

use std::{
    env,
    future::Future,
    num::NonZeroU64,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use patterns::saga_orchestration::{
    Message, Participant, Sagas, Service, now, order,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
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
/// Each participant has a topic and a group: `saga-payment`, and so on.
const SHOP: &str = "saga";
/// The story has topics of its own: what it does is no business of others.
const STORY: &str = "saga-story";
const PARTITIONS: i32 = 4;
/// The last part of the orchestrator's topic: new orders and answers.
const INBOX: &str = "orchestrator";
/// How many commands are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long an answer may take, unless `--deadline` says otherwise.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long an orchestrator looks at no deadline after its start: the answers that
/// have come while it was down are in time, and a consumer has to join its group
/// first.
const GRACE: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: saga_orchestration_kafka [orchestrator FILE|--in-memory \
                     [--deadline SECONDS] | service payment|stock|shipping FILE | \
                     order FIRST [LAST] | show FILE]";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the next message of the story may take.
const LATEST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let Some(result) = run(&words).await else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing if the words say nothing that there is.
async fn run(words: &[&str]) -> Option<Result<()>> {
    let result = match *words {
        [] => story().await,
        ["orchestrator", file] => orchestrator(file, DEADLINE).await,
        ["orchestrator", file, "--deadline", seconds] => {
            let seconds: NonZeroU64 = seconds.parse().ok()?;
            orchestrator(file, Duration::from_secs(seconds.get())).await
        }
        ["service", name, file] => service(name.parse().ok()?, file).await,
        ["order", number] => {
            let number = number.parse().ok()?;
            place(number, number).await
        }
        ["order", first, last] => {
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            if first > last {
                return None;
            }
            place(first, last).await
        }
        ["show", file] => show(file),
        _ => return None,
    };
    Some(result)
}

// ---- Orders ----------------------------------------------------------------

async fn place(first: u64, last: u64) -> Result<()> {
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    for number in first..=last {
        let order = order(number);
        let id = order.id.clone();
        let payload = Message::Placed(order).to_json();
        publish(&producer, &topic(SHOP, INBOX), &id, &payload).await?;
        println!("placed:    {id}");
    }
    Ok(())
}

/// Prints what has happened to each order. No broker is needed for it.
fn show(file: &str) -> Result<()> {
    ensure!(Path::new(file).exists(), "there is no file {file}");
    for entry in open_sagas(file, DEADLINE)?.history()? {
        println!("{entry}");
    }
    Ok(())
}

// ---- Orchestrator ----------------------------------------------------------

// ANCHOR: orchestrator
async fn orchestrator(file: &str, limit: Duration) -> Result<()> {
    let mut sagas = open_sagas(file, limit)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let inbox = consume(&brokers, &topic(SHOP, INBOX))?;
    println!("ready:     orders and answers, Ctrl-C to stop");
    let started = Instant::now();
    let mut lost = false;
    loop {
        // First what a dead orchestrator has left.
        send_commands(&producer, SHOP, &mut sagas).await?;
        // A database blocks its thread.
        let wait = block_in_place(|| sagas.wait(now()))?;
        let wait = wait.max(GRACE.saturating_sub(started.elapsed()));
        tokio::select! {
            // In this order: an answer that is there is not too late.
            biased;
            () = &mut stop_signal => break,
            record = inbox.recv() => {
                if let Some(record) = received(record, &mut lost)? {
                    take(&inbox, &mut sagas, &record)?;
                }
            }
            () = sleep(wait) => {
                for entry in block_in_place(|| sagas.overdue(now()))? {
                    println!("{entry}");
                }
            }
        }
    }
    close(inbox).await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the table, and commits its offset afterwards. If the
/// program ends in between, it comes again and changes nothing.
fn take(
    inbox: &StreamConsumer,
    sagas: &mut Sagas,
    record: &BorrowedMessage<'_>,
) -> Result<()> {
    let payload = record.payload().unwrap_or_default();
    let entry = block_in_place(|| sagas.take(payload, now()))
        .context("cannot write down what has come, it will come again")?;
    match entry {
        Some(entry) => println!("{entry}"),
        None => eprintln!("neither an order nor an answer, set aside"),
    }
    commit(inbox, record)
}
// ANCHOR_END: orchestrator

// ANCHOR: send
/// Sends what is in the outbox, and returns to whom.
async fn send_commands(
    producer: &FutureProducer,
    shop: &str,
    sagas: &mut Sagas,
) -> Result<Vec<Participant>> {
    let mut told = Vec::new();
    loop {
        let commands = block_in_place(|| sagas.waiting(BATCH))?;
        if commands.is_empty() {
            return Ok(told);
        }
        for command in commands {
            let topic = topic(shop, command.to.name());
            publish(producer, &topic, &command.key, &command.payload).await?;
            // If the program ends before this line, the command is sent again.
            block_in_place(|| sagas.cross_off(&command))?;
            told.push(command.to);
        }
    }
}
// ANCHOR_END: send

fn open_sagas(file: &str, limit: Duration) -> Result<Sagas> {
    // The mistake, to see what it costs: forgets when it is killed.
    let path = if file == "--in-memory" {
        ":memory:"
    } else {
        file
    };
    Sagas::open(Path::new(path), limit).with_context(|| format!("cannot use {file}"))
}

// ---- Service ---------------------------------------------------------------

// ANCHOR: service
async fn service(participant: Participant, file: &str) -> Result<()> {
    let mut service = open_service(participant, file)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let brokers = brokers()?;
    ensure_topics(&brokers).await?;
    let producer = producer(&brokers)?;
    let commands = consume(&brokers, &topic(SHOP, participant.name()))?;
    println!("ready:     {}, Ctrl-C to stop", participant.name());
    let mut lost = false;
    loop {
        let record = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            record = commands.recv() => received(record, &mut lost)?,
        };
        let Some(record) = record else { continue };
        let line = serve(&producer, SHOP, &mut service, &commands, &record).await?;
        if let Some(line) = line {
            println!("{line}");
        }
    }
    close(commands).await?;
    println!("stopped");
    Ok(())
}

/// Does the work and answers; then the offset is committed. If the program ends
/// before, the command comes again, and gets the same answer again.
async fn serve(
    producer: &FutureProducer,
    shop: &str,
    service: &mut Service,
    commands: &StreamConsumer,
    record: &BorrowedMessage<'_>,
) -> Result<Option<String>> {
    let payload = record.payload().unwrap_or_default();
    let answered = block_in_place(|| service.handle(payload))
        .context("cannot do it, the command will come again")?;
    if let Some(answered) = &answered {
        let inbox = topic(shop, INBOX);
        publish(producer, &inbox, &answered.key, &answered.payload).await?;
    } else {
        eprintln!("not a command for this service, set aside");
    }
    commit(commands, record)?;
    Ok(answered.map(|answered| answered.to_string()))
}
// ANCHOR_END: service

fn open_service(participant: Participant, file: &str) -> Result<Service> {
    Service::open(participant, Path::new(file))
        .with_context(|| format!("cannot use {file}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let mut story = Story::begin().await?;
    for number in 1..=3 {
        story.place(number).await?;
        loop {
            let told = story.orchestrate().await?;
            if told.is_empty() {
                break; // The order has ended.
            }
            for participant in told {
                story.serve(participant).await?;
            }
        }
    }

    // Nobody serves payments, until the orchestrator has given up.
    story.place(4).await?;
    story.orchestrate().await?;
    story.give_up().await?;
    for _command in ["pay", "refund"] {
        story.serve(Participant::Payment).await?;
        story.orchestrate().await?;
    }
    story.show_books()?;
    story.end().await
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    producer: FutureProducer,
    sagas: Sagas,
    inbox: StreamConsumer,
    services: Vec<(Participant, Service, StreamConsumer)>,
}

impl Story {
    async fn begin() -> Result<Self> {
        let brokers = brokers()?;
        ensure_topics(&brokers).await?;
        let mut services = Vec::new();
        for participant in Participant::ALL {
            let service = open_service(participant, ":memory:")?;
            let commands = at_the_end(&brokers, participant.name()).await?;
            services.push((participant, service, commands));
        }
        Ok(Self {
            sagas: open_sagas("--in-memory", Duration::from_secs(1))?,
            inbox: at_the_end(&brokers, INBOX).await?,
            services,
            producer: producer(&brokers)?,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let order = order(number);
        let id = order.id.clone();
        let placed = Message::Placed(order).to_json();
        publish(&self.producer, &topic(STORY, INBOX), &id, &placed).await
    }

    /// Takes one message, sends the commands that follow, and returns to whom.
    async fn orchestrate(&mut self) -> Result<Vec<Participant>> {
        let record = next(&self.inbox).await?;
        take(&self.inbox, &mut self.sagas, &record)?;
        send_commands(&self.producer, STORY, &mut self.sagas).await
    }

    /// One command for this service.
    async fn serve(&mut self, participant: Participant) -> Result<()> {
        let mut services = self.services.iter_mut();
        let service = services.find(|(it, ..)| *it == participant);
        let (_, service, commands) = service.context("no such service")?;
        let record = next(commands).await?;
        serve(&self.producer, STORY, service, commands, &record).await?;
        Ok(())
    }

    /// Waits for the deadline.
    async fn give_up(&mut self) -> Result<()> {
        sleep(self.sagas.wait(now())?).await;
        for entry in self.sagas.overdue(now())? {
            println!("{entry}");
        }
        send_commands(&self.producer, STORY, &mut self.sagas).await?;
        Ok(())
    }

    fn show_books(&self) -> Result<()> {
        let mut sums = Vec::new();
        for (_, service, _) in &self.services {
            sums.push(service.balance()?);
        }
        if let [cents, pieces, parcels] = sums[..] {
            println!(
                "books:     {cents} cents paid, {pieces} pieces taken, {parcels} \
                 parcel shipped"
            );
        }
        Ok(())
    }

    async fn end(self) -> Result<()> {
        for (_, _, commands) in self.services {
            close(commands).await?;
        }
        close(self.inbox).await
    }
}
// ANCHOR_END: story

/// The next record of this run.
async fn next(consumer: &StreamConsumer) -> Result<BorrowedMessage<'_>> {
    let record = timeout(LATEST, consumer.recv()).await;
    Ok(record.context("nothing came within 30 s")??)
}

/// A consumer of what is written from this moment on: what an earlier run has left
/// is no part of the story. Fixed here and not by `Offset::End`, which the client
/// would look up later.
async fn at_the_end(brokers: &str, participant: &str) -> Result<StreamConsumer> {
    let topic = topic(STORY, participant);
    let consumer = Arc::new(consumer(brokers, &topic)?);
    let mut ends = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        // Not for ever. A broker that has just got a partition does not answer for
        // it at once.
        let mut looks = 0..100;
        let end = loop {
            let (asking, name) = (Arc::clone(&consumer), topic.clone());
            let ask = move || asking.fetch_watermarks(&name, partition, PATIENCE);
            match spawn_blocking(ask).await? {
                Ok((_first, end)) => break end,
                Err(error) if looks.next().is_none() => return Err(error.into()),
                Err(_not_yet) => sleep(Duration::from_millis(50)).await,
            }
        };
        ends.add_partition_offset(&topic, partition, Offset::Offset(end))?;
    }
    consumer.assign(&ends)?;
    Arc::into_inner(consumer).context("a consumer in use")
}

// ---- Topics and brokers ----------------------------------------------------

fn topic(shop: &str, participant: &str) -> String {
    format!("{shop}-{participant}")
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
/// Returns when Kafka has stored the message. The key is the order: what is said of
/// one order stays in its order.
async fn publish(
    producer: &FutureProducer,
    topic: &str,
    order: &str,
    payload: &[u8],
) -> Result<()> {
    let record = FutureRecord::to(topic).key(order).payload(payload);
    let stored = producer.send(record, PATIENCE).await;
    stored.map_err(|(error, _record)| {
        anyhow!("Kafka did not store a message for {topic}: {error}")
    })?;
    Ok(())
}
// ANCHOR_END: publish

fn consume(brokers: &str, topic: &str) -> Result<StreamConsumer> {
    let consumer = consumer(brokers, topic)?;
    consumer.subscribe(&[topic])?;
    Ok(consumer)
}

fn consumer(brokers: &str, topic: &str) -> Result<StreamConsumer> {
    let consumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", topic)
        // A restarted participant takes its old place at once, and does not wait for
        // the end of the dead one's session.
        .set("group.instance.id", format!("{topic}-1"))
        .set("auto.offset.reset", "earliest")
        // What is committed is done.
        .set("enable.auto.commit", "false")
        .create()?;
    Ok(consumer)
}

/// The next record; nothing while Kafka is lost. The client connects again by
/// itself; it says so with each attempt, and to hear it once is enough.
fn received<'a>(
    record: Result<BorrowedMessage<'a>, KafkaError>,
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

/// This record is done.
fn commit(consumer: &StreamConsumer, record: &BorrowedMessage<'_>) -> Result<()> {
    block_in_place(|| consumer.commit_message(record, CommitMode::Sync))
        .context("cannot commit; it will come again")
}

/// Leaves the group. It blocks, hence a thread of its own.
async fn close(consumer: StreamConsumer) -> Result<()> {
    spawn_blocking(move || drop(consumer)).await?;
    Ok(())
}

/// Creates the topics, unless they are there, and waits until they are known.
async fn ensure_topics(brokers: &str) -> Result<()> {
    let names = || {
        Participant::ALL
            .map(Participant::name)
            .into_iter()
            .chain([INBOX])
    };
    let topics: Vec<String> = [SHOP, STORY]
        .into_iter()
        .flat_map(|shop| names().map(move |name| topic(shop, name)))
        .collect();
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
        let known =
            |name: &String| metadata.topics().iter().any(|it| it.name() == *name);
        if topics.iter().all(known) {
            return Ok(());
        }
        let new: Vec<_> = topics
            .iter()
            .map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1)))
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for result in admin.create_topics(&new, &options).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    bail!("cannot create the topic {name} ({code}); ask who may")
                }
            }
        }
        // A broker hears of a new topic a moment later. A consumer that asks before
        // is told that there is none.
        sleep(Duration::from_millis(50)).await;
    }
    bail!("created, and Kafka does not show it: {topics:?}; ask who may describe it")
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
