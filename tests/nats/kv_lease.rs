//! Never two leaders; a killed one is replaced; one that comes back is refused.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::kv::{Entry, Operation, Watch};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const LEASE: &str = env!("CARGO_BIN_EXE_nats_kv_lease");
const STREAM: &str = "KV_shop_scheduler";

/// The bucket belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// Who has written the report, from the server, oldest first.
async fn reports(address: &str) -> Result<Vec<String>> {
    let jetstream = observe::nats::jetstream(address).await?;
    let bucket = jetstream.get_key_value("shop_scheduler").await?;
    let mut history = bucket.history("report").await?;
    let mut reports = Vec::new();
    while let Some(entry) = history.next().await {
        reports.push(text(&entry?));
    }
    Ok(reports)
}

fn text(entry: &Entry) -> String {
    String::from_utf8_lossy(&entry.value).into_owned()
}

#[tokio::test]
async fn a_leader_that_was_replaced_cannot_write() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(LEASE, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;
    assert_eq!(reports(nats.1).await?, ["1 anna", "4 bert"]);
    Ok(())
}

/// The control: the same freeze, and a write without a look at the token.
#[tokio::test]
async fn control_without_a_fence_the_old_leader_overwrites_the_new_one() -> Result<()>
{
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(LEASE, &["unfenced"], nats)?.end().await?;
    ended.succeeded()?.printed_what_the_book_shows("unfenced")?;
    assert_eq!(reports(nats.1).await?, ["1 anna", "4 bert", "1 anna"]);
    Ok(())
}

#[tokio::test]
async fn a_killed_leader_is_replaced_in_time_and_there_are_never_two() -> Result<()>
{
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    let start = |name| Example::start(LEASE, &["candidate", name], nats);

    let mut anna = start("anna")?;
    anna.prints("leader:   anna").await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let bucket = jetstream.get_key_value("shop_scheduler").await?;
    let mut watch = bucket.watch_with_history("leader").await?;
    let mut bert = start("bert")?;
    timeout(DEADLINE, bert.prints("waits:    bert")).await??;
    let mut carl = start("carl")?;
    timeout(DEADLINE, carl.prints("waits:    carl")).await??;
    anna.kill().await?;

    let bert_leads = tokio::select! {
        leads = bert.prints("leader:") => leads.map(|_line| true)?,
        leads = carl.prints("leader:") => leads.map(|_line| false)?,
    };
    let (mut second, second_name, mut third, third_name) = if bert_leads {
        (bert, "bert", carl, "carl")
    } else {
        (carl, "carl", bert, "bert")
    };

    // By the server's clock: from the last sign of anna to the first of another.
    let (last_of_anna, marker, first) = change_of(&mut watch).await?;
    assert_eq!(text(&last_of_anna), "anna");
    assert_eq!(marker, [Operation::Purge], "expired");
    assert_eq!(text(&first), second_name);
    let nanos = (first.created - last_of_anna.created).whole_nanoseconds();
    let without_leader = Duration::from_nanos(nanos.try_into()?);
    ensure!(
        without_leader > Duration::from_millis(2900)
            && without_leader < Duration::from_secs(6),
        "a lease of 3 s, and {without_leader:?} without a leader"
    );

    // A leader that stops gives the lease back, and nobody has to wait.
    second.terminate().await?;
    second.prints("stopped").await?;
    second.end().await?.succeeded()?;
    third.prints(&format!("leader:   {third_name}")).await?;
    let (_last, marker, first) = change_of(&mut watch).await?;
    assert_eq!(marker, [Operation::Delete], "given back");
    assert_eq!(text(&first), third_name);
    third.interrupt().await?;
    third.end().await?.succeeded()?;

    let tokens: Vec<u64> = reports(nats.1)
        .await?
        .iter()
        .map(|report| Ok(report.split(' ').next().context("a token")?.parse()?))
        .collect::<Result<_>>()?;
    ensure!(tokens.is_sorted(), "a report of an older term: {tokens:?}");
    Ok(())
}

/// The last lease of one leader, the markers after it, and the first lease of
/// another. Two leaders at once would be a change with no marker between.
async fn change_of(watch: &mut Watch) -> Result<(Entry, Vec<Operation>, Entry)> {
    let mut last: Option<Entry> = None;
    let mut markers = Vec::new();
    loop {
        let entry = timeout(DEADLINE, watch.next())
            .await?
            .context("the watch has ended")??;
        if entry.operation != Operation::Put {
            markers.push(entry.operation);
            continue;
        }
        match last {
            Some(last) if last.value != entry.value => {
                return Ok((last, markers, entry));
            }
            _ => {
                ensure!(markers.is_empty(), "a marker within a term");
                last = Some(entry);
            }
        }
    }
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(LEASE, &["candidate"], nowhere)?
        .end()
        .await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_kv_lease"));
    Ok(())
}
