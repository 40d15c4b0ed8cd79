//! The lag is what was produced less what was committed, and asking for it changes
//! nothing.

use anyhow::{Result, ensure};
use rdkafka::{
    ClientConfig,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
};
use tests::{Example, observe, wait};

use crate::{kafka, ran_twice};

const LAG_MONITOR: &str = env!("CARGO_BIN_EXE_kafka_lag_monitor");
const TOPIC: &str = "lag.test";
const GROUP: &str = "lag-test";

/// The last line of the monitor.
async fn together(topic: &str, group: &str) -> Result<String> {
    let words = [topic, group];
    let ended = Example::start(LAG_MONITOR, &words, kafka().await?)?;
    let ended = ended.end().await?.succeeded()?;
    let last = ended.stdout.lines().last().unwrap_or_default();
    Ok(last.trim().to_owned())
}

#[tokio::test]
async fn the_story_ends_without_a_lag() -> Result<()> {
    ran_twice(LAG_MONITOR, &["lag.orders"]).await?;
    assert_eq!(together("lag.orders", "lag-billing").await?, "together 0");
    assert_eq!(together("lag.orders", "lag-nobody").await?, "together none");
    Ok(())
}

#[tokio::test]
async fn the_lag_of_a_group_at_work_is_seen_from_outside() -> Result<()> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    observe::kafka::create_topic(kafka.1, TOPIC).await?;
    for number in 0..7 {
        observe::kafka::produce(kafka.1, TOPIC, "key", &number.to_string()).await?;
    }
    let member: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.1)
        .set("group.id", GROUP)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .create()?;
    member.subscribe(&[TOPIC])?;
    for expected in [6, 5, 4] {
        let record = member.recv().await?;
        member.commit_message(&record, CommitMode::Sync)?;
        let lag = together(TOPIC, GROUP).await?;
        assert_eq!(lag, format!("together {expected}"));
    }
    // Nobody was made to leave or to join.
    wait::until("the group as it was", async || {
        let members = observe::kafka::members(kafka.1, GROUP).await?;
        ensure!(members == 1, "it has {members} members");
        Ok(())
    })
    .await?;
    member.recv().await?;
    Ok(())
}

#[tokio::test]
async fn an_unknown_topic_is_one_line() -> Result<()> {
    let words = ["lag.nowhere", GROUP];
    let ended = Example::start(LAG_MONITOR, &words, kafka().await?)?;
    ended
        .end()
        .await?
        .refused("there is no topic lag.nowhere")?;
    let topics = observe::kafka::topics(kafka().await?.1).await?;
    ensure!(!topics.contains(&"lag.nowhere".to_owned()), "{topics:?}");

    let ended = Example::start(LAG_MONITOR, &["lag.orders"], kafka().await?)?;
    assert_eq!(ended.end().await?.status.code(), Some(2));
    Ok(())
}
