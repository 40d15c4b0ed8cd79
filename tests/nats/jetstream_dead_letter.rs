//! Where an order goes that no worker can process.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::{
    self,
    message::{PublishMessage, StreamMessage},
    stream::State,
};
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const DEAD_LETTER: &str = env!("CARGO_BIN_EXE_nats_jetstream_dead_letter");
const ORDERS: &str = "INTAKE";
const ADVISORIES: &str = "INTAKE_GIVEN_UP";
const DEAD: &str = "INTAKE_DEAD";

/// The streams belong to the example, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

type Nats = (&'static str, &'static str);

async fn fresh() -> Result<(Nats, jetstream::Context)> {
    let nats = nats().await?;
    for stream in [ORDERS, ADVISORIES, DEAD] {
        observe::nats::forget_stream(nats.1, stream).await?;
    }
    Ok((nats, observe::nats::jetstream(nats.1).await?))
}

async fn once(nats: Nats, role: &str) -> Result<String> {
    let ended = Example::start(DEAD_LETTER, &[role], nats)?.end().await?;
    Ok(ended.succeeded()?.stdout)
}

async fn state(jetstream: &jetstream::Context, name: &str) -> Result<State> {
    let mut stream = jetstream.get_stream(name).await?;
    Ok(stream.info().await?.state.clone())
}

async fn holds(
    jetstream: &jetstream::Context,
    name: &str,
    messages: u64,
) -> Result<State> {
    wait::until(&format!("{messages} in {name}"), async || {
        let state = state(jetstream, name).await?;
        ensure!(state.messages == messages, "{state:?}");
        Ok(state)
    })
    .await
}

async fn raw(
    jetstream: &jetstream::Context,
    stream: &str,
    sequence: u64,
) -> Result<StreamMessage> {
    let stream = jetstream.get_stream(stream).await?;
    Ok(stream.get_raw_message(sequence).await?)
}

fn header<'a>(letter: &'a StreamMessage, name: &str) -> &'a str {
    letter.headers.get(name).map_or("", |value| value.as_str())
}

fn is_order_2(letter: &StreamMessage) {
    assert_eq!(letter.payload, "order-2 three");
    assert_eq!(header(letter, "Customer"), "customer-2");
    assert_eq!(header(letter, "Dead-Letter-Subject"), "intake.orders.web");
    assert_eq!(header(letter, "Dead-Letter-Stream"), "INTAKE");
    assert_eq!(header(letter, "Dead-Letter-Sequence"), "2");
    assert_eq!(header(letter, "Dead-Letter-Deliveries"), "3");
    assert_eq!(header(letter, "Dead-Letter-Reason"), "max_deliver reached");
}

/// Runs a worker until it has failed three times and the server has said so,
/// with nobody there to listen.
async fn give_up(nats: Nats, jetstream: &jetstream::Context) -> Result<()> {
    once(nats, "producer").await?;
    let mut worker = Example::start(DEAD_LETTER, &["worker"], nats)?;
    worker.prints("failed: order-2 (delivery 3)").await?;
    holds(jetstream, ADVISORIES, 1).await?;
    worker.interrupt().await?;
    let stdout = worker.end().await?.succeeded()?.stdout;
    let last = stdout.find("(delivery 3)").context("no delivery 3")?;
    for order in ["order-1", "order-3", "order-4"] {
        let done = stdout.find(&format!("done:   {order} (delivery 1)"));
        ensure!(done.is_some_and(|done| done < last), "{order}: {stdout}");
    }
    ensure!(stdout.ends_with("stopped\n"), "{stdout}");
    Ok(())
}

