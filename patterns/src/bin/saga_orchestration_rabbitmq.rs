//! Saga, orchestrated: each order ends completed or compensated.
//!
//! Teaches: an order is paid, taken out of the stock and shipped by three services,
//! and no transaction spans them. An orchestrator keeps the state of each order in a
//! table, writes it together with the next command, sends the command afterwards,
//! and acknowledges an answer when that is committed. So a kill forgets no step and
//! invents none. What cannot be finished is taken back, step by step, also what was
//! perhaps done by a service that is silent.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin saga_orchestration_rabbitmq                          # the story
//! cargo run --bin saga_orchestration_rabbitmq orchestrator saga.db     # terminal 1
//! cargo run --bin saga_orchestration_rabbitmq service payment pay.db   # 2
//! cargo run --bin saga_orchestration_rabbitmq service stock stock.db   # 3
//! cargo run --bin saga_orchestration_rabbitmq service shipping ship.db # 4
//! cargo run --bin saga_orchestration_rabbitmq order 1 20               # kill one
//! cargo run --bin saga_orchestration_rabbitmq show saga.db
//! cargo run --bin saga_orchestration_rabbitmq orchestrator --in-memory
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
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::saga_orchestration::{
    Message, Participant, Sagas, Service, now, order,
};
use tokio::{
    sync::Notify,
    task::block_in_place,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
/// Each participant has a queue: `saga.payment`, and so on.
const SHOP: &str = "saga";
/// The story has queues of its own, which it empties.
const STORY: &str = "saga-story";
/// The queue of the orchestrator: new orders and answers.
const INBOX: &str = "orchestrator";
/// How many messages may be on their way to a participant.
const PREFETCH: u16 = 20;
/// How many commands are taken out of the outbox at a time.
const BATCH: u32 = 100;
/// How long an answer may take, unless `--deadline` says otherwise.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long an orchestrator looks at no deadline after its start: the answers that
/// have come while it was down are in time.
const GRACE: Duration = Duration::from_secs(1);
const USAGE: &str = "usage: saga_orchestration_rabbitmq [orchestrator \
                     FILE|--in-memory [--deadline SECONDS] | \
                     service payment|stock|shipping FILE | \
                     order FIRST [LAST] | show FILE]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

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
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    for number in first..=last {
        let order = order(number);
        let id = order.id.clone();
        let payload = Message::Placed(order).to_json();
        publish(&channel, &queue(SHOP, INBOX), &payload).await?;
        println!("placed:    {id}");
    }
    connection.close(200, "done".into()).await?;
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
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    let mut inbox = consume(&channel, &queue(SHOP, INBOX)).await?;
    println!("ready:     orders and answers, Ctrl-C to stop");
    let started = Instant::now();
    loop {
        // First what a dead orchestrator has left.
        send_commands(&channel, SHOP, &mut sagas).await?;
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
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Takes what has come into the table, and acknowledges it afterwards. If the
/// program ends in between, it comes again and changes nothing.
async fn take(sagas: &mut Sagas, delivery: &Delivery) -> Result<()> {
    let entry = block_in_place(|| sagas.take(&delivery.data, now()))
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
    channel: &Channel,
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
            let queue = queue(shop, command.to.name());
            publish(channel, &queue, &command.payload).await?;
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
    let connection = connect().await?;
    let channel = open_channel(&connection, SHOP).await?;
    let mut commands = consume(&channel, &queue(SHOP, participant.name())).await?;
    println!("ready:     {}, Ctrl-C to stop", participant.name());
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop_signal => break,
            delivery = commands.next() => received(delivery)?,
        };
        if let Some(line) = serve(&channel, SHOP, &mut service, &delivery).await? {
            println!("{line}");
        }
    }
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Does the work and answers; then the command is acknowledged. If the program ends
/// before, the command comes again, and gets the same answer again.
async fn serve(
    channel: &Channel,
    shop: &str,
    service: &mut Service,
    delivery: &Delivery,
) -> Result<Option<String>> {
    let answered = block_in_place(|| service.handle(&delivery.data))
        .context("cannot do it, the command will come again")?;
    if let Some(answered) = &answered {
        publish(channel, &queue(shop, INBOX), &answered.payload).await?;
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
    let connection = connect().await?;
    let mut story = Story::begin(&connection).await?;
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
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Everybody in one process. The tables are gone with it.
struct Story {
    channel: Channel,
    sagas: Sagas,
    inbox: Consumer,
    services: Vec<(Participant, Service, Consumer)>,
}

impl Story {
    async fn begin(connection: &Connection) -> Result<Self> {
        let channel = open_channel(connection, STORY).await?;
        let mut services = Vec::new();
        for participant in Participant::ALL {
            let service = open_service(participant, ":memory:")?;
            let commands = story_queue(&channel, participant.name()).await?;
            services.push((participant, service, commands));
        }
        Ok(Self {
            sagas: open_sagas("--in-memory", Duration::from_secs(1))?,
            inbox: story_queue(&channel, INBOX).await?,
            services,
            channel,
        })
    }

    async fn place(&self, number: u64) -> Result<()> {
        let placed = Message::Placed(order(number)).to_json();
        publish(&self.channel, &queue(STORY, INBOX), &placed).await
    }

    /// Takes one message, sends the commands that follow, and returns to whom.
    async fn orchestrate(&mut self) -> Result<Vec<Participant>> {
        let delivery = next(&mut self.inbox).await?;
        take(&mut self.sagas, &delivery).await?;
        send_commands(&self.channel, STORY, &mut self.sagas).await
    }

    /// One command for this service.
    async fn serve(&mut self, participant: Participant) -> Result<()> {
        let mut services = self.services.iter_mut();
        let service = services.find(|(it, ..)| *it == participant);
        let (_, service, commands) = service.context("no such service")?;
        let delivery = next(commands).await?;
        serve(&self.channel, STORY, service, &delivery).await?;
        Ok(())
    }

    /// Waits for the deadline.
    async fn give_up(&mut self) -> Result<()> {
        sleep(self.sagas.wait(now())?).await;
        for entry in self.sagas.overdue(now())? {
            println!("{entry}");
        }
        send_commands(&self.channel, STORY, &mut self.sagas).await?;
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

/// What an earlier run has left is no part of the story.
async fn story_queue(channel: &Channel, name: &str) -> Result<Consumer> {
    let queue = queue(STORY, name);
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(queue.as_str().into(), purge).await?;
    consume(channel, &queue).await
}

async fn next(deliveries: &mut Consumer) -> Result<Delivery> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    received(delivery.context("nothing came; has another taken it?")?)
}

// ---- Queues and connection -------------------------------------------------

fn queue(shop: &str, participant: &str) -> String {
    format!("{shop}.{participant}")
}

// ANCHOR: channel
/// A channel on which all queues are declared, and what is published is confirmed.
async fn open_channel(connection: &Connection, shop: &str) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    let participants = Participant::ALL.map(Participant::name);
    for participant in [INBOX].into_iter().chain(participants) {
        let queue = queue(shop, participant);
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        // No limit: by default a message is deleted after twenty programs that were
        // killed while they had it, and a command or an answer with it.
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(-1));
        channel
            .queue_declare(
                queue.as_str().into(),
                QueueDeclareOptions::durable(),
                arguments,
            )
            .await
            .map_err(|error| {
                anyhow!(
                    "cannot declare the queue {queue} ({error}); if it was made with \
                     other arguments, delete it first"
                )
            })?;
    }
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    Ok(channel)
}
// ANCHOR_END: channel

/// Returns when RabbitMQ has stored the message.
async fn publish(channel: &Channel, queue: &str, payload: &[u8]) -> Result<()> {
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let confirm = channel
        .basic_publish("".into(), queue.into(), options, payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store it in {queue}: {answer:?}"),
    }
}

async fn consume(channel: &Channel, queue: &str) -> Result<Consumer> {
    let deliveries = channel
        .basic_consume(
            queue.into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(deliveries)
}

fn received(delivery: Option<lapin::Result<Delivery>>) -> Result<Delivery> {
    delivery
        .context("RabbitMQ ended it: is the queue deleted?")?
        .context("lost RabbitMQ; what is not acknowledged will come again")
}

async fn acknowledge(delivery: &Delivery) -> Result<()> {
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
    Ok(())
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

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
