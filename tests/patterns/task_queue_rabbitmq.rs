//! A task outlives its worker and its broker, because the queue is durable, the
//! task is persistent, and the acknowledgement comes last.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::FieldTable,
};
use patterns::task_queue::{TASKS, tasks};
use tests::{
    Example, TestBroker, broker, example::fail_with_one_line, observe, pika, wait,
};
use tokio::sync::Mutex;

use crate::task_queue::{
    an_unknown_role_gets_the_usage, done, each_once, producer,
    two_workers_share_the_tasks, worker,
};

const TASK_QUEUE: &str = env!("CARGO_BIN_EXE_task_queue_rabbitmq");
const QUEUE: &str = "task_queue";
const UNREADABLE: &str = "task_queue_unreadable";

/// The queue belongs to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// The shared RabbitMQ without the queues of the pattern.
async fn fresh() -> Result<(&'static str, &'static str)> {
    let address = broker::shared(Broker::RabbitMq).await?;
    observe::rabbitmq::delete_queues(address, &[QUEUE, UNREADABLE]).await?;
    Ok(("AMQP_URL", address))
}

async fn queue_is_empty(address: &str) -> Result<()> {
    wait::until("the queue to be empty", async || {
        let ready = observe::rabbitmq::ready(address, QUEUE).await?;
        ensure!(ready == 0, "{ready} tasks are left");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_story_ends_with_every_task_done() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    for _run in 0..2 {
        let ended = Example::start(TASK_QUEUE, &[], rabbitmq)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        queue_is_empty(rabbitmq.1).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_workers_task_goes_to_another() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;

    let mut first = worker(TASK_QUEUE, rabbitmq)?;
    first.prints("start: Task 0").await?;
    first.kill().await?;

    let mut second = worker(TASK_QUEUE, rabbitmq)?;
    second.prints("start: Task 0 (again)").await?;
    second.prints("done:  Task 9").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(done([&*second.stdout]), each_once());
    second.printed_what_the_book_shows("killed")?;
    queue_is_empty(rabbitmq.1).await
}

/// The control: the same fault, with the acknowledgement first.
#[tokio::test]
async fn control_acknowledged_first_a_killed_workers_task_is_lost() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;

    let mut first =
        Example::start(TASK_QUEUE, &["worker", "--ack-first"], rabbitmq)?;
    first.prints("start: Task 0").await?;
    // A task takes 300 ms, and it must not come to the next one.
    first.signal("STOP").await?;
    // The acknowledgement has been written before the line; when it has been
    // read, the next task is on its way to this worker.
    wait::until("Task 0 to be forgotten", async || {
        let ready = observe::rabbitmq::ready(rabbitmq.1, QUEUE).await?;
        ensure!(ready == TASKS as u32 - 2, "{ready} tasks are left");
        Ok(())
    })
    .await?;
    first.kill().await?;

    let mut second = worker(TASK_QUEUE, rabbitmq)?;
    second.prints("done:  Task 9").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    let mut expected = each_once();
    expected.remove("Task 0");
    assert_eq!(done([&*second.stdout]), expected);
    second.printed_what_the_book_shows("ack-first")?;
    queue_is_empty(rabbitmq.1).await
}

#[tokio::test]
async fn a_stopped_worker_finishes_and_acknowledges_the_task_in_hand() -> Result<()>
{
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;

    let mut first = worker(TASK_QUEUE, rabbitmq)?;
    first.prints("start: Task 0").await?;
    first.terminate().await?;
    let first = first.end().await?.succeeded()?;
    assert_eq!(
        first.stdout,
        "waiting for tasks in task_queue, Ctrl-C to stop\n\
         start: Task 0\ndone:  Task 0\nstopped\n"
    );

    let left = observe::rabbitmq::drain(rabbitmq.1, QUEUE).await?;
    let left: Vec<_> = left
        .iter()
        .map(|task| String::from_utf8_lossy(&task.data).into_owned())
        .collect();
    assert_eq!(left, tasks().skip(1).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn a_second_ctrl_c_ends_a_worker_at_once_and_its_task_comes_back() -> Result<()>
{
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;

    let mut first = worker(TASK_QUEUE, rabbitmq)?;
    first.prints("start: Task 0").await?;
    first.interrupt().await?;
    // Two signals that arrive together are one, so this goes on until the
    // second has been heard.
    let mut ended = tokio::spawn(async move {
        while first.interrupt().await.is_ok() {
            if let Ok(line) = tokio::time::timeout(
                Duration::from_millis(20),
                first.prints("done:  Task 0"),
            )
            .await
            {
                // Either the end of its output, or too late for the lesson.
                line.err();
                break;
            }
        }
        first.end().await
    });
    let ended = (&mut ended).await??;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.stdout);

    let mut second = worker(TASK_QUEUE, rabbitmq)?;
    second.prints("start: Task 0 (again)").await?;
    second.interrupt().await?;
    second.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn two_workers_share_the_tasks_and_none_is_done_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    let ready = async || Ok(());
    let empty = async || queue_is_empty(rabbitmq.1).await;
    // Every task takes the same time, so each worker gets every second one.
    two_workers_share_the_tasks(TASK_QUEUE, rabbitmq, 3, ready, empty).await
}

#[tokio::test]
async fn what_no_worker_can_read_is_kept_elsewhere() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;
    let (connection, channel) = observe::rabbitmq::connect(rabbitmq.1).await?;
    channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            b"\xff\xfe",
            BasicProperties::default().with_message_id("odd".into()),
        )
        .await?;
    connection.close(200, "".into()).await?;

    let mut worker = worker(TASK_QUEUE, rabbitmq)?;
    worker.prints("done:  Task 9").await?;
    wait::until("the unreadable task", async || {
        let ready = observe::rabbitmq::ready(rabbitmq.1, UNREADABLE).await?;
        ensure!(ready == 1, "{ready} messages");
        Ok(())
    })
    .await?;
    worker.interrupt().await?;
    let ended = worker.end().await?;
    assert!(ended.status.success(), "{}", ended.status);
    assert_eq!(
        ended.stderr,
        "not a task: 2 bytes, kept in task_queue_unreadable\n"
    );
    let kept = observe::rabbitmq::drain(rabbitmq.1, UNREADABLE).await?;
    assert_eq!(kept[0].data, b"\xff\xfe");
    queue_is_empty(rabbitmq.1).await
}

// ---- The broker dies -------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_keeps_every_confirmed_task() -> Result<()> {
    let mut rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    let address = rabbitmq.address().to_owned();
    producer(TASK_QUEUE, ("AMQP_URL", &address)).await?;

    tokio::time::sleep(observe::rabbitmq::QUEUE_IS_WRITTEN).await;
    rabbitmq.kill().await?;
    rabbitmq.restart().await?;

    let mut worker = worker(TASK_QUEUE, ("AMQP_URL", &address))?;
    worker.prints("done:  Task 9").await?;
    worker.interrupt().await?;
    let worker = worker.end().await?.succeeded()?;
    assert_eq!(done([&*worker.stdout]), each_once());
    Ok(())
}

