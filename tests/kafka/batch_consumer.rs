//! Facts and offsets in one transaction: killed workers store each sale once. The
//! control, without the offsets, stores some twice.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rusqlite::Connection;
use tests::{Example, observe, wait};

use crate::{kafka, ran_twice};

const BATCH: &str = env!("CARGO_BIN_EXE_kafka_batch_consumer");
const TOPIC: &str = "batch.sales";
const GROUP: &str = "batch-facts";

/// The tests share the topic and the group.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How many facts there are, and how many different ones.
fn facts(file: &Path) -> Result<(usize, usize)> {
    let count = "SELECT count(*), count(DISTINCT sale) FROM facts";
    let row = Connection::open(file)?.query_row(count, [], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
    });
    let (all, different) = row?;
    Ok((usize::try_from(all)?, usize::try_from(different)?))
}

/// Kills a worker so many times, right after it stored a batch and before Kafka is told,
/// and returns the facts when all sales are there.
async fn killed(role: &str, kills: usize) -> Result<(usize, usize)> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("facts.db");
    let words = [role, file.to_str().context("a path that is no text")?];
    for _kill in 0..kills {
        let sales = Example::start(BATCH, &["sales", "500"], kafka)?;
        sales.end().await?.succeeded()?;
        let mut worker = Example::start(BATCH, &words, kafka)?;
        worker.prints("stored:").await?;
        worker.kill().await?;
    }
    stores_the_rest(&words).await?;
    facts(&file)
}

/// Runs a worker until Kafka knows that all sales are stored.
async fn stores_the_rest(words: &[&str]) -> Result<()> {
    let kafka = kafka().await?;
    let worker = Example::start(BATCH, words, kafka)?;
    wait::until("all sales", async || {
        let lag = observe::kafka::lag(kafka.1, TOPIC, 2, GROUP).await?;
        ensure!(lag == 0, "{lag} are missing");
        Ok(())
    })
    .await?;
    worker.interrupt().await?;
    worker.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn each_sale_is_stored_once_under_kills_and_twice_without_offsets()
-> Result<()> {
    let _turn = TURN.lock().await;
    ran_twice(BATCH, &[TOPIC]).await?;
    assert_eq!(killed("worker", 5).await?, (2500, 2500));
    // The control.
    let (all, different) = killed("careless", 2).await?;
    assert_eq!(different, 1000);
    ensure!(all > different, "the kills have done nothing");
    Ok(())
}

/// Kafka must not be told of what is not stored.
#[tokio::test]
async fn a_locked_database_is_one_line_and_loses_no_sale() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("facts.db");
    let words = ["worker", file.to_str().context("a path that is no text")?];
    let mut worker = Example::start(BATCH, &words, kafka)?;
    worker.prints("ready:").await?;
    let lock = Connection::open(&file)?;
    lock.execute_batch("BEGIN EXCLUSIVE")?;
    let sales = Example::start(BATCH, &["sales", "300"], kafka)?;
    sales.end().await?.succeeded()?;
    let ended = worker.end().await?;
    let error = ended.one_line_error()?;
    ensure!(error.contains("database is locked"), "{error}");
    let lag = observe::kafka::lag(kafka.1, TOPIC, 2, GROUP).await?;
    assert_eq!(lag, 300);
    drop(lock);

    stores_the_rest(&words).await?;
    assert_eq!(facts(&file)?, (300, 300));
    Ok(())
}
