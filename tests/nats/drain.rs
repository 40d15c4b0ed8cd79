//! Whoever leaves a queue group works off what it has received; without the
//! drain, that is lost.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, Subscriber};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const DRAIN_SHUTDOWN: &str = env!("CARGO_BIN_EXE_nats_drain_shutdown");
const SUBJECT: &str = "shipments.label";
const PRINTED: &str = "shipments.labelled";
const BURST: u64 = 100;

/// The queue group belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// What an example has printed on its line `stopped: received A, printed B`.
fn received_and_printed(stdout: &str) -> Result<(u64, u64)> {
    let (_, counts) = stdout.split_once("stopped: received ").context("no end")?;
    let (received, printed) =
        counts.trim().split_once(", printed ").context("counts")?;
    Ok((received.parse()?, printed.parse()?))
}

/// The next labels, until this many different ones have been seen.
async fn labels(
    printed: &mut Subscriber,
    wanted: usize,
) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    while seen.len() < wanted {
        let label = timeout(DEADLINE, printed.next())
            .await
            .with_context(|| format!("{} of {wanted} labels", seen.len()))?
            .context("the subscription ended")?;
        seen.insert(String::from_utf8(label.payload.to_vec())?);
    }
    Ok(seen)
}

/// Labels that have all reached the only member, which has begun to print them.
async fn burst(observer: &Client, printed: &mut Subscriber) -> Result<()> {
    for number in 0..BURST {
        let label = format!("label {number}");
        observer.publish(SUBJECT, label.into()).await?;
    }
    observe::nats::round_trip(observer).await?;
    labels(printed, 1).await?;
    Ok(())
}

#[tokio::test]
async fn the_story_answers_every_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut printed = observe::nats::subscribe(&observer, PRINTED).await?;
    let ended = Example::start(DRAIN_SHUTDOWN, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;
    // More fails after the deadline, fewer at once.
    labels(&mut printed, 500).await?;
    Ok(())
}

#[tokio::test]
async fn a_rolling_restart_by_sigterm_loses_no_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut printed = observe::nats::subscribe(&observer, PRINTED).await?;
    let start = async || {
        let mut worker = Example::start(DRAIN_SHUTDOWN, &["worker"], nats)?;
        worker.prints("waiting for labels").await?;
        Ok::<_, anyhow::Error>(worker)
    };
    let members = [start().await?, start().await?];
    let publisher = Example::start(DRAIN_SHUTDOWN, &["publisher"], nats)?;
    let mut seen = BTreeSet::new();
    let mut replacements = Vec::new();
    for member in members {
        replacements.push(start().await?);
        // The load is on: labels are being printed while the member leaves.
        seen.extend(labels(&mut printed, 100).await?);
        member.terminate().await?;
        let stopped = member.end().await?.succeeded()?;
        ensure!(
            received_and_printed(&stopped.stdout)?.1 > 0,
            "no part in it"
        );
    }
    publisher.end().await?.succeeded()?;
    for member in replacements {
        member.terminate().await?;
        let stopped = member.end().await?.succeeded()?;
        ensure!(
            received_and_printed(&stopped.stdout)?.1 > 0,
            "no part in it"
        );
    }
    while seen.len() < 1000 {
        seen.extend(labels(&mut printed, 1).await.with_context(|| {
            format!("{} of 1000 labels were printed", seen.len())
        })?);
    }
    Ok(())
}

#[tokio::test]
async fn what_a_stopped_member_has_received_is_printed() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut printed = observe::nats::subscribe(&observer, PRINTED).await?;
    let mut worker = Example::start(DRAIN_SHUTDOWN, &["worker"], nats)?;
    worker.prints("waiting for labels").await?;
    burst(&observer, &mut printed).await?;
    worker.terminate().await?;
    labels(&mut printed, BURST as usize - 1).await?;
    let stopped = worker.end().await?.succeeded()?;
    let counts = received_and_printed(&stopped.stdout)?;
    assert_eq!(counts, (BURST, BURST));
    Ok(())
}

/// The control: the same burst, and a member that only stops.
#[tokio::test]
async fn control_without_drain_a_stopped_member_loses_labels() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut printed = observe::nats::subscribe(&observer, PRINTED).await?;
    let arguments = ["worker", "--no-drain"];
    let mut worker = Example::start(DRAIN_SHUTDOWN, &arguments, nats)?;
    worker.prints("waiting for labels").await?;
    burst(&observer, &mut printed).await?;
    worker.terminate().await?;
    let stopped = worker.end().await?.succeeded()?;
    let (received, done) = received_and_printed(&stopped.stdout)?;
    assert_eq!(received, BURST);
    ensure!(done < received, "nothing was lost: {}", stopped.stdout);

    // And no other member gets them: the server has forgotten them.
    let mut next = Example::start(DRAIN_SHUTDOWN, &["worker"], nats)?;
    next.prints("waiting for labels").await?;
    next.terminate().await?;
    let next = next.end().await?.succeeded()?;
    assert_eq!(received_and_printed(&next.stdout)?, (0, 0));
    let recorded = tests::example::Ended {
        stdout: stopped
            .stdout
            .replace(&format!("printed {done}"), "printed <n>"),
        ..stopped
    };
    recorded.printed_what_the_book_shows("no-drain")
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(DRAIN_SHUTDOWN, &["printer"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_drain_shutdown"));
    Ok(())
}
