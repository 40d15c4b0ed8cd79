//! A task outlives its worker and its broker, because it is committed last.

use anyhow::{Result, ensure};
use lab::broker::Broker;
use patterns::task_queue::TASKS;
use tests::{
    Example, TestBroker, broker, example::fail_with_one_line, observe, wait,
};
use tokio::sync::Mutex;

use crate::task_queue::{
    an_unknown_role_gets_the_usage, done, each_once, producer,
    two_workers_share_the_tasks, worker,
};

const TASK_QUEUE: &str = env!("CARGO_BIN_EXE_task_queue_kafka");
const TOPIC: &str = "task-queue";
const UNREADABLE: &str = "task-queue.unreadable";
const GROUP: &str = "task-workers";
const PARTITIONS: i32 = 4;

/// The topic belongs to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The shared Kafka without the topics of the pattern.
async fn fresh() -> Result<(&'static str, &'static str)> {
    let address = broker::shared(Broker::Kafka).await?;
    // Killed workers of an earlier test are members for a while.
    wait::until("the group to be empty", async || {
        let members = observe::kafka::members(address, GROUP).await?;
        ensure!(members == 0, "it has {members} members");
        Ok(())
    })
    .await?;
    observe::kafka::forget(address, TOPIC, GROUP).await?;
    observe::kafka::forget(address, UNREADABLE, "none").await?;
    Ok(("KAFKA_BROKERS", address))
}

async fn all_is_committed(address: &str) -> Result<()> {
    wait::until("all tasks to be committed", async || {
        let lag = observe::kafka::lag(address, TOPIC, PARTITIONS, GROUP).await?;
        ensure!(lag == 0, "{lag} are left");
        Ok(())
    })
    .await
}

/// The task that a worker has begun.
async fn begun(worker: &mut Example) -> Result<String> {
    let line = worker.prints("start:").await?;
    Ok(line.replace("start: ", ""))
}

#[tokio::test]
async fn the_story_ends_with_every_task_done() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    for _run in 0..2 {
        let ended = Example::start(TASK_QUEUE, &[], kafka)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        all_is_committed(kafka.1).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_workers_task_goes_to_another() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    producer(TASK_QUEUE, kafka).await?;
    let mut first = worker(TASK_QUEUE, kafka)?;
    let task = begun(&mut first).await?;
    first.kill().await?;

    let mut second = worker(TASK_QUEUE, kafka)?;
    second.prints("waiting for tasks").await?;
    all_is_committed(kafka.1).await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(done([&*second.stdout]), each_once());
    ensure!(
        second.stdout.contains(&format!("start: {task}\n")),
        "{task} has not come again"
    );
    Ok(())
}

/// The control: the same fault, with the commit first.
#[tokio::test]
async fn control_committed_first_a_killed_workers_task_is_lost() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    producer(TASK_QUEUE, kafka).await?;
    let words = ["worker", "--commit-first"];
    let mut first = Example::start(TASK_QUEUE, &words, kafka)?;
    let task = begun(&mut first).await?;
    first.kill().await?;

    let second = worker(TASK_QUEUE, kafka)?;
    all_is_committed(kafka.1).await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    let mut expected = each_once();
    expected.remove(task.as_str());
    assert_eq!(done([&*second.stdout]), expected);
    Ok(())
}

/// Slow and dead look the same: what a worker has in hand when its session ends is
/// done twice, and the slow one says so.
#[tokio::test]
async fn a_worker_that_hangs_is_told_that_its_task_may_come_again() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    producer(TASK_QUEUE, kafka).await?;
    let mut first = worker(TASK_QUEUE, kafka)?;
    let task = begun(&mut first).await?;
    first.signal("STOP").await?;

    let second = worker(TASK_QUEUE, kafka)?;
    all_is_committed(kafka.1).await?;
    first.signal("CONT").await?;
    // The partitions are shared again, also with the first.
    wait::until("two members", async || {
        let members = observe::kafka::members(kafka.1, GROUP).await?;
        ensure!(members == 2, "there are {members}");
        Ok(())
    })
    .await?;
    first.interrupt().await?;
    let first = first.end().await?;
    ensure!(first.status.success(), "{}", first.status);
    let line = first.stderr.lines().next().unwrap_or_default();
    ensure!(
        line.starts_with(&task) && line.contains("this task may come again"),
        "{line}"
    );
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(done([&*second.stdout]), each_once());
    Ok(())
}

