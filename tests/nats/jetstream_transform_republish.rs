//! An order stays in its partition, and each stored message is echoed once.

use std::collections::BTreeMap;

use anyhow::{Context as _, Error, Result, bail, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{
    Example, observe,
    wait::{self, DEADLINE},
};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const TRANSFORM: &str = env!("CARGO_BIN_EXE_nats_jetstream_transform_republish");
const STREAM: &str = "TRANSFORMED";
const LIVE: &str = "transformed.live.>";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn each_order_has_one_partition_and_each_message_one_echo() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    for _run in 0..2 {
        let mut echoes = observe::nats::subscribe(&observer, LIVE).await?;
        let ended = Example::start(TRANSFORM, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        observe::nats::round_trip(&observer).await?;
        let mut count = 0;
        while let Some(Some(echo)) = poll_once(echoes.next()).await {
            count += 1;
            let headers = echo.headers.context("an echo without headers")?;
            let sequence = headers.get("Nats-Sequence").context("no sequence")?;
            assert_eq!(sequence.as_str(), count.to_string());
        }
        assert_eq!(count, 15);
    }

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let mut partitions: BTreeMap<String, String> = BTreeMap::new();
    for sequence in 1..=15 {
        let subject = stream.get_raw_message(sequence).await?.subject;
        let parts: Vec<&str> = subject.split('.').collect();
        let ["transformed", "part", partition, order] = parts[..] else {
            bail!("{subject} was not rewritten");
        };
        let first = partitions
            .entry(order.to_owned())
            .or_insert_with(|| partition.to_owned());
        assert_eq!(first, partition, "{order} has moved");
    }
    assert_eq!(partitions.len(), 5);

    // Each worker has acknowledged all of its partition.
    for partition in 0..3 {
        let name = format!("worker-{partition}");
        let mut consumer: PullConsumer = stream
            .get_consumer(&name)
            .await
            .map_err(Error::from_boxed)?;
        // An acknowledgement is on its way when the program has ended.
        wait::until("an idle consumer", async || {
            let info = consumer.info().await?;
            let open = (info.num_pending, info.num_ack_pending);
            ensure!(open == (0, 0), "{open:?} of {name} are open");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Many keys fill all partitions, and an echo that nobody waits for is gone while
/// its message stays.
#[tokio::test]
async fn keys_are_spread_and_a_late_subscriber_has_no_echo() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(TRANSFORM, &[], nats)?.end().await?;
    ended.succeeded()?;
    let observer = observe::nats::connect(nats.1).await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let mut counts = [0; 3];
    for order in 1..=90 {
        let subject = format!("transformed.raw.sku-{order}");
        let stored = jetstream.publish(subject, "placed".into()).await?.await?;
        let subject = stream.get_raw_message(stored.sequence).await?.subject;
        let partition = subject.split('.').nth(2).context("no partition")?;
        counts[partition.parse::<usize>()?] += 1;
    }
    // A third each would be 30; none at all would be a hash of a constant.
    ensure!(counts.iter().all(|count| *count > 10), "{counts:?}");

    let mut late = observe::nats::subscribe(&observer, LIVE).await?;
    ensure!(poll_once(late.next()).await.is_none(), "an old echo");
    let one_more = jetstream.publish("transformed.raw.sku-1", "paid".into());
    let stored = one_more.await?.await?;
    let echo = timeout(DEADLINE, late.next()).await?.context("no echo")?;
    let headers = echo.headers.context("an echo without headers")?;
    let header = |name: &str| headers.get(name).map(|text| text.as_str().to_owned());
    assert_eq!(header("Nats-Sequence"), Some(stored.sequence.to_string()));
    // So a subscriber knows what it has missed.
    let before = header("Nats-Last-Sequence").context("no last sequence")?;
    ensure!(before.parse::<u64>()? < stored.sequence);
    Ok(())
}
