//! A message that the publisher calls confirmed is in a durable queue.

use anyhow::{Result, ensure};
use lapin::{options::QueueDeclareOptions, types::FieldTable};
use tests::{Example, observe};

use crate::{FIRST_STEPS, PUBLISHER, QUEUE, rabbitmq};

#[tokio::test]
async fn what_is_confirmed_is_in_the_queue() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let rabbitmq = rabbitmq().await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await?;

    for _run in 0..2 {
        let ended = Example::start(PUBLISHER, &[], rabbitmq)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }

    let messages = observe::rabbitmq::drain(rabbitmq.1, QUEUE).await?;
    assert_eq!(messages.len(), 2);
    for message in messages {
        assert_eq!(message.data, b"Hello, RabbitMQ!");
        assert_eq!(*message.properties.delivery_mode(), Some(2));
    }
    Ok(())
}

#[tokio::test]
async fn a_queue_with_other_arguments_is_one_line_that_names_them() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let rabbitmq = rabbitmq().await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await?;
    let (connection, channel) = observe::rabbitmq::connect(rabbitmq.1).await?;
    channel
        .queue_declare(
            QUEUE.into(),
            QueueDeclareOptions::durable(),
            FieldTable::default(), // a classic queue
        )
        .await?;

    let ended = Example::start(PUBLISHER, &[], rabbitmq)?.end().await?;
    let line = ended.one_line_error()?;
    for part in ["PRECONDITION_FAILED", "x-queue-type", "delete it first"] {
        ensure!(line.contains(part), "{part:?} is not in {line:?}");
    }
    ended.printed_what_the_book_shows("other-queue")?;
    connection.close(200, "".into()).await?;
    observe::rabbitmq::delete_queues(rabbitmq.1, &[QUEUE]).await
}
