//! The example whose own tests need no Kafka: here it runs on a real one.

use anyhow::Result;
use tests::observe;

use crate::ran_twice;

const MOCK_TESTS: &str = env!("CARGO_BIN_EXE_kafka_mock_tests");
const TOPIC: &str = "mock-tests.orders";

#[tokio::test]
async fn only_what_is_placed_is_in_kafka() -> Result<()> {
    let address = ran_twice(MOCK_TESTS, &[TOPIC]).await?;
    let records = observe::kafka::records(address, TOPIC).await?;
    let orders: Vec<_> = records
        .iter()
        .map(|it| observe::kafka::text(it).1)
        .collect();
    assert_eq!(orders, ["a lamp", "a lamp"]);
    Ok(())
}
