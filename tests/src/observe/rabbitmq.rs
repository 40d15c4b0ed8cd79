//! A second connection to RabbitMQ.

use anyhow::{Context as _, Result};
use lapin::{
    Channel, Connection, ConnectionProperties,
    message::BasicGetMessage,
    options::{
        BasicAckOptions, BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};

/// Connects, and gives a channel with its connection.
///
/// # Errors
///
/// If no broker answers.
pub async fn connect(address: &str) -> Result<(Connection, Channel)> {
    let connection =
        Connection::connect(address, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

/// Deletes queues with all that is in them; those that are not there count as
/// deleted.
///
/// # Errors
///
/// If no broker answers.
pub async fn delete_queues(address: &str, queues: &[&str]) -> Result<()> {
    let (connection, channel) = connect(address).await?;
    for queue in queues {
        channel
            .queue_delete((*queue).into(), QueueDeleteOptions::default())
            .await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}

/// How many messages lie in a queue, ready to be delivered; those that are with
/// a consumer do not count.
///
/// # Errors
///
/// If there is no such queue.
pub async fn ready(address: &str, queue: &str) -> Result<u32> {
    let (connection, channel) = connect(address).await?;
    let declared = channel
        .queue_declare(
            queue.into(),
            QueueDeclareOptions::default().passive(),
            FieldTable::default(),
        )
        .await
        .with_context(|| format!("the queue {queue}"))?;
    let count = declared.message_count();
    connection.close(200, "".into()).await?;
    Ok(count)
}

/// Takes all messages out of a queue.
///
/// # Errors
///
/// If there is no such queue.
pub async fn drain(address: &str, queue: &str) -> Result<Vec<BasicGetMessage>> {
    let (connection, channel) = connect(address).await?;
    let mut messages = Vec::new();
    while let Some(message) = channel
        .basic_get(queue.into(), BasicGetOptions::default())
        .await?
    {
        message.ack(BasicAckOptions::default()).await?;
        messages.push(message);
    }
    connection.close(200, "".into()).await?;
    Ok(messages)
}
