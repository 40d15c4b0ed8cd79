//! A full stream forgets its oldest message or refuses the newest, and only in
//! the second case does the publisher know.

use anyhow::Result;
use async_nats::jetstream::stream::DiscardPolicy;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const LIMITS: &str = env!("CARGO_BIN_EXE_nats_jetstream_limits");
const STREAM: &str = "READINGS";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn what_is_refused_is_told_and_what_is_accepted_is_there() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(LIMITS, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    let info = stream.info().await?;
    // The last of its streams: discard new, made larger, five accepted. No
    // sequence is used by a message that was refused.
    assert_eq!(info.config.discard, DiscardPolicy::New);
    assert_eq!(info.config.max_messages, 6);
    assert_eq!((info.state.messages, info.state.last_sequence), (5, 5));
    assert_eq!(info.state.consumer_count, 0, "its own consumers are gone");
    Ok(())
}
