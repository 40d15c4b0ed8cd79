//! Partitions are worked on beside each other, and all of it is committed.

use anyhow::Result;
use tests::observe;

use crate::ran_twice;

const PARALLEL_PARTITIONS: &str = env!("CARGO_BIN_EXE_kafka_parallel_partitions");
const TOPIC: &str = "parallel.orders";

/// That three were worked on at once, and the slow one was the last, is what the
/// story prints.
#[tokio::test]
async fn each_partition_keeps_its_order_and_all_of_it_is_committed() -> Result<()> {
    let address = ran_twice(PARALLEL_PARTITIONS, &[TOPIC]).await?;
    let committed = observe::kafka::committed(address, TOPIC, "parallel-billing");
    assert_eq!(committed.await?, Some(20));
    Ok(())
}