#[tokio::test]
async fn a_stopped_worker_finishes_and_commits_the_task_in_hand() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    producer(TASK_QUEUE, kafka).await?;
    let mut first = worker(TASK_QUEUE, kafka)?;
    let task = begun(&mut first).await?;
    first.terminate().await?;
    let first = first.end().await?.succeeded()?;
    assert_eq!(
        first.stdout,
        format!(
            "waiting for tasks in task-queue, Ctrl-C to stop\n\
             start: {task}\ndone:  {task}\nstopped\n"
        )
    );
    let lag = observe::kafka::lag(kafka.1, TOPIC, PARTITIONS, GROUP).await?;
    assert_eq!(lag, TASKS as i64 - 1);
    Ok(())
}

#[tokio::test]
async fn two_workers_share_the_tasks_and_none_is_done_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    // The topic comes with the first worker, and the partitions are divided then.
    let both = async || {
        wait::until("two members", async || {
            let members = observe::kafka::members(kafka.1, GROUP).await?;
            ensure!(members == 2, "there are {members}");
            Ok(())
        })
        .await
    };
    let empty = async || all_is_committed(kafka.1).await;
    // Of four partitions each has two, with four tasks at least.
    two_workers_share_the_tasks(TASK_QUEUE, kafka, 4, both, empty).await
}

#[tokio::test]
async fn what_no_worker_can_read_is_kept_elsewhere() -> Result<()> {
    let _turn = TURN.lock().await;
    let kafka = fresh().await?;
    producer(TASK_QUEUE, kafka).await?;
    observe::kafka::produce(kafka.1, TOPIC, "odd", "  ").await?;
    let worker = worker(TASK_QUEUE, kafka)?;
    all_is_committed(kafka.1).await?;
    worker.interrupt().await?;
    let ended = worker.end().await?;
    ensure!(ended.status.success(), "{}", ended.status);
    let kept = "not a task: 2 bytes, kept in task-queue.unreadable\n";
    assert_eq!(ended.stderr, kept);
    let kept =
        observe::kafka::read_all(kafka.1, UNREADABLE, PARTITIONS, "read_committed");
    let kept = kept.await?;
    assert_eq!(kept.len(), 1);
    assert_eq!(
        observe::kafka::text(&kept[0]),
        ("odd".to_owned(), "  ".to_owned())
    );
    Ok(())
}

// ---- The broker dies -------------------------------------------------------

/// Kafka's client waits for its broker: the worker goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_keeps_every_delivered_task() -> Result<()> {
    let mut kafka = TestBroker::start(Broker::Kafka).await?;
    let address = kafka.address().to_owned();
    let mut worker = worker(TASK_QUEUE, ("KAFKA_BROKERS", &address))?;
    worker.prints("waiting for tasks").await?;
    producer(TASK_QUEUE, ("KAFKA_BROKERS", &address)).await?;
    worker.prints("done:").await?;
    kafka.kill().await?;
    kafka.restart().await?;
    all_is_committed(&address).await?;
    worker.interrupt().await?;
    let worker = worker.end().await?;
    ensure!(worker.status.success(), "{}", worker.status);
    let done = done([&*worker.stdout]);
    assert_eq!(
        done.keys().collect::<Vec<_>>(),
        each_once().keys().collect::<Vec<_>>()
    );
    Ok(())
}

// ---- Wrong words, no broker ------------------------------------------------

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("KAFKA_BROKERS", "localhost:1");
    let usage = "usage: task_queue_kafka";
    an_unknown_role_gets_the_usage(TASK_QUEUE, nowhere, usage).await
}

#[tokio::test]
async fn no_kafka_is_one_line_with_the_way_out() -> Result<()> {
    let parts = ["no Kafka at localhost:1", "cargo lab up kafka"];
    fail_with_one_line(&[TASK_QUEUE], ("KAFKA_BROKERS", "localhost:1"), &parts).await
}
