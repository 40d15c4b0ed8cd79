//! What a queue gets is what its bindings say, also for keys that the examples do
//! not use.

use std::collections::BTreeMap;

use anyhow::Result;
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions},
    types::{AMQPValue, FieldTable},
};
use tests::observe;

use crate::{DIRECT_ROUTING, TOPICS, ran_twice};

const HEADERS: &str = env!("CARGO_BIN_EXE_rabbitmq_headers_exchange");
const EXCHANGE_TO_EXCHANGE: &str =
    env!("CARGO_BIN_EXE_rabbitmq_exchange_to_exchange");

/// Which of these queues get a message with each of these keys.
async fn routed<const N: usize>(
    address: &str,
    exchange: &str,
    keys: &[&'static str],
    queues: [&'static str; N],
) -> Result<BTreeMap<String, Vec<&'static str>>> {
    let (connection, channel) = observe::rabbitmq::connect(address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for key in keys {
        channel
            .basic_publish(
                exchange.into(),
                (*key).into(),
                BasicPublishOptions::default(),
                key.as_bytes(),
                BasicProperties::default(),
            )
            .await?
            .await?;
    }
    connection.close(200, "".into()).await?;
    let mut routed: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    for queue in queues {
        for message in observe::rabbitmq::drain(address, queue).await? {
            let key = String::from_utf8(message.data.clone())?;
            routed.entry(key).or_default().push(queue);
        }
    }
    Ok(routed)
}

#[tokio::test]
async fn a_direct_exchange_compares_the_whole_key() -> Result<()> {
    let address = ran_twice(DIRECT_ROUTING).await?;
    let (ledger, support) = ("direct.payments.ledger", "direct.payments.support");
    let keys = [
        "captured",
        "refunded",
        "declined",
        "disputed",
        "refunded.late",
        "",
    ];
    let routed =
        routed(&address, "direct.payments", &keys, [ledger, support]).await?;
    let expected = [
        ("captured", vec![ledger]),
        ("declined", vec![ledger, support]),
        ("refunded", vec![ledger, support]),
    ];
    let expected = expected.map(|(key, queues)| (key.to_owned(), queues));
    assert_eq!(routed, BTreeMap::from(expected));
    Ok(())
}

#[tokio::test]
async fn a_topic_exchange_matches_word_by_word() -> Result<()> {
    let address = ran_twice(TOPICS).await?;
    let [europe, audit, payments, both] = [
        "topics.orders.europe",
        "topics.orders.audit",
        "topics.orders.payments",
        "topics.orders.both",
    ];
    let keys = [
        "order",
        "order.eu",
        "order.eu.placed",
        "order.eu.placed.late",
        "order.eu.paid",
        "shop.eu.paid",
        "order.us.paid",
        "orders.eu.placed",
        "eu.paid",
        "",
    ];
    let queues = [europe, audit, payments, both];
    let routed = routed(&address, "topics.orders", &keys, queues).await?;
    let expected = [
        ("order", vec![audit]),
        ("order.eu", vec![audit]),
        ("order.eu.paid", vec![europe, audit, payments, both]),
        ("order.eu.placed", vec![europe, audit, both]),
        ("order.eu.placed.late", vec![audit]),
        ("order.us.paid", vec![audit, payments, both]),
        ("shop.eu.paid", vec![payments, both]),
    ];
    let expected = expected.map(|(key, queues)| (key.to_owned(), queues));
    assert_eq!(routed, BTreeMap::from(expected));
    Ok(())
}

/// Headers of an observer, with types that the example does not use.
#[tokio::test]
async fn a_headers_exchange_compares_values_and_types() -> Result<()> {
    let address = ran_twice(HEADERS).await?;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let pdf = ("format", text("pdf"));
    let de = ("country", text("de"));
    let x_copies = |count: i32| ("x-copies", AMQPValue::from(count));
    let messages = [
        ("none", vec![]),
        ("pdf", vec![pdf.clone()]),
        ("PDF", vec![("format", text("PDF"))]),
        ("de", vec![de.clone()]),
        ("pages", vec![("pages", AMQPValue::LongInt(2))]),
        ("pages-float", vec![("pages", AMQPValue::Double(2.5))]),
        ("pages-text", vec![("pages", text("2"))]),
        ("de-copies", vec![de.clone(), x_copies(3)]),
        ("de-more-copies", vec![de, x_copies(4)]),
    ];
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for (name, headers) in messages {
        let mut table = FieldTable::default();
        for (header, value) in headers {
            table.insert(header.into(), value);
        }
        let properties = BasicProperties::default().with_headers(table);
        let options = BasicPublishOptions::default();
        let (exchange, key) = ("headers.documents".into(), "".into());
        channel
            .basic_publish(exchange, key, options, name.as_bytes(), properties)
            .await?
            .await?;
    }
    connection.close(200, "".into()).await?;
    for (queue, expected) in [
        ("pdf-germany", ""),
        ("any", "pdf de de-copies de-more-copies"),
        ("two-pages", "pages"),
        ("x-copies", "de de-copies de-more-copies"),
        ("with-x", "de-copies"),
    ] {
        let queue = format!("headers.{queue}");
        let messages = observe::rabbitmq::drain(&address, &queue).await?;
        let names = messages.iter().map(|message| message.data.clone());
        let names: Vec<_> =
            names.map(String::from_utf8).collect::<Result<_, _>>()?;
        assert_eq!(names.join(" "), expected, "{queue}");
    }
    Ok(())
}

/// The example ends with stock unbound: an observer binds it again, and to itself
/// in a circle.
#[tokio::test]
async fn an_exchange_is_bound_to_another_and_each_queue_gets_one() -> Result<()> {
    let address = ran_twice(EXCHANGE_TO_EXCHANGE).await?;
    let (audit, ledger, picking) = (
        "entrance.audit",
        "entrance.billing.ledger",
        "entrance.stock.picking",
    );
    let queues = [audit, ledger, picking];
    let keys = ["order.lost", "payment.lost"];
    let unbound = routed(&address, "entrance", &keys, queues).await?;
    assert_eq!(unbound["order.lost"], [audit]);
    assert_eq!(unbound["payment.lost"], [audit, ledger]);

    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    for (destination, source) in [
        ("entrance.stock", "entrance"),
        ("entrance", "entrance.stock"),
    ] {
        let options = ExchangeBindOptions::default();
        let none = FieldTable::default();
        let (destination, source) = (destination.into(), source.into());
        channel
            .exchange_bind(destination, source, "order.#".into(), options, none)
            .await?;
    }
    connection.close(200, "".into()).await?;
    let bound = routed(&address, "entrance", &keys, queues).await?;
    assert_eq!(bound["order.lost"], [audit, picking]);
    Ok(())
}
