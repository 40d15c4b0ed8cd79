//! Every subscriber that is there gets the message; one that is late gets none.

use anyhow::{Context as _, Result};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::{PUBSUB, nats};

const SUBJECT: &str = "my.subject";

/// The subject belongs to the example, and core NATS has no queue to clear.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn every_subscriber_gets_the_message() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, SUBJECT).await?;

    let ended = Example::start(PUBSUB, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let message = timeout(DEADLINE, seen.next())
        .await?
        .context("no message")?;
    assert_eq!(&message.payload[..], b"Hello NATS!");
    Ok(())
}

/// The control: what the lesson's order is for.
#[tokio::test]
async fn control_a_late_subscriber_gets_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    Example::start(PUBSUB, &[], nats)?
        .end()
        .await?
        .succeeded()?;

    let late = observe::nats::connect(nats.1).await?;
    // Returns after whatever the server had for this subscription.
    let mut seen = observe::nats::subscribe(&late, SUBJECT).await?;
    let nothing = poll_once(seen.next()).await;
    assert!(nothing.is_none(), "a message from the past: {nothing:?}");
    Ok(())
}
