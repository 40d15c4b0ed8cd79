//! A reminder comes when it is due and not before; a cancelled one never comes.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use lapin::options::BasicGetOptions;
use patterns::delayed_message::{Reminder, now};
use rdkafka::Message as _;
use rusqlite::Connection;
use tests::{
    Example, Supervised, TestBroker,
    example::Ended,
    observe::{self, rabbitmq::QUEUE_IS_WRITTEN},
    wait,
};
use tokio::{sync::Mutex, time::sleep};

use crate::common::{Pattern, nowhere};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_delayed_message_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_delayed_message_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_delayed_message_nats"),
    topics: &[
        ("reminders-planned", "reminder-scheduler"),
        ("reminders-due", "reminder-mail"),
    ],
    queues: &[
        "reminders.due",
        "reminders.unreadable",
        "reminders.planned-mixed",
        "reminders.planned-1s",
        "reminders.planned-2s",
        "reminders.planned-4s",
        "reminders.planned-10s",
        "reminders.planned-20s",
    ],
    streams: &["PAYMENT_REMINDERS"],
};
const PLANNED_TOPIC: &str = "reminders-planned";
const DUE_TOPIC: &str = "reminders-due";
const SCHEDULER: &str = "reminder-scheduler";
const PARTITIONS: i32 = 4;
const DUE_QUEUE: &str = "reminders.due";
const STREAM: &str = "PAYMENT_REMINDERS";

/// In milliseconds. Long enough for a slow machine to cancel before it is over.
const DELAY: i64 = 20_000;
/// So much later than its time a reminder may come on a loaded machine.
const TOLERANCE: i64 = 20_000;

type Variable<'a> = (&'static str, &'a str);

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_remind_in_time_and_never_of_what_is_paid() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// A reminder where it lies when it is due, with the time at which it came there, by the
/// clock of who put it there.
struct Arrival {
    reminder: Reminder,
    at: i64,
}

/// What Kafka's topic of due reminders holds.
async fn in_topic(address: &str) -> Result<Vec<Arrival>> {
    let records =
        observe::kafka::read_all(address, DUE_TOPIC, PARTITIONS, "read_committed")
            .await?;
    let arrivals = records.iter().map(|record| {
        let reminder = Reminder::read(record.payload().unwrap_or_default());
        Ok(Arrival {
            reminder: reminder.context("not a reminder")?,
            at: record.timestamp().to_millis().context("no time")?,
        })
    });
    arrivals.collect()
}

/// What is due in the stream of NATS; nobody takes it.
async fn in_stream(address: &str) -> Result<Vec<Arrival>> {
    let jetstream = observe::nats::jetstream(address).await?;
    let stream = jetstream.get_stream(STREAM).await?;
    let due = "payment.reminders.due.*";
    let mut subjects = stream.info_with_subjects(due).await?;
    let mut arrivals = Vec::new();
    while let Some(subject) = subjects.next().await {
        let (subject, count) = subject?;
        ensure!(count == 1, "{count} times {subject}");
        let message = stream.get_last_raw_message_by_subject(&subject).await?;
        let at = message.time.unix_timestamp_nanos() / 1_000_000;
        arrivals.push(Arrival {
            reminder: Reminder::read(&message.payload).context("no reminder")?,
            at: i64::try_from(at)?,
        });
    }
    Ok(arrivals)
}

async fn held(broker: Broker, address: &str) -> Result<Vec<Arrival>> {
    match broker {
        Broker::Kafka => in_topic(address).await,
        _ => in_stream(address).await,
    }
}

/// Waits until this reminder is due, and returns the invoices of all that are, each once
/// and in their order.
async fn due_until(
    broker: Broker,
    address: &str,
    last: &str,
) -> Result<Vec<Arrival>> {
    let mut arrivals = wait::until(last, async || {
        let arrivals = held(broker, address).await?;
        let found = arrivals.iter().any(|it| it.reminder.invoice == last);
        ensure!(found, "{:?}", invoices(&arrivals));
        Ok(arrivals)
    })
    .await?;
    arrivals.sort_by(|a, b| a.reminder.invoice.cmp(&b.reminder.invoice));
    // At least once: what was published as the broker died may be there twice.
    arrivals.dedup_by(|a, b| a.reminder == b.reminder);
    Ok(arrivals)
}