/// The control: the same fault, with the queue and the messages of the guide's
/// first snippet, `QueueDeclareOptions::default()` and no delivery mode.
#[tokio::test(flavor = "multi_thread")]
async fn control_a_killed_broker_loses_a_transient_queue_with_its_tasks()
-> Result<()> {
    let mut rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    let address = rabbitmq.address().to_owned();
    let (_connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    channel
        .queue_declare(
            QUEUE.into(),
            QueueDeclareOptions::default(),
            FieldTable::default(),
        )
        .await?;
    for task in tasks() {
        let confirm = channel
            .basic_publish(
                "".into(),
                QUEUE.into(),
                BasicPublishOptions::default(),
                task.as_bytes(),
                BasicProperties::default(),
            )
            .await?;
        ensure!(confirm.await?.is_ack(), "{task} is not confirmed");
    }
    assert_eq!(
        observe::rabbitmq::ready(&address, QUEUE).await?,
        TASKS as u32
    );

    rabbitmq.kill().await?;
    rabbitmq.restart().await?;

    match observe::rabbitmq::ready(&address, QUEUE).await {
        Ok(left) => bail!("the queue is still there, with {left} tasks"),
        Err(error) => {
            ensure!(format!("{error:#}").contains("NOT_FOUND"), "{error:#}")
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_broker_dies_says_so_and_ends() -> Result<()> {
    let mut rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    let address = rabbitmq.address().to_owned();
    let mut worker = worker(TASK_QUEUE, ("AMQP_URL", &address))?;
    worker.prints("waiting for tasks").await?;
    rabbitmq.kill().await?;
    let ended = worker.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("lost RabbitMQ"), "{line}");
    Ok(())
}

// ---- Wrong words, no broker ------------------------------------------------

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("AMQP_URL", "amqp://localhost:1");
    let usage = "usage: task_queue_rabbitmq";
    an_unknown_role_gets_the_usage(TASK_QUEUE, nowhere, usage).await
}

#[tokio::test]
async fn no_rabbitmq_is_one_line_with_the_way_out() -> Result<()> {
    let nowhere = ("AMQP_URL", "amqp://guest:secret@localhost:1/%2f");
    let parts = ["no RabbitMQ at localhost:1", "cargo lab up rabbitmq"];
    fail_with_one_line(&[TASK_QUEUE], nowhere, &parts).await
}

// ---- With another client: the second of RabbitMQ's tutorials ---------------

#[tokio::test]
async fn pikas_worker_takes_our_tasks_and_ours_takes_pikas() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = fresh().await?;
    producer(TASK_QUEUE, rabbitmq).await?;
    let heard = pika::run(rabbitmq.1, &["get", QUEUE, "10"]).await?;
    let expected: Vec<_> = tasks().map(|task| format!("{QUEUE} {task}")).collect();
    assert_eq!(heard.lines().collect::<Vec<_>>(), expected);

    let mut worker = worker(TASK_QUEUE, rabbitmq)?;
    worker.prints("waiting for tasks").await?;
    pika::run(rabbitmq.1, &["publish", "", QUEUE, "Task from Python"]).await?;
    worker.prints("done:  Task from Python").await?;
    worker.interrupt().await?;
    worker.end().await?.succeeded()?;
    queue_is_empty(rabbitmq.1).await
}
