//! One message over all three brokers, and not round for ever. What it looks like under
//! faults is in tests/faults.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable},
};
use rdkafka::{
    ClientConfig, Message as _,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tests::{Example, broker, example::fail_with_one_line_each, observe, wait};
use tokio::sync::Mutex;

const KAFKA: &str = env!("CARGO_BIN_EXE_bridge_kafka");
const NATS: &str = env!("CARGO_BIN_EXE_bridge_nats");
const RABBITMQ: &str = env!("CARGO_BIN_EXE_bridge_rabbitmq");

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The shared brokers, without what an earlier test has left; each with its variable.
async fn fresh() -> Result<[(&'static str, &'static str); 3]> {
    let kafka = broker::shared(Broker::Kafka).await?;
    let rabbitmq = broker::shared(Broker::RabbitMq).await?;
    let nats = broker::shared(Broker::Nats).await?;
    observe::kafka::forget(kafka, "partner-orders", "bridge-to-nats").await?;
    observe::rabbitmq::delete_queues(rabbitmq, &["partner.orders"]).await?;
    observe::nats::forget_stream(nats, "PARTNER_ORDERS").await?;
    Ok([
        (Broker::Kafka.address_var(), kafka),
        (Broker::RabbitMq.address_var(), rabbitmq),
        (Broker::Nats.address_var(), nats),
    ])
}

#[tokio::test]
async fn the_stories_lose_nothing_on_the_way() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    for binary in [KAFKA, NATS, RABBITMQ] {
        for _time in 0..2 {
            let ended = Example::start_with(binary, &[], &variables)?.end().await?;
            ended.succeeded()?.printed_what_its_header_says()?;
        }
    }
    Ok(())
}

/// From Kafka over NATS to RabbitMQ, with id, key and hops; the third bridge, back to
/// Kafka, lets nothing through that has crossed two.
#[tokio::test]
async fn three_bridges_carry_an_order_and_close_no_circle() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let [(_, kafka), (_, rabbitmq), _] = variables;
    let publisher = Example::start_with(KAFKA, &["publish", "1", "9"], &variables)?;
    publisher.end().await?.succeeded()?;
    let run = |binary| Example::start_with(binary, &["run"], &variables);
    let bridges = [run(KAFKA)?, run(NATS)?];
    wait::until("nine orders in RabbitMQ", async || {
        let ready = observe::rabbitmq::ready(rabbitmq, "partner.orders").await?;
        ensure!(ready == 9, "{ready}");
        Ok(())
    })
    .await?;
    let (connection, channel) = observe::rabbitmq::connect(rabbitmq).await?;
    let order = channel
        .basic_get("partner.orders".into(), Default::default())
        .await?
        .context("an order")?;
    let properties = &order.delivery.properties;
    let id = properties.message_id().as_ref().context("an id")?.as_str();
    let number = id.strip_prefix("order-").context("its id")?;
    let payload: serde_json::Value = serde_json::from_slice(&order.delivery.data)?;
    assert_eq!(payload["quantity"].to_string(), number);
    let headers = properties.headers().as_ref().context("headers")?.inner();
    let text = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => format!("{other:?}"),
    };
    assert_eq!(text("hops"), "2");
    assert_eq!(text("key"), payload["partner"].as_str().unwrap_or_default());
    // Not acknowledged, so it goes back.
    connection.close(200, "".into()).await?;

    let back = run(RABBITMQ)?;
    wait::until("an empty queue", async || {
        let ready = observe::rabbitmq::ready(rabbitmq, "partner.orders").await?;
        ensure!(ready == 0, "{ready}");
        Ok(())
    })
    .await?;
    back.interrupt().await?;
    let back = back.end().await?.succeeded()?;
    assert_eq!(back.stdout.matches("it has been around").count(), 9);
    for bridge in bridges {
        bridge.interrupt().await?;
        let ended = bridge.end().await?.succeeded()?;
        assert_eq!(
            ended.stdout.matches("carried:").count(),
            9,
            "{}",
            ended.stdout
        );
    }
    let records =
        observe::kafka::read_all(kafka, "partner-orders", 4, "read_committed")
            .await?;
    assert_eq!(
        records.len(),
        9,
        "what was published, and nothing came back"
    );
    Ok(())
}

