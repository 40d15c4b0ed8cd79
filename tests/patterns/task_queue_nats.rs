//! A task outlives its worker and its server, because the stream is in files, the
//! publishing is acknowledged, and the acknowledgement of the work comes last.

use anyhow::{Result, bail, ensure};
use async_nats::jetstream::{context::GetStreamErrorKind, stream};
use lab::broker::Broker;
use patterns::task_queue::{TASKS, tasks};
use tests::{
    Example, TestBroker, broker, example::fail_with_one_line, observe, wait,
};
use tokio::sync::Mutex;

use crate::task_queue::{
    an_unknown_role_gets_the_usage, done, each_once, producer,
    two_workers_share_the_tasks, worker,
};

const TASK_QUEUE: &str = env!("CARGO_BIN_EXE_task_queue_nats");
const STREAM: &str = "TASK_QUEUE";
const SUBJECT: &str = "task_queue";
const UNREADABLE: &str = "TASK_QUEUE_UNREADABLE";

/// The streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The shared server without the streams of the pattern.
async fn fresh() -> Result<(&'static str, &'static str)> {
    let address = broker::shared(Broker::Nats).await?;
    observe::nats::forget_stream(address, STREAM).await?;
    observe::nats::forget_stream(address, UNREADABLE).await?;
    Ok(("NATS_URL", address))
}

/// How many messages the server holds in a stream.
async fn stored(address: &str, stream: &str) -> Result<u64> {
    let jetstream = observe::nats::jetstream(address).await?;
    Ok(jetstream
        .get_stream(stream)
        .await?
        .info()
        .await?
        .state
        .messages)
}

async fn queue_is_empty(address: &str) -> Result<()> {
    wait::until("the queue to be empty", async || {
        let stored = stored(address, STREAM).await?;
        ensure!(stored == 0, "{stored} tasks are left");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_story_ends_with_every_task_done() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    let ended = Example::start(TASK_QUEUE, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;
    queue_is_empty(nats.1).await
}

#[tokio::test]
async fn a_killed_workers_task_goes_to_another() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(TASK_QUEUE, nats).await?;

    let mut first = worker(TASK_QUEUE, nats)?;
    first.prints("start: Task 0").await?;
    first.kill().await?;

    let mut second = worker(TASK_QUEUE, nats)?;
    second.prints("done:  Task 9").await?;
    // Not before the server has waited for the first worker's acknowledgement.
    second.prints("start: Task 0 (again)").await?;
    second.prints("done:  Task 0").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(done([&*second.stdout]), each_once());
    second.printed_what_the_book_shows("killed")?;
    queue_is_empty(nats.1).await
}

/// The control: the same fault, with the acknowledgement first.
#[tokio::test]
async fn control_acknowledged_first_a_killed_workers_task_is_lost() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(TASK_QUEUE, nats).await?;

    let mut first = Example::start(TASK_QUEUE, &["worker", "--ack-first"], nats)?;
    first.prints("start: Task 0").await?;
    first.kill().await?;

    let mut second = worker(TASK_QUEUE, nats)?;
    second.prints("done:  Task 9").await?;
    queue_is_empty(nats.1).await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    let mut expected = each_once();
    expected.remove("Task 0");
    assert_eq!(done([&*second.stdout]), expected);
    Ok(())
}

#[tokio::test]
async fn a_stopped_worker_finishes_and_acknowledges_the_task_in_hand() -> Result<()>
{
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(TASK_QUEUE, nats).await?;

    let mut first = worker(TASK_QUEUE, nats)?;
    first.prints("start: Task 0").await?;
    first.terminate().await?;
    let first = first.end().await?.succeeded()?;
    assert_eq!(
        first.stdout,
        "waiting for tasks in task_queue, Ctrl-C to stop\n\
         start: Task 0\ndone:  Task 0\nstopped\n"
    );
    // Acknowledged and gone; the others have not been touched.
    assert_eq!(stored(nats.1, STREAM).await?, TASKS as u64 - 1);
    let mut second = worker(TASK_QUEUE, nats)?;
    second.prints("start: Task 1").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert!(!second.stdout.contains("(again)"), "{}", second.stdout);
    Ok(())
}

#[tokio::test]
async fn two_workers_share_the_tasks_and_none_is_done_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    let ready = async || Ok(());
    let empty = async || queue_is_empty(nats.1).await;
    two_workers_share_the_tasks(TASK_QUEUE, nats, 1, ready, empty).await
}

