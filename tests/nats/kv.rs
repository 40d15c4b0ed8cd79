//! A bucket keeps what its settings say, and no longer.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::{
    HeaderName,
    header::{NATS_MARKER_REASON, NATS_MESSAGE_TTL},
    jetstream::{
        kv::{self, Entry},
        message::StreamMessage,
        stream::{LastRawMessageErrorKind, RawMessageErrorKind},
    },
};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const KV: &str = env!("CARGO_BIN_EXE_nats_kv");
const KV_TTL: &str = env!("CARGO_BIN_EXE_nats_kv_ttl");

/// Each bucket belongs to its example.
static TURN: Mutex<()> = Mutex::const_new(());
static TTL_TURN: Mutex<()> = Mutex::const_new(());

// ---- nats_kv ---------------------------------------------------------------

#[tokio::test]
async fn a_bucket_keeps_the_history_it_was_made_for() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(KV, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;

        // Not a bucket here, but the stream under it, message by message.
        let jetstream = observe::nats::jetstream(nats.1).await?;
        let stream = jetstream.get_stream("KV_shop_prices").await?;
        let mut kept = Vec::new();
        for revision in 1..=8 {
            match stream.get_raw_message(revision).await {
                Ok(message) => kept.push(shown(&message)),
                Err(error) => ensure!(
                    error.kind() == RawMessageErrorKind::NoMessageFound,
                    "{error}"
                ),
            }
        }
        assert_eq!(
            kept,
            [
                "4 $KV.shop_prices.tea 3.20 ",
                "5 $KV.shop_prices.tea 3.40 ",
                "6 $KV.shop_prices.tea  DEL",
                "7 $KV.shop_prices.coffee  PURGE",
            ]
        );
    }
    Ok(())
}

/// The control: without `history`, the value before the last is gone.
#[tokio::test]
async fn control_by_default_a_bucket_has_no_history() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let bucket = jetstream
        .create_key_value(kv::Config {
            bucket: "control_history".to_owned(),
            ..kv::Config::default()
        })
        .await?;
    bucket.put("tea", "3.20".into()).await?;
    bucket.put("tea", "3.40".into()).await?;
    let history: Vec<Entry> = bucket.history("tea").await?.try_collect().await?;
    let values: Vec<_> = history.iter().map(|entry| &entry.value[..]).collect();
    assert_eq!(values, [b"3.40"]);
    Ok(())
}

fn shown(message: &StreamMessage) -> String {
    let operation = message.headers.get("KV-Operation");
    format!(
        "{} {} {} {}",
        message.sequence,
        message.subject,
        String::from_utf8_lossy(&message.payload),
        operation.map(|value| value.as_str()).unwrap_or_default(),
    )
}

// ---- nats_kv_ttl -----------------------------------------------------------

const CART: &str = "$KV.shop_reservations.cart-17";

#[tokio::test]
async fn a_reservation_ends_by_itself_with_a_marker_and_a_session_without()
-> Result<()> {
    let _turn = TTL_TURN.lock().await;
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;

    let mut example = Example::start(KV_TTL, &[], nats)?;
    example.prints("session:  anna is gone").await?;
    let mut sessions = jetstream.get_stream("KV_shop_sessions").await?;
    assert_eq!(sessions.info().await?.state.messages, 0, "a marker is left");

    example.prints("reserved: cart-17").await?;
    let stream = jetstream.get_stream("KV_shop_reservations").await?;
    let stored = stream.get_last_raw_message_by_subject(CART).await?;
    assert_eq!(header(&stored, NATS_MESSAGE_TTL), Some("3"));

    // The marker is there for a second; this looks every 50 ms.
    wait::until("the marker", async || {
        let last = stream.get_last_raw_message_by_subject(CART).await?;
        let reason = header(&last, NATS_MARKER_REASON);
        ensure!(reason == Some("MaxAge"), "{last:?}");
        Ok(())
    })
    .await?;
    wait::until("the end of the marker", async || {
        match stream.get_last_raw_message_by_subject(CART).await {
            Err(error)
                if error.kind() == LastRawMessageErrorKind::NoMessageFound =>
            {
                Ok(())
            }
            other => anyhow::bail!("still there: {other:?}"),
        }
    })
    .await?;

    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    let seconds: f64 = ended
        .stdout
        .split_once("free:     cart-17, after ")
        .and_then(|(_, rest)| rest.split_once(" s"))
        .context("the last line")?
        .0
        .parse()?;
    ensure!(seconds >= 2.9, "a reservation of 3 s ended after {seconds}");
    Ok(())
}

/// A write without a time to live takes the old one away.
#[tokio::test]
async fn a_plain_put_makes_a_reservation_stay() -> Result<()> {
    let _turn = TTL_TURN.lock().await;
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;

    let mut example = Example::start(KV_TTL, &[], nats)?;
    example.prints("refused:  cart-17").await?;
    let bucket = jetstream.get_key_value("shop_reservations").await?;
    bucket.put("cart-17", "mine".into()).await?;

    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("cart-17 does not expire"), "{line}");
    ended.printed_what_the_book_shows("overwritten")?;
    assert_eq!(bucket.get("cart-17").await?.as_deref(), Some(&b"mine"[..]));

    // What it leaves behind does not stop the next run.
    Example::start(KV_TTL, &[], nats)?
        .end()
        .await?
        .succeeded()?;
    Ok(())
}

/// The control for the example's wait for the marker to be gone. When this
/// fails, the client has been mended, and the example can do without.
#[tokio::test]
async fn control_created_over_a_marker_a_key_has_no_time_to_live() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let bucket = jetstream
        .create_key_value(kv::Config {
            bucket: "control_marker".to_owned(),
            limit_markers: Some(Duration::from_secs(60)),
            ..kv::Config::default()
        })
        .await?;
    let stream = jetstream.get_stream("KV_control_marker").await?;
    let ttl = Duration::from_secs(120);

    bucket.purge_with_ttl("first", ttl).await?;
    bucket.purge_with_ttl("second", ttl).await?;
    stream.purge().filter("$KV.control_marker.first").await?;
    for (key, expected) in [("first", Some("120")), ("second", None)] {
        bucket.create_with_ttl(key, "mine".into(), ttl).await?;
        let subject = format!("$KV.control_marker.{key}");
        let stored = stream.get_last_raw_message_by_subject(&subject).await?;
        assert_eq!(header(&stored, NATS_MESSAGE_TTL), expected, "{key}");
    }
    jetstream.delete_key_value("control_marker").await?;
    Ok(())
}

fn header(message: &StreamMessage, name: HeaderName) -> Option<&str> {
    message.headers.get(name).map(|value| value.as_str())
}