fn invoices(arrivals: &[Arrival]) -> Vec<&str> {
    let invoices = arrivals.iter().map(|it| it.reminder.invoice.as_str());
    invoices.collect()
}

async fn run(binary: &str, words: &[&str], variable: Variable<'_>) -> Result<Ended> {
    Example::start(binary, words, variable)?
        .end()
        .await?
        .succeeded()
}

/// Plans these for `DELAY` from now, and cancels number 2 while it is waiting. Returns
/// the time before all that.
async fn plan_and_cancel(
    broker: Broker,
    binary: &str,
    variable: Variable<'_>,
    paid: &str,
) -> Result<i64> {
    let before = now();
    let planned = run(binary, &["plan", "1", "3", "20"], variable).await?;
    assert_eq!(planned.stdout.matches("planned:").count(), 3);
    let words = match broker {
        Broker::RabbitMq => vec!["cancel", "2", paid],
        _ => vec!["cancel", "2"],
    };
    let cancelled = run(binary, &words, variable).await?;
    assert_eq!(cancelled.stdout, "cancelled: invoice-2\n");
    Ok(before)
}

/// Without this the test proves nothing.
fn still_waiting(before: i64) -> Result<()> {
    ensure!(
        now() < before + DELAY,
        "this machine is too slow: it is due"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reminder_comes_after_its_time_and_a_cancelled_one_never() -> Result<()> {
    let _turn = TURN.lock().await;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("reminders.db");
    let file = file.to_string_lossy();
    tokio::try_join!(
        comes_in_time(Broker::Kafka, PATTERN.kafka, Some(&file)),
        comes_in_time(Broker::Nats, PATTERN.nats, None),
        comes_in_time_on_rabbitmq(),
    )?;
    Ok(())
}

async fn comes_in_time(
    broker: Broker,
    binary: &str,
    table: Option<&str>,
) -> Result<()> {
    let variable = PATTERN.fresh(broker).await?;
    let start = |file| Example::start(binary, &["schedule", file], variable);
    let scheduler = table.map(start).transpose()?;
    // Planned for later, and then again for an earlier time: it has moved.
    run(binary, &["plan", "5", "5", "3600"], variable).await?;
    let before = plan_and_cancel(broker, binary, variable, "").await?;
    still_waiting(before)?;
    run(binary, &["plan", "5", "5", "20"], variable).await?;
    // Due after all the others.
    run(binary, &["plan", "6", "6", "22"], variable).await?;
    let arrivals = due_until(broker, variable.1, "invoice-6").await?;
    let expected = ["invoice-1", "invoice-3", "invoice-5", "invoice-6"];
    assert_eq!(invoices(&arrivals), expected, "{broker:?}");
    for Arrival { reminder, at } in &arrivals {
        let due = reminder.due;
        ensure!(due >= before + DELAY, "{broker:?}: {reminder:?}");
        ensure!(
            *at >= due,
            "{broker:?}: {reminder:?} came at {at}, too early"
        );
        ensure!(
            *at < due + TOLERANCE,
            "{broker:?}: {reminder:?} came at {at}"
        );
    }

    let mut reader = Example::start(binary, &["remind"], variable)?;
    reader.prints("due:       invoice-6").await?;
    reader.interrupt().await?;
    let reader = reader.end().await?.succeeded()?;
    ensure!(!reader.stdout.contains("invoice-2"), "{}", reader.stdout);
    ensure!(reader.stdout.ends_with("stopped\n"), "{}", reader.stdout);
    if broker == Broker::Nats {
        let late = run(binary, &["cancel", "1"], variable).await?;
        let said = "too late:  invoice-1 is not planned, or no longer\n";
        assert_eq!(late.stdout, said);
        // Acknowledged, and gone.
        wait::until("nothing left", async || {
            let jetstream = observe::nats::jetstream(variable.1).await?;
            let mut stream = jetstream.get_stream(STREAM).await?;
            let left = stream.info().await?.state.messages;
            ensure!(left == 0, "{left} messages");
            Ok(())
        })
        .await?;
    }
    if let Some(scheduler) = scheduler {
        scheduler.interrupt().await?;
        let ended = scheduler.end().await?.succeeded()?;
        ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    }
    Ok(())
}

/// The message of the cancelled one comes, and is dropped by who would send the mail.
async fn comes_in_time_on_rabbitmq() -> Result<()> {
    let (broker, binary) = (Broker::RabbitMq, PATTERN.rabbitmq);
    let variable = PATTERN.fresh(broker).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("shop.db");
    let paid = file.to_string_lossy();
    let before = plan_and_cancel(broker, binary, variable, &paid).await?;
    still_waiting(before)?;
    // Asked of the broker: the reader would wait for what comes too early.
    let late = first_due(variable.1).await?;
    ensure!(late < TOLERANCE, "{late} ms after its time");
    let mut reader = Example::start(binary, &["remind", &paid], variable)?;
    let lines = [
        "due:       invoice-1",
        "dropped:   invoice-2, which is paid",
        "due:       invoice-3",
    ];
    for line in lines {
        reader.prints(line).await?;
    }
    reader.interrupt().await?;
    let reader = reader.end().await?.succeeded()?;
    let expected = format!(
        "ready:     reminders from {DUE_QUEUE}, Ctrl-C to stop\n{}\nstopped\n",
        lines.join("\n")
    );
    assert_eq!(reader.stdout, expected);
    Ok(())
}

/// Waits for the first message in the queue of what is due, leaves it there, and returns
/// by how many milliseconds it is late.
async fn first_due(address: &str) -> Result<i64> {
    let (connection, channel) = observe::rabbitmq::connect(address).await?;
    let late = wait::until("the first that is due", async || {
        let options = BasicGetOptions::default();
        let first = channel.basic_get(DUE_QUEUE.into(), options).await?;
        let first = first.context("nothing is due")?;
        let reminder = Reminder::read(&first.data).context("not a reminder")?;
        Ok(now() - reminder.due)
    })
    .await?;
    // Not acknowledged, so it goes back to its place.
    connection.close(200, "".into()).await?;
    ensure!(late >= 0, "{} ms too early", -late);
    Ok(late)
}

/// What waits is on the disk of the broker, and its time goes on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_reminder_outlives_a_broker_that_is_killed_while_it_waits() -> Result<()> {
    tokio::try_join!(outlives_kafka(), outlives_rabbitmq(), outlives_nats())?;
    Ok(())
}

async fn outlives_kafka() -> Result<()> {
    let binary = PATTERN.kafka;
    let mut kafka = TestBroker::start(Broker::Kafka).await?;
    let address = kafka.address().to_owned();
    let variable = (Broker::Kafka.address_var(), address.as_str());
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("reminders.db");
    let words = ["schedule", &file.to_string_lossy()];
    let mut scheduler = Supervised::start(binary, &words, &[variable])?;
    scheduler.prints("ready:").await?;
    let before = plan_and_cancel(Broker::Kafka, binary, variable, "").await?;
    scheduler.prints("cancelled: invoice-2").await?;
    kafka.kill().await?;
    still_waiting(before)?;
    kafka.restart().await?;
    run(binary, &["plan", "6", "6", "20"], variable).await?;
    scheduler.prints("published: invoice-6").await?;
    let arrivals = due_until(Broker::Kafka, &address, "invoice-6").await?;
    came_late_enough(&arrivals, before)?;
    scheduler.stop().await?;
    Ok(())
}

async fn outlives_nats() -> Result<()> {
    let binary = PATTERN.nats;
    let mut nats = TestBroker::start(Broker::Nats).await?;
    let address = nats.address().to_owned();
    let variable = (Broker::Nats.address_var(), address.as_str());
    let before = plan_and_cancel(Broker::Nats, binary, variable, "").await?;
    nats.kill().await?;
    still_waiting(before)?;
    // Down when it is due: it comes afterwards.
    wait::until("the time of the reminders", async || {
        ensure!(now() > before + DELAY + 2_000, "not yet");
        Ok(())
    })
    .await?;
    nats.restart().await?;
    run(binary, &["plan", "6", "6", "20"], variable).await?;
    let arrivals = due_until(Broker::Nats, &address, "invoice-6").await?;
    came_late_enough(&arrivals, before)
}

fn came_late_enough(arrivals: &[Arrival], before: i64) -> Result<()> {
    assert_eq!(invoices(arrivals), ["invoice-1", "invoice-3", "invoice-6"]);
    for Arrival { reminder, at } in arrivals {
        ensure!(reminder.due >= before + DELAY, "{reminder:?}");
        ensure!(*at >= reminder.due, "{reminder:?} came at {at}, too early");
    }
    Ok(())
}

async fn outlives_rabbitmq() -> Result<()> {
    let binary = PATTERN.rabbitmq;
    let mut rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    let address = rabbitmq.address().to_owned();
    let variable = (Broker::RabbitMq.address_var(), address.as_str());
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("shop.db");
    let paid = file.to_string_lossy();
    // Declares the queues, which are not brand new when the broker dies.
    let mut reader = Example::start(binary, &["remind", &paid], variable)?;
    reader.prints("ready:").await?;
    reader.interrupt().await?;
    reader.end().await?.succeeded()?;
    sleep(QUEUE_IS_WRITTEN).await;

    let before = plan_and_cancel(Broker::RabbitMq, binary, variable, &paid).await?;
    assert_eq!(observe::rabbitmq::ready(&address, DUE_QUEUE).await?, 0);
    rabbitmq.kill().await?;
    still_waiting(before)?;
    rabbitmq.restart().await?;
    first_due(&address).await?;
    // All three: nothing can be taken out of the middle of a queue.
    wait::until("all that is due", async || {
        let due = observe::rabbitmq::ready(&address, DUE_QUEUE).await?;
        ensure!(due == 3, "{due} are due");
        Ok(())
    })
    .await?;
    let mut reader = Example::start(binary, &["remind", &paid], variable)?;
    reader.prints("due:       invoice-3").await?;
    reader.interrupt().await?;
    let reader = reader.end().await?.succeeded()?;
    let lines: Vec<&str> = reader.stdout.lines().skip(1).collect();
    let expected = [
        "due:       invoice-1",
        "dropped:   invoice-2, which is paid",
        "due:       invoice-3",
        "stopped",
    ];
    assert_eq!(lines, expected);
    Ok(())
}

/// The control: a limit for each message, in one queue. One second takes as long as the
/// four seconds before it. In queues of their own, the story has them in their order.
#[tokio::test]
async fn control_in_one_queue_a_short_delay_waits_for_a_long_one() -> Result<()> {
    let _turn = TURN.lock().await;
    let binary = PATTERN.rabbitmq;
    let variable = PATTERN.fresh(Broker::RabbitMq).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("shop.db");
    let mut reader =
        Example::start(binary, &["remind", &file.to_string_lossy()], variable)?;
    reader.prints("ready:").await?;
    let before = now();
    for words in [["plan", "1", "1", "4"], ["plan", "2", "2", "1"]] {
        let words = [&words[..], &["--one-queue"]].concat();
        run(binary, &words, variable).await?;
    }
    reader.prints("due:       invoice-2").await?;
    let took = now() - before;
    ensure!(took >= 4_000, "one second took {took} ms");
    reader.interrupt().await?;
    let reader = reader.end().await?.succeeded()?;
    reader.printed_what_the_book_shows("one-queue")
}

/// A scheduler that has read the plan of invoice 1 is killed before it is due. Another
/// one is started in its place, and plans invoice 2 as well. Returns what the second one
/// said.
async fn killed_while_it_waits(
    table: &str,
    variable: Variable<'_>,
) -> Result<Ended> {
    let binary = PATTERN.kafka;
    let words = ["schedule", table];
    let mut first = Example::start(binary, &words, variable)?;
    first.prints("ready:").await?;
    run(binary, &["plan", "1", "1", "20"], variable).await?;
    let before = now();
    first.prints("planned:   invoice-1").await?;
    if table == "--in-memory" {
        wait::until("the plan to be committed", async || {
            let address = variable.1;
            let lag =
                observe::kafka::lag(address, PLANNED_TOPIC, PARTITIONS, SCHEDULER);
            let lag = lag.await?;
            ensure!(lag == 0, "{lag} left");
            Ok(())
        })
        .await?;
    }
    first.kill().await?;
    // By less than the delay of the plan.
    ensure!(now() < before + DELAY / 2, "this machine is too slow");

    let mut second = Example::start(binary, &words, variable)?;
    second.prints("ready:").await?;
    // Due after invoice 1.
    run(binary, &["plan", "2", "2", "20"], variable).await?;
    second.prints("published: invoice-2").await?;
    second.interrupt().await?;
    second.end().await?.succeeded()
}

#[tokio::test]
async fn a_scheduler_goes_on_with_its_table_after_a_kill() -> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::Kafka).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("reminders.db");
    killed_while_it_waits(&file.to_string_lossy(), variable).await?;
    let arrivals = in_topic(variable.1).await?;
    let mut found = invoices(&arrivals);
    found.sort_unstable();
    assert_eq!(found, ["invoice-1", "invoice-2"]);
    Ok(())
}

