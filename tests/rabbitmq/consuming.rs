//! How much is with a consumer at once, and in which order it comes.

use anyhow::{Context as _, Result, ensure};
use lapin::{
    BasicProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        BasicQosOptions, ConfirmSelectOptions,
    },
    types::FieldTable,
};
use tests::{Example, observe, wait};

use crate::{own_vhost, ran_twice};

const PREFETCH: &str = env!("CARGO_BIN_EXE_rabbitmq_prefetch");
const CONCURRENT: &str = env!("CARGO_BIN_EXE_rabbitmq_concurrent_consumer");
const PRIORITY: &str = env!("CARGO_BIN_EXE_rabbitmq_priority_queue");
const RETRY: &str = env!("CARGO_BIN_EXE_rabbitmq_retry_delay");

async fn publish(address: &str, queue: &str, messages: &[(&str, u8)]) -> Result<()> {
    let (connection, channel) = observe::rabbitmq::connect(address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for (text, priority) in messages {
        let properties = BasicProperties::default().with_priority(*priority);
        let options = BasicPublishOptions::default();
        let (exchange, body) = ("".into(), text.as_bytes());
        channel
            .basic_publish(exchange, queue.into(), options, body, properties)
            .await?
            .await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}

/// What the management API says is with consumers, for limits that the example
/// does not use; `global` is a limit of each consumer.
#[tokio::test]
async fn a_consumer_holds_no_more_than_its_limit() -> Result<()> {
    let address = ran_twice(PREFETCH).await?;
    let (management, _vhost) = own_vhost().await?;
    let queue = "prefetch.labels";
    assert_eq!(observe::rabbitmq::ready(&address, queue).await?, 0);
    publish(&address, queue, &[("label", 0); 30]).await?;
    for (limit, global, expected) in [(7, false, 14), (7, true, 14), (0, false, 30)]
    {
        let (connection, channel) = observe::rabbitmq::connect(&address).await?;
        channel.basic_qos(limit, BasicQosOptions { global }).await?;
        let mut consumers = Vec::new();
        for _consumer in 0..2 {
            let options = BasicConsumeOptions::default();
            let none = FieldTable::default();
            let consumer = channel
                .basic_consume(queue.into(), "".into(), options, none)
                .await?;
            consumers.push(consumer);
        }
        wait::until("the messages that are with consumers", async || {
            let seen = management.queue(&address, queue).await?;
            let held = seen["messages_unacknowledged"].as_u64().context("none")?;
            ensure!(held == expected, "{held} are with consumers");
            Ok(())
        })
        .await?;
        connection.close(200, "".into()).await?;
        wait::until("all of them back", async || {
            let ready = observe::rabbitmq::ready(&address, queue).await?;
            ensure!(ready == 30, "{ready} are back");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn each_mail_is_acknowledged_whoever_sends_it() -> Result<()> {
    let address = ran_twice(CONCURRENT).await?;
    let left = observe::rabbitmq::ready(&address, "concurrent.mails").await?;
    assert_eq!(left, 0);
    Ok(())
}

/// Messages of an observer, in another order than those of the example.
#[tokio::test]
async fn the_urgent_overtakes_where_the_queue_knows_priorities() -> Result<()> {
    let address = ran_twice(PRIORITY).await?;
    let messages = [("a", 2), ("b", 5), ("c", 2), ("d", 0), ("e", 5), ("f", 4)];
    for (kind, expected) in [
        ("quorum", "befacd"),
        ("classic", "befacd"),
        // The control.
        ("plain", "abcdef"),
    ] {
        let queue = format!("priority.orders.{kind}");
        publish(&address, &queue, &messages).await?;
        let order = observe::rabbitmq::drain(&address, &queue).await?;
        let order: Vec<_> = order.iter().map(|message| &message.data[..]).collect();
        assert_eq!(String::from_utf8(order.concat())?, expected, "{kind}");
    }
    Ok(())
}

/// A message that an observer lays into each delay comes back to the workers, with
/// the headers that it had.
#[tokio::test]
async fn what_failed_comes_back_after_its_delay() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(RETRY, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
        let pauses = ended.stdout.lines().find_map(|line| {
            let (first, second) =
                line.strip_prefix("pauses:  ")?.split_once(", ")?;
            let number = |text: &str| text.strip_suffix(" ms")?.parse::<u32>().ok();
            Some((number(first)?, number(second)?))
        });
        let (first, second) = pauses.context("no pauses")?;
        ensure!(first >= 1000 && second >= 3000, "{first} ms, {second} ms");
    }
    let names = management.queue_names(&address).await?;
    let queues = [
        "retry.delay-1000",
        "retry.delay-3000",
        "retry.parcels",
        "retry.parked",
    ];
    assert_eq!(names, queues);
    for queue in queues {
        assert_eq!(
            observe::rabbitmq::ready(&address, queue).await?,
            0,
            "{queue}"
        );
    }

    publish(&address, "retry.delay-1000", &[("late", 0)]).await?;
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    let back = wait::until("the way back", async || {
        let options = BasicGetOptions::default();
        let back = channel.basic_get("retry.parcels".into(), options).await?;
        back.context("it is not there")
    })
    .await?;
    back.ack(BasicAckOptions::default()).await?;
    assert_eq!(back.data, b"late");
    let headers = back.properties.headers().clone().unwrap_or_default();
    ensure!(headers.inner().contains_key("x-death"), "{headers:?}");
    connection.close(200, "".into()).await?;
    Ok(())
}
