//! Whoever is bound gets a copy of each message, and nobody one from before.

use anyhow::Result;
use lapin::{
    BasicProperties, ExchangeKind,
    options::{
        BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::FieldTable,
};
use tests::{Example, observe};

use crate::{FANOUT, own_vhost};

const EXCHANGE: &str = "fanout.orders";
const SERVICES: [&str; 2] = ["fanout.orders.billing", "fanout.orders.stock"];

#[tokio::test]
async fn each_queue_that_is_bound_gets_its_copy() -> Result<()> {
    let (management, address) = own_vhost().await?;
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    // A subscriber that the example knows nothing of.
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default;
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Fanout, durable, none())
        .await?;
    let queue = "observer";
    let exclusive = QueueDeclareOptions::exclusive();
    channel
        .queue_declare(queue.into(), exclusive, none())
        .await?;
    let options = QueueBindOptions::default();
    let bind = |exchange: &'static str| {
        channel.queue_bind(queue.into(), exchange.into(), "".into(), options, none())
    };
    bind(EXCHANGE).await?;

    for _run in 0..2 {
        let ended = Example::start(FANOUT, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let mut copies = Vec::new();
    while let Some(copy) =
        channel.basic_get(queue.into(), Default::default()).await?
    {
        copies.push(String::from_utf8(copy.data.clone())?);
    }
    assert_eq!(copies, ["order-1", "order-2", "order-1", "order-2"]);

    // While no service runs, its durable queue keeps its copy; the dashboard's
    // queue has gone with the dashboard.
    channel
        .basic_publish(
            EXCHANGE.into(),
            "".into(),
            BasicPublishOptions::default(),
            b"order-3",
            BasicProperties::default(),
        )
        .await?
        .await?;
    for service in SERVICES {
        let kept = tests::wait::until("order-3", async || {
            let kept = observe::rabbitmq::drain(&address, service).await?;
            anyhow::ensure!(!kept.is_empty(), "nothing in {service}");
            Ok(kept)
        });
        let kept = kept.await?;
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].data, b"order-3");
    }
    assert_eq!(
        management.queue_names(&address).await?,
        [SERVICES[0], SERVICES[1], queue]
    );
    connection.close(200, "".into()).await?;
    Ok(())
}
