//! An order over which the worker is killed comes again; with the defaults it does
//! not.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tests::{Example, observe, wait};
use tokio::{sync::Mutex, time::sleep};

use crate::kafka;

const AT_LEAST_ONCE: &str = env!("CARGO_BIN_EXE_kafka_at_least_once");
const TOPIC: &str = "at-least-once.orders";
const GROUP: &str = "at-least-once-billing";

/// Topic and group belong to the example.
static TURN: Mutex<()> = Mutex::const_new(());

async fn ten_orders() -> Result<(&'static str, &'static str)> {
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    let ended = Example::start(AT_LEAST_ONCE, &["orders"], kafka)?
        .end()
        .await?;
    ended.succeeded()?;
    Ok(kafka)
}

/// The number in `begun:  order-3`.
fn number(line: &str) -> Result<usize> {
    let (_, number) = line.split_once("order-").context("no order")?;
    Ok(number.trim().parse()?)
}

/// Lets a worker do one order, kills it in the middle of the next, and returns the
/// number of that one.
async fn killed_over(role: &str, kafka: (&str, &str)) -> Result<usize> {
    let mut worker = Example::start(AT_LEAST_ONCE, &[role], kafka)?;
    worker.prints("done:").await?;
    let order = number(&worker.prints("begun:").await?)?;
    // A third of the work; the background commits every 50 ms.
    sleep(Duration::from_millis(150)).await;
    worker.kill().await?;
    Ok(order)
}

/// What the next worker begins with.
async fn next(role: &str, kafka: (&str, &str)) -> Result<usize> {
    let mut worker = Example::start(AT_LEAST_ONCE, &[role], kafka)?;
    let order = number(&worker.prints("begun:").await?)?;
    worker.terminate().await?;
    worker.end().await?.succeeded()?;
    Ok(order)
}

#[tokio::test]
async fn the_order_over_which_a_worker_dies_comes_again() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = ten_orders().await?;
    for _kill in 0..3 {
        let order = killed_over("worker", kafka).await?;
        let again = next("worker", kafka).await?;
        assert_eq!(
            again, order,
            "another order than the one that was interrupted"
        );
    }
    Ok(())
}

#[tokio::test]
async fn control_with_the_defaults_it_is_lost() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = ten_orders().await?;
    for _kill in 0..3 {
        let order = killed_over("careless", kafka).await?;
        if next("careless", kafka).await? > order {
            return Ok(());
        }
    }
    bail!("three times the background has committed too late")
}

#[tokio::test]
async fn a_worker_that_is_asked_to_stop_finishes_and_commits() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = ten_orders().await?;
    let mut worker = Example::start(AT_LEAST_ONCE, &["worker"], kafka)?;
    let order = number(&worker.prints("begun:").await?)?;
    worker.interrupt().await?;
    worker.prints(&format!("done:   order-{order}")).await?;
    worker.prints("stopped").await?;
    worker.end().await?.succeeded()?;
    let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP).await?;
    assert_eq!(committed, Some(order as i64 + 1));
    Ok(())
}

#[tokio::test]
async fn the_story_does_all_of_its_orders() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;
    for run in 1..=2 {
        let ended = Example::start(AT_LEAST_ONCE, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        wait::until("the commit", async || {
            let committed = observe::kafka::committed(kafka.1, TOPIC, GROUP);
            let committed = committed.await?;
            ensure!(committed == Some(run * 10), "{committed:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let variable = ("KAFKA_BROKERS", "localhost:1");
    let ended = Example::start(AT_LEAST_ONCE, &["nobody"], variable)?
        .end()
        .await?;
    assert_eq!(ended.status.code(), Some(2));
    ensure!(ended.stderr.starts_with("usage: kafka_at_least_once"));
    Ok(())
}
