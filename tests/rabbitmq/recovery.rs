//! Connections that are closed from the other side, and servers that are killed:
//! nothing that was confirmed is lost, and the program goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::broker::Broker;
use lapin::{options::QueueDeclareOptions, types::FieldTable};
use tests::{
    Example, Supervised, TestBroker,
    observe::{self, rabbitmq::Management},
    proxy::Proxy,
    random, wait,
};
use tokio::time::sleep;

use crate::{own_vhost, ran_twice};

const AUTO: &str = env!("CARGO_BIN_EXE_rabbitmq_auto_recovery");
const MANUAL: &str = env!("CARGO_BIN_EXE_rabbitmq_manual_reconnect");

/// The queue of an example.
fn queue(example: &str) -> &'static str {
    match example {
        AUTO => "recovery.readings",
        _ => "reconnect.readings",
    }
}

/// How often each reading was printed by a consumer, in its whole output.
fn counted(output: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let readings = output.lines().filter_map(|line| {
        let reading = line.strip_prefix("consumed:")?;
        Some(reading.trim().to_owned())
    });
    for reading in readings {
        *counts.entry(reading).or_default() += 1;
    }
    counts
}

/// How lapin 4.12.3 is known to fail when it recovers, as the example words it. Any
/// other error of a program that was only disturbed is one of the program.
const KNOWN_FAILURES: [&str; 4] = [
    "lapin has not recovered within 45 s",
    "lapin has given up its consumer",
    "RabbitMQ has not confirmed within 45 s",
    "failed to parse",
];

/// What one that is started again may find: no server, or one that has only begun.
const NOT_YET: [&str; 3] = [
    "no RabbitMQ at",
    "no answer from RabbitMQ",
    "refuses the connection",
];

/// What an example may end with that the example cannot help; other ends are errors.
fn excused(errors: &[String]) -> Result<()> {
    for (number, line) in errors.iter().enumerate() {
        let is_one_of =
            |list: &[&str]| list.iter().any(|words| line.contains(words));
        let not_yet = number > 0 && is_one_of(&NOT_YET);
        ensure!(
            is_one_of(&KNOWN_FAILURES) || not_yet,
            "it should have gone on: {line}"
        );
    }
    Ok(())
}

async fn start(example: &str, words: &[&str], address: &str) -> Result<Supervised> {
    let mut running = Supervised::start(example, words, &[("AMQP_URL", address)])?;
    running.prints("ready:").await?;
    Ok(running)
}

/// Runs a publisher and a consumer, disturbs them, and counts what came.
async fn disturbed(
    example: &str,
    management: &Management,
    address: &str,
    readings: usize,
    disturb: impl AsyncFnOnce(&mut Supervised) -> Result<()>,
) -> Result<()> {
    let queue = queue(example);
    let count = readings.to_string();
    let mut consumer = start(example, &["consume"], address).await?;
    let words = ["publish", count.as_str()];
    let publisher = start(example, &words, address).await?;
    disturb(&mut consumer).await?;
    let (published, publisher_errors) = publisher.finish().await?;
    // Longer than a recovery that never ends is waited for.
    wait::within(Duration::from_secs(150), "an empty queue", async || {
        consumer.look_after().await?;
        let ready = observe::rabbitmq::ready(address, queue).await?;
        ensure!(ready == 0, "{ready} are ready");
        Ok(())
    })
    .await?;
    let (consumed, consumer_errors) = consumer.stop().await?;
    // What it had in hand when it was stopped, or a connection before it when that
    // was lost, goes back; RabbitMQ takes its time for it.
    let mut counts = counted(&consumed);
    wait::until("what is missing", async || {
        for message in observe::rabbitmq::drain(address, queue).await? {
            let reading = String::from_utf8(message.data.clone())?;
            *counts.entry(reading).or_default() += 1;
        }
        let mut expected = (1..=readings).map(|number| format!("reading-{number}"));
        let lost = expected.find(|reading| !counts.contains_key(reading));
        if let Some(lost) = lost {
            let left = management.queue(address, queue).await?;
            bail!("{lost} is lost; the queue has {}", left["messages"]);
        }
        Ok(())
    })
    .await?;
    let twice = counts.values().filter(|count| **count > 1).count();
    println!("{published}lost 0, twice {twice}");
    println!("started again: {publisher_errors:?}, {consumer_errors:?}");
    let ids: BTreeSet<_> = counts.into_keys().collect();
    assert_eq!(ids.len(), readings);
    excused(&publisher_errors)?;
    excused(&consumer_errors)?;
    // The loop of one's own always goes on.
    let errors = publisher_errors.len() + consumer_errors.len();
    ensure!(example == AUTO || errors == 0, "it was started again");
    Ok(())
}

#[tokio::test]
async fn the_stories_go_on_after_their_connection() -> Result<()> {
    for example in [AUTO, MANUAL] {
        let address = ran_twice(example).await?;
        let ready = observe::rabbitmq::ready(&address, queue(example)).await?;
        assert_eq!(ready, 0);
    }
    Ok(())
}

/// The address of this vhost by way of a proxy, which comes with it.
async fn proxied(address: &str) -> Result<(Proxy, String)> {
    let (user, place) = address.rsplit_once('@').context("a user")?;
    let (server, vhost) = place.rsplit_once('/').context("a vhost")?;
    let proxy = Proxy::start(server).await?;
    let address = format!("{user}@{}/{vhost}", proxy.address());
    Ok((proxy, address))
}

