//! All that counts as delivered is in the topic, once and in order; what is not
//! delivered is said.

use anyhow::{Result, ensure};
use lab::broker::Broker;
use tests::{Example, TestBroker, observe, wait};
use tokio::sync::Mutex;

use crate::kafka;

const PIPELINED: &str = env!("CARGO_BIN_EXE_kafka_producer_pipelined");
const TOPIC: &str = "pipelined.readings";

/// The topic belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn each_reading_is_there_once_and_in_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, "none").await?;
    for _run in 0..2 {
        let ended = Example::start(PIPELINED, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let records = observe::kafka::records(kafka.1, TOPIC).await?;
    let texts: Vec<_> = records
        .iter()
        .map(|one| observe::kafka::text(one).1)
        .collect();
    let readings = (0..10_000).map(|number| format!("reading-{number}"));
    let twice: Vec<_> = readings.clone().chain(readings).collect();
    ensure!(texts == twice, "{} records, or another order", texts.len());
    Ok(())
}

#[tokio::test]
async fn a_number_and_a_size_are_measured() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, "none").await?;
    let ended = Example::start(PIPELINED, &["3000", "50"], kafka)?
        .end()
        .await?;
    let ended = ended.succeeded()?;
    let said = "published: 3000 messages of 50 B in ";
    ensure!(ended.stdout.starts_with(said), "{}", ended.stdout);
    assert_eq!(observe::kafka::records(kafka.1, TOPIC).await?.len(), 3000);
    for words in [&["x", "64"][..], &["0", "64"], &["5"], &["1", "2", "3"]] {
        let ended = Example::start(PIPELINED, words, kafka)?.end().await?;
        assert_eq!(ended.status.code(), Some(2));
        ensure!(ended.stderr.starts_with("usage: kafka_producer_pipelined"));
    }
    Ok(())
}

#[tokio::test]
async fn a_record_that_is_too_large_is_one_line_that_names_the_limits() -> Result<()>
{
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    let ended = Example::start(PIPELINED, &["1", "2000000"], kafka)?
        .end()
        .await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("max.message.bytes of the topic"), "{line}");
    ended.printed_what_the_book_shows("too-large")
}

/// Kafka dies with records in flight. Their time is over, and the program says so;
/// "all delivered" would be the loss of those.
#[tokio::test(flavor = "multi_thread")]
async fn a_kafka_that_is_gone_for_too_long_is_one_line() -> Result<()> {
    let mut kafka = TestBroker::start(Broker::Kafka).await?;
    let address = kafka.address().to_owned();
    let words = ["3000000", "200"];
    let example = Example::start(PIPELINED, &words, ("KAFKA_BROKERS", &address))?;
    wait::until("the first records", async || {
        // Of a group that has read nothing, as there is none.
        let count = observe::kafka::lag(&address, TOPIC, 1, "nobody").await?;
        ensure!(count > 0, "the topic is empty");
        Ok(())
    })
    .await?;
    kafka.kill().await?;
    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("within message.timeout.ms"), "{line}");
    Ok(())
}
