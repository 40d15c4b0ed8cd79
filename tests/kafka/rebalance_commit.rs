//! What was done is not done again when a partition goes to another member, and a
//! member that was taken for dead commits nothing.

use anyhow::{Result, ensure};
use tests::{Example, observe, wait};

use crate::{kafka, ran_twice};

const REBALANCE_COMMIT: &str = env!("CARGO_BIN_EXE_kafka_rebalance_commit");
const TOPIC: &str = "rebalance.payments";
const GROUP: &str = "rebalance-workers";

async fn has_members(address: &str, wanted: usize) -> Result<()> {
    wait::until("the members", async || {
        let members = observe::kafka::members(address, GROUP).await?;
        ensure!(members == wanted, "there are {members}");
        Ok(())
    })
    .await
}

/// One test, as there is one topic.
#[tokio::test]
async fn a_partition_that_goes_is_committed_unless_it_is_lost() -> Result<()> {
    // With the control in the story itself: without the commit, all 40 come again.
    ran_twice(REBALANCE_COMMIT, &[]).await?;

    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    let payments = Example::start(REBALANCE_COMMIT, &["payments"], kafka)?;
    payments.end().await?.succeeded()?;
    let worker = || Example::start(REBALANCE_COMMIT, &["worker"], kafka);
    let mut first = worker()?;
    for _payment in 0..40 {
        first.prints("captured:").await?;
    }
    // Nothing is committed yet, and then another one joins.
    let none = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(none, None);
    let mut second = worker()?;
    second.prints("ready:").await?;
    first.prints("handed:   4 partitions, committed").await?;
    has_members(kafka.1, 2).await?;
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, Some(10));

    // Taken for dead: its session ends, and the first one has all of it.
    second.signal("STOP").await?;
    has_members(kafka.1, 1).await?;
    let payments = Example::start(REBALANCE_COMMIT, &["payments"], kafka)?;
    payments.end().await?.succeeded()?;
    for _payment in 0..40 {
        first.prints("captured:").await?;
    }
    second.signal("CONT").await?;
    second.prints("lost:").await?;
    has_members(kafka.1, 2).await?;

    for worker in [first, second] {
        worker.interrupt().await?;
        worker.end().await?.succeeded()?;
    }
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, Some(20));
    Ok(())
}
