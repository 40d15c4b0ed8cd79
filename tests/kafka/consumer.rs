//! A group goes on where it stopped: after what was processed, not after what
//! was handed out.

use anyhow::{Result, ensure};
use rdkafka::{
    ClientConfig,
    consumer::{Consumer as _, StreamConsumer},
};
use tests::{Example, observe, wait};

use crate::{CONSUMER, FIRST_STEPS, GROUP, PRODUCER, TOPIC, kafka};

#[tokio::test]
async fn the_consumer_may_start_before_the_producer() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;

    let mut consumer = Example::start(CONSUMER, &[], kafka)?;
    consumer.prints("waiting for records").await?;
    let producer = Example::start(PRODUCER, &[], kafka)?;
    producer.end().await?.succeeded()?;
    consumer.prints("received: key1 = Hello, Kafka!").await?;
    consumer.interrupt().await?;
    let ended = consumer.end().await?.succeeded()?;
    ended.printed_what_its_header_says()
}

#[tokio::test]
async fn a_stopped_consumer_does_not_read_again_what_it_committed() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    observe::kafka::create_topic(kafka.1, TOPIC).await?;
    for number in 0..3 {
        let payload = format!("order {number}");
        observe::kafka::produce(kafka.1, TOPIC, "shop", &payload).await?;
    }

    // Produced before the group existed: read all the same.
    let mut first = Example::start(CONSUMER, &[], kafka)?;
    first.prints("received: shop = order 2").await?;
    first.terminate().await?;
    first.end().await?.succeeded()?;
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, Some(3));

    observe::kafka::produce(kafka.1, TOPIC, "shop", "order 3").await?;
    let mut second = Example::start(CONSUMER, &[], kafka)?;
    let next = second.prints("received:").await?;
    assert_eq!(next, "received: shop = order 3 (partition 0, offset 3)");
    second.interrupt().await?;
    second.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn a_killed_consumer_reads_again_what_it_had_not_committed() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    observe::kafka::create_topic(kafka.1, TOPIC).await?;
    observe::kafka::produce(kafka.1, TOPIC, "shop", "order 0").await?;

    let mut first = Example::start(CONSUMER, &[], kafka)?;
    first.prints("received: shop = order 0").await?;
    first.kill().await?;
    // The next commit of librdkafka would have come within 5 s.
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, None);

    let mut second = Example::start(CONSUMER, &[], kafka)?;
    second.prints("received: shop = order 0").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    second.printed_what_the_book_shows("killed")
}

/// The control: with the guide's settings an offset is committed although
/// nothing has processed the record, so a crash at this point would lose it.
#[tokio::test]
async fn control_offsets_stored_by_the_client_are_committed_before_the_work()
-> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    observe::kafka::create_topic(kafka.1, TOPIC).await?;
    observe::kafka::produce(kafka.1, TOPIC, "shop", "order 0").await?;

    let careless: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.1)
        .set("group.id", GROUP)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        // The default, 5 s, would only make the test slower.
        .set("auto.commit.interval.ms", "100")
        .create()?;
    careless.subscribe(&[TOPIC])?;
    let _in_hand = careless.recv().await?;
    wait::until("the commit", async || {
        let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
        ensure!(committed == Some(1), "committed: {committed:?}");
        Ok(())
    })
    .await
}
