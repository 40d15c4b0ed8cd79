//! A subscription keeps what it has room for, and whoever reads at once needs
//! little room.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const SLOW_CONSUMER: &str = env!("CARGO_BIN_EXE_nats_slow_consumer");
const SUBJECT: &str = "telemetry.temperature";
const READINGS: usize = 1000;

/// The subject belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// The busy half is the control of the reading one: same room, same load.
#[tokio::test]
async fn control_a_busy_subscriber_keeps_its_capacity_and_a_reading_one_all()
-> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, SUBJECT).await?;
    let ended = Example::start(SLOW_CONSUMER, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    let times: u64 = ended
        .stdout
        .split_once("slow consumer, ")
        .and_then(|(_, rest)| rest.split_once(" times"))
        .context("the event")?
        .0
        .parse()?;
    // Every dropped message is an event, as long as the client's own queue of
    // events has room: never more.
    ensure!((1..=500).contains(&times), "{times} events");

    // The server knows nothing of it: another subscriber got both halves whole.
    for number in 0..2 * READINGS {
        let reading = timeout(DEADLINE, seen.next())
            .await
            .with_context(|| format!("{number} readings"))?
            .context("the subscription ended")?;
        let (tick, sensor) = (number / 100 % 10, number % 100);
        assert_eq!(reading.payload, format!("{tick} {sensor}"));
    }
    let more = timeout(Duration::ZERO, seen.next()).await;
    ensure!(more.is_err(), "one more: {more:?}");
    Ok(())
}
