//! A mirror is its origin's copy, a stream with sources has what their filters let
//! through, and a deletion is not copied.

use anyhow::Result;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const MIRROR_SOURCE: &str = env!("CARGO_BIN_EXE_nats_jetstream_mirror_source");

/// The streams belong to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn copies_have_what_their_origins_had() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(MIRROR_SOURCE, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let copy = jetstream.get_stream("SHIPPED_EU_COPY").await?;
    for sequence in 1..=3 {
        let message = copy.get_raw_message(sequence).await?;
        assert_eq!(message.subject.as_str(), "shipped.eu.sent");
        let parcel = format!("parcel-{sequence}");
        assert_eq!(&message.payload[..], parcel.as_bytes());
    }
    let all = jetstream.get_stream("SHIPPED_ALL").await?;
    let mut parcels = Vec::new();
    for sequence in 1..=5 {
        let message = all.get_raw_message(sequence).await?;
        assert_ne!(message.subject.as_str(), "shipped.us.cancelled");
        parcels.push(String::from_utf8_lossy(&message.payload).into_owned());
    }
    parcels.sort();
    let expected = ["parcel-1", "parcel-2", "parcel-3", "parcel-4", "parcel-6"];
    assert_eq!(parcels, expected);
    let mut origin = jetstream.get_stream("SHIPPED_EU").await?;
    assert_eq!(origin.info().await?.state.messages, 0);
    Ok(())
}

/// What is published while nobody looks is copied too: the example is not what
/// does the copying.
#[tokio::test]
async fn the_server_copies_by_itself() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(MIRROR_SOURCE, &[], nats)?.end().await?;
    ended.succeeded()?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let published = jetstream
        .publish("shipped.eu.sent", "parcel-7".into())
        .await?;
    let sequence = published.await?.sequence;
    let copy = jetstream.get_stream("SHIPPED_EU_COPY").await?;
    tests::wait::until("the copy", async || {
        let message = copy.get_raw_message(sequence).await?;
        assert_eq!(&message.payload[..], b"parcel-7");
        Ok(())
    })
    .await
}
