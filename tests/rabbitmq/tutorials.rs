//! The official tutorials, with a client of another language on the other side: each
//! sends, and the other one receives. The second, work queues, is with the patterns.

use anyhow::{Result, ensure};
use tests::{Example, observe, pika};

use crate::{CONSUMER, DIRECT_ROUTING, FANOUT, PUBLISHER, TOPICS, own_vhost};

const RPC: &str = env!("CARGO_BIN_EXE_rabbitmq_rpc");
const CONFIRMS: [(&str, &str); 3] = [
    (
        env!("CARGO_BIN_EXE_rabbitmq_confirms_sync"),
        "confirms.sync.payments",
    ),
    (
        env!("CARGO_BIN_EXE_rabbitmq_confirms_batch"),
        "confirms.batch.payments",
    ),
    (
        env!("CARGO_BIN_EXE_rabbitmq_confirms_pipelined"),
        "confirms.pipelined.payments",
    ),
];

async fn ran(example: &str, address: &str) -> Result<()> {
    let ended = Example::start(example, &[], ("AMQP_URL", address))?;
    ended.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn one_hello_world() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    ran(PUBLISHER, &address).await?;
    let heard = pika::run(&address, &["get", "hello", "1"]).await?;
    assert_eq!(heard, "hello Hello, RabbitMQ!\n");

    let mut consumer = Example::start(CONSUMER, &[], ("AMQP_URL", &address))?;
    pika::run(&address, &["publish", "", "hello", "Hello, Rust!"]).await?;
    consumer.prints("Hello, Rust!").await?;
    consumer.interrupt().await?;
    consumer.end().await?.succeeded()?;
    Ok(())
}

/// What pika hears from an exchange while the example publishes to it, and what
/// arrives in the queues of the example when pika does.
async fn exchange(
    example: &str,
    exchange: &str,
    key: &str,
    expected: &str,
    queues: &[&str],
) -> Result<()> {
    let (_management, address) = own_vhost().await?;
    // The exchange comes with the first run.
    ran(example, &address).await?;
    let count = expected.lines().count().to_string();
    let mut peer = pika::start(&address, &["hear", exchange, key, &count]).await?;
    peer.prints("bound").await?;
    ran(example, &address).await?;
    let heard = peer.end().await?.succeeded()?.stdout;
    assert_eq!(heard, format!("bound\n{expected}"));

    // No pattern here, but a key that the pattern matches.
    let one = key.replace('#', "eu.paid");
    pika::run(&address, &["publish", exchange, &one, "from Python"]).await?;
    for queue in queues {
        let taken = observe::rabbitmq::drain(&address, queue).await?;
        let texts: Vec<_> = taken.iter().map(|one| one.data.as_slice()).collect();
        ensure!(
            texts == [b"from Python"],
            "{queue} has {} messages",
            texts.len()
        );
    }
    Ok(())
}

#[tokio::test]
async fn three_publish_subscribe() -> Result<()> {
    let queues = ["fanout.orders.billing", "fanout.orders.stock"];
    exchange(FANOUT, "fanout.orders", "", " order-1\n order-2\n", &queues).await
}

#[tokio::test]
async fn four_routing() -> Result<()> {
    let expected = "refunded payment-2\n";
    let queues = ["direct.payments.ledger", "direct.payments.support"];
    exchange(
        DIRECT_ROUTING,
        "direct.payments",
        "refunded",
        expected,
        &queues,
    )
    .await
}

#[tokio::test]
async fn five_topics() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    ran(TOPICS, &address).await?;
    let words = ["hear", "topics.orders", "order.*.paid", "1"];
    let mut peer = pika::start(&address, &words).await?;
    peer.prints("bound").await?;
    ran(TOPICS, &address).await?;
    let heard = peer.end().await?.succeeded()?.stdout;
    ensure!(heard.starts_with("bound\norder.eu.paid "), "{heard}");

    let words = [
        "publish",
        "topics.orders",
        "order.eu.returned",
        "from Python",
    ];
    pika::run(&address, &words).await?;
    for (queue, count) in [
        ("topics.orders.europe", 1),
        ("topics.orders.audit", 1),
        ("topics.orders.payments", 0),
        ("topics.orders.both", 1),
    ] {
        let taken = observe::rabbitmq::drain(&address, queue).await?;
        assert_eq!(taken.len(), count, "{queue}");
    }
    Ok(())
}

#[tokio::test]
async fn six_rpc() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let variable = ("AMQP_URL", address.as_str());
    let mut server = Example::start(RPC, &["server"], variable)?;
    server.prints("ready:").await?;
    let quote = pika::run(&address, &["ask", "rpc.quotes", "sku-2"]).await?;
    assert_eq!(quote, "4.50\n");
    server.interrupt().await?;
    server.end().await?.succeeded()?;

    let mut peer = pika::start(&address, &["answer", "rpc.quotes", "3"]).await?;
    peer.prints("ready").await?;
    let client = Example::start(RPC, &["client"], variable)?;
    let client = client.end().await?.succeeded()?;
    let expected = "sku-1: sku-1 from Python\nsku-2: sku-2 from Python\n\
                    sku-9: sku-9 from Python\n";
    assert_eq!(client.stdout, expected);
    peer.end().await?.succeeded()?;
    Ok(())
}

/// What was confirmed to us is there for pika, and what was confirmed to pika is
/// there for us.
#[tokio::test]
async fn seven_publisher_confirms() -> Result<()> {
    for (example, queue) in CONFIRMS {
        let (_management, address) = own_vhost().await?;
        ran(example, &address).await?;
        let stored = observe::rabbitmq::ready(&address, queue).await?.to_string();
        let heard = pika::run(&address, &["get", queue, &stored]).await?;
        ensure!(
            heard.lines().count().to_string() == stored,
            "{queue}: {heard}"
        );
        let words = ["publish", "", queue, "from Python"];
        assert_eq!(pika::run(&address, &words).await?, "confirmed\n");
        let taken = observe::rabbitmq::drain(&address, queue).await?;
        assert_eq!(taken.len(), 1, "{queue}");
    }
    Ok(())
}