#[tokio::test]
async fn what_no_worker_can_read_is_kept_elsewhere() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = fresh().await?;
    producer(TASK_QUEUE, nats).await?;
    let jetstream = observe::nats::jetstream(nats.1).await?;
    jetstream
        .publish(SUBJECT, b"\xff\xfe"[..].into())
        .await?
        .await?;

    let mut worker = worker(TASK_QUEUE, nats)?;
    worker.prints("done:  Task 9").await?;
    queue_is_empty(nats.1).await?;
    worker.interrupt().await?;
    let ended = worker.end().await?;
    assert!(ended.status.success(), "{}", ended.status);
    assert_eq!(
        ended.stderr,
        "not a task: 2 bytes, kept in task_queue_unreadable\n"
    );
    let kept = jetstream.get_stream(UNREADABLE).await?;
    let kept = kept.get_raw_message(1).await?;
    assert_eq!(&kept.payload[..], b"\xff\xfe");
    Ok(())
}

// ---- The server dies -------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_keeps_every_acknowledged_task() -> Result<()> {
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    producer(TASK_QUEUE, ("NATS_URL", &address)).await?;
    nats.kill().await?;
    nats.restart().await?;

    let mut worker = worker(TASK_QUEUE, ("NATS_URL", &address))?;
    worker.prints("done:  Task 9").await?;
    worker.interrupt().await?;
    let worker = worker.end().await?.succeeded()?;
    assert_eq!(done([&*worker.stdout]), each_once());
    Ok(())
}

/// The control: the same fault, with the stream in memory.
#[tokio::test(flavor = "multi_thread")]
async fn control_a_killed_server_loses_a_stream_in_memory() -> Result<()> {
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let jetstream = observe::nats::jetstream(&address).await?;
    jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            retention: stream::RetentionPolicy::WorkQueue,
            storage: stream::StorageType::Memory,
            ..stream::Config::default()
        })
        .await?;
    for task in tasks() {
        jetstream.publish(SUBJECT, task.into()).await?.await?;
    }
    assert_eq!(stored(&address, STREAM).await?, TASKS as u64);

    nats.kill().await?;
    nats.restart().await?;

    let jetstream = observe::nats::jetstream(&address).await?;
    match jetstream.get_stream(STREAM).await {
        Ok(_stream) => {
            let left = stored(&address, STREAM).await?;
            bail!("the stream is still there, with {left} tasks")
        }
        Err(error) => ensure!(
            matches!(error.kind(), GetStreamErrorKind::JetStream(_)),
            "{error}"
        ),
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_outlives_a_restart_of_the_server() -> Result<()> {
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let mut worker = worker(TASK_QUEUE, ("NATS_URL", &address))?;
    worker.prints("waiting for tasks").await?;
    nats.kill().await?;
    nats.restart().await?;
    producer(TASK_QUEUE, ("NATS_URL", &address)).await?;
    worker.prints("done:  Task 9").await?;
    worker.interrupt().await?;
    let worker = worker.end().await?;
    assert!(
        worker.status.success(),
        "{} {}",
        worker.status,
        worker.stderr
    );
    assert_eq!(done([&*worker.stdout]), each_once());
    Ok(())
}

// ---- Wrong words, no server ------------------------------------------------

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let usage = "usage: task_queue_nats";
    an_unknown_role_gets_the_usage(TASK_QUEUE, nowhere, usage).await
}

#[tokio::test]
async fn no_server_is_one_line_with_the_way_out() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://app:secret@localhost:1");
    let parts = ["no NATS server at localhost:1", "cargo lab up nats"];
    fail_with_one_line(&[TASK_QUEUE], nowhere, &parts).await
}
