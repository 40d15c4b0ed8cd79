//! Request and reply: what an answer takes, by direct reply-to and by a queue.
//!
//! Teaches: an answer by direct reply-to goes to the channel of the asker, and no
//! queue stands between. The questions are due by the clock, and each is measured
//! from then on, whenever it could be sent: a responder that stands still for a
//! second is felt by all who would have asked meanwhile.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --release --bin rabbitmq_rpc_latency
//! cargo run --release --bin rabbitmq_rpc_latency responder          # terminal 1
//! cargo run --release --bin rabbitmq_rpc_latency direct 10000 500   # terminal 2
//! ```
//!
//! The ways are `direct` and `queue`; then how many, and how many a second.
//!
//! Expected output:
//!
//! ```text
//! ready:    answers latency.quotes
//! answered: 500 requests of 100 B in <seconds> s (p50 <us> us, p99 <us> us), direct
//! answered: 500 requests of 100 B in <seconds> s (p50 <us> us, p99 <us> us), queue
//! ```
//!
//! Left out on purpose: several questions at a time, as `rabbitmq_rpc` has them.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use hdrhistogram::Histogram;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{
        BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
    uri::AMQPUri,
};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUESTIONS: &str = "latency.quotes";
const REPLY_TO: &str = "amq.rabbitmq.reply-to";
const SIZE: usize = 100;
const USAGE: &str = "usage: rabbitmq_rpc_latency [responder | \
     direct COUNT [RATE] | queue COUNT [RATE]]";

/// Of the story: how many questions, and how many a second.
const COUNT: u32 = 500;
const RATE: u32 = 500;

/// How long the broker, or an answer, may take before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// The same for the broker, which then drops the question, in milliseconds.
const EXPIRATION: &str = "8000";

// One thread: this program waits for lapin's and lapin's for this program, by
// turns. With more of them each turn would wake another one.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let numbers: Option<Vec<u32>> = words
        .iter()
        .skip(1)
        .map(|word| word.parse().ok().filter(|number| *number > 0))
        .collect();
    let way = words.first().copied().and_then(Way::parse);
    let result = match (&words[..], way, numbers.as_deref()) {
        ([], ..) => story().await,
        (["responder"], ..) => responder().await,
        (_, Some(way), Some(&[count])) => requester(way, count, None).await,
        (_, Some(way), Some(&[count, rate])) => {
            requester(way, count, Some(rate)).await
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How an answer comes back.
#[derive(Clone, Copy)]
enum Way {
    Direct,
    Queue,
}

impl Way {
    const ALL: [Self; 2] = [Self::Direct, Self::Queue];

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Queue => "queue",
        }
    }
}

/// Both halves in one program, each with a connection of its own.
async fn story() -> Result<()> {
    let at_responder = connect().await?;
    let (channel, questions) = take_questions(&at_responder).await?;
    let answering = tokio::spawn(answer_all(channel, questions));
    let at_requester = connect().await?;
    for way in Way::ALL {
        ask_all(&at_requester, way, COUNT, Some(RATE)).await?;
    }
    answering.abort();
    at_requester.close(200, "done".into()).await?;
    at_responder.close(200, "done".into()).await?;
    Ok(())
}

async fn responder() -> Result<()> {
    let stop_signal = stop_signal()?;
    let connection = connect().await?;
    let (channel, questions) = take_questions(&connection).await?;
    tokio::select! {
        biased;
        () = stop_signal => {}
        ended = answer_all(channel, questions) => ended?,
    }
    connection.close(200, "done".into()).await?;
    println!("stopped");
    Ok(())
}

