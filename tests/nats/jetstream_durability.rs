//! Under killed servers core NATS loses messages, and JetStream none that it has
//! acknowledged.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::stream::Stream;
use tests::{
    Example,
    nats::{Server, Servers},
    observe, random, wait,
};
use tokio::time::sleep;

const DURABILITY: &str = env!("CARGO_BIN_EXE_nats_jetstream_durability");
const READINGS: usize = 1000;
const KILLS: usize = 6;

async fn server(sync_interval: &str) -> Result<Servers> {
    let [port] = Servers::ports()?;
    let config = format!("jetstream {{ {sync_interval} }}");
    let name = "shop";
    Servers::start(&[Server { name, config, port }], &[]).await
}

async fn stored(url: &str) -> Result<BTreeMap<String, usize>> {
    let jetstream = observe::nats::jetstream(url).await?;
    let mut stream: Stream = jetstream.get_stream("durable_readings").await?;
    let last = stream.info().await?.state.last_sequence;
    let mut stored = BTreeMap::new();
    for sequence in 1..=last {
        let message = stream.get_raw_message(sequence).await?;
        let id = message.headers.get("Nats-Msg-Id").context("no id")?;
        *stored.entry(id.to_string()).or_default() += 1;
    }
    Ok(stored)
}

/// The number before this word.
fn number_before(word: &str, text: &str) -> Result<usize> {
    let (before, _) = text.split_once(word).context(word.to_owned())?;
    let number = before.rsplit(' ').next().unwrap_or_default();
    Ok(number.parse()?)
}

/// Kills the server at random moments, each time while the publisher is at work.
async fn under_kills(servers: &mut Servers) -> Result<()> {
    let url = servers.url("shop")?;
    let mut random = random::seeded();
    let mut example = Example::start(DURABILITY, &[], ("NATS_URL", &url))?;
    example.prints("ready:").await?;
    for _kill in 0..KILLS {
        // How far the publisher gets in between is the random choice.
        let more = random.u64(5..100);
        let mut begin = None;
        wait::until("more readings", async || {
            let jetstream = observe::nats::jetstream(&url).await?;
            let mut stream = jetstream.get_stream("durable_readings").await?;
            let count = stream.info().await?.state.messages;
            let begin = *begin.get_or_insert(count);
            ensure!(count >= begin + more, "{count}");
            Ok(())
        })
        .await?;
        servers.kill("shop").await?;
        sleep(Duration::from_millis(random.u64(200..600))).await;
        servers.restart("shop").await?;
    }
    let ended = example.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    println!("{}", ended.stdout);

    let each_once = (0..READINGS).map(|n| (format!("reading-{n}"), 1)).collect();
    assert_eq!(stored(&url).await?, each_once);
    // What core NATS does with the same faults is the control.
    let lost = number_before(" lost\njetstream:", &ended.stdout)?;
    let received = number_before(" received", &ended.stdout)?;
    assert_eq!(lost + received, READINGS);
    ensure!(lost >= KILLS, "only {lost} are lost, in {KILLS} kills");
    let calm = ended.stdout.contains("without an answer: 0\n");
    ensure!(!calm, "no kill has met a publish");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn jetstream_loses_nothing_that_core_nats_loses() -> Result<()> {
    under_kills(&mut server("").await?).await
}

/// With a sync for each message. A kill of the process shows no difference: what
/// it has written is with the kernel, which lives on.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_for_each_message_holds_as_well() -> Result<()> {
    under_kills(&mut server("sync_interval: always").await?).await
}

/// Without a fault, nothing is lost on either way.
#[tokio::test]
async fn control_without_a_fault_core_nats_loses_nothing() -> Result<()> {
    let nats = crate::nats().await?;
    let ended = Example::start(DURABILITY, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;
    ensure!(
        ended.stdout.contains("1000 received, 0 lost"),
        "{}",
        ended.stdout
    );
    ensure!(
        ended.stdout.contains("without an answer: 0\n"),
        "{}",
        ended.stdout
    );
    Ok(())
}
