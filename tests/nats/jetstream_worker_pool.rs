//! Workers share one durable consumer, and an order outlives its worker.

use std::collections::BTreeMap;

use anyhow::{Context as _, Error, Result, ensure};
use async_nats::jetstream::consumer::{Info, PullConsumer};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::nats;

const WORKER_POOL: &str = env!("CARGO_BIN_EXE_nats_jetstream_worker_pool");
const STREAM: &str = "PACKING";
const DURABLE: &str = "packers";

/// The stream belongs to the example, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

async fn fresh() -> Result<(&'static str, &'static str)> {
    let nats = nats().await?;
    observe::nats::forget_stream(nats.1, STREAM).await?;
    Ok(nats)
}

async fn producer(nats: (&str, &str)) -> Result<()> {
    let ended = Example::start(WORKER_POOL, &["producer"], nats)?;
    ended.end().await?.succeeded()?;
    Ok(())
}

fn worker(nats: (&str, &str)) -> Result<Example> {
    Example::start(WORKER_POOL, &["worker"], nats)
}

async fn durable(address: &str) -> Result<PullConsumer> {
    let jetstream = observe::nats::jetstream(address).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let durable = stream.get_consumer(DURABLE).await;
    durable.map_err(Error::from_boxed)
}

async fn all_acknowledged(address: &str) -> Result<Info> {
    wait::until("all orders acknowledged", async || {
        let info = durable(address).await?.get_info().await?;
        ensure!(
            info.num_pending == 0
                && info.num_ack_pending == 0
                && info.ack_floor.stream_sequence == 12,
            "{info:?}"
        );
        Ok(info)
    })
    .await
}

/// The orders that these outputs call done, each with its number of times.
fn done<'a>(outputs: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut done = BTreeMap::new();
    for line in outputs.into_iter().flat_map(str::lines) {
        if let Some(rest) = line.strip_prefix("done:  ") {
            let order = rest.split(' ').next().unwrap_or(rest);
            *done.entry(order.to_owned()).or_default() += 1;
        }
    }
    done
}

fn each_once() -> BTreeMap<String, usize> {
    (1..=12).map(|n| (format!("order-{n}"), 1)).collect()
}

#[tokio::test]
async fn the_story_packs_every_order() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    for _run in 0..2 {
        let ended = Example::start(WORKER_POOL, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        let info = all_acknowledged(nats.1).await?;
        // Twelve orders, one of them twice.
        assert_eq!(info.delivered.consumer_sequence, 13);
    }
    Ok(())
}

#[tokio::test]
async fn workers_share_the_orders_and_none_is_packed_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    let mut workers = [worker(nats)?, worker(nats)?];
    for worker in &mut workers {
        worker.prints("waiting for orders").await?;
    }
    producer(nats).await?;
    for worker in &mut workers {
        worker.prints("done:").await?;
    }
    let info = all_acknowledged(nats.1).await?;
    assert_eq!(info.delivered.consumer_sequence, 12);
    let mut outputs = Vec::new();
    for worker in workers {
        worker.interrupt().await?;
        outputs.push(worker.end().await?.succeeded()?.stdout);
    }
    assert_eq!(done(outputs.iter().map(String::as_str)), each_once());
    Ok(())
}

#[tokio::test]
async fn a_killed_workers_order_is_delivered_a_second_time() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats).await?;
    let mut first = worker(nats)?;
    first.prints("start: order-1 (delivery 1)").await?;
    // In the middle: the server has no acknowledgement. The few round trips of
    // this question are enough for one that is sent before the work.
    let info = durable(nats.1).await?.get_info().await?;
    assert_eq!(info.num_ack_pending, 1, "{info:?}");
    first.kill().await?;

    let mut second = worker(nats)?;
    second.prints("done:  order-1 (delivery 2)").await?;
    let info = all_acknowledged(nats.1).await?;
    assert_eq!(info.delivered.consumer_sequence, 13);
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(done([&*second.stdout]), each_once());
    second.printed_what_the_book_shows("killed")
}

/// The control: acknowledged before the work, the order of a worker that dies
/// is lost: nobody gets it a second time.
#[tokio::test]
async fn control_acknowledged_first_the_order_is_lost() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats).await?;
    let consumer = durable(nats.1).await?;
    let mut taken = consumer.fetch().max_messages(1).messages().await?;
    let message = taken.next().await.context("no order")?;
    let message = message.map_err(Error::from_boxed)?;
    message.double_ack().await.map_err(Error::from_boxed)?;
    // And now it dies, before the work.

    let mut second = worker(nats)?;
    second.prints("done:  order-12 (delivery 1)").await?;
    let info = all_acknowledged(nats.1).await?;
    assert_eq!(info.delivered.consumer_sequence, 12);
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    let mut expected = each_once();
    expected.remove("order-1");
    assert_eq!(done([&*second.stdout]), expected);
    Ok(())
}

#[tokio::test]
async fn a_stopped_worker_finishes_the_order_in_hand() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(nats).await?;
    let mut worker = worker(nats)?;
    worker.prints("start: order-1").await?;
    worker.terminate().await?;
    let ended = worker.end().await?.succeeded()?;
    ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    let finished = done([&*ended.stdout]).len() as u64;
    let info = durable(nats.1).await?.get_info().await?;
    assert_eq!((info.ack_floor.stream_sequence, finished), (1, 1));
    Ok(())
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(WORKER_POOL, &["packer"], nowhere)?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(
        ended
            .stderr
            .starts_with("usage: nats_jetstream_worker_pool")
    );
    Ok(())
}
