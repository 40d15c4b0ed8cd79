//! Request and reply: a hundred questions at a time, and each gets its own answer.
//!
//! Teaches: direct reply-to needs no queue for the answers: they come on the channel
//! that has asked, and a correlation id tells whose they are. A question that nobody
//! has taken within its time RabbitMQ drops by itself, by `expiration`. It does not
//! say that nobody is there: only the time limit ends the waiting.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin request_reply_rabbitmq             # the whole story
//! cargo run --bin request_reply_rabbitmq serve       # terminal 1, and 2
//! cargo run --bin request_reply_rabbitmq ask 100     # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! asked:    100 questions at the same time
//! answered: 100, each with its own answer
//! late:     a question whose deadline has passed has no answer
//! nobody:   no answer within 300ms
//! ```
//!
//! Left out on purpose: a reply queue of one's own, which outlives the connection;
//! see rabbitmq_rpc.

use std::{
    collections::HashMap,
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::request_reply::{
    Answer, DEADLINE, answer, deadline, is_late, question,
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::timeout,
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "price.requests";
const CONSUMER_TAG: &str = "price-server";
/// Not a queue: RabbitMQ sends what goes here to the channel that has asked.
const REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// How many questions a server may hold.
const PREFETCH: u16 = 20;
const USAGE: &str = "usage: request_reply_rabbitmq [serve | ask COUNT]";

/// How long an answer may take, also RabbitMQ's.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long one waits that is not answered in the story.
const IMPATIENCE: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["serve"] => serve_until_stopped().await,
        ["ask", count] => match count.parse() {
            Ok(count) => ask_many(count).await,
            Err(_) => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

// ---- Server ----------------------------------------------------------------

async fn serve_until_stopped() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, mut questions) = questions(&connection).await?;
    println!("ready:    answers to {QUEUE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = questions.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ")?;
        println!("{}", serve(&channel, &delivery).await?);
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

async fn questions(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let questions = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, questions))
}

// ANCHOR: serve
async fn serve(channel: &Channel, delivery: &Delivery) -> Result<&'static str> {
    let said = answer_to(channel, delivery).await?;
    let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
    ack.await.context("lost RabbitMQ")??;
    Ok(said)
}

async fn answer_to(channel: &Channel, delivery: &Delivery) -> Result<&'static str> {
    let properties = &delivery.properties;
    if is_late(deadline_of(delivery).as_deref(), SystemTime::now()) {
        return Ok("skipped:  nobody waits any more");
    }
    let Some(reply_to) = properties.reply_to().clone() else {
        return Ok("skipped:  nobody wants an answer");
    };
    let mut correlated = BasicProperties::default();
    if let Some(id) = properties.correlation_id().clone() {
        correlated = correlated.with_correlation_id(id);
    }
    let answer = serde_json::to_vec(&answer(&delivery.data))?;
    let options = BasicPublishOptions::default();
    // Nobody confirms it: whoever has asked and is gone needs no answer.
    channel
        .basic_publish("".into(), reply_to, options, &answer, correlated)
        .await?;
    Ok("answered: a question")
}
// ANCHOR_END: serve

fn deadline_of(delivery: &Delivery) -> Option<String> {
    let headers = delivery.properties.headers().as_ref()?;
    match headers.inner().get(DEADLINE)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        _ => None,
    }
}

// ---- Client ----------------------------------------------------------------

