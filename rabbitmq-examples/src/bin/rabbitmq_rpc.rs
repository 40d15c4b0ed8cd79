//! Request and reply: with a queue for the answers, and ids to tell them apart.
//!
//! Teaches: a request names the queue for its answer (`reply_to`) and an id that
//! the answer repeats (`correlation_id`), so many can be under way at a time. An
//! answer to nobody's question is ignored: it is late, or comes twice because a
//! server died before its acknowledgement. A request ends when its asker has given
//! up (`expiration`), or it would be answered for nobody.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_rpc               # the whole story
//! cargo run --bin rabbitmq_rpc server        # terminal 1, and 2
//! cargo run --bin rabbitmq_rpc client        # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready: answers on rpc.quotes
//! sku-1: 9.90
//! sku-2: 4.50
//! sku-9: unknown article
//! sku-3: no answer within 500 ms, the server has stopped
//! left:  0 requests
//! ```
//!
//! Left out on purpose: reconnecting, and answers that must not get lost: those
//! belong into a durable queue, as a message of their own.

use std::{
    collections::HashMap,
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::{
    sync::{Notify, oneshot},
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const REQUESTS: &str = "rpc.quotes";

/// How long an asker waits for an answer.
const ANSWER: Duration = Duration::from_millis(500);
/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["server"] => server().await,
        ["client"] => client().await,
        _ => {
            eprintln!("usage: rabbitmq_rpc [server | client]");
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

// ANCHOR: story
async fn story() -> Result<()> {
    // Two connections, as if they were two programs.
    let (at_server, at_client) = (connect().await?, connect().await?);
    let channel = at_server.create_channel().await?;
    let requests = serve(&channel).await?;
    let tag = requests.tag();
    let answering = tokio::spawn(answer_all(channel.clone(), requests));
    println!("ready: answers on {REQUESTS}");

    let asker = Asker::new(&at_client).await?;
    // All three are under way at the same time.
    let skus = ["sku-1", "sku-2", "sku-9"];
    let quotes = try_join_all(skus.map(|sku| asker.ask(sku))).await?;
    for (sku, quote) in skus.into_iter().zip(quotes) {
        println!("{sku}: {}", quote.context("no answer from the server")?);
    }

    let options = BasicCancelOptions::default();
    channel.basic_cancel(tag, options).await?;
    answering.await??;
    let quote = asker.ask("sku-3").await?;
    ensure!(quote.is_none(), "somebody else answers on {REQUESTS}");
    println!(
        "sku-3: no answer within {} ms, the server has stopped",
        ANSWER.as_millis()
    );
    println!("left:  {} requests", left(&channel).await?);
    at_client.close(200, "done".into()).await?;
    at_server.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- The server ------------------------------------------------------------

async fn server() -> Result<()> {
    let connection = connect().await?;
    let stop_signal = stop_signal()?;
    let channel = connection.create_channel().await?;
    let requests = serve(&channel).await?;
    let tag = requests.tag();
    let mut answering = tokio::spawn(answer_all(channel.clone(), requests));
    println!("ready: answers on {REQUESTS}, Ctrl-C to stop");
    tokio::select! {
        () = stop_signal => {}
        ended = &mut answering => {
            ended??;
            bail!("RabbitMQ has taken the queue {REQUESTS} away");
        }
    }
    // What has been delivered is still answered.
    channel
        .basic_cancel(tag, BasicCancelOptions::default())
        .await?;
    answering.await??;
    connection.close(200, "done".into()).await?;
    println!("stopped");
    Ok(())
}

async fn serve(channel: &Channel) -> Result<Consumer> {
    declare(channel).await?;
    channel.basic_qos(10, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let requests = channel
        .basic_consume(REQUESTS.into(), "".into(), options, none)
        .await?;
    Ok(requests)
}

// ANCHOR: answer
async fn answer_all(channel: Channel, mut requests: Consumer) -> Result<()> {
    while let Some(request) = requests.next().await {
        let request = request?;
        let sku = String::from_utf8_lossy(&request.data);
        let quote = match sku.as_ref() {
            "sku-1" => "9.90",
            "sku-2" => "4.50",
            // An answer as well, or the asker waits for nothing.
            _ => "unknown article",
        };
        // Somebody who wants no answer is served too.
        if let Some(reply_to) = request.properties.reply_to() {
            let mut properties = BasicProperties::default();
            if let Some(id) = request.properties.correlation_id() {
                properties = properties.with_correlation_id(id.clone());
            }
            // Not mandatory: the asker may have gone, and its queue with it.
            let options = BasicPublishOptions::default();
            let answer = quote.as_bytes();
            channel
                .basic_publish(
                    "".into(),
                    reply_to.clone(),
                    options,
                    answer,
                    properties,
                )
                .await?;
        }
        // After the answer. A server that dies between the two leaves the request
        // to another, and the asker gets two answers.
        request.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}
// ANCHOR_END: answer

// ---- The client ------------------------------------------------------------

async fn client() -> Result<()> {
    let connection = connect().await?;
    let asker = Asker::new(&connection).await?;
    for sku in ["sku-1", "sku-2", "sku-9"] {
        let quote = asker.ask(sku).await?;
        let quote = quote.with_context(|| {
            let milliseconds = ANSWER.as_millis();
            format!(
                "no answer for {sku} within {milliseconds} ms; start a server: \
                 rabbitmq_rpc server"
            )
        })?;
        println!("{sku}: {quote}");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: ask
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<String>>>>;

struct Asker {
    channel: Channel,
    answers: String,
    waiting: Waiting,
    count: AtomicU64,
}

impl Asker {
    async fn new(connection: &Connection) -> Result<Self> {
        let channel = connection.create_channel().await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        declare(&channel).await?;
        // For this connection alone, and gone with it: an answer is of no use to
        // anybody else.
        let exclusive = QueueDeclareOptions::exclusive();
        let none = FieldTable::default();
        let queue = channel.queue_declare("".into(), exclusive, none).await?;
        let answers = queue.name().to_string();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let none = FieldTable::default();
        let consumer = channel
            .basic_consume(queue.name().clone(), "".into(), options, none)
            .await?;
        let waiting = Waiting::default();
        tokio::spawn(hand_out(consumer, Arc::clone(&waiting)));
        Ok(Self {
            channel,
            answers,
            waiting,
            count: AtomicU64::new(0),
        })
    }

    /// The answer, or none if it does not come in time.
    async fn ask(&self, sku: &str) -> Result<Option<String>> {
        let id = self.count.fetch_add(1, Ordering::Relaxed).to_string();
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(id.clone(), sender);
        let properties = BasicProperties::default()
            .with_reply_to(self.answers.as_str().into())
            .with_correlation_id(id.as_str().into())
            .with_expiration(ANSWER.as_millis().to_string().into());
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let request = sku.as_bytes();
        let confirm = self
            .channel
            .basic_publish("".into(), REQUESTS.into(), options, request, properties)
            .await?;
        let confirm = timeout(PATIENCE, confirm)
            .await
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
        ensure!(
            matches!(confirm, Confirmation::Ack(None)),
            "no queue takes the request: {confirm:?}"
        );
        let answer = timeout(ANSWER, answer).await;
        // Whoever has given up must not stay in the map.
        lock(&self.waiting).remove(&id);
        Ok(answer.ok().and_then(Result::ok))
    }
}

async fn hand_out(mut answers: Consumer, waiting: Waiting) {
    while let Some(Ok(answer)) = answers.next().await {
        let id = answer.properties.correlation_id().clone();
        let asker = id.and_then(|id| lock(&waiting).remove(id.as_str()));
        // None: late, a second time, or nobody's. No reason to stop.
        if let Some(asker) = asker {
            let text = String::from_utf8_lossy(&answer.data).into_owned();
            let _gave_up = asker.send(text);
        }
    }
}
// ANCHOR_END: ask

fn lock(
    waiting: &Waiting,
) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<String>>> {
    // Nothing under the lock can panic half way.
    waiting
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How many requests wait, when those that are over have had time to go.
async fn left(channel: &Channel) -> Result<u32> {
    let mut count = 0;
    for _look in 0..20 {
        let options = QueueDeclareOptions::default().passive();
        let none = FieldTable::default();
        let queue = channel
            .queue_declare(REQUESTS.into(), options, none)
            .await?;
        count = queue.message_count();
        if count == 0 {
            break;
        }
        sleep(ANSWER / 5).await;
    }
    Ok(count)
}

/// Declares the queue, which changes nothing if it is there already. Both sides
/// do, so either may start first.
async fn declare(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(REQUESTS.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {REQUESTS} ({error}); if it was made with \
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
