//! The publisher keeps to the pace of its subscriber, and so nothing is lost.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, ConnectOptions, Subscriber};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, task::unconstrained, time::timeout};

use crate::nats;

const THROUGHPUT: &str = env!("CARGO_BIN_EXE_nats_throughput");
const LATENCY: &str = env!("CARGO_BIN_EXE_nats_request_latency");
const SUBJECT: &str = "throughput.readings";
const QUOTE: &str = "latency.quote";

/// The buffer of a subscription in the example, the client's default.
const BUFFER: usize = 65_536;

/// The subjects belong to the examples; messages of another test would be counted.
static TURN: Mutex<()> = Mutex::const_new(());

/// Subscribes with a buffer that holds all that a test publishes.
async fn observe_all(address: &str) -> Result<(Client, Subscriber)> {
    let options = ConnectOptions::new().subscription_capacity(1_000_000);
    let observer = options.connect(address).await?;
    let seen = observe::nats::subscribe(&observer, SUBJECT).await?;
    Ok((observer, seen))
}

/// How many messages wait, once the server has delivered what it had.
async fn count(observer: &Client, seen: &mut Subscriber) -> Result<usize> {
    observe::nats::round_trip(observer).await?;
    // Otherwise Tokio lets a task take 128 messages, and then says that there is
    // none until it has yielded.
    let all = unconstrained(async {
        let mut count = 0;
        while let Some(Some(_message)) = poll_once(seen.next()).await {
            count += 1;
        }
        count
    });
    Ok(all.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_and_an_observer_count_the_same() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let (observer, mut seen) = observe_all(nats.1).await?;
    let ended = Example::start(THROUGHPUT, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;
    assert_eq!(count(&observer, &mut seen).await?, 200_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_programs_count_the_same_and_end_by_themselves() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let mut subscriber =
        Example::start(THROUGHPUT, &["subscriber", "150001"], nats)?;
    subscriber.prints("ready: subscribed").await?;
    let publisher =
        Example::start(THROUGHPUT, &["publisher", "150001", "64"], nats)?;
    let published = publisher.end().await?.succeeded()?;
    let consumed = subscriber.end().await?.succeeded()?;
    let of_64_b = "150001 messages of 64 B in ";
    ensure!(
        published.stdout.starts_with("published: "),
        "{}",
        published.stdout
    );
    ensure!(published.stdout.contains(of_64_b), "{}", published.stdout);
    ensure!(
        consumed.stdout.contains("consumed: "),
        "{}",
        consumed.stdout
    );
    ensure!(consumed.stdout.contains(of_64_b), "{}", consumed.stdout);
    Ok(())
}

/// A subscriber that answers nothing gets what its buffer holds, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn the_publisher_waits_for_a_subscriber_that_is_stuck() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let (observer, mut seen) = observe_all(nats.1).await?;
    let publisher = Example::start(THROUGHPUT, &["publisher", "300000"], nats)?;
    let ended = publisher.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("has not answered"), "{line}");
    assert_eq!(count(&observer, &mut seen).await?, BUFFER);
    ended.printed_what_the_book_shows("stuck")
}

/// The control: what is published without a question is lost beyond the buffer,
/// and neither end gets an error.
#[tokio::test(flavor = "multi_thread")]
async fn control_without_questions_a_slow_subscriber_loses_messages() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let slow = observe::nats::connect(nats.1).await?;
    let mut readings = observe::nats::subscribe(&slow, SUBJECT).await?;
    let careless = observe::nats::connect(nats.1).await?;
    for _ in 0..100_000 {
        careless.publish(SUBJECT, "r".into()).await?;
    }
    observe::nats::round_trip(&careless).await?;
    assert_eq!(count(&slow, &mut readings).await?, BUFFER);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_that_nobody_listens_to_is_told_and_ends_well() -> Result<()> {
    let _turn = TURN.lock().await;
    let publisher =
        Example::start(THROUGHPUT, &["publisher", "100000"], nats().await?)?;
    let ended = publisher.end().await?.succeeded()?;
    let mut lines = ended.stdout.lines();
    assert_eq!(
        lines.next(),
        Some("nobody has subscribed to throughput.readings")
    );
    let last = lines.next().context("a second line")?;
    ensure!(
        last.starts_with("published: 100000 messages of 128 B"),
        "{last}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_without_a_count_stops_when_asked() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let mut subscriber = Example::start(THROUGHPUT, &["subscriber"], nats)?;
    subscriber.prints("ready: subscribed").await?;
    let publisher = Example::start(THROUGHPUT, &["publisher", "7"], nats)?;
    publisher.end().await?.succeeded()?;
    subscriber.interrupt().await?;
    subscriber.prints("consumed: 7 messages of 128 B").await?;
    subscriber.prints("stopped").await?;
    timeout(DEADLINE, subscriber.end()).await??.succeeded()?;
    Ok(())
}

/// The number after this text, up to the next blank.
fn number_after(text: &str, output: &str) -> Result<u64> {
    let (_, rest) = output.split_once(text).context(text.to_owned())?;
    let word = rest.split_whitespace().next().unwrap_or_default();
    Ok(word.parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_shows_from_the_due_time_and_hides_from_the_sending() -> Result<()> {
    let _turn = TURN.lock().await;
    let ended = Example::start(LATENCY, &[], nats().await?)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;
    // A pause of 250 ms in 1000 requests at 1000 a second: a quarter of them
    // waited, and one was sent and not answered meanwhile.
    let from_due = number_after(" us, p99 ", &ended.stdout)?;
    let from_sending = number_after("instead: p99 ", &ended.stdout)?;
    ensure!(from_due > 150_000, "{}", ended.stdout);
    ensure!(from_sending < from_due / 2, "{}", ended.stdout);
    Ok(())
}

/// An observer that stands in as responder counts the requests, and its own
/// delay is in the result.
#[tokio::test(flavor = "multi_thread")]
async fn the_requester_asks_as_often_as_it_says_and_measures_the_responder()
-> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut requests = observe::nats::subscribe(&observer, QUOTE).await?;
    let requester = Example::start(LATENCY, &["requester", "20", "1000"], nats)?;
    for _ in 0..20 {
        let request = timeout(DEADLINE, requests.next()).await?.context("none")?;
        assert_eq!(request.payload.len(), 128);
        // What the example must see.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let reply_to = request.reply.context("no reply subject")?;
        observer.publish(reply_to, "".into()).await?;
    }
    let ended = requester.end().await?.succeeded()?;
    ensure!(
        ended
            .stdout
            .starts_with("answered: 20 requests of 128 B in ")
    );
    // All are due within 20 ms and answered in 100: the later ones waited.
    let p50 = number_after("(p50 ", &ended.stdout)?;
    ensure!(p50 > 20_000, "{}", ended.stdout);
    ensure!(poll_once(requests.next()).await.is_none(), "one too many");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_responder_gives_each_request_back_and_stops_when_asked() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let mut responder = Example::start(LATENCY, &["responder"], nats)?;
    responder.prints("ready: answers on latency.quote").await?;
    let observer = observe::nats::connect(nats.1).await?;
    let answer = observe::nats::request(&observer, QUOTE, "how much?").await?;
    assert_eq!(&answer.payload[..], b"how much?");
    responder.terminate().await?;
    responder.prints("stopped").await?;
    responder.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_requester_without_responder_says_so() -> Result<()> {
    let _turn = TURN.lock().await;
    let ended = Example::start(LATENCY, &["requester"], nats().await?)?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("no responders on latency.quote"), "{line}");
    Ok(())
}

#[tokio::test]
async fn other_words_are_answered_with_the_usage() -> Result<()> {
    let wrong: [(&str, &[&str]); 5] = [
        (THROUGHPUT, &["listener"]),
        (THROUGHPUT, &["publisher", "many"]),
        (THROUGHPUT, &["subscriber", "1", "2"]),
        (LATENCY, &["requester", "10", "0"]),
        (LATENCY, &["responder", "1"]),
    ];
    for (binary, words) in wrong {
        let ended = Example::start(binary, words, nats().await?)?.end().await?;
        assert_eq!(ended.status.code(), Some(2), "{words:?}");
        ensure!(ended.stderr.starts_with("usage: "), "{}", ended.stderr);
    }
    Ok(())
}
