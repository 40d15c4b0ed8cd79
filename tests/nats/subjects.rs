//! A pattern gets what it matches and nothing else, and one loop reads several
//! subjects to the end of each.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use async_nats::{ConnectOptions, Event, Subscriber};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait::DEADLINE};
use tokio::{
    sync::{Mutex, mpsc},
    task::unconstrained,
    time::timeout,
};

use crate::nats;

const WILDCARDS: &str = env!("CARGO_BIN_EXE_nats_wildcards");
const MULTIPLE: &str = env!("CARGO_BIN_EXE_nats_multiple_subscriptions");

/// An example of another test would publish into the observer's subscription.
static WILDCARDS_TURN: Mutex<()> = Mutex::const_new(());
static MULTIPLE_TURN: Mutex<()> = Mutex::const_new(());

/// What has been delivered: call it after a round trip.
async fn delivered(seen: &mut Subscriber) -> Vec<(String, String)> {
    let mut messages = Vec::new();
    // Tokio makes a task pause after some messages, as if there were none left.
    while let Some(Some(message)) = poll_once(unconstrained(seen.next())).await {
        let text = String::from_utf8_lossy(&message.payload).into_owned();
        messages.push((message.subject.to_string(), text));
    }
    messages
}

/// The rule, written down a second time.
fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for part in pattern.split('.') {
        let Some(token) = tokens.next() else {
            return false;
        };
        match part {
            ">" => return true,
            "*" => {}
            part if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// The published subjects come from the observer, the receipts from the example,
/// and what they should be from the rule.
#[tokio::test]
async fn each_pattern_gets_what_it_matches() -> Result<()> {
    let _turn = WILDCARDS_TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut root = observe::nats::subscribe(&observer, "orders_in").await?;
    let mut below = observe::nats::subscribe(&observer, "orders_in.>").await?;

    let ended = Example::start(WILDCARDS, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let mut published = delivered(&mut root).await;
    published.extend(delivered(&mut below).await);
    assert_eq!(published.len(), 6, "{published:?}");
    let receipts = ended.stdout.lines().filter_map(|line| {
        let (pattern, got) = line.split_once(" gets ")?;
        Some((pattern.trim(), got))
    });
    let mut cells = 0;
    for (pattern, got) in receipts {
        let got: Vec<&str> = got.split(", ").collect();
        for (subject, _) in &published {
            let short = subject.strip_prefix("orders_in.").unwrap_or("(itself)");
            // A `>` that is not the last token is no pattern to the server.
            let expected =
                pattern != "orders_in.>.placed" && matches(pattern, subject);
            let times = got.iter().filter(|got| **got == short).count();
            assert_eq!(times, usize::from(expected), "{pattern} and {subject}");
            cells += 1;
        }
    }
    assert_eq!(cells, 8 * 6);
    Ok(())
}

/// Why the last pattern of the example stays empty without an error.
#[tokio::test]
async fn a_pattern_that_the_server_refuses_is_an_event_only() -> Result<()> {
    let (sender, mut events) = mpsc::unbounded_channel();
    let client = ConnectOptions::new()
        .event_callback(move |event| {
            // Nobody listens any more when the test has ended.
            let _ = sender.send(event);
            std::future::ready(())
        })
        .connect(nats().await?.1)
        .await?;
    let mut refused = client.subscribe("orders_in.>.placed").await?;
    let said = async {
        loop {
            if let Event::ServerError(error) =
                events.recv().await.context("closed")?
            {
                break Ok::<_, anyhow::Error>(error.to_string());
            }
        }
    };
    let said = timeout(DEADLINE, said).await??;
    ensure!(said.to_lowercase().contains("invalid subject"), "{said}");
    let nothing = poll_once(refused.next()).await;
    assert!(nothing.is_none(), "the stream neither ended nor failed");
    Ok(())
}

/// The observer says what was published where; of that, the example has all on
/// its three subjects but the car after the last, and nothing of the fourth.
#[tokio::test]
async fn one_loop_reads_three_subjects_and_outlives_the_end_of_one() -> Result<()> {
    let _turn = MULTIPLE_TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut courier = observe::nats::subscribe(&observer, "courier.>").await?;

    let ended = Example::start(MULTIPLE, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let mut by_subject: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (subject, parcel) in delivered(&mut courier).await {
        by_subject.entry(subject).or_default().push(parcel);
    }
    let drones = by_subject.remove("courier.drones");
    assert_eq!(drones, Some(vec!["parcel 4".to_owned()]));
    let cars = by_subject.get_mut("courier.cars").context("no cars")?;
    assert_eq!(cars.pop().as_deref(), Some("parcel 7"));
    let expected: Vec<String> = by_subject
        .iter()
        .map(|(subject, parcels)| {
            format!("{subject:<14} brought {}", parcels.join(", "))
        })
        .collect();
    let brought: Vec<&str> = ended
        .stdout
        .lines()
        .filter(|line| line.contains(" brought "))
        .collect();
    assert_eq!(brought, expected);
    Ok(())
}
