//! Cluster failover: the leader of a stream dies, and what was acknowledged stays.
//!
//! Teaches: with three replicas an acknowledgement means that two servers have
//! the message, so one may die. While the others elect a leader, publishes fail:
//! publish again with the same message id, so that a payment of which only the
//! acknowledgement was lost is not stored twice. With one replica there is nobody
//! to elect: the stream is gone until its server is back.
//!
//! Run, after `docker compose -f docker-compose.cluster.yml --profile nats up -d
//! --wait`, or with these three, each in a terminal:
//!
//! ```text
//! nats-server -c nats-examples/config/cluster/n1.conf -sd target/nats-cluster/n1
//! nats-server -c nats-examples/config/cluster/n2.conf -sd target/nats-cluster/n2
//! nats-server -c nats-examples/config/cluster/n3.conf -sd target/nats-cluster/n3
//!
//! cargo run --bin nats_jetstream_cluster_failover            # kill the leader
//! cargo run --bin nats_jetstream_cluster_failover single     # one replica
//! docker compose -f docker-compose.cluster.yml kill n2       # if n2 leads
//! ```
//!
//! Expected output:
//!
//! ```text
//! stream:    shop_payments, replicas 3, leader <server>
//! publish:   300 payments, kill that server meanwhile
//! attempted: <attempts> times, <failed> without an acknowledgement
//! acked:     300 payments
//! leader:    <leader>
//! stored:    300 different payments
//! lost:      0 acknowledged payments
//! twice:     0 payments
//! ```
//!
//! Left out on purpose: several publishes in flight at a time; reading during the
//! election.

use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    header::NATS_MESSAGE_ID,
    jetstream::{
        self, Context, ErrorCode,
        consumer::pull,
        context::DeleteStreamErrorKind,
        message::PublishMessage,
        stream::{Config, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::{sleep, timeout};

/// One address is enough: the server tells the client those of the others.
const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "shop_payments";
const SUBJECT: &str = "shop.payments.captured";
/// What the errors say.
const HOW: &str =
    "docker compose -f docker-compose.cluster.yml --profile nats up -d --wait";
const USAGE: &str = "usage: nats_jetstream_cluster_failover [single]";

const PAYMENTS: usize = 300;
/// Slow enough to kill a server in the middle.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one attempt may take, and how long all of one payment together.
const ATTEMPT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two attempts, so that they do not hammer the servers.
const BREATH: Duration = Duration::from_millis(100);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(3).await,
        ["single"] => story(1).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story(replicas: usize) -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // What this run stores is counted at its end, so it begins with nothing.
    delete_leftovers(&jetstream).await?;
    let mut stream = create(&jetstream, replicas).await?;
    let leader = leader(&mut stream).await?;
    println!("stream:    {STREAM}, replicas {replicas}, leader {leader}");
    println!("publish:   {PAYMENTS} payments, kill that server meanwhile");

    let mut failed = 0;
    for number in 0..PAYMENTS {
        failed += publish(&jetstream, number)
            .await
            .with_context(|| format!("{number} of {PAYMENTS} are acknowledged"))?;
        sleep(PAUSE).await;
    }
    let attempts = PAYMENTS + failed;
    println!("attempted: {attempts} times, {failed} without an acknowledgement");
    println!("acked:     {PAYMENTS} payments");

    println!("leader:    {}", self::leader(&mut stream).await?);
    let stored = read_all(&mut stream).await?;
    let lost = (0..PAYMENTS)
        .filter(|number| !stored.contains_key(&id(*number)))
        .count();
    let twice = stored.values().filter(|times| **times > 1).count();
    println!("stored:    {} different payments", stored.len());
    println!("lost:      {lost} acknowledged payments");
    println!("twice:     {twice} payments");
    Ok(())
}
// ANCHOR_END: story

/// The number of the payment in the books, the same for each attempt.
fn id(number: usize) -> String {
    format!("payment-{number}")
}

// ANCHOR: publish
/// Publishes until it is acknowledged. Returns how many attempts failed.
async fn publish(jetstream: &Context, number: usize) -> Result<usize> {
    let deadline = Instant::now() + PATIENCE;
    let mut failed = 0;
    loop {
        let message = PublishMessage::build()
            .payload("9.90".into())
            // The server stores one message for an id, within `duplicate_window`
            // (2 minutes by default, so retry for less than that).
            .message_id(id(number));
        let attempt = timeout(ATTEMPT, async {
            let acknowledgement = jetstream.send_publish(SUBJECT, message).await?;
            acknowledgement.await
        });
        // Any error may come up while a leader is elected: nobody listens on the
        // subject, no answer, a lost connection. Whether the message was stored
        // none of them tells.
        let reason = match attempt.await {
            Ok(Ok(_stored)) => return Ok(failed),
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => "no answer".to_owned(),
        };
        if Instant::now() > deadline {
            bail!(
                "payment {number} got none in {} s ({reason})",
                PATIENCE.as_secs()
            );
        }
        failed += 1;
        sleep(BREATH).await;
    }
}
// ANCHOR_END: publish

// ANCHOR: create
async fn create(jetstream: &Context, replicas: usize) -> Result<Stream> {
    let config = Config {
        name: STREAM.to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        num_replicas: replicas,
        ..Config::default()
    };
    jetstream.create_stream(config).await.map_err(|error| {
        anyhow!(
            "cannot create {STREAM} with {replicas} replicas ({error}); it needs \
             three servers: {HOW}"
        )
    })
}

/// The server through which all writes go.
async fn leader(stream: &mut Stream) -> Result<String> {
    let asking = async {
        loop {
            // None while one is elected; then nobody may answer either.
            if let Ok(info) = stream.info().await
                && let Some(cluster) = &info.cluster
                && let Some(leader) = &cluster.leader
            {
                return leader.clone();
            }
            sleep(BREATH).await;
        }
    };
    timeout(PATIENCE, asking).await.with_context(|| {
        format!("{STREAM} has no leader; are two of three servers up?")
    })
}
// ANCHOR_END: create

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

async fn delete_leftovers(jetstream: &Context) -> Result<()> {
    match jetstream.delete_stream(STREAM).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => bail!(
                "JetStream does not answer ({error}); it needs three \
                 servers, two of which are up: {HOW}"
            ),
        },
    }
}

// ANCHOR: connect
async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one is {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start three, the one of \
                 cargo lab up nats is not enough: {HOW}"
            ),
        })
}
// ANCHOR_END: connect