/// A key of two lines, which no header of NATS can hold, and an id that is too long for
/// RabbitMQ: carried all the same, and the bridges go on.
#[tokio::test]
async fn what_does_not_map_ends_no_bridge() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let [(_, kafka), (_, rabbitmq), _] = variables;
    let run = |binary| Example::start_with(binary, &["run"], &variables);
    let mut first = run(KAFKA)?;
    first.prints("ready:").await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .create()?;
    let long = "x".repeat(300);
    let headers = OwnedHeaders::new().insert(Header {
        key: "order-id",
        value: Some(&long),
    });
    let record = FutureRecord::to("partner-orders")
        .key("partner\n7")
        .headers(headers)
        .payload("{}");
    let sent = producer.send(record, Duration::from_secs(10)).await;
    sent.map_err(|(error, _record)| error)?;
    first.prints("carried:   xxx").await?;
    let mut second = run(NATS)?;
    second.prints("carried:   xxx").await?;
    let (connection, channel) = observe::rabbitmq::connect(rabbitmq).await?;
    let order = channel
        .basic_get("partner.orders".into(), Default::default())
        .await?
        .context("an order")?;
    connection.close(200, "".into()).await?;
    assert_eq!(order.delivery.data, b"{}");
    let properties = &order.delivery.properties;
    let id = properties.message_id().as_ref().context("an id")?;
    assert_eq!(id.as_str(), "PARTNER_ORDERS-1");
    let headers = properties.headers().as_ref().context("headers")?.inner();
    let key = AMQPValue::LongString("partner\\n7".into());
    assert_eq!(headers.get("key"), Some(&key));
    for bridge in [first, second] {
        bridge.interrupt().await?;
        bridge.end().await?.succeeded()?;
    }
    Ok(())
}

/// A hop count that another client has written as a number, or as nothing that is one.
#[tokio::test]
async fn hops_of_any_type_are_counted() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let rabbitmq = variables[1].1;
    let mut bridge = Example::start_with(RABBITMQ, &["run"], &variables)?;
    bridge.prints("ready:").await?;
    let (connection, channel) = observe::rabbitmq::connect(rabbitmq).await?;
    for (id, hops) in [
        ("one", AMQPValue::LongLongInt(1)),
        ("two", AMQPValue::ShortShortUInt(2)),
        ("odd", AMQPValue::Boolean(true)),
    ] {
        let mut headers = FieldTable::default();
        headers.insert("hops".into(), hops);
        let properties = BasicProperties::default()
            .with_message_id(id.into())
            .with_headers(headers);
        let (exchange, queue) = ("".into(), "partner.orders".into());
        channel
            .basic_publish(exchange, queue, Default::default(), b"{}", properties)
            .await?;
    }
    bridge.prints("carried:   one").await?;
    bridge.prints("stopped:   two").await?;
    bridge.prints("stopped:   odd").await?;
    connection.close(200, "".into()).await?;
    bridge.interrupt().await?;
    bridge.end().await?.succeeded()?;
    Ok(())
}

/// From RabbitMQ into Kafka, where its key decides the partition.
#[tokio::test]
async fn a_key_arrives_in_kafka() -> Result<()> {
    let _turn = TURN.lock().await;
    let variables = fresh().await?;
    let words = ["publish", "1", "9"];
    let publisher = Example::start_with(RABBITMQ, &words, &variables)?;
    publisher.end().await?.succeeded()?;
    let mut bridge = Example::start_with(RABBITMQ, &["run"], &variables)?;
    bridge.prints("carried:   order-9").await?;
    bridge.interrupt().await?;
    bridge.end().await?.succeeded()?;
    let kafka = variables[0].1;
    let records =
        observe::kafka::read_all(kafka, "partner-orders", 4, "read_committed")
            .await?;
    assert_eq!(records.len(), 9);
    for record in records {
        let payload = record.payload().context("a payload")?;
        let payload: serde_json::Value = serde_json::from_slice(payload)?;
        let key = record.key().context("a key")?;
        assert_eq!(Some(std::str::from_utf8(key)?), payload["partner"].as_str());
        let headers = record.headers().context("headers")?;
        let hops = headers.iter().find(|header| header.key == "hops");
        assert_eq!(hops.and_then(|header| header.value), Some(&b"1"[..]));
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_a_missing_side_one_line() -> Result<()> {
    let _turn = TURN.lock().await;
    let [kafka, rabbitmq, nats] = fresh().await?;
    let no_kafka = ("KAFKA_BROKERS", "localhost:1");
    let no_rabbitmq = ("AMQP_URL", "amqp://app:secret@localhost:1/%2f");
    let no_nats = ("NATS_URL", "nats://app:secret@localhost:1");
    for (binary, sides, missing) in [
        (KAFKA, [no_kafka, nats], "cargo lab up kafka"),
        (KAFKA, [kafka, no_nats], "cargo lab up nats"),
        (NATS, [no_nats, rabbitmq], "cargo lab up nats"),
        (NATS, [nats, no_rabbitmq], "cargo lab up rabbitmq"),
        (RABBITMQ, [no_rabbitmq, kafka], "cargo lab up rabbitmq"),
        (RABBITMQ, [rabbitmq, no_kafka], "cargo lab up kafka"),
    ] {
        let parts = ["localhost:1", missing];
        fail_with_one_line_each(&[binary], &sides, &parts).await?;
        let ended = Example::start_with(binary, &["run", "fast"], &sides)?;
        let ended = ended.end().await?;
        assert_eq!(ended.status.code(), Some(2));
        ensure!(
            ended.stderr.starts_with("usage: bridge_"),
            "{}",
            ended.stderr
        );
    }
    Ok(())
}