/// The control: Kafka remembers that the plan was read, and nobody remembers the plan.
#[tokio::test]
async fn control_a_scheduler_with_its_table_in_memory_forgets_after_a_kill()
-> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::Kafka).await?;
    let second = killed_while_it_waits("--in-memory", variable).await?;
    let arrivals = in_topic(variable.1).await?;
    assert_eq!(invoices(&arrivals), ["invoice-2"]);
    second.printed_what_the_book_shows("in-memory")
}

/// The plans are in its table and due; that they are cancelled is still in Kafka, in
/// all of its partitions.
#[tokio::test]
async fn cancelled_while_the_scheduler_is_down_it_never_comes() -> Result<()> {
    let _turn = TURN.lock().await;
    let binary = PATTERN.kafka;
    let variable = PATTERN.fresh(Broker::Kafka).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("reminders.db");
    let words = ["schedule", &file.to_string_lossy()];
    let mut first = Example::start(binary, &words, variable)?;
    first.prints("ready:").await?;
    let before = now();
    run(binary, &["plan", "1", "8", "20"], variable).await?;
    wait::until("eight plans in the table", async || {
        let count = "SELECT count(*) FROM reminders";
        let database = Connection::open(&file)?;
        let found: i64 = database.query_row(count, (), |row| row.get(0))?;
        ensure!(found == 8, "{found}");
        Ok(())
    })
    .await?;
    first.kill().await?;
    still_waiting(before)?;
    for number in 1..=8 {
        run(binary, &["cancel", &number.to_string()], variable).await?;
    }
    wait::until("the time of the reminders", async || {
        // They were planned within a second or two.
        ensure!(now() > before + DELAY + 2_000, "not yet");
        Ok(())
    })
    .await?;

    let mut second = Example::start(binary, &words, variable)?;
    second.prints("ready:").await?;
    run(binary, &["plan", "9", "9", "1"], variable).await?;
    second.prints("published: invoice-9").await?;
    second.interrupt().await?;
    let second = second.end().await?.succeeded()?;
    assert_eq!(second.stdout.matches("cancelled: ").count(), 8);
    assert_eq!(invoices(&in_topic(variable.1).await?), ["invoice-9"]);
    Ok(())
}

