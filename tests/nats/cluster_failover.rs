//! A stream with three replicas outlives its leader, and one with one does not.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{
    message::PublishMessage,
    stream::{Config, Stream},
};
use lab::{
    broker::Broker,
    guarantees::{Claim, Counts},
};
use tests::{
    Example, guarantees,
    nats::{Server, Servers},
    observe, wait,
};
use tokio::sync::Mutex;

const FAILOVER: &str = env!("CARGO_BIN_EXE_nats_jetstream_cluster_failover");
const STREAM: &str = "shop_payments";
const NAMES: [&str; 3] = ["n1", "n2", "n3"];

/// The configurations that a reader starts the servers with.
const CONFIGS: [&str; 3] = [
    include_str!("../../nats-examples/config/cluster/n1.conf"),
    include_str!("../../nats-examples/config/cluster/n2.conf"),
    include_str!("../../nats-examples/config/cluster/n3.conf"),
];

/// Nine servers at a time are too many for a small machine.
static TURN: Mutex<()> = Mutex::const_new(());

/// Three servers that can hold a stream with three replicas, and the address of
/// one of them: the client has to learn the others.
async fn cluster() -> Result<(Servers, String)> {
    let ports: [u16; 6] = Servers::ports()?;
    let written = [4222, 4223, 4224, 6222, 6223, 6224];
    let config = |text: &str| {
        let pairs = written.iter().zip(ports);
        pairs.fold(text.to_owned(), |text, (written, port)| {
            text.replace(&format!(":{written}"), &format!(":{port}"))
        })
    };
    let servers: Vec<_> = (0..3)
        .map(|at| Server {
            name: NAMES[at],
            config: config(CONFIGS[at]),
            port: ports[at],
        })
        .collect();
    let servers = Servers::start(&servers, &[]).await?;
    let url = servers.url(NAMES[0])?;
    wait::until("a cluster of three", async || {
        let jetstream = observe::nats::jetstream(&url).await?;
        let config = Config {
            name: "ready".to_owned(),
            num_replicas: 3,
            ..Config::default()
        };
        jetstream.create_stream(config).await?;
        Ok(jetstream.delete_stream("ready").await?)
    })
    .await?;
    Ok((servers, url))
}

/// The server that the example names as the leader, once it publishes.
async fn leader_of(example: &mut Example) -> Result<&'static str> {
    let line = example.prints("stream:    shop_payments").await?;
    example.prints("publish:   300 payments").await?;
    NAMES
        .into_iter()
        .find(|name| line.ends_with(&format!("leader {name}")))
        .with_context(|| format!("no leader in {line:?}"))
}

fn another(name: &str) -> Result<&'static str> {
    let other = NAMES.into_iter().find(|other| *other != name);
    other.context("no other server")
}

/// A stream through a server that is up, when it has a leader again.
async fn stream_at(servers: &Servers, name: &str) -> Result<Stream> {
    let url = servers.url(name)?;
    wait::until("the stream", async || {
        let jetstream = observe::nats::jetstream(&url).await?;
        Ok(jetstream.get_stream(STREAM).await?)
    })
    .await
}

/// Waits until some payments are stored, so that the fault comes in the middle.
async fn some_are_stored(servers: &Servers, name: &str) -> Result<()> {
    let mut stream = stream_at(servers, name).await?;
    wait::until("50 payments", async || {
        let messages = stream.info().await?.state.messages;
        ensure!(messages >= 50, "{messages} payments");
        Ok(())
    })
    .await
}

/// Each message id that the stream holds, and how often.
async fn stored(stream: &mut Stream) -> Result<BTreeMap<String, usize>> {
    let last = stream.info().await?.state.last_sequence;
    let mut stored = BTreeMap::new();
    for sequence in 1..=last {
        let message = stream.get_raw_message(sequence).await?;
        let id = message.headers.get("Nats-Msg-Id").context("no id")?;
        *stored.entry(id.to_string()).or_default() += 1;
    }
    Ok(stored)
}

fn each_once(count: usize) -> BTreeMap<String, usize> {
    (0..count).map(|n| (format!("payment-{n}"), 1)).collect()
}

