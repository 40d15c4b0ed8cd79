//! Cluster failover: the leader of a queue dies, and what was confirmed stays.
//!
//! Teaches: with three replicas a confirm means that two nodes have the message, so
//! one may die. The client has to go to another node by itself, and publishes again
//! what was not confirmed: RabbitMQ does not know a repeated message, so the consumer
//! has to, by its id. With one replica nobody can take over: the queue is gone until
//! its node is back.
//!
//! Run, after `docker compose -f docker-compose.cluster.yml --profile rabbitmq up -d
//! --wait`:
//!
//! ```text
//! cargo run --bin rabbitmq_quorum_failover            # kill the leader
//! cargo run --bin rabbitmq_quorum_failover single     # one replica
//! docker compose -f docker-compose.cluster.yml kill rabbitmq1      # it leads
//! ```
//!
//! Expected output:
//!
//! ```text
//! queue:     failover.payments, replicas 3, leader at <node>
//! publish:   300 payments, kill that node meanwhile
//! confirmed: 50 payments
//! ...
//! confirmed: 300 payments
//! attempted: <attempts> times, <failed> without a confirm
//! stored:    300 different payments
//! lost:      0 confirmed payments
//! twice:     <twice> payments
//! ```
//!
//! Left out on purpose: several publishes in flight at a time; consumers during the
//! election.

use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{sleep, timeout};

/// The nodes, with commas between. A client of AMQP learns none that it is not told.
const DEFAULT_URLS: &str = "amqp://guest:guest@localhost:5672/%2f,\
                            amqp://guest:guest@localhost:5673/%2f,\
                            amqp://guest:guest@localhost:5674/%2f";
const QUEUE: &str = "failover.payments";
/// What the errors say.
const HOW: &str =
    "docker compose -f docker-compose.cluster.yml --profile rabbitmq up -d --wait";
const USAGE: &str = "usage: rabbitmq_quorum_failover [single]";

const PAYMENTS: usize = 300;
/// Slow enough to kill a node in the middle.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a node may take to answer before the next is tried.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long one attempt may take, and how long all of one payment together.
const ATTEMPT: Duration = Duration::from_secs(3);
const ALL_ATTEMPTS: Duration = Duration::from_secs(20);
/// Between two attempts, so that they do not hammer the nodes.
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
async fn story(replicas: i32) -> Result<()> {
    let nodes = nodes()?;
    let mut link = connect(&nodes).await?;
    declare(&link.channel, replicas).await?;
    see_everywhere(&nodes).await?;
    println!(
        "queue:     {QUEUE}, replicas {replicas}, leader at {}",
        link.node
    );
    println!("publish:   {PAYMENTS} payments, kill that node meanwhile");

    let mut failed = 0;
    for number in 0..PAYMENTS {
        failed += publish(&mut link, &nodes, number)
            .await
            .with_context(|| format!("{number} of {PAYMENTS} are confirmed"))?;
        if (number + 1) % 50 == 0 {
            println!("confirmed: {} payments", number + 1);
        }
        sleep(PAUSE).await;
    }
    let attempts = PAYMENTS + failed;
    println!("attempted: {attempts} times, {failed} without a confirm");

    let stored = take_all(&link.channel).await?;
    let lost = (0..PAYMENTS)
        .filter(|number| !stored.contains_key(&id(*number)))
        .count();
    let twice = stored.values().filter(|times| **times > 1).count();
    println!("stored:    {} different payments", stored.len());
    println!("lost:      {lost} confirmed payments");
    println!("twice:     {twice} payments");
    ensure!(lost == 0, "{lost} payments that were confirmed are gone");
    Ok(())
}
// ANCHOR_END: story

/// The number of the payment in the books, the same for each attempt.
fn id(number: usize) -> String {
    format!("payment-{number}")
}

// ANCHOR: publish
/// Publishes until it is confirmed, by whichever node. Returns how many attempts
/// failed.
async fn publish(
    link: &mut Link,
    nodes: &[AMQPUri],
    number: usize,
) -> Result<usize> {
    let deadline = Instant::now() + ALL_ATTEMPTS;
    let mut failed = 0;
    loop {
        // Whether the message of a failed attempt was stored, nothing tells.
        let reason = match timeout(ATTEMPT, attempt(&link.channel, number)).await {
            Ok(Ok(())) => return Ok(failed),
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => "no confirm".to_owned(),
        };
        if Instant::now() > deadline {
            bail!(
                "payment {number} got no confirm in {} s ({reason})",
                ALL_ATTEMPTS.as_secs()
            );
        }
        failed += 1;
        sleep(BREATH).await;
        // A node may be up and its answer lost: a new connection asks anew. Where
        // none can be had the next attempt fails, until the time is over.
        if let Ok(another) = connect(nodes).await {
            *link = another;
        }
    }
}