#[tokio::test]
async fn the_story_ends_with_nothing_left() -> Result<()> {
    let _turn = TURN.lock().await;
    let (nats, jetstream) = fresh().await?;
    for _run in 0..2 {
        let ended = Example::start(DEAD_LETTER, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        // Four orders and one a second time; one advisory; one dead letter.
        for (stream, stored) in [(ORDERS, 5), (ADVISORIES, 1), (DEAD, 1)] {
            let state = holds(&jetstream, stream, 0).await?;
            assert_eq!(state.last_sequence, stored, "{stream}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_handler_that_starts_later_moves_the_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let (nats, jetstream) = fresh().await?;
    give_up(nats, &jetstream).await?;
    let mut handler = Example::start(DEAD_LETTER, &["handler"], nats)?;
    handler.prints("moved:  INTAKE 2").await?;
    holds(&jetstream, ADVISORIES, 0).await?;
    handler.terminate().await?;
    let stdout = handler.end().await?.succeeded()?.stdout;
    ensure!(stdout.ends_with("stopped\n"), "{stdout}");
    assert_eq!(state(&jetstream, ORDERS).await?.messages, 0);
    assert_eq!(state(&jetstream, DEAD).await?.messages, 1);
    is_order_2(&raw(&jetstream, DEAD, 1).await?);

    // After a fix, as the order that it was.
    let stdout = once(nats, "redrive").await?;
    assert_eq!(stdout, "redriven: dead letter 1 to intake.orders.web\n");
    assert_eq!(state(&jetstream, DEAD).await?.messages, 0);
    let again = raw(&jetstream, ORDERS, 5).await?;
    assert_eq!(again.subject.as_str(), "intake.orders.web");
    assert_eq!(again.payload, "order-2 three");
    assert_eq!(header(&again, "Customer"), "customer-2");
    assert_eq!(header(&again, "Dead-Letter-Subject"), "");
    let mut fixed = Example::start(DEAD_LETTER, &["worker", "--fixed"], nats)?;
    fixed.prints("done:   order-2 (delivery 1)").await?;
    holds(&jetstream, ORDERS, 0).await?;
    fixed.interrupt().await?;
    fixed.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn a_handler_killed_in_between_loses_nothing_and_stores_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let (nats, jetstream) = fresh().await?;
    give_up(nats, &jetstream).await?;
    let mut first = Example::start(DEAD_LETTER, &["handler", "--slow"], nats)?;
    first.prints("stored: INTAKE 2").await?;
    first.kill().await?;
    // Stored, and neither deleted nor acknowledged.
    for stream in [ORDERS, ADVISORIES, DEAD] {
        assert_eq!(state(&jetstream, stream).await?.messages, 1, "{stream}");
    }

    let mut second = Example::start(DEAD_LETTER, &["handler"], nats)?;
    second.prints("moved:  INTAKE 2").await?;
    holds(&jetstream, ADVISORIES, 0).await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(state(&jetstream, ORDERS).await?.messages, 0);
    let dead = state(&jetstream, DEAD).await?;
    assert_eq!((dead.messages, dead.last_sequence), (1, 1));
    is_order_2(&raw(&jetstream, DEAD, 1).await?);
    second.printed_what_the_book_shows("killed")
}

/// An advisory for an order that is gone, as after a crash between the deletion
/// and the acknowledgement, does not stop the handler.
#[tokio::test]
async fn a_handler_acknowledges_an_order_that_is_gone() -> Result<()> {
    let _turn = TURN.lock().await;
    let (nats, jetstream) = fresh().await?;
    give_up(nats, &jetstream).await?;
    let orders = jetstream.get_stream(ORDERS).await?;
    orders.delete_message(2).await?;
    let mut handler = Example::start(DEAD_LETTER, &["handler"], nats)?;
    handler.prints("gone:   INTAKE 2").await?;
    holds(&jetstream, ADVISORIES, 0).await?;
    handler.interrupt().await?;
    handler.end().await?.succeeded()?;
    assert_eq!(state(&jetstream, DEAD).await?.last_sequence, 0);
    Ok(())
}

/// The control: without a handler the order stays where it is, and no worker
/// gets it, not even one that could read it by now.
#[tokio::test]
async fn control_without_a_handler_the_order_is_stuck() -> Result<()> {
    let _turn = TURN.lock().await;
    let (nats, jetstream) = fresh().await?;
    give_up(nats, &jetstream).await?;
    let mut fixed = Example::start(DEAD_LETTER, &["worker", "--fixed"], nats)?;
    fixed.prints("waiting for orders").await?;
    // The worker is at work: it does what comes later.
    let later = PublishMessage::build().payload("order-5 1".into());
    jetstream
        .send_publish("intake.orders.web", later)
        .await?
        .await?;
    fixed.prints("done:   order-5 (delivery 1)").await?;
    let orders = state(&jetstream, ORDERS).await?;
    assert_eq!((orders.messages, orders.first_sequence), (1, 2));
    assert_eq!(raw(&jetstream, ORDERS, 2).await?.payload, "order-2 three");
    fixed.interrupt().await?;
    let stdout = fixed.end().await?.succeeded()?.stdout;
    ensure!(!stdout.contains("order-2"), "{stdout}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(DEAD_LETTER, &["gravedigger"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    ensure!(
        ended
            .stderr
            .starts_with("usage: nats_jetstream_dead_letter")
    );
    Ok(())
}
