//! Headers arrive as they were sent, a payload that cannot be read is not lost,
//! and an old reader reads a newer message.

use anyhow::{Context as _, Result, ensure};
use async_nats::{HeaderMap, HeaderValue, Message, Subscriber};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe};
use tokio::{sync::Mutex, task::unconstrained};

use crate::nats;

const HEADERS: &str = env!("CARGO_BIN_EXE_nats_headers");
const JSON: &str = env!("CARGO_BIN_EXE_nats_json");
const PROTOBUF: &str = env!("CARGO_BIN_EXE_nats_protobuf");

/// What one test publishes, the example of another would read.
static HEADERS_TURN: Mutex<()> = Mutex::const_new(());
static JSON_TURN: Mutex<()> = Mutex::const_new(());
static PROTOBUF_TURN: Mutex<()> = Mutex::const_new(());

/// What has been delivered: call it after a round trip.
async fn delivered(seen: &mut Subscriber) -> Vec<Message> {
    let mut messages = Vec::new();
    // Tokio makes a task pause after some messages, as if there were none left.
    while let Some(Some(message)) = poll_once(unconstrained(seen.next())).await {
        messages.push(message);
    }
    messages
}

fn all<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers.get_all(name).map(HeaderValue::as_str).collect()
}

#[tokio::test]
async fn both_values_of_a_header_arrive_in_their_order() -> Result<()> {
    let _turn = HEADERS_TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, "headers.orders").await?;

    let ended = Example::start(HEADERS, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let messages = delivered(&mut seen).await;
    assert_eq!(messages.len(), 2);
    for message in messages {
        let headers = message.headers.context("no headers")?;
        assert_eq!(all(&headers, "Hop"), ["web", "checkout"]);
        assert_eq!(all(&headers, "Order-Key"), ["key-1"]);
        ensure!(headers.get("order-key").is_none(), "{headers:?}");
        // The refused key would have brought a third.
        assert_eq!(headers.len(), 2, "{headers:?}");
    }
    Ok(())
}

/// The control: a line break in a value ends a program that does not parse it.
#[tokio::test]
async fn control_a_line_break_in_a_value_panics_unparsed() -> Result<()> {
    let unparsed = std::panic::catch_unwind(|| {
        HeaderMap::new().insert("Order-Key", "key-1\r\nHop: nowhere");
    });
    ensure!(unparsed.is_err(), "it was taken");
    ensure!("key-1\r\nHop: nowhere".parse::<HeaderValue>().is_err());
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_read_is_put_aside_as_it_came() -> Result<()> {
    let _turn = JSON_TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut orders = observe::nats::subscribe(&observer, "json.orders").await?;
    let mut aside =
        observe::nats::subscribe(&observer, "json.orders.unreadable").await?;

    let ended = Example::start(JSON, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let published = delivered(&mut orders).await;
    let aside = delivered(&mut aside).await;
    let done = ended.stdout.matches("\norder ").count();
    assert_eq!((published.len(), done, aside.len()), (5, 3, 2));
    // The second and the fourth, byte for byte, each with its reason.
    assert_eq!(aside[0].payload, published[1].payload);
    assert_eq!(aside[1].payload, published[3].payload);
    for (message, part) in aside.iter().zip(["EOF", "missing field"]) {
        let headers = message.headers.as_ref().context("no headers")?;
        let reason = headers.get("Reason").context("no reason")?.as_str();
        ensure!(reason.contains(part), "{reason}");
    }
    Ok(())
}

/// The bytes are compared with the encoding's definition, not with prost.
#[tokio::test]
async fn an_old_reader_reads_a_newer_message() -> Result<()> {
    let _turn = PROTOBUF_TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, "protobuf.orders").await?;

    let ended = Example::start(PROTOBUF, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let sent: Vec<(String, Vec<u8>)> = delivered(&mut seen)
        .await
        .into_iter()
        .map(|message| {
            let headers = message.headers.unwrap_or_default();
            let name = all(&headers, "Proto-Type").join(", ");
            (name, message.payload.to_vec())
        })
        .collect();
    // Number and kind of a field in one byte, then the value; a string has its
    // length before it.
    let expected: [(&str, &[u8]); 3] = [
        ("shop.Order", b"\x08\x07\x12\x04lamp\x1a\x07For Ada"),
        ("shop.Order", b"\x08\x08\x12\x05chair"),
        ("shop.Customer", b"\x08\x09\x12\x03Ada"),
    ];
    let expected = expected.map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
    assert_eq!(sent, expected);
    Ok(())
}
