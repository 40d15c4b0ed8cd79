//! Who still wants a message decides how long the stream keeps it.

use anyhow::{Result, ensure};
use async_nats::jetstream::{
    consumer::pull,
    stream::{self, RetentionPolicy},
};
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const INTEREST: &str = env!("CARGO_BIN_EXE_nats_jetstream_interest");
const WORKQUEUE: &str = env!("CARGO_BIN_EXE_nats_jetstream_workqueue");

/// Each stream belongs to one example, whose tests take turns.
static INTEREST_TURN: Mutex<()> = Mutex::const_new(());
static WORKQUEUE_TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn interest_keeps_a_message_until_every_consumer_acknowledged() -> Result<()> {
    let _turn = INTEREST_TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, "FANOUT").await?;
    for _run in 0..2 {
        let ended = Example::start(INTEREST, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;

        let jetstream = observe::nats::jetstream(nats.1).await?;
        let stream = jetstream.get_stream("FANOUT").await?;
        let info = stream.get_info().await?;
        assert_eq!(info.config.retention, RetentionPolicy::Interest);
        // Two were published, and both are gone.
        assert_eq!((info.state.messages, info.state.last_sequence), (0, 2));
        for durable in ["billing", "mail"] {
            let consumer = stream.consumer_info(durable).await?;
            assert_eq!(consumer.delivered.stream_sequence, 2, "{durable}");
            assert_eq!(consumer.delivered.consumer_sequence, 1, "{durable}");
            assert_eq!(consumer.ack_floor.stream_sequence, 2, "{durable}");
        }
    }
    Ok(())
}

/// The control: with the default, limits, acknowledgements delete nothing, and
/// a message without a consumer stays.
#[tokio::test]
async fn control_with_limits_a_message_without_a_consumer_stays() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    observe::nats::forget_stream(nats.1, "FANOUT_CONTROL").await?;
    let config = stream::Config {
        name: "FANOUT_CONTROL".into(),
        subjects: vec!["fanout_control".into()],
        ..Default::default()
    };
    let stream = jetstream.create_stream(config).await?;
    jetstream
        .publish("fanout_control", "".into())
        .await?
        .await?;
    assert_eq!(stream.get_info().await?.state.messages, 1);
    observe::nats::forget_stream(nats.1, "FANOUT_CONTROL").await
}

#[tokio::test]
async fn a_work_queue_is_emptied_by_acknowledgements() -> Result<()> {
    let _turn = WORKQUEUE_TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, "FULFILMENT").await?;
    for _run in 0..2 {
        let ended = Example::start(WORKQUEUE, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;

        let jetstream = observe::nats::jetstream(nats.1).await?;
        let stream = jetstream.get_stream("FULFILMENT").await?;
        let info = stream.get_info().await?;
        // Its change was refused, so it is still a work queue.
        assert_eq!(info.config.retention, RetentionPolicy::WorkQueue);
        assert_eq!((info.state.messages, info.state.last_sequence), (0, 3));
        // pick and pack are there, the third one was refused.
        assert_eq!(info.state.consumer_count, 2);
        for (durable, count) in [("pick", 2), ("pack", 1)] {
            let consumer = stream.consumer_info(durable).await?;
            assert_eq!(consumer.delivered.consumer_sequence, count, "{durable}");
        }
    }
    Ok(())
}

/// The control: the same two consumers on a stream with limits are allowed, and
/// each gets the message.
#[tokio::test]
async fn control_with_limits_two_consumers_may_want_the_same() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    observe::nats::forget_stream(nats.1, "FULFILMENT_CONTROL").await?;
    let config = stream::Config {
        name: "FULFILMENT_CONTROL".into(),
        subjects: vec!["fulfilment_control.pick".into()],
        ..Default::default()
    };
    let stream = jetstream.create_stream(config).await?;
    jetstream
        .publish("fulfilment_control.pick", "".into())
        .await?
        .await?;
    for durable in ["pick", "audit"] {
        let consumer = pull::Config {
            durable_name: Some(durable.into()),
            ..Default::default()
        };
        stream.create_consumer(consumer).await?;
        let info = stream.consumer_info(durable).await?;
        ensure!(info.num_pending == 1, "{durable}: {info:?}");
    }
    observe::nats::forget_stream(nats.1, "FULFILMENT_CONTROL").await
}
