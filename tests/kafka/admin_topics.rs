//! Topics are created, resized and deleted, and what is refused is told.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use tests::{Example, observe, wait};

use crate::{kafka, ran_twice};

const ADMIN_TOPICS: &str = env!("CARGO_BIN_EXE_kafka_admin_topics");

/// One test, as all of it is about the same two topics.
#[tokio::test]
async fn topics_come_and_go_and_a_refusal_is_told() -> Result<()> {
    let address = ran_twice(ADMIN_TOPICS, &[]).await?;
    let topics = observe::kafka::topics(address).await?;
    ensure!(
        !topics.iter().any(|name| name.starts_with("admin.")),
        "{topics:?}"
    );

    // What a run that was killed has left, with more partitions than it wants.
    observe::kafka::create_topic_with(address, "admin.orders", 9, &[]).await?;
    ran_twice(ADMIN_TOPICS, &[]).await?;

    // Another client, which looks all the time, sees both sizes of the topic. It may
    // miss one that is there for a moment, so it looks again.
    let mut seen = BTreeSet::new();
    wait::until("both sizes", async || {
        let mut example = Example::start(ADMIN_TOPICS, &[], kafka().await?)?;
        while !example.has_ended()? {
            let now = observe::kafka::partitions(address, "admin.orders").await?;
            seen.extend(now);
        }
        example.end().await?.succeeded()?;
        ensure!(seen == BTreeSet::from([3, 6]), "seen were {seen:?}");
        Ok(())
    })
    .await?;
    Ok(())
}
