//! Saga, orchestrated: each order ends completed or compensated.
//!
//! Teaches: an order is paid, taken out of the stock and shipped by three services,
//! and no transaction spans them. An orchestrator keeps the state of each order in a
//! table, writes it together with the next command, sends the command afterwards,
//! and acknowledges an answer when that is committed. So a kill forgets no step and
//! invents none. What cannot be finished is taken back, step by step, also what was
//! perhaps done by a service that is silent.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin saga_orchestration_nats                          # the story
//! cargo run --bin saga_orchestration_nats orchestrator saga.db     # terminal 1
//! cargo run --bin saga_orchestration_nats service payment pay.db   # 2
//! cargo run --bin saga_orchestration_nats service stock stock.db   # 3
//! cargo run --bin saga_orchestration_nats service shipping ship.db # 4
//! cargo run --bin saga_orchestration_nats order 1 20               # kill one
//! cargo run --bin saga_orchestration_nats show saga.db
//! cargo run --bin saga_orchestration_nats orchestrator --in-memory
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

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr,
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::saga_orchestration::{
    Message, Participant, Sagas, Service, now, order,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
/// Where the participants meet: a stream, and in it a subject for each of them.
const SHOP: Place = Place {
    stream: "SAGA",
    subject: "saga",
};
/// The story has a stream of its own, which it deletes.
const STORY: Place = Place {
    stream: "SAGA_STORY",
    subject: "saga-story",
};
/// The last part of the orchestrator's subject: new orders and answers.
const INBOX: &str = "orchestrator";
/// How many messages may be on their way to a participant.
const PREFETCH: usize = 20;
/// After this time NATS delivers again what is not acknowledged. So commands for one
/// order may change places when a service dies: it has to bear that.
const ACK_WAIT: Duration = Duration::from_secs(2);
/// How many commands are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long an answer may take, unless `--deadline` says otherwise.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long an orchestrator looks at no deadline after its start: the answers that
/// have come while it was down are in time.
const GRACE: Duration = Duration::from_secs(1);
const USAGE: &str = "usage: saga_orchestration_nats [orchestrator FILE|--in-memory \
                     [--deadline SECONDS] | service payment|stock|shipping FILE | \
                     order FIRST [LAST] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

struct Place {
    stream: &'static str,
    subject: &'static str,
}

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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, &SHOP).await?;
    for number in first..=last {
        let order = order(number);
        let id = order.id.clone();
        let payload = Message::Placed(order).to_json();
        publish(&jetstream, &SHOP, INBOX, payload).await?;
        println!("placed:    {id}");
    }
    client.drain().await?;
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut inbox = consume(&jetstream, &SHOP, INBOX).await?;
    println!("ready:     orders and answers, Ctrl-C to stop");
    let started = Instant::now();
    loop {
        // First what a dead orchestrator has left.
        send_commands(&jetstream, &SHOP, &mut sagas).await?;
        // A database blocks its thread.
        let wait = block_in_place(|| sagas.wait(now()))?;
        let wait = wait.max(GRACE.saturating_sub(started.elapsed()));
        tokio::select! {
            // In this order: an answer that is there is not too late.
            biased;
            () = &mut stop_signal => break,
            delivery = inbox.next() => take(&mut sagas, &received(delivery)?).await?,
            () = sleep(wait) => {
                for entry in block_in_place(|| sagas.overdue(now()))? {
                    println!("{entry}");
                }
            }
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the table, and acknowledges it afterwards. If the
/// program ends in between, it comes again and changes nothing.
async fn take(sagas: &mut Sagas, delivery: &jetstream::Message) -> Result<()> {
    let entry = block_in_place(|| sagas.take(&delivery.payload, now()))
        .context("cannot write down what has come, it will come again")?;
    match entry {
        Some(entry) => println!("{entry}"),
        None => eprintln!("neither an order nor an answer, set aside"),
    }
    acknowledge(delivery).await
}
// ANCHOR_END: orchestrator

// ANCHOR: send
/// Sends what is in the outbox, and returns to whom.
async fn send_commands(
    jetstream: &jetstream::Context,
    place: &Place,
    sagas: &mut Sagas,
) -> Result<Vec<Participant>> {
    let mut told = Vec::new();
    loop {
        let commands = block_in_place(|| sagas.waiting(BATCH))?;
        if commands.is_empty() {
            return Ok(told);
        }
        for command in commands {
            let payload = command.payload.clone();
            publish(jetstream, place, command.to.name(), payload).await?;
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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    let mut commands = consume(&jetstream, &SHOP, participant.name()).await?;
    println!("ready:     {}, Ctrl-C to stop", participant.name());
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = commands.next() => received(delivery)?,
        };
        if let Some(line) = serve(&jetstream, &SHOP, &mut service, &delivery).await?
        {
            println!("{line}");
        }
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Does the work and answers; then the command is acknowledged. If the program ends
/// before, the command comes again, and gets the same answer again.
async fn serve(
    jetstream: &jetstream::Context,
    place: &Place,
    service: &mut Service,
    delivery: &jetstream::Message,
) -> Result<Option<String>> {
    let answered = block_in_place(|| service.handle(&delivery.payload))
        .context("cannot do it, the command will come again")?;
    if let Some(answered) = &answered {
        publish(jetstream, place, INBOX, answered.payload.clone()).await?;
    } else {
        eprintln!("not a command for this service, set aside");
    }
    acknowledge(delivery).await?;
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
    let client = connect().await?;
    let mut story = Story::begin(jetstream::new(client.clone())).await?;
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
    client.drain().await?;
    Ok(())
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    jetstream: jetstream::Context,
    sagas: Sagas,
    inbox: pull::Stream,
    services: Vec<(Participant, Service, pull::Stream)>,
}

impl Story {
    async fn begin(jetstream: jetstream::Context) -> Result<Self> {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(STORY.stream).await;
        let mut services = Vec::new();
        for participant in Participant::ALL {
            let service = open_service(participant, ":memory:")?;
            let commands = consume(&jetstream, &STORY, participant.name()).await?;
            services.push((participant, service, commands));
        }
        Ok(Self {
            sagas: open_sagas("--in-memory", Duration::from_secs(1))?,
            inbox: consume(&jetstream, &STORY, INBOX).await?,
            services,
            jetstream,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let placed = Message::Placed(order(number)).to_json();
        publish(&self.jetstream, &STORY, INBOX, placed).await
    }

    /// Takes one message, sends the commands that follow, and returns to whom.
    async fn orchestrate(&mut self) -> Result<Vec<Participant>> {
        let delivery = next(&mut self.inbox).await?;
        take(&mut self.sagas, &delivery).await?;
        send_commands(&self.jetstream, &STORY, &mut self.sagas).await
    }

    /// One command for this service.
    async fn serve(&mut self, participant: Participant) -> Result<()> {
        let mut services = self.services.iter_mut();
        let service = services.find(|(it, ..)| *it == participant);
        let (_, service, commands) = service.context("no such service")?;
        let delivery = next(commands).await?;
        serve(&self.jetstream, &STORY, service, &delivery).await?;
        Ok(())
    }

    /// Waits for the deadline.
    async fn give_up(&mut self) -> Result<()> {
        sleep(self.sagas.wait(now())?).await;
        for entry in self.sagas.overdue(now())? {
            println!("{entry}");
        }
        send_commands(&self.jetstream, &STORY, &mut self.sagas).await?;
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
}
// ANCHOR_END: story

async fn next(deliveries: &mut pull::Stream) -> Result<jetstream::Message> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    received(delivery.context("nothing came; has another taken it?")?)
}

// ---- Stream and connection -------------------------------------------------

// ANCHOR: declare
/// Declares the stream. A message stays in it until its participant has acknowledged
/// it.
async fn declare(
    jetstream: &jetstream::Context,
    place: &Place,
) -> Result<stream::Stream> {
    let Place { stream, subject } = place;
    jetstream
        .create_stream(stream::Config {
            name: (*stream).to_owned(),
            subjects: vec![format!("{subject}.*")],
            retention: stream::RetentionPolicy::WorkQueue,
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

/// What comes for a participant, also what came while it was down.
async fn consume(
    jetstream: &jetstream::Context,
    place: &Place,
    participant: &str,
) -> Result<pull::Stream> {
    let stream = declare(jetstream, place).await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(participant.to_owned()),
            filter_subject: format!("{}.{participant}", place.subject),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .with_context(|| format!("cannot make the consumer {participant}"))?;
    let deliveries = consumer
        .stream()
        .max_messages_per_batch(PREFETCH)
        .messages();
    Ok(deliveries.await?)
}
// ANCHOR_END: declare

/// Returns when NATS has stored the message. It has no id for NATS, which would drop
/// a command that is sent once more within two minutes.
async fn publish(
    jetstream: &jetstream::Context,
    place: &Place,
    participant: &str,
    payload: Vec<u8>,
) -> Result<()> {
    let subject = format!("{}.{participant}", place.subject);
    // Two awaits: the first hands the message to the connection, the second waits
    // for the answer of the stream.
    let stored = jetstream.publish(subject, payload.into()).await?;
    let stored = stored.await;
    stored.with_context(|| format!("NATS did not store it for {participant}"))?;
    Ok(())
}

fn received(
    delivery: Option<Result<jetstream::Message, pull::MessagesError>>,
) -> Result<jetstream::Message> {
    delivery
        .context("NATS ended the deliveries")?
        .context("cannot read on; is the stream or its consumer deleted?")
}

/// Returns when NATS knows of it.
async fn acknowledge(delivery: &jetstream::Message) -> Result<()> {
    let acknowledged = delivery.double_ack().await.map_err(Error::from_boxed);
    acknowledged.context("lost NATS; what is not acknowledged will come again")
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
    ConnectOptions::new()
        // The client connects again by itself, and would do so in silence.
        .event_callback(|event| async move {
            if event == Event::Disconnected {
                eprintln!("lost NATS, still trying");
            }
        })
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
