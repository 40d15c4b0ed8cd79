//! What the client counts is what another one finds.

use anyhow::{Context as _, Result};
use tests::{Example, observe};

use crate::{kafka, ran_twice};

const STATISTICS: &str = env!("CARGO_BIN_EXE_kafka_statistics");
const TOPIC: &str = "statistics.orders";
const GROUP: &str = "statistics-billing";

fn metric(stdout: &str, name: &str) -> Result<i64> {
    let mut lines = stdout.lines();
    let line = lines.find(|line| line.starts_with(name));
    let line = line.with_context(|| format!("no {name}"))?;
    let (_, value) = line.rsplit_once(' ').context("no value")?;
    Ok(value.parse()?)
}

#[tokio::test]
async fn the_metrics_agree_with_an_observer() -> Result<()> {
    let kafka = kafka().await?;
    ran_twice(STATISTICS, &[TOPIC]).await?;
    let before = observe::kafka::records(kafka.1, TOPIC).await?.len();
    let ended = Example::start(STATISTICS, &[], kafka)?.end().await?;
    let stdout = ended.succeeded()?.stdout;
    let after = observe::kafka::records(kafka.1, TOPIC).await?.len();
    let sent = metric(&stdout, "kafka_records_sent_total")?;
    assert_eq!(sent, i64::try_from(after - before)?);
    let position = metric(&stdout, "kafka_consumer_position")?;
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, Some(position));
    let lag = observe::kafka::lag(kafka.1, TOPIC, 1, GROUP).await?;
    assert_eq!(metric(&stdout, "kafka_consumer_lag")?, lag);
    Ok(())
}
