//! What is purged or deleted is gone, and nothing else is.

use anyhow::Result;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const INSPECT: &str = env!("CARGO_BIN_EXE_nats_jetstream_inspect");

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_purge_with_a_filter_keeps_the_other_subjects() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(INSPECT, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream("INSPECTED").await?;
    let mut left = Vec::new();
    for sequence in 1..=6 {
        if let Ok(message) = stream.get_raw_message(sequence).await {
            left.push((sequence, message.subject.to_string()));
        }
    }
    let expected = [
        (2, "inspected.us".to_owned()),
        (5, "inspected.eu".to_owned()),
        (6, "inspected.eu".to_owned()),
    ];
    assert_eq!(left, expected);
    Ok(())
}