async fn requester(way: Way, count: u32, rate: Option<u32>) -> Result<()> {
    let connection = connect().await?;
    ask_all(&connection, way, count, rate).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ---- Responder -------------------------------------------------------------

// ANCHOR: answer
async fn take_questions(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    // A classic queue: to write a question to the disk and to replicas takes longer
    // than to answer it, and its asker asks again.
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("classic".into()),
    );
    channel
        .queue_declare(QUESTIONS.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {QUESTIONS} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    let options = QueuePurgeOptions::default();
    channel.queue_purge(QUESTIONS.into(), options).await?;
    let questions = consume(&channel, QUESTIONS).await?;
    println!("ready:    answers {QUESTIONS}");
    Ok((channel, questions))
}

/// Sends each question back as its answer.
async fn answer_all(channel: Channel, mut questions: Consumer) -> Result<()> {
    while let Some(question) = questions.next().await {
        let question = question?;
        let Some(reply_to) = question.properties.reply_to().clone() else {
            eprintln!("a question without reply_to is left unanswered");
            continue;
        };
        let mut properties = BasicProperties::default();
        if let Some(id) = question.properties.correlation_id().clone() {
            properties = properties.with_correlation_id(id);
        }
        publish(&channel, reply_to, &question.data, properties).await?;
    }
    bail!("RabbitMQ ended the consumer of {QUESTIONS}")
}
// ANCHOR_END: answer

// ---- Requester -------------------------------------------------------------

// ANCHOR: ask
/// Asks again and again: by the clock, or, without a rate, as soon as there is an
/// answer, so that each question is due when it is sent.
async fn ask_all(
    connection: &Connection,
    way: Way,
    count: u32,
    rate: Option<u32>,
) -> Result<()> {
    let channel = connection.create_channel().await?;
    responder_is_there(&channel).await?;
    let reply_to = match way {
        Way::Direct => ShortString::from(REPLY_TO),
        Way::Queue => queue_of_our_own(&channel).await?,
    };
    let mut answers = consume(&channel, reply_to.as_str()).await?;
    let properties = BasicProperties::default()
        .with_reply_to(reply_to)
        .with_expiration(EXPIRATION.into());
    let payload = vec![b'q'; SIZE];
    // In microseconds; three digits, whatever the size of the value.
    let mut latencies = Histogram::<u64>::new(3)?;
    let started = Instant::now();
    let mut due_times = rate.map(|rate| clock(started, count, rate));
    for number in 0..count {
        let due = match &mut due_times {
            Some(times) => times.recv().await.context("the clock ended")?,
            None => Instant::now(),
        };
        let id = ShortString::from(number.to_string());
        let properties = properties.clone().with_correlation_id(id.clone());
        publish(&channel, QUESTIONS.into(), &payload, properties).await?;
        let answer = timeout(PATIENCE, answer_to(&mut answers, &id)).await;
        answer
            .with_context(|| format!("no answer from {QUESTIONS} within 8 s"))??;
        latencies.record(u64::try_from(due.elapsed().as_micros())?)?;
    }
    println!(
        "answered: {count} requests of {SIZE} B in {:.3} s (p50 {} us, p99 {} us), {}",
        started.elapsed().as_secs_f64(),
        latencies.value_at_quantile(0.5),
        latencies.value_at_quantile(0.99),
        way.name()
    );
    channel.close(200, "".into()).await?;
    Ok(())
}

/// Passes over what answers an earlier question.
async fn answer_to(answers: &mut Consumer, id: &ShortString) -> Result<()> {
    while let Some(answer) = answers.next().await {
        if answer?.properties.correlation_id().as_ref() == Some(id) {
            return Ok(());
        }
    }
    bail!("RabbitMQ ended the consumer of the answers")
}
// ANCHOR_END: ask

/// Otherwise the first question would tell it, eight seconds later.
async fn responder_is_there(channel: &Channel) -> Result<()> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::durable()
    };
    let none = FieldTable::default();
    let queue = channel.queue_declare(QUESTIONS.into(), passive, none).await;
    let consumers = queue.map_or(0, |queue| queue.consumer_count());
    ensure!(
        consumers > 0,
        "nobody answers {QUESTIONS}; start one: rabbitmq_rpc_latency responder"
    );
    Ok(())
}

/// With a name by RabbitMQ, and gone with this connection.
async fn queue_of_our_own(channel: &Channel) -> Result<ShortString> {
    let exclusive = QueueDeclareOptions::exclusive();
    let none = FieldTable::default();
    let queue = channel.queue_declare("".into(), exclusive, none).await?;
    Ok(queue.name().clone())
}

/// Sends each moment at which a question is due, when it has come. From a thread of
/// its own, since Tokio's timers count in milliseconds.
fn clock(started: Instant, count: u32, rate: u32) -> mpsc::Receiver<Instant> {
    // If the requester is late, this waits; the moments stay those of the plan.
    let (sender, due_times) = mpsc::channel(1);
    thread::spawn(move || {
        for number in 0..count {
            let due = started
                + Duration::from_secs_f64(f64::from(number) / f64::from(rate));
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.blocking_send(due).is_err() {
                break;
            }
        }
    });
    due_times
}

// ---- Channel and connection ------------------------------------------------

/// Without confirms: the answer is one.
async fn publish(
    channel: &Channel,
    queue: ShortString,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish("".into(), queue, options, payload, properties);
    // Blocked by RabbitMQ, it would wait for ever.
    let sent = timeout(PATIENCE, sent).await;
    sent.context("RabbitMQ has taken nothing for 8 s; it may be blocked")??;
    Ok(())
}

/// Without acknowledgements, as direct reply-to demands it for the answers; and for
/// the questions a second delivery would come after their asker has given up.
async fn consume(channel: &Channel, queue: &str) -> Result<Consumer> {
    let no_ack = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let none = FieldTable::default();
    let consumer = channel.basic_consume(queue.into(), "".into(), no_ack, none);
    Ok(consumer.await?)
}

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
}

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
