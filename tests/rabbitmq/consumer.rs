//! A message that the consumer has acknowledged is gone, any other is not.

use anyhow::{Result, ensure};
use tests::{Example, observe, wait};

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
