//! Who gets what a consumer leaves behind when it ends.

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tests::{Example, observe, wait, wait::DEADLINE};
use tokio::time::timeout;

use crate::own_vhost;

const CONSUMER_CANCEL: &str = env!("CARGO_BIN_EXE_rabbitmq_consumer_cancel");
const SINGLE_ACTIVE: &str = env!("CARGO_BIN_EXE_rabbitmq_single_active_consumer");

async fn publish(channel: &Channel, queue: &str, text: &str) -> Result<()> {
    let options = BasicPublishOptions::default();
    let properties = BasicProperties::default();
    channel
        .basic_publish(
            "".into(),
            queue.into(),
            options,
            text.as_bytes(),
            properties,
        )
        .await?
        .await?;
    Ok(())
}

#[tokio::test]
async fn nothing_is_left_and_nothing_is_with_anybody() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(CONSUMER_CANCEL, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    // Its last act is to delete the queue.
    assert_eq!(management.queue_names(&address).await?, [""; 0]);
    Ok(())
}

/// Entries that an observer publishes to the example's queue, with two consumers
/// that work at the same time: in order with the argument, shared without.
#[tokio::test]
async fn one_consumer_works_and_the_control_shares() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(SINGLE_ACTIVE, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let queue = management.queue(&address, "single.ledger").await?;
    assert_eq!(queue["arguments"]["x-single-active-consumer"], true);

    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare("control".into(), durable, arguments)
        .await?;
    for (queue, expected) in [("single.ledger", false), ("control", true)] {
        let mut consumers = Vec::new();
        for _consumer in 0..2 {
            let channel = connection.create_channel().await?;
            channel.basic_qos(1, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let none = FieldTable::default();
            let consumer = channel
                .basic_consume(queue.into(), "".into(), options, none)
                .await?;
            consumers.push((channel, consumer));
        }
        for number in 0..20 {
            publish(&channel, queue, &number.to_string()).await?;
        }
        let mut counts = [0, 0];
        let [(_, first), (_, second)] = &mut consumers[..] else {
            unreachable!("two were pushed")
        };
        while counts.iter().sum::<usize>() < 20 {
            let (at, delivery) = timeout(DEADLINE, async {
                tokio::select! {
                    delivery = first.next() => (0, delivery),
                    delivery = second.next() => (1, delivery),
                }
            })
            .await?;
            let delivery = delivery.context("the consumer has ended")??;
            counts[at] += 1;
            delivery.ack(BasicAckOptions::default()).await?;
        }
        let shared = counts.iter().all(|count| *count > 0);
        ensure!(shared == expected, "{queue}: {counts:?}");
        for (channel, _consumer) in consumers {
            channel.close(200, "".into()).await?;
        }
        wait::until("an empty queue", async || {
            let ready = observe::rabbitmq::ready(&address, queue).await?;
            ensure!(ready == 0, "{ready} are ready");
            Ok(())
        })
        .await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}
