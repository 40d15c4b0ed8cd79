//! What a worker answers, and what the server makes of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::Subscriber;
use futures_lite::{StreamExt as _, future::poll_once};
use lab::broker::Broker;
use tests::{Example, Proxy, TestBroker, example::Ended, observe, wait};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const ACKS: &str = env!("CARGO_BIN_EXE_nats_jetstream_acks");
const DOUBLE_ACK: &str = env!("CARGO_BIN_EXE_nats_jetstream_double_ack");
const STREAM: &str = "CARRIER_BOOKINGS";

/// What `ack()` of this client sends: an empty message counts as "+ACK".
const DONE: &str = "";

/// The stream belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// What the server was told: sequence in the stream, delivery, answer.
async fn answers(seen: &mut Subscriber) -> Result<Vec<(u64, u64, String)>> {
    let mut answers = Vec::new();
    while let Some(Some(answer)) = poll_once(seen.next()).await {
        // $JS.ACK.<stream>.<consumer>.<delivery>.<sequence>...
        let mut tokens = answer.subject.split('.').skip(4);
        let delivery = tokens.next().context("no delivery")?.parse()?;
        let sequence = tokens.next().context("no sequence")?.parse()?;
        let payload = String::from_utf8_lossy(&answer.payload).into_owned();
        answers.push((sequence, delivery, payload));
    }
    Ok(answers)
}

/// The pauses before the second and later deliveries of a booking.
fn pauses(stdout: &str, booking: &str) -> Result<Vec<u64>> {
    stdout
        .lines()
        .filter(|line| line.starts_with(booking))
        .filter_map(|line| line.strip_suffix(" ms after the one before"))
        .map(|line| {
            let (_, pause) = line.rsplit_once(' ').context("a number")?;
            Ok(pause.parse()?)
        })
        .collect()
}