#[tokio::test]
async fn what_nobody_can_read_is_kept_and_keeps_nobody() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("some.db");
        let file = file.to_string_lossy();
        // Declares what there is.
        run(binary, &["plan", "1", "1", "1"], variable).await?;
        noise(broker, variable.1).await?;
        run(binary, &["plan", "2", "2", "1"], variable).await?;
        let words: &[&str] = match broker {
            Broker::RabbitMq => &["remind", &file],
            _ => &["remind"],
        };
        let mut scheduler = None;
        if broker == Broker::Kafka {
            let words = ["schedule", &file];
            scheduler = Some(Example::start(binary, &words, variable)?);
        }
        let mut reader = Example::start(binary, words, variable)?;
        reader.prints("due:       invoice-2").await?;
        reader.interrupt().await?;
        let reader = reader.end().await?;
        ensure!(reader.status.success(), "{broker:?}: {}", reader.stderr);
        let complaint = reader.stderr.starts_with("not a reminder");
        ensure!(complaint, "{broker:?}: {:?}", reader.stderr);
        if let Some(scheduler) = scheduler {
            scheduler.interrupt().await?;
            let ended = scheduler.end().await?;
            assert_eq!(ended.stderr, "not a reminder, set aside: \"noise\"\n");
        }
        let kept = kept_noise(broker, variable.1, Path::new(&*file)).await?;
        assert_eq!(kept, b"\x01", "{broker:?}");
    }
    Ok(())
}

