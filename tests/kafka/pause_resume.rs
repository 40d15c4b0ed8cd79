//! A member that works beside its loop stays one for longer than it may go without a
//! poll; one that works in it does not, and gets its work again.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::{Example, observe, wait};
use tokio::time::sleep;

use crate::kafka;

const PAUSE: &str = env!("CARGO_BIN_EXE_kafka_pause_resume");
const TOPIC: &str = "pause.pickings";
const GROUP: &str = "pause-beside";

#[tokio::test]
async fn a_paused_member_stays_and_gets_each_picking_once() -> Result<()> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    for _run in 0..2 {
        let running = Example::start(PAUSE, &[], kafka)?;
        let members = async || observe::kafka::members(kafka.1, GROUP).await;
        wait::until("the member that pauses", async || {
            ensure!(members().await? == 1, "it has not joined");
            Ok(())
        })
        .await?;
        // The warehouse is closed for eight seconds, and a member may be silent for
        // six.
        let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
        sleep(Duration::from_millis(6500)).await;
        assert_eq!(members().await?, 1);
        let later = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
        assert_eq!(later, committed);

        let ended = running.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
        for group in [GROUP, "pause-unpaused"] {
            let lag = observe::kafka::lag(kafka.1, TOPIC, 2, group).await?;
            assert_eq!(lag, 0, "{group}");
        }
    }
    Ok(())
}
