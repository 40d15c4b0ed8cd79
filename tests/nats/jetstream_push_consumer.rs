//! The boards of one deliver group share what the server pushes.

use anyhow::Result;
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const PUSH_CONSUMER: &str = env!("CARGO_BIN_EXE_nats_jetstream_push_consumer");

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_deliver_group_shares_the_messages() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    // The control: a plain subscriber of the deliver subject is in no group, so it
    // sees all that is pushed, and takes nothing away.
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen =
        observe::nats::subscribe(&observer, "prices.board.delivered").await?;

    let ended = Example::start(PUSH_CONSUMER, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    let mut prices = Vec::new();
    for _ in 0..20 {
        let message = timeout(DEADLINE, seen.next()).await?;
        let message = message.ok_or_else(|| anyhow::anyhow!("the end"))?;
        prices.push(String::from_utf8_lossy(&message.payload).parse::<u32>()?);
    }
    assert_eq!(prices, (1..=20).collect::<Vec<_>>());
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream("PRICE_BOARD").await?;
    let info = stream.consumer_info("boards").await?;
    assert_eq!((info.num_pending, info.num_ack_pending), (0, 0));
    assert_eq!(info.delivered.consumer_sequence, 20, "each was pushed once");
    Ok(())
}
