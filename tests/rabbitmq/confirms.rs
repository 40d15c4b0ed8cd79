//! What counts as stored is in the queue, and what does not is not.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::json;
use tests::{Example, example::Ended, observe};
use tokio::time::timeout;

use crate::own_vhost;

const SYNC: &str = env!("CARGO_BIN_EXE_rabbitmq_confirms_sync");
const BATCH: &str = env!("CARGO_BIN_EXE_rabbitmq_confirms_batch");
const PIPELINED: &str = env!("CARGO_BIN_EXE_rabbitmq_confirms_pipelined");
const QUEUE: &str = "confirms.pipelined.payments";

async fn run(example: &str, words: &[&str], address: &str) -> Result<Ended> {
    let example = Example::start(example, words, ("AMQP_URL", address))?;
    example.end().await
}

async fn texts(address: &str, queue: &str) -> Result<Vec<String>> {
    let messages = observe::rabbitmq::drain(address, queue).await?;
    let text = |data: &[u8]| String::from_utf8_lossy(data).into_owned();
    Ok(messages.iter().map(|message| text(&message.data)).collect())
}

fn payments() -> BTreeSet<String> {
    let routed = (1..=1000).filter(|number| *number != 500);
    routed.map(|number| format!("payment-{number}")).collect()
}

#[tokio::test]
async fn each_answer_means_what_the_queue_holds() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = run(SYNC, &[], &address).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let stored = texts(&address, "confirms.sync.payments").await?;
    assert_eq!(stored, ["payment-1", "payment-2"]);
    Ok(())
}

#[tokio::test]
async fn the_futures_tell_what_the_shortcut_hides() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = run(BATCH, &[], &address).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    let stored = texts(&address, "confirms.batch.payments").await?;
    assert_eq!(stored, ["payment-1", "payment-2", "payment-3"]);
    Ok(())
}

#[tokio::test]
async fn each_payment_is_stored_once_and_the_returned_one_is_named() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = run(PIPELINED, &[], &address).await?.succeeded()?;
        ended.printed_what_its_header_says()?;
        ensure!(ended.stdout.contains("refused:   0,"), "{}", ended.stdout);
    }
    let messages = observe::rabbitmq::drain(&address, QUEUE).await?;
    assert_eq!(messages.len(), 999);
    let id = |message: &lapin::message::BasicGetMessage| {
        message
            .properties
            .message_id()
            .as_ref()
            .map(ToString::to_string)
    };
    let ids: BTreeSet<String> = messages.iter().filter_map(id).collect();
    assert_eq!(ids, payments());
    Ok(())
}

/// A queue with room for less than the window refuses, while a consumer makes
/// room: all is there in the end.
#[tokio::test]
async fn what_is_refused_is_published_again() -> Result<()> {
    let (management, address) = own_vhost().await?;
    let vhost = address.rsplit('/').next().unwrap_or_default();
    let limit = json!({
        "pattern": "^confirms", "apply-to": "queues",
        "definition": { "max-length": 20, "overflow": "reject-publish" },
    });
    management
        .put(&format!("policies/{vhost}/tight"), limit)
        .await?;

    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(QUEUE.into(), durable, arguments)
        .await?;
    let qos = BasicQosOptions::default();
    channel.basic_qos(10, qos).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let mut consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    let consuming = tokio::spawn(async move {
        let mut seen = BTreeSet::new();
        while seen.len() < 999
            && let Ok(Some(delivery)) =
                timeout(tests::wait::DEADLINE, consumer.next()).await
        {
            let delivery = delivery?;
            let id = delivery.properties.message_id().clone().unwrap_or_default();
            seen.insert(id.to_string());
            delivery.ack(BasicAckOptions::default()).await?;
        }
        anyhow::Ok(seen)
    });
    let ended = run(PIPELINED, &[], &address).await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    ensure!(
        !ended.stdout.contains("refused:   0,"),
        "nothing was refused"
    );
    assert_eq!(consuming.await??, payments());
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test]
async fn a_number_and_a_size_are_measured() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let ended = run(PIPELINED, &["2000", "64"], &address)
        .await?
        .succeeded()?;
    let said = "published: 2000 messages of 64 B in ";
    ensure!(ended.stdout.starts_with(said), "{}", ended.stdout);
    assert_eq!(observe::rabbitmq::ready(&address, QUEUE).await?, 2000);
    for words in [&["x", "64"][..], &["0", "64"], &["5"], &["1", "2", "3"]] {
        let ended = run(PIPELINED, words, &address).await?;
        assert_eq!(ended.status.code(), Some(2));
        ensure!(
            ended
                .stderr
                .starts_with("usage: rabbitmq_confirms_pipelined")
        );
    }
    Ok(())
}

/// The limit is RabbitMQ's `max_message_size`, 16 MiB: the channel is closed, and the
/// line says both sizes.
#[tokio::test]
async fn a_message_above_the_limit_is_one_line() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let words = ["2", "17000000"];
    let ended = Example::start(PIPELINED, &words, ("AMQP_URL", &address))?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    for part in ["PRECONDITION_FAILED", "17000000", "16777216"] {
        ensure!(line.contains(part), "{part:?} is not in {line:?}");
    }
    Ok(())
}
