//! A watcher knows what is there, hears of each change, and of those too that
//! were made while it had no connection.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{self, kv};
use futures_lite::{StreamExt as _, future::poll_once};
use lab::broker::Broker;
use tests::{
    Example, TestBroker, observe,
    wait::{self, DEADLINE},
};
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};

use crate::nats;

const WATCH: &str = env!("CARGO_BIN_EXE_nats_kv_watch");
const STREAM: &str = "KV_shop_flags";

/// The bucket belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_watcher_gets_what_is_there_and_then_each_change() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(WATCH, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    Ok(())
}

/// What an observer writes, a watcher in another process shows.
#[tokio::test]
async fn a_watcher_shows_what_others_write_and_stops_when_asked() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    let mut watcher = Example::start(WATCH, &["watcher"], nats)?;
    watcher.prints("watching shop_flags").await?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let flags = jetstream.get_key_value("shop_flags").await?;
    flags.put("dark-mode", "on".into()).await?;
    flags.purge("dark-mode").await?;
    watcher.prints("dark-mode = on").await?;
    watcher
        .prints("dark-mode is off, its key was purged")
        .await?;
    watcher.terminate().await?;
    watcher.end().await?.succeeded()?;

    // A watcher that comes later is told of the purge: the marker is what is
    // there now.
    let mut later = Example::start(WATCH, &["watcher"], nats)?;
    later.prints("dark-mode is off, its key was purged").await?;
    later.interrupt().await?;
    later.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_skips_no_change_and_repeats_none() -> Result<()> {
    let mut server = TestBroker::start(Broker::Nats).await?;
    let address = server.address().to_owned();
    let mut watcher = Example::start(WATCH, &["watcher"], ("NATS_URL", &address))?;
    watcher.prints("watching shop_flags").await?;
    let mut written = Vec::new();
    let jetstream = observe::nats::jetstream(&address).await?;
    write(&jetstream, &mut written, 3).await?;
    watcher.prints("dark-mode = 3").await?;

    // Until a change has been made while the watcher was away: it may be quick
    // and be back before our first write.
    wait::until("a change without a watcher", async || {
        server.kill().await?;
        // A part of the fault: the longer the server is away, the longer the
        // client waits between two attempts.
        sleep(Duration::from_secs(1)).await;
        server.restart().await?;
        let jetstream = observe::nats::jetstream(&address).await?;
        write(&jetstream, &mut written, 1).await?;
        let stream = jetstream.get_stream(STREAM).await?;
        // The consumer of a watch is on the server's disk and outlives it; it is
        // bound when the watcher is there too.
        let mut consumers = stream.consumers();
        let mut bound = 0;
        while let Some(consumer) = consumers.next().await {
            bound += u32::from(consumer?.push_bound);
        }
        write(&jetstream, &mut written, 5).await?;
        let last = written.len();
        watcher.prints(&format!("dark-mode = {last}")).await?;
        ensure!(bound == 0, "the watcher was back already");
        Ok(())
    })
    .await?;

    watcher.interrupt().await?;
    let ended = watcher.end().await?;
    let seen: Vec<_> = ended
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("flag:    dark-mode = "))
        .collect();
    assert_eq!(seen, written, "stderr: {}", ended.stderr);
    Ok(())
}

/// Writes the next numbers and keeps what was acknowledged.
async fn write(
    jetstream: &jetstream::Context,
    written: &mut Vec<String>,
    count: usize,
) -> Result<()> {
    let flags = jetstream.get_key_value("shop_flags").await?;
    for _ in 0..count {
        let value = (written.len() + 1).to_string();
        flags.put("dark-mode", value.clone().into()).await?;
        written.push(value);
    }
    Ok(())
}

/// The control: `watch`, the call that looks right, does not say what is there.
#[tokio::test]
async fn control_a_watch_without_history_does_not_know_what_is_there() -> Result<()>
{
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let flags = jetstream
        .create_key_value(kv::Config {
            bucket: "control_watch".to_owned(),
            ..kv::Config::default()
        })
        .await?;
    flags.put("dark-mode", "on".into()).await?;

    let mut changes = flags.watch("dark-mode").await?;
    let mut all = flags.watch_with_history("dark-mode").await?;
    assert_eq!(next(&mut all).await?, "on");
    flags.put("dark-mode", "off".into()).await?;
    assert_eq!(next(&mut all).await?, "off");
    assert_eq!(next(&mut changes).await?, "off");
    assert!(poll_once(changes.next()).await.is_none());
    Ok(())
}

async fn next(watch: &mut kv::Watch) -> Result<String> {
    let entry = timeout(DEADLINE, watch.next())
        .await?
        .context("the watch has ended")??;
    Ok(String::from_utf8_lossy(&entry.value).into_owned())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(WATCH, &["writer"], nowhere)?.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_kv_watch"));
    Ok(())
}
