//! Each service hears of each order, also of those that came while it was down. What it
//! looks like under faults is in tests/faults.

use anyhow::{Result, ensure};
use lab::broker::Broker;
use tests::Example;
use tokio::sync::Mutex;

use crate::common::Pattern;

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_pubsub_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_pubsub_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_pubsub_nats"),
    topics: &[
        ("orders-events", "orders-events-billing"),
        ("orders-events", "orders-events-stock"),
        ("orders-events", "orders-events-mail"),
        ("orders-events", "orders-events-analytics"),
    ],
    queues: &[
        "orders.events.billing",
        "orders.events.stock",
        "orders.events.mail",
    ],
    streams: &["ORDERS_EVENTS"],
};

/// Exchange, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_tell_each_service() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// What a service has heard so far, after it has heard of this order.
async fn hears(
    binary: &str,
    words: &[&str],
    variable: (&str, &str),
    last: &str,
) -> Result<Vec<String>> {
    let mut service = Example::start(binary, words, variable)?;
    service.prints(last).await?;
    service.interrupt().await?;
    let ended = service.end().await?.succeeded()?;
    ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    let heard = ended.stdout.lines();
    Ok(heard
        .filter_map(|line| line.strip_prefix("heard:     "))
        .map(str::to_owned)
        .collect())
}

async fn publishes(
    binary: &str,
    variable: (&str, &str),
    first: &str,
    last: &str,
) -> Result<()> {
    let publisher = Example::start(binary, &["publish", first, last], variable)?;
    publisher.end().await?.succeeded()?;
    Ok(())
}

/// Down while order-4 to order-6 were published: it goes on where it was, and another
/// service has a place of its own.
#[tokio::test]
async fn a_service_that_was_down_goes_on_where_it_was() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let mail = ["subscribe", "mail"];
        let mut first = Example::start(binary, &mail, variable)?;
        first.prints("ready:").await?;
        publishes(binary, variable, "1", "3").await?;
        first.prints("order-3").await?;
        first.interrupt().await?;
        first.end().await?.succeeded()?;
        publishes(binary, variable, "4", "6").await?;
        let heard = hears(binary, &mail, variable, "order-6").await?;
        assert_eq!(heard, ["order-4", "order-5", "order-6"], "{broker:?}");
    }
    Ok(())
}

/// Nobody was there when they were published. Kafka and JetStream keep them for a
/// service that comes later; RabbitMQ had no queue to put them into.
#[tokio::test]
async fn a_service_that_is_new_hears_what_is_kept() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        publishes(binary, variable, "1", "3").await?;
        let mut stock = Example::start(binary, &["subscribe", "stock"], variable)?;
        stock.prints("ready:").await?;
        publishes(binary, variable, "4", "4").await?;
        stock.prints("order-4").await?;
        stock.interrupt().await?;
        let ended = stock.end().await?.succeeded()?;
        let older = ended.stdout.matches("order-").count() - 1;
        assert_eq!(older, if broker == Broker::RabbitMq { 0 } else { 3 });
    }
    Ok(())
}

/// The control: core NATS keeps nothing for a service that was down.
#[tokio::test]
async fn control_core_nats_tells_those_who_listen() -> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::Nats).await?;
    publishes(PATTERN.nats, variable, "1", "3").await?;
    let words = ["subscribe", "mail", "--core"];
    let mut mail = Example::start(PATTERN.nats, &words, variable)?;
    mail.prints("ready:").await?;
    publishes(PATTERN.nats, variable, "4", "4").await?;
    mail.prints("order-4").await?;
    mail.interrupt().await?;
    let ended = mail.end().await?.succeeded()?;
    assert_eq!(
        ended.stdout.matches("heard:").count(),
        1,
        "{}",
        ended.stdout
    );
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 3] =
        [&["subscribe"], &["subscribe", "nobody"], &["publish", "1"]];
    PATTERN.says_what_is_wrong(&wrong).await
}
