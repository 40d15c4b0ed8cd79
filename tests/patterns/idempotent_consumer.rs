//! A payment is charged once. What it looks like under faults is in tests/faults.

use std::path::Path;

use anyhow::{Result, ensure};
use lab::broker::Broker;
use rusqlite::Connection;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::common::Pattern;

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_idempotent_consumer_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_idempotent_consumer_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_idempotent_consumer_nats"),
    topics: &[("payments-due", "ledger")],
    queues: &["payments.due"],
    streams: &["PAYMENTS_DUE"],
};

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_charge_each_payment_once() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

fn count(file: &Path, table: &str) -> Result<i64> {
    let database = Connection::open(file)?;
    let count = format!("SELECT count(*) FROM {table}");
    Ok(database.query_row(&count, (), |row| row.get(0))?)
}

/// Published twice, as by one that has heard no answer, with a message between that
/// nobody can read.
#[tokio::test]
async fn published_twice_is_charged_once_and_noise_is_kept() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        for _time in 0..2 {
            let publisher =
                Example::start(binary, &["publish", "1", "9"], variable)?;
            publisher.end().await?.succeeded()?;
        }
        noise(broker, variable.1).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("ledger.db");
        let ledger = file.to_string_lossy();
        let consumer = Example::start(binary, &["consume", &ledger], variable)?;
        wait::until("nine charges", async || {
            let found = (count(&file, "charges")?, count(&file, "unreadable")?);
            ensure!(found == (9, 1), "{broker:?}: {found:?}");
            Ok(())
        })
        .await?;
        consumer.interrupt().await?;
        let ended = consumer.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        assert_eq!(ended.stderr, "not a payment, set aside: \"\"\n");
        ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
        // What is set aside is done with: it does not come again.
        let next = Example::start(binary, &["consume", &ledger], variable)?;
        let one = Example::start(binary, &["publish", "10", "10"], variable)?;
        one.end().await?.succeeded()?;
        wait::until("the tenth charge", async || {
            let charges = count(&file, "charges")?;
            ensure!(charges == 10, "{broker:?}: {charges}");
            Ok(())
        })
        .await?;
        next.interrupt().await?;
        let ended = next.end().await?.succeeded()?;
        assert_eq!(ended.stderr, "");
        assert_eq!(count(&file, "unreadable")?, 1);
    }
    Ok(())
}

async fn noise(broker: Broker, address: &str) -> Result<()> {
    match broker {
        Broker::Kafka => {
            observe::kafka::produce(address, "payments-due", "noise", "\u{1}")
                .await?;
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            let (options, properties) = Default::default();
            channel
                .basic_publish(
                    "".into(),
                    "payments.due".into(),
                    options,
                    b"\xff",
                    properties,
                )
                .await?;
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let noise = b"\xff"[..].into();
            jetstream.publish("payments.due", noise).await?.await?;
        }
    }
    Ok(())
}

/// A ledger that cannot be written ends the consumer, and the payment stays.
#[tokio::test]
async fn without_its_database_nothing_is_acknowledged() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let publisher = Example::start(binary, &["publish", "1", "3"], variable)?;
        publisher.end().await?.succeeded()?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("ledger.db");
        let ledger = file.to_string_lossy();
        std::fs::write(&file, "this is no database, but a text about one")?;
        let words = ["consume", &ledger];
        let ended = Example::start(binary, &words, variable)?.end().await?;
        let line = ended.one_line_error()?;
        ensure!(
            line.contains("cannot use") && line.contains("ledger.db"),
            "{line}"
        );

        std::fs::remove_file(&file)?;
        let consumer = Example::start(binary, &words, variable)?;
        wait::until("three charges", async || {
            ensure!(count(&file, "charges")? == 3, "not yet");
            Ok(())
        })
        .await?;
        // Somebody else holds the database.
        let locked = Connection::open(&file)?;
        locked.execute_batch("BEGIN IMMEDIATE")?;
        let publisher = Example::start(binary, &["publish", "4", "4"], variable)?;
        publisher.end().await?.succeeded()?;
        let ended = consumer.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("cannot charge payment-4"), "{line}");
        locked.execute_batch("ROLLBACK")?;
        let mut consumer = Example::start(binary, &words, variable)?;
        consumer.prints("charged:   payment-4").await?;
        consumer.interrupt().await?;
        consumer.end().await?;
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 3] =
        [&["publish", "1"], &["publish", "1", "many"], &["consume"]];
    PATTERN.says_what_is_wrong(&wrong).await
}
