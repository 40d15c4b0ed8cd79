//! What was aborted is in the log and not in the eyes of a reader of committed
//! records; what was committed is in both topics.

use anyhow::Result;
use tests::{Example, observe};

use crate::kafka;

const TRANSACTIONS: &str = env!("CARGO_BIN_EXE_kafka_transactions");
const TOPICS: [&str; 2] = ["transactions.orders", "transactions.ledger"];

#[tokio::test]
async fn both_topics_have_what_was_committed_and_nothing_else() -> Result<()> {
    let kafka = kafka().await?;
    for topic in TOPICS {
        observe::kafka::forget(kafka.1, topic, "transactions-audit").await?;
    }
    for _run in 0..2 {
        let ended = Example::start(TRANSACTIONS, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    for topic in TOPICS {
        let orders = async |isolation: &str| {
            let records = observe::kafka::read_all(kafka.1, topic, 1, isolation);
            let text = |record| observe::kafka::text(record).1;
            anyhow::Ok(records.await?.iter().map(text).collect::<Vec<_>>())
        };
        let committed = ["order-1", "order-3", "order-1", "order-3"];
        assert_eq!(orders("read_committed").await?, committed);
        // The control: the aborted one was written.
        let all = ["order-1", "order-2", "order-3"].repeat(2);
        assert_eq!(orders("read_uncommitted").await?, all);
    }
    Ok(())
}