async fn ask_many(count: u64) -> Result<()> {
    let connection = connect().await?;
    let caller = Arc::new(Caller::new(&connection).await?);
    let answered = ask_all(&caller, count).await?;
    println!("answered: {answered} of {count}, each with its own answer");
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: ask
/// Who waits for which answer, by correlation id.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>>;

struct Caller {
    channel: Channel,
    waiting: Waiting,
}

impl Caller {
    async fn new(connection: &Connection) -> Result<Self> {
        let channel = connection.create_channel().await?;
        declare(&channel, QUEUE).await?;
        let no_ack = BasicConsumeOptions {
            no_ack: true, // direct reply-to knows no other way
            ..BasicConsumeOptions::default()
        };
        // Before the first question, and on the channel that asks.
        let mut answers = channel
            .basic_consume(REPLY_TO.into(), "".into(), no_ack, FieldTable::default())
            .await?;
        let waiting = Waiting::default();
        let of_answers = Arc::clone(&waiting);
        // Ends with the connection.
        tokio::spawn(async move {
            while let Some(Ok(answer)) = answers.next().await {
                let id = answer.properties.correlation_id().as_ref();
                let waits = id.and_then(|id| lock(&of_answers).remove(id.as_str()));
                // One that nobody waits for is late, or a second one.
                if let Some(waits) = waits {
                    let _gone = waits.send(answer.data.clone());
                }
            }
        });
        Ok(Self { channel, waiting })
    }

    async fn ask(&self, number: u64, patience: Duration) -> Result<Answer> {
        let until = deadline(SystemTime::now(), patience);
        self.ask_until(number, patience, &until).await
    }

    async fn ask_until(
        &self,
        number: u64,
        patience: Duration,
        until: &str,
    ) -> Result<Answer> {
        let (sender, answer) = oneshot::channel();
        let id = format!("question-{number}");
        lock(&self.waiting).insert(id.clone(), sender);
        let mut headers = FieldTable::default();
        headers.insert(DEADLINE.into(), AMQPValue::LongString(until.into()));
        let properties = BasicProperties::default()
            .with_reply_to(REPLY_TO.into())
            .with_correlation_id(id.as_str().into())
            .with_headers(headers)
            // RabbitMQ itself drops it after this time, in milliseconds.
            .with_expiration(patience.as_millis().to_string().into());
        let payload = serde_json::to_vec(&question(number))?;
        let options = BasicPublishOptions::default();
        self.channel
            .basic_publish("".into(), QUEUE.into(), options, &payload, properties)
            .await?;
        let answer = timeout(patience, answer).await;
        lock(&self.waiting).remove(&id);
        let answer = answer
            .map_err(|_elapsed| {
                anyhow!("no answer from {QUEUE} within {patience:?}")
            })?
            .context("lost RabbitMQ")?;
        Ok(serde_json::from_slice(&answer)?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
// ANCHOR_END: ask

/// Asks so many questions at the same time, and compares each answer with its question.
async fn ask_all(caller: &Arc<Caller>, count: u64) -> Result<u64> {
    let mut questions = JoinSet::new();
    for number in 1..=count {
        let caller = Arc::clone(caller);
        questions.spawn(async move {
            let answer = caller.ask(number, PATIENCE).await?;
            let own = answer == Answer::Price(number * 10);
            ensure!(own, "{number} labels: somebody else's answer, {answer:?}");
            Ok(())
        });
    }
    let mut answered = 0;
    while let Some(question) = questions.join_next().await {
        question??;
        answered += 1;
    }
    Ok(answered)
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let server = connect().await?;
    let (channel, mut incoming) = questions(&server).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    let answering = tokio::spawn(async move {
        while let Some(delivery) = incoming.next().await {
            serve(&channel, &delivery?).await?;
        }
        Ok::<_, anyhow::Error>(())
    });
    let caller = Arc::new(Caller::new(&connection).await?);
    println!("asked:    100 questions at the same time");
    let answered = ask_all(&caller, 100).await?;
    println!("answered: {answered}, each with its own answer");

    // Its deadline has passed before it is sent, as if it had lain for long.
    match caller.ask_until(1, IMPATIENCE, "0").await {
        Err(error) if error.to_string().starts_with("no answer") => {
            println!("late:     a question whose deadline has passed has no answer");
        }
        other => bail!("a late question got {other:?}"),
    }

    server.close(200, "the server stops".into()).await?;
    // It ends with its connection, with an error or without one.
    let _ended = answering.await;
    match caller.ask(1, IMPATIENCE).await {
        Err(error) if error.to_string().starts_with("no answer") => {
            println!("nobody:   no answer within {IMPATIENCE:?}");
        }
        other => bail!("without a server there is {other:?}"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn declare(channel: &Channel, queue: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {queue} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
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
