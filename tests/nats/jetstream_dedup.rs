//! The stream stores a message id once, for as long as it remembers it.

use anyhow::{Context as _, Result};
use async_nats::jetstream::message::PublishMessage;
use tests::{Example, TestBroker, observe};
use tokio::sync::Mutex;

use crate::nats;

const DEDUP: &str = env!("CARGO_BIN_EXE_nats_jetstream_dedup");
const STREAM: &str = "PAYMENT_REQUESTS";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_payment_is_stored_once_within_the_window() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(DEDUP, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    // Of seven or more attempts: one, two without an id, one after the window.
    assert_eq!(stream.info().await?.state.messages, 4);
    let payments = [
        (1, "payment-17"),
        (2, "payment-18"),
        (3, "payment-18"),
        (4, "payment-17"),
    ];
    for (sequence, payment) in payments {
        let message = stream.get_raw_message(sequence).await?;
        assert_eq!(&message.payload[..], payment.as_bytes());
        let id = message.headers.get("Nats-Msg-Id");
        let id = id.map(|id| id.as_str());
        assert_eq!(id, (payment == "payment-17").then_some(payment));
    }
    Ok(())
}

/// What the page says of a server that is killed: it reads the ids from the
/// stored messages again.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_still_knows_the_ids() -> Result<()> {
    let mut nats = TestBroker::start(lab::broker::Broker::Nats).await?;
    let address = nats.address().to_owned();
    let jetstream = observe::nats::jetstream(&address).await?;
    jetstream
        .create_stream(async_nats::jetstream::stream::Config {
            name: STREAM.to_owned(),
            subjects: vec!["payment.requests".to_owned()],
            ..Default::default()
        })
        .await?;
    let message = || {
        PublishMessage::build()
            .payload("payment-17".into())
            .message_id("payment-17")
    };
    let first = jetstream
        .send_publish("payment.requests", message())
        .await?;
    assert!(!first.await?.duplicate);

    nats.kill().await?;
    nats.restart().await?;

    let jetstream = observe::nats::jetstream(&address).await?;
    let again = jetstream
        .send_publish("payment.requests", message())
        .await?;
    assert!(again.await.context("no answer")?.duplicate);
    Ok(())
}