async fn attempt(channel: &Channel, number: usize) -> Result<()> {
    let options = BasicPublishOptions {
        // Without it a message for a queue that is not there is confirmed, and gone.
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default().with_message_id(id(number).into());
    let confirm = channel
        .basic_publish("".into(), QUEUE.into(), options, b"9.90", properties)
        .await?;
    match confirm.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("RabbitMQ did not store it: {other:?}"),
    }
}
// ANCHOR_END: publish

// ANCHOR: declare
/// A new queue, as what this run stores is counted at its end.
async fn declare(channel: &Channel, replicas: i32) -> Result<()> {
    // That there is none is no error.
    channel
        .queue_delete(QUEUE.into(), QueueDeleteOptions::default())
        .await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let size = AMQPValue::LongInt(replicas);
    arguments.insert("x-quorum-initial-group-size".into(), size);
    // The node of this connection is to lead, which is the default too.
    let locator = AMQPValue::LongString("client-local".into());
    arguments.insert("x-queue-leader-locator".into(), locator);
    channel
        .queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .with_context(|| format!("cannot declare {QUEUE}"))?;
    Ok(())
}
// ANCHOR_END: declare

/// RabbitMQ makes fewer replicas where there are fewer nodes, and says nothing. Hence
/// each node is asked for the queue, which nodes of another cluster do not know.
async fn see_everywhere(nodes: &[AMQPUri]) -> Result<()> {
    ensure!(
        nodes.len() >= 3,
        "AMQP_URL names {} of the nodes; it needs three, with commas between: {HOW}",
        nodes.len()
    );
    for node in nodes {
        let link = connect(std::slice::from_ref(node)).await?;
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        link.channel
            .queue_declare(QUEUE.into(), passive, FieldTable::default())
            .await
            .with_context(|| {
                format!(
                    "RabbitMQ at {} is not of the same cluster: {HOW}",
                    link.node
                )
            })?;
    }
    Ok(())
}

/// Takes what is in the queue: each payment, and how often.
async fn take_all(channel: &Channel) -> Result<BTreeMap<String, usize>> {
    let mut taken = BTreeMap::new();
    let options = BasicGetOptions::default();
    while let Some(message) =
        timeout(ALL_ATTEMPTS, channel.basic_get(QUEUE.into(), options))
            .await
            .context("the queue does not answer")??
    {
        let properties = &message.delivery.properties;
        let id = properties.message_id().as_ref();
        let id = id.context("a payment without an id")?.to_string();
        *taken.entry(id).or_default() += 1;
        message.delivery.ack(BasicAckOptions::default()).await?;
    }
    Ok(taken)
}

/// A connection to one of the nodes, and its channel, whose publishes are confirmed.
struct Link {
    channel: Channel,
    /// Host and port.
    node: String,
    /// Dropped, it closes the connection.
    _connection: Connection,
}

// ANCHOR: connect
/// To the first node that takes it.
async fn connect(nodes: &[AMQPUri]) -> Result<Link> {
    let (mut absent, mut refused) = (Vec::new(), None);
    for node in nodes {
        let place = format!(
            "{}:{}, vhost {:?}",
            node.authority.host, node.authority.port, node.vhost
        );
        match timeout(PATIENCE, link(node.clone())).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(error)) if error.is_io_error() => {
                absent.push(format!("no RabbitMQ at {place} ({error})"));
            }
            // A node that is just starting refuses too, so the others are asked first.
            Ok(Err(error)) => refused = Some((place, error)),
            Err(_elapsed) => {
                absent.push(format!("no answer from RabbitMQ at {place}"));
            }
        }
    }
    if let Some((place, error)) = refused {
        bail!(
            "RabbitMQ at {place} refuses the connection ({error}); check user, \
             password and vhost in AMQP_URL"
        );
    }
    bail!(
        "{}; it needs three nodes, and cargo lab up rabbitmq starts one: {HOW}",
        absent.join(", ")
    )
}

async fn link(node: AMQPUri) -> lapin::Result<Link> {
    let place = format!("{}:{}", node.authority.host, node.authority.port);
    let properties = ConnectionProperties::default();
    let connection = Connection::connect_uri(node, properties).await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(Link {
        channel,
        node: place,
        _connection: connection,
    })
}
// ANCHOR_END: connect

fn nodes() -> Result<Vec<AMQPUri>> {
    let urls = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URLS.to_owned());
    let nodes = urls.split(',').map(|url| {
        url.parse().map_err(|_reason| {
            // The reason would repeat the address, with the password in it.
            anyhow!(
                "AMQP_URL is not a list of AMQP addresses; a right one: {DEFAULT_URLS}"
            )
        })
    });
    nodes.collect()
}
