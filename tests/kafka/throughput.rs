//! The examples about speed, on both sides: nothing is lost on the way, and the line
//! that the benchmark reads is there.

use anyhow::{Result, ensure};
use rdkafka::Message as _;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::{kafka, ran_twice};

const CALLBACKS: &str = env!("CARGO_BIN_EXE_kafka_producer_callbacks");
const CONSUMER: &str = env!("CARGO_BIN_EXE_kafka_consumer_throughput");
const SENT: &str = "callbacks.readings";

/// The tests of the callbacks share a topic.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn each_reading_is_called_back_once_and_stored_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let address = ran_twice(CALLBACKS, &[SENT]).await?;
    let records = observe::kafka::records(address, SENT).await?;
    assert_eq!(records.len(), 20_000);
    // The second run, in its order.
    for (number, record) in records[10_000..].iter().enumerate() {
        let reading = format!("reading-{number}");
        assert_eq!(record.payload(), Some(reading.as_bytes()));
    }
    Ok(())
}

#[tokio::test]
async fn a_reading_that_fails_is_no_success() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    // Above the limit of the client, 1,000,000 bytes: refused by `send`.
    let words = ["1", "2000000"];
    let ended = Example::start(CALLBACKS, &words, kafka)?.end().await?;
    let error = ended.one_line_error()?;
    ensure!(error.contains("not sent to"), "{error}");
    ensure!(error.contains("MessageSizeTooLarge"), "{error}");

    // Above that of the topic: the callback hears of it.
    observe::kafka::forget(kafka.1, SENT, "none").await?;
    let limit = [("max.message.bytes", "1000")];
    observe::kafka::create_topic_with(kafka.1, SENT, 1, &limit).await?;
    let ended = Example::start(CALLBACKS, &["1", "2000"], kafka)?
        .end()
        .await?;
    let error = ended.one_line_error()?;
    ensure!(error.contains("1 readings are not delivered"), "{error}");
    ensure!(error.contains("MessageSizeTooLarge"), "{error}");
    observe::kafka::forget(kafka.1, SENT, "none").await
}

#[tokio::test]
async fn what_is_filled_is_read_and_no_more() -> Result<()> {
    // Its own size has a topic of its own.
    ran_twice(CONSUMER, &["throughput.readings-64"]).await?;
    let kafka = kafka().await?;
    let topic = "throughput.readings-50";
    observe::kafka::forget(kafka.1, topic, "none").await?;
    let run =
        async |words: &[&str]| Example::start(CONSUMER, words, kafka)?.end().await;
    // The second time there is nothing to do.
    for _run in 0..2 {
        run(&["fill", "3000", "50"]).await?.succeeded()?;
        let records = observe::kafka::records(kafka.1, topic).await?;
        assert_eq!(records.len(), 3000);
    }
    for settings in ["tuned", "defaults"] {
        let ended = run(&[settings, "3000", "50"]).await?.succeeded()?;
        let said = "consumed: 3000 messages of 50 B in ";
        ensure!(ended.stdout.starts_with(said), "{}", ended.stdout);
    }
    let ended = run(&["tuned", "3001", "50"]).await?;
    let error = ended.one_line_error()?;
    ensure!(
        error.contains("has 3000 records; fill it before"),
        "{error}"
    );
    for words in [&["x", "1", "2"][..], &["fill", "x", "2"], &["tuned", "5"]] {
        assert_eq!(run(words).await?.status.code(), Some(2));
    }
    Ok(())
}
