//! What is fetched is what was stored, to the last byte, or an error.

use std::{env, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{
    consumer::{DeliverPolicy, pull},
    object_store,
};
use futures_lite::StreamExt as _;
use tests::{Example, observe};
use tokio::{io::AsyncReadExt as _, sync::Mutex, time::timeout};

use crate::nats;

const OBJECT_STORE: &str = env!("CARGO_BIN_EXE_nats_object_store");
const STREAM: &str = "OBJ_shop_invoices";

/// The bucket and the file belong to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// The invoice, made here once more.
fn invoice() -> Vec<u8> {
    (0..100_000)
        .flat_map(|line| format!("{line:>8} mug, white      3.50\n").into_bytes())
        .collect()
}

fn fetched() -> PathBuf {
    env::temp_dir().join("invoice-2026-11.pdf")
}

/// The chunks as messages of the stream under the bucket: sequence and bytes.
async fn chunks(address: &str) -> Result<Vec<(u64, Vec<u8>)>> {
    let jetstream = observe::nats::jetstream(address).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let consumer = stream
        .create_consumer(pull::OrderedConfig {
            filter_subject: "$O.shop_invoices.C.>".to_owned(),
            deliver_policy: DeliverPolicy::All,
            ..pull::OrderedConfig::default()
        })
        .await?;
    let mut messages = consumer.messages().await?;
    let mut chunks = Vec::new();
    loop {
        let message = timeout(Duration::from_secs(30), messages.next())
            .await?
            .context("the consumer has ended")??;
        let info = message.info().map_err(anyhow::Error::from_boxed)?;
        chunks.push((info.stream_sequence, message.payload.to_vec()));
        if info.pending == 0 {
            return Ok(chunks);
        }
    }
}

#[tokio::test]
async fn what_is_fetched_is_what_was_stored() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    for _run in 0..2 {
        let ended = Example::start(OBJECT_STORE, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;

        assert!(fs::read(fetched())? == invoice(), "the file differs");
        // On the second run too: the chunks of the first object are gone.
        let chunks = chunks(nats.1).await?;
        assert_eq!(chunks.len(), 23);
        let bytes: Vec<u8> =
            chunks.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert!(bytes == invoice(), "the chunks differ");
        fs::remove_file(fetched())?;
    }
    Ok(())
}

#[tokio::test]
async fn a_damaged_object_is_an_error_and_no_file() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    let put = Example::start(OBJECT_STORE, &["put"], nats)?;
    put.end().await?.succeeded()?;
    Example::start(OBJECT_STORE, &["get"], nats)?
        .end()
        .await?
        .succeeded()?;
    fs::remove_file(fetched())?;

    let chunks = chunks(nats.1).await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    ensure!(stream.delete_message(chunks[1].0).await?, "not deleted");

    let ended = Example::start(OBJECT_STORE, &["get"], nats)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("is damaged"), "{line}");
    ended.printed_what_the_book_shows("damaged")?;
    assert!(
        !fetched().exists(),
        "a damaged file has the name of a whole one"
    );
    Ok(())
}

/// The control: who stops reading before the end is told of no damage.
#[tokio::test]
async fn control_what_is_read_before_the_end_is_not_checked() -> Result<()> {
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    observe::nats::forget_stream(nats.1, "OBJ_control_invoices").await?;
    let invoices = jetstream
        .create_object_store(object_store::Config {
            bucket: "control_invoices".to_owned(),
            ..object_store::Config::default()
        })
        .await?;
    invoices.put("invoice", &mut &invoice()[..]).await?;
    let stream = jetstream.get_stream("OBJ_control_invoices").await?;
    stream.delete_message(2).await?;

    let mut object = invoices.get("invoice").await?;
    let mut half = vec![0; 1_500_000];
    // No error, and not the first half of the invoice.
    object.read_exact(&mut half).await?;
    assert!(half != invoice()[..half.len()]);
    Ok(())
}

#[tokio::test]
async fn nothing_stored_is_one_line_that_says_so() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    let ended = Example::start(OBJECT_STORE, &["get"], nats)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("store it first: put"), "{line}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(OBJECT_STORE, &["list"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_object_store"));
    Ok(())
}
