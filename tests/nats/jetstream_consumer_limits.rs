//! The server keeps the readers of a consumer within its limits, and tells them
//! when there is no consumer any more.

use anyhow::Result;
use async_nats::jetstream::{consumer::pull, stream};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const PULL_LIMITS: &str = env!("CARGO_BIN_EXE_nats_jetstream_pull_limits");

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn each_limit_is_named_when_it_is_met() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(PULL_LIMITS, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream("TENANTS").await?;
    let state = stream.info().await?.state.clone();
    assert_eq!((state.messages, state.consumer_count), (5, 0));
    Ok(())
}

/// The control: without the limit, one reader gets all five at once.
#[tokio::test]
async fn control_without_a_limit_one_reader_gets_everything() -> Result<()> {
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, "UNLIMITED").await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: "UNLIMITED".to_owned(),
            subjects: vec!["unlimited".to_owned()],
            ..stream::Config::default()
        })
        .await?;
    for _ in 0..5 {
        jetstream.publish("unlimited", "job".into()).await?.await?;
    }
    let consumer = stream.create_consumer(pull::Config::default()).await?;
    let mut jobs = consumer.messages().await?;
    for _ in 0..5 {
        let job = timeout(DEADLINE, jobs.next()).await?;
        assert!(job.is_some_and(|job| job.is_ok()));
    }
    assert_eq!(consumer.get_info().await?.num_ack_pending, 5);
    Ok(())
}
