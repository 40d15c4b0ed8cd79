//! An ordered consumer hands out every message in order, also across a restart of
//! the server.

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use tests::{Example, TestBroker, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const ORDERED: &str = env!("CARGO_BIN_EXE_nats_jetstream_ordered_consumer");
const STREAM: &str = "STOCK_MOVEMENTS";
const SUBJECT: &str = "stock.movements";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

async fn publish(address: &str, movements: usize) -> Result<()> {
    let jetstream = observe::nats::jetstream(address).await?;
    for _ in 0..movements {
        jetstream.publish(SUBJECT, "1".into()).await?.await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_read_model_is_rebuilt_from_the_whole_stream() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(ORDERED, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    // It acknowledges nothing and leaves nothing: a durable consumer would stay.
    let jetstream = observe::nats::jetstream(nats.1).await?;
    wait::until("the consumers to be gone", async || {
        let mut stream = jetstream.get_stream(STREAM).await?;
        let count = stream.info().await?.state.consumer_count;
        // Deleted by the server some time after the last reader has left.
        ensure!(count <= 1, "{count} consumers");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_makes_no_gap_and_no_repetition() -> Result<()> {
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let url = ("NATS_URL", address.as_str());
    let mut reader = Example::start(ORDERED, &["reader"], url)?;
    reader.prints("reading stock.movements").await?;
    publish(&address, 20).await?;
    reader.prints("stock after sequence 20: 20").await?;

    nats.kill().await?;
    nats.restart().await?;
    publish(&address, 20).await?;
    reader.prints("stock after sequence 40: 40").await?;
    reader.terminate().await?;
    let ended = reader.end().await?;
    ensure!(ended.status.success(), "{} {}", ended.status, ended.stderr);

    let sequences: Vec<u64> = ended
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("stock after sequence "))
        .map(|rest| {
            let (sequence, _) = rest.split_once(':').context("its form")?;
            Ok(sequence.parse()?)
        })
        .collect::<Result<_>>()?;
    assert_eq!(sequences, (1..=40).collect::<Vec<_>>());
    Ok(())
}

/// The control: a plain consumer without acknowledgements, of which the server
/// keeps nothing, is not there any more after the restart.
#[tokio::test(flavor = "multi_thread")]
async fn control_a_plain_ephemeral_consumer_ends_with_the_server() -> Result<()> {
    use async_nats::jetstream::{consumer::pull, stream};
    use futures_lite::StreamExt as _;

    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let jetstream = observe::nats::jetstream(&address).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await?;
    let consumer = stream
        .create_consumer(pull::Config {
            memory_storage: true,
            ..pull::Config::default()
        })
        .await?;
    let mut messages = consumer.messages().await?;
    publish(&address, 1).await?;
    let first = tokio::time::timeout(wait::DEADLINE, messages.next()).await?;
    first.context("no message")??;

    nats.kill().await?;
    nats.restart().await?;
    publish(&address, 1).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    assert_eq!(stream.info().await?.state.messages, 2);
    assert_eq!(stream.info().await?.state.consumer_count, 0);
    Ok(())
}
