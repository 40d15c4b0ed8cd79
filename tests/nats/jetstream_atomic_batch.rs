//! A batch is stored as a whole or not at all.

use anyhow::Result;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const ATOMIC_BATCH: &str = env!("CARGO_BIN_EXE_nats_jetstream_atomic_batch");
const STREAM: &str = "BOOKINGS";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_committed_batch_is_stored_whole_and_in_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(ATOMIC_BATCH, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    let state = stream.info().await?.state.clone();
    // No gap: what was not committed has not even used a sequence.
    assert_eq!((state.messages, state.last_sequence), (3, 3));
    for (sequence, subject) in (1..).zip([
        "bookings.order",
        "bookings.ledger.sales",
        "bookings.ledger.customer",
    ]) {
        let message = stream.get_raw_message(sequence).await?;
        assert_eq!(message.subject.as_str(), subject);
    }
    Ok(())
}

#[tokio::test]
async fn a_program_that_dies_before_the_commit_leaves_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let mut example = Example::start(ATOMIC_BATCH, &[], nats)?;
    example.prints("without a commit").await?;
    example.kill().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    let stored = stream.info().await?.state.messages;
    // The program may have come as far as its second batch.
    assert!(stored == 0 || stored == 3, "{stored} messages");
    Ok(())
}
