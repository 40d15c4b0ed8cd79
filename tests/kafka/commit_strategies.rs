//! Whatever the way of committing, another client finds what was committed.

use anyhow::Result;
use tests::observe;

use crate::ran_twice;

const COMMIT_STRATEGIES: &str = env!("CARGO_BIN_EXE_kafka_commit_strategies");
const TOPIC: &str = "commits.orders";

#[tokio::test]
async fn the_next_offset_is_behind_the_last_order() -> Result<()> {
    let address = ran_twice(COMMIT_STRATEGIES, &[TOPIC]).await?;
    let committed = observe::kafka::committed(address, TOPIC, "commits-billing");
    assert_eq!(committed.await?, Some(24));
    let note = observe::kafka::committed_note(address, TOPIC, "commits-billing");
    assert_eq!(note.await?, "invoice 17");
    let records = observe::kafka::records(address, TOPIC).await?;
    assert_eq!(records.len(), 24);
    Ok(())
}
