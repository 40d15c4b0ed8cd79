//! Each order goes to one packer of the group, wherever its members are.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use async_nats::Subscriber;
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe};
use tokio::{sync::Mutex, task::unconstrained};

use crate::nats;

const QUEUE_GROUPS: &str = env!("CARGO_BIN_EXE_nats_queue_groups");
const SUBJECT: &str = "packers.orders";
const ORDERS: usize = 200;

/// A member of another test would take its share.
static TURN: Mutex<()> = Mutex::const_new(());

/// What has been delivered: call it after a round trip.
async fn delivered(seen: &mut Subscriber) -> Vec<String> {
    let mut orders = Vec::new();
    // Tokio makes a task pause after some messages, as if there were none left.
    while let Some(Some(message)) = poll_once(unconstrained(seen.next())).await {
        orders.push(String::from_utf8_lossy(&message.payload).into_owned());
    }
    orders
}

/// The number in the line that begins with this label.
fn number(stdout: &str, label: &str) -> Result<usize> {
    let line = stdout
        .lines()
        .find_map(|line| line.strip_prefix(label))
        .with_context(|| format!("no {label:?} in {stdout}"))?;
    let word = line.split_whitespace().next().context("no number")?;
    Ok(word.parse()?)
}

#[tokio::test]
async fn two_packers_share_the_orders_and_the_audit_sees_all() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(QUEUE_GROUPS, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;
    let a = number(&ended.stdout, "packer a:")?;
    let b = number(&ended.stdout, "packer b:")?;
    assert_eq!(a + b, ORDERS);
    // At random: that one of two gets none of 200 does not happen.
    ensure!(a > 0 && b > 0, "{a} and {b}");
    Ok(())
}

/// A third member on another connection takes a share, which the two in the
/// example then do not have; a plain subscriber takes nothing away.
#[tokio::test]
async fn a_member_elsewhere_takes_its_share_and_a_listener_none() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut listener = observer.subscribe(SUBJECT).await?;
    let mut member = observer.queue_subscribe(SUBJECT, "packers".into()).await?;
    observe::nats::round_trip(&observer).await?;

    let ended = Example::start(QUEUE_GROUPS, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    observe::nats::round_trip(&observer).await?;
    let shared = delivered(&mut member).await;
    let all = delivered(&mut listener).await;

    let packed = number(&ended.stdout, "packed:")?;
    ensure!(!shared.is_empty() && packed > 0, "{packed}, {shared:?}");
    assert_eq!(packed + shared.len(), ORDERS);
    assert_eq!(all.len(), ORDERS);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), ORDERS);
    Ok(())
}

/// The control: without the group, each order is packed twice.
#[tokio::test]
async fn control_plain_subscribers_each_get_every_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(QUEUE_GROUPS, &["plain"], nats)?
        .end()
        .await?;
    let ended = ended.succeeded()?;
    assert_eq!(number(&ended.stdout, "packer a:")?, ORDERS);
    assert_eq!(number(&ended.stdout, "packer b:")?, ORDERS);
    ensure!(ended.stdout.contains("0 orders once, 200 twice"));
    ended.printed_what_the_book_shows("plain")
}
