//! An order and its event, both or none. What it looks like under faults is in
//! tests/faults.

use std::path::Path;

use anyhow::{Result, ensure};
use lab::broker::Broker;
use rusqlite::Connection;
use tests::{Example, broker, example::fail_with_one_line, observe, wait};
use tokio::sync::Mutex;

const KAFKA: &str = env!("CARGO_BIN_EXE_transactional_outbox_kafka");
const RABBITMQ: &str = env!("CARGO_BIN_EXE_transactional_outbox_rabbitmq");
const NATS: &str = env!("CARGO_BIN_EXE_transactional_outbox_nats");
const ALL: [(Broker, &str); 3] = [
    (Broker::Kafka, KAFKA),
    (Broker::RabbitMq, RABBITMQ),
    (Broker::Nats, NATS),
];

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The address of the shared broker, without what an earlier test has left.
async fn fresh(broker: Broker) -> Result<(&'static str, &'static str)> {
    let address = broker::shared(broker).await?;
    match broker {
        Broker::Kafka => {
            observe::kafka::forget(address, "orders-placed", "none").await?;
        }
        Broker::RabbitMq => {
            observe::rabbitmq::delete_queues(address, &["orders.placed"]).await?;
        }
        Broker::Nats => {
            observe::nats::forget_stream(address, "ORDERS_PLACED").await?;
        }
    }
    Ok((broker.address_var(), address))
}

#[tokio::test]
async fn the_stories_publish_what_was_placed() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in ALL {
        let variable = fresh(broker).await?;
        for _time in 0..2 {
            let ended = Example::start(binary, &[], variable)?.end().await?;
            ended.succeeded()?.printed_what_its_header_says()?;
        }
    }
    Ok(())
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
    for (broker, binary) in ALL {
        let variable = fresh(broker).await?;
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
    for (broker, binary) in ALL {
        let nowhere = match broker {
            Broker::Kafka => "localhost:1",
            Broker::RabbitMq => "amqp://app:secret@localhost:1/%2f",
            Broker::Nats => "nats://app:secret@localhost:1",
        };
        let variable = (broker.address_var(), nowhere);
        for words in [
            &["place", "1", "9"][..],
            &["place", "1", "many", "x"],
            &["x"],
        ] {
            let ended = Example::start(binary, words, variable)?.end().await?;
            assert_eq!(ended.status.code(), Some(2));
            ensure!(ended.stderr.starts_with("usage: "), "{}", ended.stderr);
        }
        let way_out = format!("cargo lab up {}", broker.name());
        fail_with_one_line(&[binary], variable, &["localhost:1", &way_out]).await?;

        let folder = tempfile::tempdir()?;
        let file = folder.path().join("shop.db");
        std::fs::write(&file, "this is no database, but a text about one")?;
        let words = ["place", "1", "9", &file.to_string_lossy()];
        let ended = Example::start(binary, &words, variable)?.end().await?;
        let line = ended.one_line_error()?;
        ensure!(
            line.contains("cannot use") && line.contains("shop.db"),
            "{line}"
        );
    }
    Ok(())
}
