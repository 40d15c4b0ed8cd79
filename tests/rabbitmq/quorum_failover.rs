//! A quorum queue with three replicas outlives its leader, and one with one does not.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{Claim, Counts},
};
use tests::{
    Example,
    cluster::{Cluster, NODES},
    guarantees, observe, wait,
};

const FAILOVER: &str = env!("CARGO_BIN_EXE_rabbitmq_quorum_failover");
const QUEUE: &str = "failover.payments";
/// How many payments there are in a run of the example.
const PAYMENTS: u64 = 300;

/// Waits until the example publishes. Its connection goes to the first node, so that
/// one leads the queue.
async fn publishing(cluster: &Cluster, words: &[&str]) -> Result<Example> {
    let nodes = cluster.address()?;
    let mut example = Example::start(FAILOVER, words, ("AMQP_URL", &nodes))?;
    let line = example.prints("queue:     failover.payments").await?;
    let first = cluster.url(NODES[0])?;
    let port = first.rsplit_once(':').context("a port")?.1;
    let port = port.split('/').next().unwrap_or_default();
    ensure!(
        line.ends_with(&format!("leader at localhost:{port}")),
        "{line}"
    );
    example.prints("confirmed: 50 payments").await?;
    Ok(example)
}

fn number(printed: &str, label: &str) -> Result<usize> {
    let line = printed.lines().find_map(|line| line.strip_prefix(label));
    let line = line.with_context(|| format!("no line {label:?}"))?;
    let word = line.split_whitespace().next().unwrap_or_default();
    Ok(word.parse()?)
}

/// The line of the table of guarantees, by what the example has found in the queue: it
/// empties it.
fn tell(printed: &str) -> Result<()> {
    let received = number(printed, "stored:")? as u64;
    let twice = number(printed, "twice:")? as u64;
    let counts = Counts {
        attempted: number(printed, "attempted:")? as u64,
        acknowledged: PAYMENTS,
        received,
        lost: number(printed, "lost:")? as u64,
        repeated: Some(twice),
        doubled: twice,
        reordered: None,
    };
    let example = ("quorum_failover", "");
    let claim = Claim::AtLeastOnce;
    guarantees::tell_of_killed_leader(Broker::RabbitMq, example, claim, counts)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_loses_no_confirmed_payment() -> Result<()> {
    let mut cluster = Cluster::rabbitmq().await?;
    let example = publishing(&cluster, &[]).await?;
    cluster.kill(NODES[0]).await?;
    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    let attempted = number(&ended.stdout, "attempted:")?;
    ensure!(attempted > 300, "no failure was seen");
    // A repeated attempt may be there twice, and nothing else.
    let twice = number(&ended.stdout, "twice:")?;
    ensure!(twice <= attempted - 300, "{}", ended.stdout);
    tell(&ended.stdout)?;

    // Once more with the node that was away; another one leads now or this one again,
    // and the story goes on with all three.
    cluster.restart(NODES[0]).await?;
    let example = publishing(&cluster, &[]).await?;
    // Frozen, it answers nobody, and its connections stay open.
    cluster.freeze(NODES[0]).await?;
    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    cluster.thaw(NODES[0]).await
}

/// The control: one replica. Nobody can take over, so the publisher gives up; what was
/// confirmed is there again when the node is.
#[tokio::test(flavor = "multi_thread")]
async fn control_with_one_replica_a_killed_node_takes_the_queue_away() -> Result<()>
{
    let mut cluster = Cluster::rabbitmq().await?;
    let example = publishing(&cluster, &["single"]).await?;
    cluster.kill(NODES[0]).await?;

    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    let confirmed: usize = line
        .strip_prefix("error: ")
        .and_then(|line| line.split_once(" of 300 are confirmed"))
        .with_context(|| line.to_owned())?
        .0
        .parse()?;
    ensure!((50..300).contains(&confirmed), "{line}");

    cluster.restart(NODES[0]).await?;
    let url = cluster.url(NODES[0])?;
    let mut stored = BTreeMap::<String, usize>::new();
    wait::until("the queue", async || {
        for message in observe::rabbitmq::drain(&url, QUEUE).await? {
            let id = message.delivery.properties.message_id().as_ref();
            let id = id.context("no id")?.to_string();
            *stored.entry(id).or_default() += 1;
        }
        let lost = (0..confirmed)
            .filter(|number| !stored.contains_key(&format!("payment-{number}")))
            .count();
        ensure!(lost == 0, "{lost} are not there");
        Ok(())
    })
    .await
}

/// RabbitMQ would make a queue of one replica and say nothing.
#[tokio::test]
async fn a_single_node_is_one_line_that_says_what_is_needed() -> Result<()> {
    let (_vhost, address) = crate::own_vhost().await?;
    let ended = Example::start(FAILOVER, &[], ("AMQP_URL", &address))?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("docker-compose.cluster.yml"), "{line}");
    let twice = format!("{address},{address},amqp://app:secret@localhost:1/%2f");
    let ended = Example::start(FAILOVER, &[], ("AMQP_URL", &twice))?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("no RabbitMQ at localhost:1"), "{line}");
    ensure!(!line.contains("secret"), "{line}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("AMQP_URL", "amqp://localhost:1");
    let ended = Example::start(FAILOVER, &["double"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    let usage = "usage: rabbitmq_quorum_failover";
    assert!(ended.stderr.starts_with(usage), "{}", ended.stderr);
    Ok(())
}