async fn noise(broker: Broker, address: &str) -> Result<()> {
    match broker {
        Broker::Kafka => {
            for topic in [PLANNED_TOPIC, DUE_TOPIC] {
                observe::kafka::produce(address, topic, "noise", "\u{1}").await?;
            }
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            let (options, properties) = Default::default();
            let queue = DUE_QUEUE.into();
            channel
                .basic_publish("".into(), queue, options, b"\x01", properties)
                .await?;
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let (subject, noise) = ("payment.reminders.due.noise", "\u{1}".into());
            jetstream.publish(subject, noise).await?.await?;
        }
    }
    Ok(())
}

/// Where the bytes are afterwards.
async fn kept_noise(broker: Broker, address: &str, file: &Path) -> Result<Vec<u8>> {
    match broker {
        Broker::Kafka => {
            let database = Connection::open(file)?;
            let kept = "SELECT payload FROM unreadable";
            Ok(database.query_row(kept, (), |row| row.get(0))?)
        }
        Broker::RabbitMq => {
            let queue = "reminders.unreadable";
            let kept = observe::rabbitmq::drain(address, queue).await?;
            let kept = kept.first().context("nothing is kept")?;
            Ok(kept.data.clone())
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let stream = jetstream.get_stream(STREAM).await?;
            let subject = "payment.reminders.unreadable";
            let kept = stream.get_last_raw_message_by_subject(subject).await?;
            Ok(kept.payload.to_vec())
        }
    }
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 5] = [
        &["plan", "9", "1", "5"],
        &["plan", "1", "9"],
        &["plan", "1", "9", "soon"],
        &["cancel"],
        &["x"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await?;

    let (broker, binary) = (Broker::RabbitMq, PATTERN.rabbitmq);
    let variable = (broker.address_var(), nowhere(broker));
    let words = ["plan", "1", "9", "7"];
    let ended = Example::start(binary, &words, variable)?.end().await?;
    ended
        .refused("no queue waits for 7 s; there are queues for [1, 2, 4, 10, 20]")?;

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("shop.db");
    std::fs::write(&file, "this is no database, but a text about one")?;
    let file = file.to_string_lossy();
    for (binary, words) in [
        (PATTERN.rabbitmq, &["cancel", "1", &file][..]),
        (PATTERN.rabbitmq, &["remind", &file][..]),
        (PATTERN.kafka, &["schedule", &file][..]),
    ] {
        let ended = Example::start(binary, words, variable)?.end().await?;
        ended.refused("cannot use")?;
    }
    Ok(())
}
