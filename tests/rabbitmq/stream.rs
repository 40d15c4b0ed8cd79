//! A stream gives each reader all of it, from where the reader says.

use anyhow::{Context as _, Result};
use futures_lite::StreamExt as _;
use lapin::{
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use tests::{Example, observe, wait::DEADLINE};
use tokio::time::timeout;

use crate::own_vhost;

const STREAM: &str = env!("CARGO_BIN_EXE_rabbitmq_stream");

#[tokio::test]
async fn reading_takes_nothing_away() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(STREAM, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let queue = management.queue(&address, "stream.orders").await?;
    assert_eq!(queue["type"], "stream");

    // All was acknowledged by the example, and another reader finds it again.
    for (from, first) in [(0, 0), (4, 4), (10, 10)] {
        let (connection, channel) = observe::rabbitmq::connect(&address).await?;
        channel.basic_qos(10, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        let offset = AMQPValue::LongLongInt(from);
        arguments.insert("x-stream-offset".into(), offset);
        let options = BasicConsumeOptions::default();
        let mut reader = channel
            .basic_consume("stream.orders".into(), "".into(), options, arguments)
            .await?;
        for number in first..11 {
            let message = timeout(DEADLINE, reader.next()).await?;
            let message = message.context("the stream is gone")??;
            let order = format!("order-{number}");
            assert_eq!(message.data, order.as_bytes());
            message.ack(BasicAckOptions::default()).await?;
        }
        connection.close(200, "".into()).await?;
    }
    Ok(())
}
