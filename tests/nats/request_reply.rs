//! Nobody there is known at once; somebody there gives an answer.

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::{REQUEST_REPLY, nats};

const SUBJECT: &str = "request.subject";

/// The subject belongs to the example; a responder of another test would answer.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn no_responder_is_known_at_once_and_a_responder_answers() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(REQUEST_REPLY, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    // A time-out would be 2 s: the example's own limit.
    let milliseconds: u64 = ended
        .stdout
        .split_once("known after ")
        .and_then(|(_, rest)| rest.split_once(" ms"))
        .context("the first line")?
        .0
        .parse()?;
    ensure!(milliseconds < 1000, "{milliseconds} ms is no \"at once\"");
    Ok(())
}

/// An observer that stands in as responder sees the requests as they are, and
/// the example sees its answers.
#[tokio::test]
async fn the_answer_comes_from_whoever_listens() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut requests = observe::nats::subscribe(&observer, SUBJECT).await?;

    let mut example = Example::start(REQUEST_REPLY, &[], nats)?;
    let request = timeout(DEADLINE, requests.next()).await?.context("none")?;
    assert_eq!(&request.payload[..], b"Request!");
    let reply_to = request.reply.context("no reply subject")?;
    observer.publish(reply_to, "from outside".into()).await?;
    observer.flush().await?;
    example
        .prints("another responder is there already: from outside")
        .await?;
    example.prints("response:  Response!").await?;
    example.end().await?.succeeded()?;
    Ok(())
}

/// The control: a responder that is there and silent is a time-out, after the
/// example's own limit, and not "no responders".
#[tokio::test]
async fn control_a_silent_responder_is_a_time_out() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let _silent = observe::nats::subscribe(&observer, SUBJECT).await?;

    let ended = Example::start(REQUEST_REPLY, &[], nats)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("did not answer in 2s"), "{line}");
    ended.printed_what_the_book_shows("silent")
}
