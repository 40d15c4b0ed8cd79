//! A tap sees what is published and changes nothing, and the trace names who
//! would get a message without delivering it.

use anyhow::{Result, ensure};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe};
use tokio::{sync::Mutex, task::unconstrained};

use crate::nats;

const WIRETAP: &str = env!("CARGO_BIN_EXE_nats_wiretap");

/// The shop of another test would be in the tap.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_tap_sees_what_is_sent_and_the_trace_delivers_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(WIRETAP, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()
}

/// A second tap sees the same three and no fourth, so the traced message went to
/// nobody; and the trace names the second subscription, which it cannot know
/// from anywhere but the server.
#[tokio::test]
async fn the_trace_names_a_subscription_of_somebody_else() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, "checkout.*").await?;

    let ended = Example::start(WIRETAP, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ensure!(
        ended.stdout.contains("to the subscription checkout.*\n"),
        "{}",
        ended.stdout
    );
    ended.printed_what_the_book_shows("second-tap")?;

    observe::nats::round_trip(&observer).await?;
    let mut subjects = Vec::new();
    while let Some(Some(message)) = poll_once(unconstrained(seen.next())).await {
        subjects.push(message.subject.to_string());
    }
    assert_eq!(
        subjects,
        ["checkout.cart", "checkout.paid", "checkout.stock"]
    );
    Ok(())
}
