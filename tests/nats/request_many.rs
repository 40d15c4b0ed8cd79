//! Each rule lets in the answers that it promises, and leaves no inbox behind.

use anyhow::{Context as _, Result, ensure};
use async_nats::RequestErrorKind;
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const REQUEST_MANY: &str = env!("CARGO_BIN_EXE_nats_request_many");
const SUBJECT: &str = "quotes.shipping";

/// A provider of another test would answer.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn three_by_count_and_two_by_deadline_or_gap() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(REQUEST_MANY, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()
}

/// The observer is a fourth provider: its offer is among those by the deadline.
/// And when the next question comes, nobody listens on the inbox of the last.
#[tokio::test]
async fn a_stranger_s_offer_counts_and_no_inbox_is_left() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    // There from the start, so that it sees every question, in this order:
    let mut questions = observe::nats::subscribe(&observer, SUBJECT).await?;
    let mut example = Example::start(REQUEST_MANY, &[], nats)?;
    let mut next = async || {
        let question = timeout(DEADLINE, questions.next()).await?.context("none")?;
        question.reply.context("no inbox")
    };

    // is anybody there,
    let inbox = next().await?;
    for offer in ["a 1", "b 2", "c 3"] {
        observer.publish(inbox.clone(), offer.into()).await?;
    }
    observer.flush().await?;
    example.prints("nobody:      other providers").await?;
    // `request`, by count, by deadline,
    next().await?;
    next().await?;
    let inbox = next().await?;
    observer.publish(inbox.clone(), "pigeon 1".into()).await?;
    observer.publish(inbox.clone(), "no offer".into()).await?;
    observer.flush().await?;
    let line = example.prints("by deadline:").await?;
    ensure!(
        line.contains("3 quotes: pigeon 1, bike 9, drone 12"),
        "{line}"
    );

    // by gap.
    next().await?;
    let late = observer.request(inbox, "ship 4".into()).await;
    let kind = late.err().context("somebody took a late offer")?.kind();
    assert_eq!(kind, RequestErrorKind::NoResponders);
    example.end().await?.succeeded()?;
    Ok(())
}

/// The control: in one queue group only one of them sees the question.
#[tokio::test]
async fn control_providers_in_one_group_give_one_quote() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let example = Example::start(REQUEST_MANY, &["one-group"], nats)?;
    let ended = example.end().await?.succeeded()?;
    ensure!(ended.stdout.contains("1 of 3 quotes"), "{}", ended.stdout);
    ended.printed_what_the_book_shows("one-group")
}
