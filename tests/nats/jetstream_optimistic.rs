//! Of two writers who have read the same, one is refused, and no change is lost.

use anyhow::{Context as _, Result};
use async_nats::jetstream::{context::PublishErrorKind, message::PublishMessage};
use tests::{Example, observe};
use tokio::{sync::Mutex, task::JoinSet};

use crate::nats;

const OPTIMISTIC: &str = env!("CARGO_BIN_EXE_nats_jetstream_optimistic");
const STREAM: &str = "ACCOUNTS";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn both_payments_are_in_the_balance() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(OPTIMISTIC, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let last = stream.get_last_raw_message_by_subject("accounts.7").await?;
    assert_eq!(&last.payload[..], b"40");
    // The control, within the example: one of two payments is lost.
    let last = stream.get_last_raw_message_by_subject("accounts.8").await?;
    assert_eq!(&last.payload[..], b"70");
    Ok(())
}

/// The same with many writers at the same time: of each version there is one.
#[tokio::test]
async fn of_racing_writers_exactly_one_wins_each_version() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(OPTIMISTIC, &[], nats)?.end().await?;
    ended.succeeded()?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let before = stream.get_last_raw_message_by_subject("accounts.7").await?;

    let mut writers = JoinSet::new();
    for writer in 0..20 {
        let (jetstream, last) = (jetstream.clone(), before.sequence);
        writers.spawn(async move {
            let message = PublishMessage::build()
                .payload(format!("writer {writer}").into())
                .expected_last_subject_sequence(last);
            jetstream.send_publish("accounts.7", message).await?.await
        });
    }
    let mut won = Vec::new();
    while let Some(written) = writers.join_next().await {
        match written? {
            Ok(ack) => won.push(ack.sequence),
            Err(error) => {
                assert_eq!(error.kind(), PublishErrorKind::WrongLastSequence);
            }
        }
    }
    assert_eq!(won.len(), 1, "{won:?}");
    let after = stream.get_last_raw_message_by_subject("accounts.7").await?;
    assert_eq!(after.sequence, *won.first().context("no winner")?);
    Ok(())
}
