//! A message that the consumer has acknowledged is gone, any other is not.

use anyhow::{Result, ensure};
use tests::{Example, broker, observe, wait};

use crate::{CONSUMER, FIRST_STEPS, PUBLISHER, QUEUE, rabbitmq};

#[tokio::test]
async fn the_consumer_may_start_before_the_publisher() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let rabbitmq = rabbitmq().await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await?;

    let mut consumer = Example::start(CONSUMER, &[], rabbitmq)?;
    consumer.prints("waiting for messages").await?;
    let publisher = Example::start(PUBLISHER, &[], rabbitmq)?;
    publisher.end().await?.succeeded()?;
    consumer.prints("received: Hello, RabbitMQ!").await?;
    consumer.interrupt().await?;
    let ended = consumer.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    let left = observe::rabbitmq::drain(rabbitmq.1, QUEUE).await?;
    assert!(left.is_empty(), "not acknowledged: {left:?}");
    Ok(())
}

#[tokio::test]
async fn sigterm_ends_it_cleanly_and_the_queue_keeps_what_comes_later() -> Result<()>
{
    let _turn = FIRST_STEPS.lock().await;
    let rabbitmq = rabbitmq().await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await?;

    let mut consumer = Example::start(CONSUMER, &[], rabbitmq)?;
    consumer.prints("waiting for messages").await?;
    consumer.terminate().await?;
    consumer.end().await?.succeeded()?;

    let publisher = Example::start(PUBLISHER, &[], rabbitmq)?;
    publisher.end().await?.succeeded()?;
    wait::until("the message", async || {
        let ready = observe::rabbitmq::ready(rabbitmq.1, QUEUE).await?;
        ensure!(ready == 1, "{ready} messages");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_deleted_queue_ends_it_with_one_line() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let rabbitmq = rabbitmq().await?;
    let mut consumer = Example::start(CONSUMER, &[], rabbitmq)?;
    consumer.prints("waiting for messages").await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await?;
    let ended = consumer.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("is hello deleted?"), "{line}");
    ended.printed_what_the_book_shows("deleted-queue")
}

#[tokio::test]
async fn a_connection_closed_by_the_broker_is_one_line_and_loses_nothing()
-> Result<()> {
    let management = broker::shared_management().await?;
    let address = management.own_vhost(rabbitmq().await?.1).await?;
    let rabbitmq = ("AMQP_URL", address.as_str());

    let mut consumer = Example::start(CONSUMER, &[], rabbitmq)?;
    consumer.prints("waiting for messages").await?;
    wait::until("the connection in the management API", async || {
        let closed = management.close_connections(&address).await?;
        ensure!(closed == 1, "{closed} connections");
        Ok(())
    })
    .await?;
    let ended = consumer.end().await?;
    let line = ended.one_line_error()?;
    assert!(line.contains("lost RabbitMQ"), "{line}");

    Example::start(PUBLISHER, &[], rabbitmq)?
        .end()
        .await?
        .succeeded()?;
    wait::until("the message that is now ready", async || {
        let queue = management.queue(&address, QUEUE).await?;
        ensure!(queue["messages_ready"] == 1, "{queue}");
        Ok(())
    })
    .await
}
