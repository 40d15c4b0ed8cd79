//! The members of a group have all partitions together, each of them once, whoever
//! comes, leaves or is killed.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tests::{Example, observe};

use crate::{kafka, ran_twice};

const CONSUMER_GROUPS: &str = env!("CARGO_BIN_EXE_kafka_consumer_groups");
const TOPIC: &str = "groups.payments";

/// The partitions that a worker says that it has.
fn partitions(line: &str) -> Result<Vec<i32>> {
    let list = line.split_once('[').context("no list")?.1;
    let numbers = list.trim_end_matches(']').split(", ");
    let numbers = numbers.filter(|number| !number.is_empty());
    Ok(numbers.map(str::parse).collect::<Result<_, _>>()?)
}

/// Waits until the workers have these numbers of partitions, and checks that no
/// partition is with two of them.
async fn divided(workers: &mut [Example], share: usize) -> Result<()> {
    let mut all = Vec::new();
    for worker in workers {
        loop {
            let own = partitions(&worker.prints("has:").await?)?;
            if own.len() == share {
                all.extend(own);
                break;
            }
        }
    }
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2, 3, 4, 5]);
    Ok(())
}

/// One test, as there is one group.
#[tokio::test]
async fn the_members_share_the_partitions_and_the_payments() -> Result<()> {
    ran_twice(CONSUMER_GROUPS, &[]).await?;

    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, "groups-workers").await?;
    let start = || Example::start(CONSUMER_GROUPS, &["worker"], kafka);
    let mut workers = vec![start()?];
    divided(&mut workers, 6).await?;
    workers.extend([start()?, start()?]);
    divided(&mut workers, 2).await?;
    // Without a word: the group notices when its session has ended.
    workers.remove(0).kill().await?;
    divided(&mut workers, 3).await?;

    let payments = Example::start(CONSUMER_GROUPS, &["payments"], kafka)?;
    payments.end().await?.succeeded()?;
    let mut got: BTreeMap<String, usize> = BTreeMap::new();
    // One leaves in order, and what it has not committed is the other's.
    let last = workers.pop().context("two workers")?;
    last.interrupt().await?;
    let mut outputs = vec![last.end().await?.succeeded()?.stdout];
    divided(&mut workers, 6).await?;
    let first = workers.pop().context("a worker")?;
    tests::wait::until("all payments", async || {
        let lag = observe::kafka::lag(kafka.1, TOPIC, 6, "groups-workers").await?;
        ensure!(lag == 0, "{lag} are not committed");
        Ok(())
    })
    .await?;
    first.interrupt().await?;
    outputs.push(first.end().await?.succeeded()?.stdout);
    for line in outputs.iter().flat_map(|output| output.lines()) {
        if let Some(got_line) = line.strip_prefix("got:    ") {
            let payment = got_line.split(' ').next().unwrap_or_default();
            *got.entry(payment.to_owned()).or_default() += 1;
        }
    }
    assert_eq!(got.len(), 60);
    ensure!(got.values().all(|times| *times == 1), "{got:?}");
    Ok(())
}
