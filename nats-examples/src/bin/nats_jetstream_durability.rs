//! Durability: the server is killed, core NATS loses messages, JetStream none.
//!
//! Teaches: core NATS hands a message to those who are connected at that moment;
//! who is away for half a second has lost what was published meanwhile, and
//! nobody says so. JetStream answers when it has stored a message. No answer: publish
//! again with the same id. What the answer does not promise is that the disk has
//! it: the server writes to it every `sync_interval`, 2 minutes by default, so a
//! power cut may take what a killed process does not.
//!
//! Run with a server of your own, and kill it meanwhile as often as you like:
//!
//! ```text
//! nats-server -js -sd target/nats-durability
//! cargo run --bin nats_jetstream_durability
//! pkill -KILL nats-server     # and start it again
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready:     1000 readings each way, kill the server meanwhile
//! core:      1000 published, <received> received, <lost> lost
//! jetstream: 1000 acknowledged, attempts without an answer: <repeated>
//! stored:    1000 different readings
//! lost:      0 acknowledged readings
//! twice:     0 readings
//! ```
//!
//! Left out on purpose: several publishes in flight (`nats_jetstream_publish_async`),
//! and servers that take over (`nats_jetstream_cluster_failover`).

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, RequestErrorKind, ServerAddr,
    Subscriber,
    header::NATS_MESSAGE_ID,
    jetstream::{
        self, Context, ErrorCode,
        consumer::pull,
        context::DeleteStreamErrorKind,
        message::PublishMessage,
        stream::{Config, StorageType, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "durable_readings";
const STORED: &str = "durable.stored.fridge";
const CORE: &str = "durable.core.fridge";

const READINGS: usize = 1000;
/// Between two readings. Slow enough to kill a server several times.
const PAUSE: Duration = Duration::from_millis(10);
/// How long the subscriber takes to come back, as one does that is far away. The
/// publisher is back at once.
const AWAY: Duration = Duration::from_millis(500);
/// How long one attempt may take, and how long all of one reading together.
const ATTEMPT: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts, so that they do not hammer the server.
const BREATH: Duration = Duration::from_millis(50);
/// The last of the core messages; published until it arrives.
const END: &str = "end";

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    // Two connections, as if they were two programs.
    let publisher = connect(BREATH).await?;
    let subscriber = connect(AWAY).await?;
    let jetstream = jetstream::new(publisher.clone());
    // What this run stores is counted at its end, so it begins with nothing.
    forget(&jetstream).await?;
    let mut stream = create(&jetstream).await?;
    let subscription = subscriber.subscribe(CORE).await?;
    // A flush only writes to the socket. The server reads in order: when it says
    // that nobody listens here, it knows of the subscription.
    match subscriber
        .request("durable.nobody.listens", "".into())
        .await
    {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {}
        answer => drop(answer.context("the server does not answer")?),
    }
    println!("ready:     {READINGS} readings each way, kill the server meanwhile");

    let receiving = tokio::spawn(receive(subscription));
    let core = tokio::spawn(publish_core(publisher.clone()));
    let repeated = publish_all(&jetstream).await?;
    core.await??;
    while !receiving.is_finished() {
        publisher.publish(CORE, END.into()).await?;
        sleep(BREATH).await;
    }
    let received = receiving.await??;
    let lost = READINGS - received.len();
    println!(
        "core:      {READINGS} published, {} received, {lost} lost",
        received.len()
    );

    println!(
        "jetstream: {READINGS} acknowledged, attempts without an answer: {repeated}"
    );
    let stored = read_all(&mut stream).await?;
    let lost = (0..READINGS)
        .filter(|number| !stored.contains_key(&id(*number)))
        .count();
    let twice = stored.values().filter(|times| **times > 1).count();
    println!("stored:    {} different readings", stored.len());
    println!("lost:      {lost} acknowledged readings");
    println!("twice:     {twice} readings");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: core
/// Publishes, and knows of no loss: while there is no server, the client keeps
/// what is published, and sends it when there is one again.
async fn publish_core(publisher: Client) -> Result<()> {
    for number in 0..READINGS {
        publisher.publish(CORE, id(number).into()).await?;
        sleep(PAUSE).await;
    }
    Ok(())
}

/// The readings that arrive. No error comes for those that do not.
async fn receive(mut subscription: Subscriber) -> Result<BTreeSet<Vec<u8>>> {
    let mut received = BTreeSet::new();
    while let Some(message) = subscription.next().await {
        if message.payload == END {
            return Ok(received);
        }
        received.insert(message.payload.to_vec());
    }
    bail!("the subscription has ended")
}
// ANCHOR_END: core

/// The number of the reading in the device, the same for each attempt.
fn id(number: usize) -> String {
    format!("reading-{number}")
}

// ANCHOR: publish
/// Publishes each until it is acknowledged. Returns how many attempts were not.
async fn publish_all(jetstream: &Context) -> Result<usize> {
    let mut repeated = 0;
    for number in 0..READINGS {
        let deadline = Instant::now() + PATIENCE;
        while let Err(reason) = publish(jetstream, number).await {
            if Instant::now() > deadline {
                bail!("{number} of {READINGS} are acknowledged ({reason})");
            }
            repeated += 1;
            sleep(BREATH).await;
        }
        sleep(PAUSE).await;
    }
    Ok(repeated)
}

/// One attempt. An error does not tell whether the reading is stored.
async fn publish(jetstream: &Context, number: usize) -> Result<()> {
    let message = PublishMessage::build()
        .payload("4.2 C".into())
        // The server stores one message for an id, within `duplicate_window`
        // (2 minutes by default, so go on for less than that).
        .message_id(id(number));
    timeout(ATTEMPT, async {
        let acknowledgement = jetstream.send_publish(STORED, message).await?;
        acknowledgement.await
    })
    .await
    .context("no answer")??;
    Ok(())
}
// ANCHOR_END: publish

async fn create(jetstream: &Context) -> Result<Stream> {
    let config = Config {
        name: STREAM.to_owned(),
        subjects: vec![STORED.to_owned()],
        // The default. In `Memory` a killed server would lose the stream.
        storage: StorageType::File,
        ..Config::default()
    };
    let stream = jetstream.create_stream(config).await;
    stream.context("cannot create the stream; is JetStream on (-js)?")
}

/// Each message id in the stream, and how often it is there.
async fn read_all(stream: &mut Stream) -> Result<BTreeMap<String, usize>> {
    let mut open = stream.info().await?.state.messages;
    let mut messages = stream
        .create_consumer(pull::OrderedConfig::default())
        .await?
        .messages()
        .await?;
    let mut stored = BTreeMap::new();
    while open > 0 {
        let message = timeout(PATIENCE, messages.next())
            .await
            .context("the stream holds more than it delivers")?
            .context("the consumer has ended")??;
        let id = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(NATS_MESSAGE_ID))
            .context("a message without an id; who published it?")?;
        *stored.entry(id.to_string()).or_default() += 1;
        open -= 1;
    }
    Ok(stored)
}

async fn forget(jetstream: &Context) -> Result<()> {
    match jetstream.delete_stream(STREAM).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => bail!("cannot delete {STREAM} ({error}); is JetStream on?"),
        },
    }
}

/// Connects, and comes back after this time when the connection is lost.
async fn connect(back: Duration) -> Result<Client> {
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
        .reconnect_delay_callback(move |_attempts| back)
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
