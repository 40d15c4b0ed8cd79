//! What no queue wants comes back or is kept, and without either it is gone.

use anyhow::{Result, ensure};
use lapin::{
    BasicProperties, Confirmation, ExchangeKind,
    options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions},
    types::FieldTable,
};
use tests::{Example, example::Ended, observe};

use crate::{ALTERNATE_EXCHANGE, MANDATORY, own_vhost};

async fn run(example: &str, address: &str) -> Result<Ended> {
    let example = Example::start(example, &[], ("AMQP_URL", address))?;
    example.end().await
}

async fn texts(address: &str, queue: &str) -> Result<Vec<String>> {
    let messages = observe::rabbitmq::drain(address, queue).await?;
    let text = |data: &[u8]| String::from_utf8_lossy(data).into_owned();
    Ok(messages.iter().map(|message| text(&message.data)).collect())
}

/// Publishes as a careless publisher does, and returns what it is told.
async fn publish(address: &str, exchange: &str, key: &str) -> Result<Confirmation> {
    publish_with(address, exchange, key, BasicPublishOptions::default()).await
}

async fn publish_with(
    address: &str,
    exchange: &str,
    key: &str,
    options: BasicPublishOptions,
) -> Result<Confirmation> {
    let (connection, channel) = observe::rabbitmq::connect(address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let confirm = channel
        .basic_publish(
            exchange.into(),
            key.into(),
            options,
            b"order-careless",
            BasicProperties::default(),
        )
        .await?;
    let answer = confirm.await?;
    connection.close(200, "".into()).await?;
    Ok(answer)
}

#[tokio::test]
async fn what_came_back_is_in_no_queue() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = run(MANDATORY, &address).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
        let queue = "mandatory.orders.europe";
        assert_eq!(texts(&address, queue).await?, ["order-3", "order-5"]);
    }
    let only = management.queue_names(&address).await?;
    assert_eq!(only, ["mandatory.orders.europe"], "nowhere else to be");
    Ok(())
}

#[tokio::test]
async fn a_careless_publisher_loses_nothing_with_an_alternate_exchange() -> Result<()>
{
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = run(ALTERNATE_EXCHANGE, &address).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let (exchange, unknown) = ("alternate.orders", "alternate.orders.unknown");
    let answer = publish(&address, exchange, "venus").await?;
    ensure!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    assert_eq!(texts(&address, unknown).await?, ["order-careless"]);

    // The control: the same answer from an exchange without one, and nothing kept.
    run(MANDATORY, &address).await?.succeeded()?;
    let europe = "mandatory.orders.europe";
    texts(&address, europe).await?;
    let answer = publish(&address, "mandatory.orders", "venus").await?;
    ensure!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    for queue in [europe, unknown, "alternate.orders.europe"] {
        assert_eq!(texts(&address, queue).await?, [""; 0]);
    }

    // An alternate exchange that leads nowhere leaves a message to `mandatory`.
    observe::rabbitmq::delete_queues(&address, &[unknown]).await?;
    let mandatory = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let answer = publish_with(&address, exchange, "venus", mandatory).await?;
    ensure!(matches!(answer, Confirmation::Ack(Some(_))), "{answer:?}");
    Ok(())
}

/// An exchange keeps the arguments with which it was made.
#[tokio::test]
async fn an_exchange_without_it_is_one_line_that_says_so() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .exchange_declare(
            "alternate.orders".into(),
            ExchangeKind::Direct,
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    connection.close(200, "".into()).await?;
    let ended = run(ALTERNATE_EXCHANGE, &address).await?;
    let line = ended.one_line_error()?;
    for part in [
        "PRECONDITION_FAILED",
        "alternate-exchange",
        "delete it first",
    ] {
        ensure!(line.contains(part), "{part:?} is not in {line:?}");
    }
    Ok(())
}
