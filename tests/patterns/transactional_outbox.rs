//! An order and its event, both or none. What it looks like under faults is in
//! tests/faults.

use std::path::Path;

use anyhow::{Result, ensure};
use rusqlite::Connection;
use tests::{Example, wait};
use tokio::sync::Mutex;

use crate::common::{Pattern, nowhere};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_transactional_outbox_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_transactional_outbox_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_transactional_outbox_nats"),
    topics: &[("orders-placed", "none")],
    queues: &["orders.placed"],
    streams: &["ORDERS_PLACED"],
};

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_publish_what_was_placed() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

fn left(file: &Path) -> Result<i64> {
    let database = Connection::open(file)?;
    let count = "SELECT count(*) FROM outbox";
    Ok(database.query_row(count, (), |row| row.get(0))?)
}

/// Orders can be placed while there is no broker, and their events wait.
#[tokio::test]
async fn without_a_broker_orders_are_placed_and_events_wait() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        let shop = file.to_string_lossy();
        let nowhere = (broker.address_var(), "nowhere");
        for _time in 0..2 {
            // Twice: an order that is there is placed no second time.
            let words = ["place", "1", "9", &shop];
            Example::start(binary, &words, nowhere)?
                .end()
                .await?
                .succeeded()?;
        }
        assert_eq!(left(&file)?, 9);
        let relay = Example::start(binary, &["relay", &shop], variable)?;
        wait::until("an empty outbox", async || {
            ensure!(left(&file)? == 0, "some are left");
            Ok(())
        })
        .await?;
        relay.interrupt().await?;
        let relay = relay.end().await?.succeeded()?;
        let published: Vec<&str> = relay
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix("published: order-"))
            .collect();
        let expected: Vec<String> =
            (1..=9).map(|number| format!("{number}.placed")).collect();
        assert_eq!(published, expected);
        ensure!(relay.stdout.ends_with("stopped\n"), "{}", relay.stdout);
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 3] =
        [&["place", "1", "9"], &["place", "1", "many", "x"], &["x"]];
    PATTERN.says_what_is_wrong(&wrong).await?;
    for (broker, binary) in PATTERN.binaries() {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        std::fs::write(&file, "this is no database, but a text about one")?;
        let words = ["place", "1", "9", &file.to_string_lossy()];
        let variable = (broker.address_var(), nowhere(broker));
        let ended = Example::start(binary, &words, variable)?.end().await?;
        let line = ended.one_line_error()?;
        ensure!(
            line.contains("cannot use") && line.contains("shop.db"),
            "{line}"
        );
    }
    Ok(())
}