/// Cut in the middle of whatever is on its way, also of a reconnection.
#[tokio::test]
async fn cut_connections_lose_nothing_that_was_confirmed() -> Result<()> {
    let (management, address) = own_vhost().await?;
    let (proxy, address) = proxied(&address).await?;
    let mut random = random::seeded();
    for example in [AUTO, MANUAL] {
        disturbed(example, &management, &address, 4000, async |consumer| {
            for _cut in 0..10 {
                consumer.prints("consumed:").await?;
                sleep(Duration::from_millis(random.u64(0..300))).await;
                proxy.cut();
                // Once more, while both are connecting.
                sleep(Duration::from_millis(random.u64(0..100))).await;
                proxy.cut();
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Nobody closes this connection; only the heartbeats are missing.
#[tokio::test]
async fn a_connection_that_has_gone_silent_is_noticed() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let (proxy, through) = proxied(&address).await?;
    let mut consumer = Example::start(MANUAL, &["consume"], ("AMQP_URL", &through))?;
    consumer.prints("ready:").await?;
    proxy.freeze();
    // Ends the freeze for those that come after; the old one stays silent.
    consumer.prints("lost:").await?;
    proxy.cut();
    consumer.prints("ready:").await?;
    let publisher =
        Example::start(MANUAL, &["publish", "10"], ("AMQP_URL", &address))?;
    publisher.end().await?.succeeded()?;
    consumer.prints("reading-10").await?;
    consumer.interrupt().await?;
    consumer.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn a_dead_node_in_the_list_is_passed_over() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let several = format!("amqp://localhost:1/%2f,{address}");
    let publisher =
        Example::start(MANUAL, &["publish", "10"], ("AMQP_URL", &several))?;
    publisher.end().await?.succeeded()?;
    let ready = observe::rabbitmq::ready(&address, queue(MANUAL)).await?;
    assert_eq!(ready, 10);
    Ok(())
}

/// Ctrl-C while there is nothing to connect to does not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_without_a_server_stops_when_asked() -> Result<()> {
    let mut broker = TestBroker::start(Broker::RabbitMq).await?;
    let address = broker.address().to_owned();
    let variable = ("AMQP_URL", address.as_str());
    let mut consumers = Vec::new();
    for example in [AUTO, MANUAL] {
        let mut consumer = Example::start(example, &["consume"], variable)?;
        consumer.prints("ready:").await?;
        consumers.push(consumer);
    }
    broker.kill().await?;
    // The other one, which says nothing, has noticed as well by then.
    consumers[1].prints("lost:").await?;
    for consumer in consumers {
        consumer.interrupt().await?;
        let ended = consumer.end().await?.succeeded()?;
        ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_an_operator_has_closed_goes_on() -> Result<()> {
    for example in [AUTO, MANUAL] {
        let (management, address) = own_vhost().await?;
        let variable = ("AMQP_URL", address.as_str());
        let mut consumer = Example::start(example, &["consume"], variable)?;
        consumer.prints("ready:").await?;
        // The management API hears of a connection some seconds later.
        wait::until("a closed connection", async || {
            let closed = management.close_connections(&address).await?;
            ensure!(closed > 0, "there is none yet");
            Ok(())
        })
        .await?;
        let publisher = Example::start(example, &["publish", "10"], variable)?;
        publisher.end().await?.succeeded()?;
        consumer.prints("reading-10").await?;
        consumer.interrupt().await?;
        let consumed = consumer.end().await?.succeeded()?;
        assert_eq!(counted(&consumed.stdout).len(), 10);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_nothing_that_was_confirmed() -> Result<()> {
    let mut broker = TestBroker::start(Broker::RabbitMq).await?;
    let management = broker.management()?;
    let address = broker.address().to_owned();
    let mut random = random::seeded();
    for example in [AUTO, MANUAL] {
        observe::rabbitmq::settled_queue(&address, queue(example)).await?;
        disturbed(example, &management, &address, 1000, async |consumer| {
            for _kill in 0..2 {
                consumer.prints("consumed:").await?;
                sleep(Duration::from_millis(random.u64(0..300))).await;
                broker.kill().await?;
                broker.restart().await?;
            }
            consumer.prints("consumed:").await?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// What is no loss of the connection is not mended by another one, and is not
/// passed over in silence either.
#[tokio::test]
async fn a_deleted_queue_ends_the_consumer_with_an_error() -> Result<()> {
    for example in [AUTO, MANUAL] {
        let (_management, address) = own_vhost().await?;
        let variable = ("AMQP_URL", address.as_str());
        let mut consumer = Example::start(example, &["consume"], variable)?;
        consumer.prints("ready:").await?;
        observe::rabbitmq::delete_queues(&address, &[queue(example)]).await?;
        let ended = consumer.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("the queue is gone"), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn an_error_of_the_channel_ends_it_with_an_error() -> Result<()> {
    for example in [AUTO, MANUAL] {
        let (_management, address) = own_vhost().await?;
        let (connection, channel) = observe::rabbitmq::connect(&address).await?;
        let (classic, none) =
            (QueueDeclareOptions::durable(), FieldTable::default());
        channel
            .queue_declare(queue(example).into(), classic, none)
            .await?;
        connection.close(200, "".into()).await?;
        let variable = ("AMQP_URL", address.as_str());
        let ended = Example::start(example, &["consume"], variable)?;
        let ended = ended.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("PRECONDITION_FAILED"), "{line}");
        ensure!(line.contains("x-queue-type"), "which argument? {line}");
    }
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    for example in [AUTO, MANUAL] {
        let variable = ("AMQP_URL", "amqp://localhost:1");
        let ended = Example::start(example, &["publish"], variable)?;
        let ended = ended.end().await?;
        assert_eq!(ended.status.code(), Some(2));
        ensure!(
            ended.stderr.starts_with("usage: rabbitmq_"),
            "{}",
            ended.stderr
        );
    }
    Ok(())
}