/// The line of the table of guarantees: what the example says of its attempts, and what
/// the new leader has, each message by its id.
fn tell(printed: &str, stored: &BTreeMap<String, usize>) -> Result<()> {
    let attempted = printed
        .lines()
        .find_map(|line| line.strip_prefix("attempted: "))
        .and_then(|line| line.split(' ').next())
        .context("no attempts")?
        .parse()?;
    let received = stored.len() as u64;
    let again = stored.values().sum::<usize>() as u64 - received;
    let counts = Counts {
        attempted,
        acknowledged: 300,
        received,
        lost: 300 - received,
        repeated: Some(again),
        doubled: again,
        reordered: None,
    };
    let example = ("jetstream_cluster_failover", "");
    let claim = Claim::EffectivelyOnce;
    guarantees::tell_of_killed_leader(Broker::Nats, example, claim, counts)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_loses_no_acknowledged_payment_and_none_is_twice()
-> Result<()> {
    let _turn = TURN.lock().await;
    let (mut servers, url) = cluster().await?;
    let mut example = Example::start(FAILOVER, &[], ("NATS_URL", &url))?;
    let leader = leader_of(&mut example).await?;
    some_are_stored(&servers, leader).await?;
    servers.kill(leader).await?;

    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    let attempted = "attempted: 300 times, 0 without";
    ensure!(!ended.stdout.contains(attempted), "no failure was seen");
    ensure!(
        !ended.stdout.contains(&format!("leader:    {leader}")),
        "alive"
    );

    // One of the two that are left, asked message by message.
    let other = another(leader)?;
    let mut stream = stream_at(&servers, other).await?;
    let stored = stored(&mut stream).await?;
    assert_eq!(stored, each_once(300));
    tell(&ended.stdout, &stored)?;

    // The new leader knows the ids that were acknowledged by the old one.
    let again = PublishMessage::build().message_id("payment-7");
    let url = servers.url(other)?;
    let jetstream = observe::nats::jetstream(&url).await?;
    let again = jetstream.send_publish("shop.payments.captured", again);
    ensure!(again.await?.await?.duplicate, "payment-7 is stored twice");

    // And the third catches up when it is back.
    servers.restart(leader).await?;
    let mut stream = stream_at(&servers, leader).await?;
    wait::until("three replicas that are current", async || {
        let info = stream.info().await?;
        let cluster = info.cluster.as_ref().context("no cluster")?;
        let current = cluster.replicas.iter().filter(|peer| peer.current).count();
        ensure!(current == 2, "{cluster:?}");
        Ok(())
    })
    .await
}

/// The client was given one address, and the server there is the one that dies.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_goes_on_with_servers_that_it_was_not_told_of() -> Result<()> {
    let _turn = TURN.lock().await;
    let (mut servers, url) = cluster().await?;
    let mut example = Example::start(FAILOVER, &[], ("NATS_URL", &url))?;
    leader_of(&mut example).await?;
    some_are_stored(&servers, "n2").await?;
    servers.kill("n1").await?;
    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    let mut stream = stream_at(&servers, "n2").await?;
    assert_eq!(stored(&mut stream).await?, each_once(300));
    Ok(())
}

/// The control: one replica. Nobody can take over, so the publisher gives up;
/// what was acknowledged is there again when the server is.
#[tokio::test(flavor = "multi_thread")]
async fn control_with_one_replica_a_killed_server_takes_the_stream_away()
-> Result<()> {
    let _turn = TURN.lock().await;
    let (mut servers, url) = cluster().await?;
    let mut example = Example::start(FAILOVER, &["single"], ("NATS_URL", &url))?;
    let leader = leader_of(&mut example).await?;
    some_are_stored(&servers, leader).await?;
    servers.kill(leader).await?;

    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    let acknowledged: usize = line
        .strip_prefix("error: ")
        .and_then(|line| line.split_once(" of 300 are acknowledged"))
        .with_context(|| line.to_owned())?
        .0
        .parse()?;
    servers.restart(leader).await?;
    let mut stream = stream_at(&servers, leader).await?;
    let stored = stored(&mut stream).await?;
    // The one that was in flight may be there too; its answer is not.
    ensure!(
        stored == each_once(acknowledged) || stored == each_once(acknowledged + 1),
        "{acknowledged} acknowledged, stored {stored:?}"
    );
    Ok(())
}

/// One server is not enough, and the example says what is.
#[tokio::test]
async fn a_single_server_is_one_line_that_says_what_is_needed() -> Result<()> {
    let nats = crate::nats().await?;
    let ended = Example::start(FAILOVER, &[], nats)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("docker-compose.cluster.yml"), "{line}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(FAILOVER, &["double"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(
        ended
            .stderr
            .starts_with("usage: nats_jetstream_cluster_failover")
    );
    Ok(())
}
