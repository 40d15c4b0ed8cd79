//! One writer has all the work, and another gets it when the first is gone.

use anyhow::Result;
use async_nats::jetstream::consumer::PullConsumer;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const PRIORITY_GROUPS: &str = env!("CARGO_BIN_EXE_nats_jetstream_priority_groups");
const STREAM: &str = "LEDGER";
const SUBJECT: &str = "ledger.entries";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// The names of the entries that this output calls written.
fn written(stdout: &str) -> Vec<&str> {
    let lines = stdout.lines();
    lines
        .filter_map(|line| line.strip_prefix("wrote: "))
        .collect()
}

#[tokio::test]
async fn the_second_writer_gets_nothing_until_the_first_is_gone() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(PRIORITY_GROUPS, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()
}

#[tokio::test]
async fn a_killed_writers_work_goes_to_the_other_in_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    let mut first = Example::start(PRIORITY_GROUPS, &["writer"], nats)?;
    first.prints("waiting for entries").await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let publish = async |numbers: std::ops::Range<u32>| -> Result<()> {
        for number in numbers {
            let entry = format!("entry {number}");
            jetstream.publish(SUBJECT, entry.into()).await?.await?;
        }
        Ok(())
    };
    publish(0..20).await?;
    first.prints("wrote: entry 19").await?;

    let mut second = Example::start(PRIORITY_GROUPS, &["writer"], nats)?;
    second.prints("waiting for entries").await?;
    publish(20..40).await?;
    first.prints("wrote: entry 39").await?;
    // The server's own word for who has the work.
    let stream = jetstream.get_stream(STREAM).await?;
    let mut consumer: PullConsumer = stream
        .get_consumer("ledger-writer")
        .await
        .map_err(anyhow::Error::from_boxed)?;
    let pinned = |info: &async_nats::jetstream::consumer::Info| {
        info.priority_groups
            .first()
            .and_then(|group| group.pinned_client_id.clone())
    };
    let before = pinned(consumer.info().await?);
    first.kill().await?;
    // Until then the server could still send to the one that is gone.
    wait::until("the server to know", async || {
        let waiting = consumer.get_info().await?.num_waiting;
        anyhow::ensure!(waiting == 1, "{waiting} writers ask");
        Ok(())
    })
    .await?;

    publish(40..60).await?;
    second.prints("wrote: entry 59").await?;
    second.terminate().await?;
    let second = second.end().await?.succeeded()?;
    let expected: Vec<_> =
        (40..60).map(|number| format!("entry {number}")).collect();
    assert_eq!(written(&second.stdout), expected);
    let info = consumer.info().await?;
    assert!(
        before.is_some() && pinned(info) != before,
        "the pin has moved"
    );
    assert_eq!(info.num_pending, 0);
    Ok(())
}

/// The control: without a priority group, two writers on one consumer share the
/// entries, and their order is nobody's.
#[tokio::test]
async fn control_without_a_group_both_writers_get_entries() -> Result<()> {
    use async_nats::jetstream::{consumer::pull, stream};
    use futures_lite::StreamExt as _;

    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, "UNPINNED").await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: "UNPINNED".to_owned(),
            subjects: vec!["unpinned".to_owned()],
            ..stream::Config::default()
        })
        .await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some("writer".to_owned()),
            ..pull::Config::default()
        })
        .await?;
    let one_each = consumer.stream().max_messages_per_batch(1);
    let mut first = one_each.messages().await?;
    let mut second = consumer
        .stream()
        .max_messages_per_batch(1)
        .messages()
        .await?;
    // Both have asked before there is anything to get.
    assert!(
        futures_lite::future::poll_once(first.next())
            .await
            .is_none()
    );
    assert!(
        futures_lite::future::poll_once(second.next())
            .await
            .is_none()
    );
    wait::until("both requests", async || {
        let waiting = consumer.get_info().await?.num_waiting;
        anyhow::ensure!(waiting == 2, "{waiting} requests");
        Ok(())
    })
    .await?;
    for entry in ["entry 0", "entry 1"] {
        jetstream.publish("unpinned", entry.into()).await?.await?;
    }
    for entries in [&mut first, &mut second] {
        let entry = tokio::time::timeout(wait::DEADLINE, entries.next()).await?;
        assert!(entry.is_some_and(|entry| entry.is_ok()));
    }
    Ok(())
}
