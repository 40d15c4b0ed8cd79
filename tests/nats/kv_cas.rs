//! Fifty decrements at once are exact, because each names the revision that it
//! has read; without that, the same fifty oversell.

use anyhow::{Context as _, Result, bail};
use async_nats::jetstream::kv::{Operation, UpdateErrorKind};
use futures_lite::StreamExt as _;
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::nats;

const CAS: &str = env!("CARGO_BIN_EXE_nats_kv_cas");

/// The bucket belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// Every value that the stock has had, from the server, oldest first.
async fn values(address: &str) -> Result<Vec<u32>> {
    let jetstream = observe::nats::jetstream(address).await?;
    let stock = jetstream.get_key_value("shop_stock").await?;
    let mut history = stock.history("mug").await?;
    let mut values = Vec::new();
    while let Some(entry) = history.next().await {
        let entry = entry?;
        assert_eq!(entry.operation, Operation::Put);
        values.push(std::str::from_utf8(&entry.value)?.parse()?);
    }
    Ok(values)
}

#[tokio::test]
async fn fifty_decrements_at_once_are_exact_and_never_below_zero() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..3 {
        let ended = Example::start(CAS, &[], nats)?.end().await?;
        let ended = ended.succeeded()?;
        ended.printed_what_its_header_says()?;
        // Each piece was sold once: 30, 29, ... 1, 0, with no value twice.
        let values = values(nats.1).await?;
        assert_eq!(values, (0..=30).rev().collect::<Vec<_>>());

        let overtaken: u32 = ended
            .stdout
            .split_once("overtaken: ")
            .and_then(|(_, rest)| rest.split_once(' '))
            .context("the last line")?
            .0
            .parse()?;
        // All had read the same revision, so at least all but one were.
        assert!(overtaken >= 49, "overtaken {overtaken}");
    }
    Ok(())
}

/// The control: the same buyers with `put` sell fifty pieces of thirty.
#[tokio::test]
async fn control_with_put_the_same_buyers_oversell() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(CAS, &["put"], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_the_book_shows("put")?;
    let values = values(nats.1).await?;
    let mut expected = vec![29; 51];
    expected[0] = 30;
    assert_eq!(values, expected);
    Ok(())
}

/// What the server says to a writer that was overtaken, and that its write did
/// not happen.
#[tokio::test]
async fn an_old_revision_is_refused_and_changes_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    Example::start(CAS, &[], nats)?.end().await?.succeeded()?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stock = jetstream.get_key_value("shop_stock").await?;
    let entry = stock.entry("mug").await?.context("no stock")?;
    match stock.update("mug", "7".into(), entry.revision - 1).await {
        Err(error) => assert_eq!(error.kind(), UpdateErrorKind::WrongLastRevision),
        Ok(revision) => bail!("accepted as revision {revision}"),
    }
    assert_eq!(stock.entry("mug").await?.as_ref(), Some(&entry));
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(CAS, &["get"], nowhere)?.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_kv_cas"));
    Ok(())
}