/// The pauses as the header writes them: they differ from run to run.
fn without_times(stdout: &str) -> String {
    let mut text = String::new();
    for line in stdout.lines() {
        match line.split_once(", ") {
            Some((start, rest)) if rest.ends_with(" ms after the one before") => {
                text.push_str(start);
                text.push_str(", <ms> ms after the one before");
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[tokio::test]
async fn each_answer_has_its_effect_on_the_server() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen =
        observe::nats::subscribe(&observer, "$JS.ACK.CARRIER_BOOKINGS.>").await?;
    let mut terminated = observe::nats::subscribe(
        &observer,
        "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.CARRIER_BOOKINGS.booker",
    )
    .await?;
    let mut given_up = observe::nats::subscribe(
        &observer,
        "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.CARRIER_BOOKINGS.booker",
    )
    .await?;

    let ended = Example::start(ACKS, &[], nats)?.end().await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    observe::nats::round_trip(&observer).await?;
    let progress = (3, 1, "+WPI".to_owned());
    assert_eq!(
        answers(&mut seen).await?,
        [
            (1, 1, DONE.to_owned()),
            (2, 1, "-NAK {\"delay\":1000000000}".to_owned()),
            (2, 2, DONE.to_owned()),
            progress.clone(),
            progress.clone(),
            progress.clone(),
            progress,
            (3, 1, DONE.to_owned()),
            (4, 1, "+TERM".to_owned()),
        ]
    );
    // The server speaks of the one it will not deliver and of the one it has
    // given up, and of no other.
    for (advisories, sequence) in [(&mut terminated, 4), (&mut given_up, 5)] {
        let advisory = timeout(Duration::from_secs(10), advisories.next())
            .await?
            .context("no advisory")?;
        let text = String::from_utf8_lossy(&advisory.payload).into_owned();
        ensure!(
            text.contains(&format!("\"stream_seq\":{sequence}")),
            "{text}"
        );
        let more = poll_once(advisories.next()).await;
        ensure!(more.is_none(), "one more: {more:?}");
    }

    // Measured in the client, whose clock starts later than the server's by as
    // long as a busy machine takes: so half the pause is the limit.
    let nak = pauses(&ended.stdout, "parcel-2")?;
    ensure!(nak.len() == 1 && nak[0] >= 500, "{nak:?}");
    let silent = pauses(&ended.stdout, "parcel-5")?;
    ensure!(
        silent.len() == 2 && silent[0] >= 500 && silent[1] >= 1000,
        "{silent:?}"
    );
    Ok(())
}

/// The control: the same work without a sign of life is done twice.
#[tokio::test]
async fn control_without_progress_the_slow_booking_is_made_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen =
        observe::nats::subscribe(&observer, "$JS.ACK.CARRIER_BOOKINGS.>").await?;

    let example = Example::start(ACKS, &["--no-progress"], nats)?;
    let mut ended = example.end().await?.succeeded()?;
    observe::nats::round_trip(&observer).await?;
    let of_slow: Vec<_> = answers(&mut seen)
        .await?
        .into_iter()
        .filter(|(sequence, _, _)| *sequence == 3)
        .collect();
    assert_eq!(of_slow, [(3, 1, DONE.to_owned()), (3, 2, DONE.to_owned())]);
    assert_eq!(ended.stdout.matches("parcel-3: booked, ack").count(), 2);
    // The next one waited in the client behind it for longer than the server did.
    assert_eq!(ended.stdout.matches("parcel-4: no such street").count(), 2);
    ended.stdout = without_times(&ended.stdout);
    ended.printed_what_the_book_shows("no-progress")
}

/// What is left for the consumer is what was never answered: nothing waits to be
/// delivered, and the stream holds all five.
#[tokio::test]
async fn nothing_is_delivered_any_more_and_the_stream_keeps_all() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    Example::start(ACKS, &[], nats)?.end().await?.succeeded()?;

    let jetstream = observe::nats::jetstream(nats.1).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    assert_eq!(stream.cached_info().state.messages, 5);
    let info = stream.consumer_info("booker").await?;
    assert_eq!(info.num_pending, 0);
    // 1, 3, 4 once, 2 twice, 5 three times.
    assert_eq!(info.delivered.consumer_sequence, 8);
    Ok(())
}

/// A worker behind a proxy, to which one payment is delivered and whose first
/// answer never arrives. What it printed, and the deliveries that the server made.
async fn ack_lost(
    args: &[&str],
    answered: &str,
    again: &str,
) -> Result<(Ended, u64)> {
    let broker = TestBroker::start(Broker::Nats).await?;
    let target = broker.address().trim_start_matches("nats://").to_owned();
    let proxy = Proxy::start(&target).await?;
    let address = format!("nats://{}", proxy.address());
    let mut worker = Example::start(DOUBLE_ACK, args, ("NATS_URL", &address))?;
    worker.prints("waiting for payments").await?;

    let jetstream = observe::nats::jetstream(broker.address()).await?;
    let stream = jetstream.get_stream("PAYMENT_CAPTURES").await?;
    // Its request for messages has to be there before it can ask no more.
    wait::until("the worker's request", async || {
        let info = stream.consumer_info("capturer").await?;
        ensure!(info.num_waiting == 1, "{}", info.num_waiting);
        Ok(())
    })
    .await?;
    proxy.freeze();
    jetstream
        .publish("payment.captures", "pay-1".into())
        .await?
        .await?;
    worker.prints(answered).await?;
    let info = stream.consumer_info("capturer").await?;
    assert_eq!(info.num_ack_pending, 1, "the server has no answer");

    proxy.cut();
    worker.prints("pay-1: captured before, not again").await?;
    worker.prints(again).await?;
    wait::until("the second answer", async || {
        let info = stream.consumer_info("capturer").await?;
        ensure!(info.num_ack_pending == 0, "{}", info.num_ack_pending);
        Ok(())
    })
    .await?;
    worker.terminate().await?;
    let ended = worker.end().await?;
    let info = stream.consumer_info("capturer").await?;
    Ok((ended, info.delivered.consumer_sequence))
}

#[tokio::test]
async fn confirmed_acks_capture_each_payment_once() -> Result<()> {
    let nats = nats().await?;
    let ended = Example::start(DOUBLE_ACK, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_sees_that_its_ack_is_lost_and_captures_once() -> Result<()> {
    let not_confirmed = "pay-1: ack not confirmed";
    let (ended, deliveries) =
        ack_lost(&["worker"], not_confirmed, "pay-1: ack confirmed").await?;
    let ended = ended.succeeded()?;
    assert_eq!(deliveries, 2);
    assert_eq!(ended.stdout.matches("pay-1: captured\n").count(), 1);
    ended.printed_what_the_book_shows("lost")
}

/// The control: of a plain ack the worker believes that it has arrived.
#[tokio::test(flavor = "multi_thread")]
async fn control_a_plain_ack_is_lost_without_a_word() -> Result<()> {
    let sent = "pay-1: ack sent";
    let (ended, deliveries) = ack_lost(&["worker", "--plain"], sent, sent).await?;
    let ended = ended.succeeded()?;
    assert_eq!(deliveries, 2);
    ensure!(!ended.stdout.contains("not confirmed"), "{}", ended.stdout);
    ended.printed_what_the_book_shows("plain")
}
