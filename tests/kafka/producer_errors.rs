//! On a simulated cluster: what is retried is stored once, what is refused is not.

use anyhow::Result;
use tests::Example;

const PRODUCER_ERRORS: &str = env!("CARGO_BIN_EXE_kafka_producer_errors");

/// What is in the log is a part of the story, as the cluster ends with it.
#[tokio::test]
async fn each_error_comes_when_it_should() -> Result<()> {
    for _run in 0..2 {
        let ended = Example::start(PRODUCER_ERRORS, &[], ("KAFKA_BROKERS", ""))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    Ok(())
}
