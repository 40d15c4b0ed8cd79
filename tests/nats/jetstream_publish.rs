//! What the stream has answered for is stored, and what is refused is known.

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use tests::{Example, TestBroker, observe};
use tokio::sync::Mutex;

use crate::nats;

const PUBLISH: &str = env!("CARGO_BIN_EXE_nats_jetstream_publish");
const PUBLISH_ASYNC: &str = env!("CARGO_BIN_EXE_nats_jetstream_publish_async");

/// The streams belong to the examples.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn what_is_called_stored_is_in_the_stream() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, "ORDERS_PLACED").await?;
    for _run in 0..2 {
        let ended = Example::start(PUBLISH, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream("ORDERS_PLACED").await?;
    assert_eq!(stream.info().await?.state.messages, 6);
    for (sequence, order) in (1..).zip(["order-1", "order-2", "order-4"]) {
        let message = stream.get_raw_message(sequence).await?;
        assert_eq!(&message.payload[..], order.as_bytes());
    }
    Ok(())
}

#[tokio::test]
async fn a_refused_message_is_known_by_its_own_answer() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(PUBLISH_ASYNC, &[], nats)?.end().await?;
        // Its last line is the control: the same loss, and no word of it.
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let jetstream = observe::nats::jetstream(nats.1).await?;
    let mut stream = jetstream.get_stream("TELEMETRY_IMPORT").await?;
    let state = stream.info().await?.state.clone();
    assert_eq!((state.messages, state.last_sequence), (8, 8));
    for sequence in 1..=8 {
        let message = stream.get_raw_message(sequence).await?;
        let reading = format!("reading {sequence}");
        assert_eq!(&message.payload[..], reading.as_bytes());
    }
    Ok(())
}

#[tokio::test]
async fn what_is_measured_is_stored_to_the_last_message() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    for (binary, stream, count) in [
        (PUBLISH, "ORDERS_MEASURED", 100),
        // More than a window.
        (PUBLISH_ASYNC, "TELEMETRY_MEASURED", 12_000),
    ] {
        observe::nats::forget_stream(nats.1, stream).await?;
        let args = [&*count.to_string(), "64"];
        let ended = Example::start(binary, &args, nats)?.end().await?;
        let ended = ended.succeeded()?;
        let said = format!("published: {count} messages of 64 B in ");
        ensure!(ended.stdout.starts_with(&said), "{}", ended.stdout);
        let mut stream = jetstream.get_stream(stream).await?;
        assert_eq!(stream.info().await?.state.messages, count);
        let last = stream.get_raw_message(count).await?;
        assert_eq!(last.payload.len(), 64);
        stream.purge().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_number_that_is_none_gets_the_usage_and_status_2() -> Result<()> {
    for binary in [PUBLISH, PUBLISH_ASYNC] {
        for args in [&["many"][..], &["0"], &["1", "2", "3"]] {
            let nowhere = ("NATS_URL", "nats://localhost:1");
            let ended = Example::start(binary, args, nowhere)?.end().await?;
            assert_eq!(ended.status.code(), Some(2), "{args:?}");
            assert!(ended.stderr.starts_with("usage: "), "{}", ended.stderr);
        }
    }
    Ok(())
}

/// A publisher whose server dies says up to where it knows, and that is true.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_no_message_before_the_one_that_is_named() -> Result<()>
{
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let observer = observe::nats::jetstream(&address).await?;
    let args = ["1000000", "64"];
    let example = Example::start(PUBLISH_ASYNC, &args, ("NATS_URL", &address))?;
    tests::wait::until("the first thousand", async || {
        let mut stream = observer.get_stream("TELEMETRY_MEASURED").await?;
        let stored = stream.info().await?.state.messages;
        ensure!(stored > 1_000, "{stored} messages");
        Ok(())
    })
    .await?;
    nats.kill().await?;

    let ended = example.end().await?;
    let line = ended.one_line_error()?;
    let (_, rest) = line.split_once("message ").context("which message?")?;
    let (number, _) = rest.split_once(' ').context("its number")?;
    let number: u64 = number.parse().with_context(|| line.to_owned())?;
    nats.restart().await?;
    let observer = observe::nats::jetstream(&address).await?;
    let mut stream = observer.get_stream("TELEMETRY_MEASURED").await?;
    let stored = stream.info().await?.state.messages;
    ensure!(stored >= number - 1, "{stored} are stored, but: {line}");
    Ok(())
}
