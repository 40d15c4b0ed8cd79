//! The position is the server's: a worker goes on where the last one stopped.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::{self, PullConsumer, pull};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const PULL_CONSUMER: &str = env!("CARGO_BIN_EXE_nats_jetstream_pull_consumer");
const STREAM: &str = "SHIPMENTS";
const SUBJECT: &str = "shipments.requested";
const DURABLE: &str = "shipping-worker";

/// The stream belongs to the example, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The shared server without the example's stream.
async fn fresh() -> Result<(&'static str, &'static str)> {
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    Ok(nats)
}

async fn producer(nats: (&str, &str), words: &[&str]) -> Result<()> {
    let words = [&["producer"], words].concat();
    let ended = Example::start(PULL_CONSUMER, &words, nats)?.end().await?;
    ended.succeeded()?;
    Ok(())
}

async fn durable(address: &str) -> Result<PullConsumer> {
    let stream = observe::nats::jetstream(address)
        .await?
        .get_stream(STREAM)
        .await?;
    let durable = stream.get_consumer(DURABLE).await;
    durable.map_err(anyhow::Error::from_boxed)
}

/// What the server has of this position: all acknowledged, up to this message.
async fn all_acknowledged(address: &str, last: u64) -> Result<()> {
    wait::until("all acknowledged", async || {
        let info = durable(address).await?.get_info().await?;
        ensure!(
            info.num_pending == 0
                && info.num_ack_pending == 0
                && info.ack_floor.stream_sequence == last,
            "{info:?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn fetch_batch_and_messages_read_each_shipment_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    // Twice: the second run finds what the first has left.
    for _run in 0..2 {
        let ended = Example::start(PULL_CONSUMER, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;

        let info = durable(nats.1).await?.get_info().await?;
        assert_eq!((info.num_pending, info.num_ack_pending), (0, 0));
        // Each once: the consumer has counted as many deliveries as messages.
        assert_eq!(info.delivered.consumer_sequence, 10);
        assert_eq!(info.ack_floor.stream_sequence, 10);
    }
    Ok(())
}

#[tokio::test]
async fn a_worker_that_starts_again_goes_on_where_it_stopped() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats, &[]).await?;
    let mut first = Example::start(PULL_CONSUMER, &["worker"], nats)?;
    first.prints("shipment-10 (message 10, delivery 1)").await?;
    first.terminate().await?;
    first.end().await?.succeeded()?;
    all_acknowledged(nats.1, 10).await?;

    // Stored while no worker runs.
    producer(nats, &["3"]).await?;
    let mut second = Example::start(PULL_CONSUMER, &["worker"], nats)?;
    second.prints("shipment-3 (message 13, delivery 1)").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    ensure!(!second.stdout.contains("(message 10"), "{}", second.stdout);
    second.printed_what_the_book_shows("resumed")?;
    all_acknowledged(nats.1, 13).await
}

/// The control: a worker that takes messages and does not acknowledge them, as
/// one that is killed. They come again; acknowledged, they would not.
#[tokio::test]
async fn control_what_is_not_acknowledged_comes_again() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats, &[]).await?;
    let consumer = durable(nats.1).await?;
    let mut taken = consumer.fetch().max_messages(3).messages().await?;
    for number in 1..=3 {
        let message = taken.next().await.context("no message")?;
        let message = message.map_err(anyhow::Error::from_boxed)?;
        assert_eq!(message.payload, format!("shipment-{number}").as_bytes());
    }

    let mut worker = Example::start(PULL_CONSUMER, &["worker"], nats)?;
    worker.prints("shipment-3 (message 3, delivery 2)").await?;
    worker.interrupt().await?;
    let worker = worker.end().await?.succeeded()?;
    worker.printed_what_the_book_shows("not-acknowledged")?;
    all_acknowledged(nats.1, 10).await
}

#[tokio::test]
async fn a_counting_worker_acknowledges_each_message_and_ends() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats, &["1500", "64"]).await?;
    let worker = Example::start(PULL_CONSUMER, &["worker", "1500"], nats)?;
    let worker = worker.end().await?.succeeded()?;

    // Without waiting: what it counts as consumed, the server has.
    let info = durable(nats.1).await?.get_info().await?;
    assert_eq!((info.num_pending, info.num_ack_pending), (0, 0));
    assert_eq!(info.ack_floor.consumer_sequence, 1500);

    let last = worker.stdout.lines().last().context("no line")?;
    let figures = last
        .strip_prefix("consumed: 1500 messages of 64 B in ")
        .and_then(|rest| rest.strip_suffix(" msg/s)"))
        .with_context(|| last.to_owned())?;
    let (seconds, rate) = figures.split_once(" s (").context("two figures")?;
    let decimals = seconds.split_once('.').context("a point")?.1;
    assert_eq!(decimals.len(), 3, "{last}");
    let (seconds, rate): (f64, u64) = (seconds.parse()?, rate.parse()?);
    // Of figures that are rounded: within half a millisecond.
    let product = rate as f64 * seconds;
    let half = rate as f64 * 0.0005 + seconds;
    ensure!((product - 1500.0).abs() <= half, "{last}");
    Ok(())
}

#[tokio::test]
async fn a_consumer_with_another_configuration_is_left_as_it_is() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream
        .create_stream(async_nats::jetstream::stream::Config {
            name: STREAM.into(),
            subjects: vec![SUBJECT.into()],
            ..Default::default()
        })
        .await?;
    let other = pull::Config {
        durable_name: Some(DURABLE.into()),
        max_deliver: 7,
        ack_policy: consumer::AckPolicy::Explicit,
        ..Default::default()
    };
    stream.create_consumer(other).await?;
    let ended = Example::start(PULL_CONSUMER, &["worker"], nats)?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("delete it first"), "{line}");
    let kept = durable(nats.1).await?.get_info().await?.config;
    assert_eq!(kept.max_deliver, 7);
    // For the next one who runs it.
    observe::nats::forget_stream(nats.1, STREAM).await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_status_2() -> Result<()> {
    for words in [&["consumer"][..], &["worker", "0"], &["producer", "3", "x"]] {
        let nowhere = ("NATS_URL", "nats://localhost:1");
        let ended = Example::start(PULL_CONSUMER, words, nowhere)?.end().await?;
        assert_eq!(ended.status.code(), Some(2));
        assert!(
            ended
                .stderr
                .starts_with("usage: nats_jetstream_pull_consumer")
        );
    }
    Ok(())
}
