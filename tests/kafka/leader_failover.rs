//! What three brokers have acknowledged outlives the leader; what only the leader has
//! does not.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use lab::{
    broker::Broker,
    guarantees::{Claim, Counts},
};
use tests::{
    Example,
    cluster::{Cluster, NODES},
    guarantees, observe,
};

const FAILOVER: &str = env!("CARGO_BIN_EXE_kafka_leader_failover");
const TOPIC: &str = "failover.payments";
/// How many payments there are in a run of the example.
const PAYMENTS: usize = 300;

/// Waits until the example publishes, and returns it with the names of the leader and
/// of the other two.
async fn publishing(
    cluster: &Cluster,
    words: &[&str],
) -> Result<(Example, &'static str, [&'static str; 2])> {
    let brokers = cluster.address()?;
    let mut example = Example::start(FAILOVER, words, ("KAFKA_BROKERS", &brokers))?;
    let line = example.prints("topic:     failover.payments").await?;
    let leader: usize = line.rsplit(' ').next().context("a broker")?.parse()?;
    let leader = *NODES.get(leader - 1).context("a broker of three")?;
    let others: Vec<_> = NODES.into_iter().filter(|name| *name != leader).collect();
    example.prints("acked:     50 payments").await?;
    Ok((example, leader, [others[0], others[1]]))
}

/// The leader dies when the others have not fetched what it got last, as in
/// [`control_what_only_the_leader_has_is_acknowledged_and_lost`].
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_loses_no_acknowledged_payment_and_none_is_twice()
-> Result<()> {
    let mut cluster = Cluster::kafka().await?;
    let (example, leader, others) = publishing(&cluster, &[]).await?;
    for name in others {
        cluster.freeze(name).await?;
    }
    cluster.kill(leader).await?;
    for name in others {
        cluster.thaw(name).await?;
    }
    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    let old = leader.trim_start_matches('n');
    let dead = format!("leader:    broker {old}");
    ensure!(!ended.stdout.contains(&dead), "{}", ended.stdout);

    // One of the two that are left, asked by another client: each payment once.
    let stored = read(&cluster.url(others[0])?).await?;
    assert_eq!(stored, (0..PAYMENTS).collect::<Vec<_>>());
    tell(Claim::EffectivelyOnce, "", &stored)?;

    // And the dead one catches up when it is back.
    cluster.restart(leader).await?;
    let address = cluster.address()?;
    tests::wait::until("three replicas in sync", async || {
        let count = observe::kafka::in_sync(&address, TOPIC).await?;
        ensure!(count == 3, "{count} of 3 are in sync");
        Ok(())
    })
    .await
}

/// The control: with `acks=1` the leader answers alone. While the others are frozen it
/// goes on, and dies with what they have not fetched.
#[tokio::test(flavor = "multi_thread")]
async fn control_what_only_the_leader_has_is_acknowledged_and_lost() -> Result<()> {
    let mut cluster = Cluster::kafka().await?;
    let (mut example, leader, others) = publishing(&cluster, &["acks=1"]).await?;
    for name in others {
        cluster.freeze(name).await?;
    }
    // Some of the fifty before it are acknowledged while nobody but the leader works.
    example.prints("acked:     100 payments").await?;
    cluster.kill(leader).await?;
    for name in others {
        cluster.thaw(name).await?;
    }
    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("that were acknowledged are gone"), "{line}");
    ensure!(ended.stdout.contains("acked:     300 payments"), "{line}");
    let stored = read(&cluster.url(others[0])?).await?;
    ensure!(stored.len() < PAYMENTS, "nothing is lost");
    let lost = format!("{} payments", PAYMENTS - stored.len());
    ensure!(line.contains(&lost), "{lost}, and it says {line}");
    tell(Claim::Control, "acks=1", &stored)
}

/// The line of the table of guarantees. The example has said that all are acknowledged;
/// stored is what the new leader has.
fn tell(claim: Claim, variant: &str, stored: &[usize]) -> Result<()> {
    let different: BTreeSet<usize> = stored.iter().copied().collect();
    let again = (stored.len() - different.len()) as u64;
    let late = stored.windows(2).filter(|pair| pair[1] < pair[0]).count();
    let counts = Counts {
        // What the client repeats by itself nobody sees.
        attempted: PAYMENTS as u64,
        acknowledged: PAYMENTS as u64,
        received: different.len() as u64,
        lost: (PAYMENTS - different.len()) as u64,
        repeated: Some(again),
        doubled: again,
        reordered: Some(late as u64),
    };
    let example = ("leader_failover", variant);
    guarantees::tell_of_killed_leader(Broker::Kafka, example, claim, counts)
}

/// The numbers of all payments, in the order of the log.
async fn read(address: &str) -> Result<Vec<usize>> {
    let records = observe::kafka::read_all(address, TOPIC, 1, "read_committed");
    let records = records.await?;
    let numbers = records.iter().map(|record| {
        use rdkafka::Message as _;
        let key = std::str::from_utf8(record.key().context("no id")?)?;
        let number = key.strip_prefix("payment-").context("an id")?;
        Ok(number.parse()?)
    });
    numbers.collect()
}

/// One broker is not enough, and the example says what is.
#[tokio::test]
async fn a_single_broker_is_one_line_that_says_what_is_needed() -> Result<()> {
    let kafka = crate::kafka().await?;
    let ended = Example::start(FAILOVER, &[], kafka)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("docker-compose.cluster.yml"), "{line}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("KAFKA_BROKERS", "localhost:1");
    let ended = Example::start(FAILOVER, &["acks=0"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    let usage = "usage: kafka_leader_failover";
    assert!(ended.stderr.starts_with(usage), "{}", ended.stderr);
    Ok(())
}
