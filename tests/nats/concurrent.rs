//! As many labels are in work at the same time as the limit says, and no more.

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, Message, Subscriber};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const CONCURRENT: &str = env!("CARGO_BIN_EXE_nats_concurrent_processing");
const SUBJECT: &str = "labels.orders";
const PRINTER: &str = "labels.printer";
const LIMIT: usize = 4;

/// A printer of another test would answer.
static TURN: Mutex<()> = Mutex::const_new(());

async fn next(requests: &mut Subscriber) -> Result<Message> {
    timeout(DEADLINE, requests.next())
        .await?
        .context("no request")
}

async fn answer(client: &Client, request: Message) -> Result<()> {
    let reply_to = request.reply.context("no reply subject")?;
    client.publish(reply_to, "printed".into()).await?;
    client.flush().await?;
    Ok(())
}

#[tokio::test]
async fn all_labels_are_done_four_at_a_time() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let ended = Example::start(CONCURRENT, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()
}

/// The observer is the printer, so it knows how many labels it has not answered.
/// After SIGTERM those in hand are finished and no other is begun.
#[tokio::test]
async fn the_printer_never_has_more_than_the_limit() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut requests = observe::nats::subscribe(&observer, PRINTER).await?;
    let mut worker = Example::start(CONCURRENT, &["worker"], nats)?;
    worker.prints("waiting for labels on labels.orders").await?;
    for number in 1..=8 {
        let label = format!("label {number}");
        observer.publish(SUBJECT, label.into()).await?;
    }

    let mut open = Vec::new();
    while open.len() < LIMIT {
        open.push(next(&mut requests).await?);
    }
    // Each answer brings exactly one new label.
    for _label in 0..2 {
        observe::nats::round_trip(&observer).await?;
        let more = poll_once(requests.next()).await;
        ensure!(more.is_none(), "one more than the limit: {more:?}");
        answer(&observer, open.remove(0)).await?;
        open.push(next(&mut requests).await?);
    }

    worker.terminate().await?;
    for request in open {
        answer(&observer, request).await?;
    }
    // The signal may be seen before or after the first of these answers.
    let mut begun = 6;
    let stopped = async {
        loop {
            tokio::select! {
                line = worker.prints("stopped after") => break line,
                request = next(&mut requests) => {
                    begun += 1;
                    answer(&observer, request?).await?;
                }
            }
        }
    };
    let line = stopped.await?;
    ensure!(
        line.contains(&format!("after {begun} labels")),
        "{line}, {begun}"
    );
    worker.end().await?.succeeded()?;
    Ok(())
}

/// The control: one at a time, no sheet is full in time.
#[tokio::test]
async fn control_one_at_a_time_no_sheet_is_full_in_time() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let example = Example::start(CONCURRENT, &["one-at-a-time"], nats)?;
    let ended = example.end().await?;
    assert_eq!(ended.status.code(), Some(1));
    ensure!(ended.stdout.contains("done:      2 labels, at most 1 "));
    ended.printed_what_the_book_shows("one-at-a-time")
}
