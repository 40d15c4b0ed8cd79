//! Graceful shutdown: a worker that is told to stop finishes what it has begun.
//!
//! Teaches: on SIGTERM, take no more (`basic_cancel`), finish what has come, also what
//! was prefetched and not begun, acknowledge it, close. RabbitMQ marks what is given
//! back as redelivered, and the next worker would have to suspect it; so it is given
//! back only when the deadline has passed. A second signal ends the worker at once.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin graceful_shutdown_rabbitmq                      # the whole story
//! cargo run --bin graceful_shutdown_rabbitmq mail-server          # terminal 1
//! cargo run --bin graceful_shutdown_rabbitmq worker               # terminal 2
//! cargo run --bin graceful_shutdown_rabbitmq producer 1 1000      # terminal 3
//! cargo run --bin graceful_shutdown_rabbitmq worker --deadline 5
//! cargo run --bin graceful_shutdown_rabbitmq worker --no-drain    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! queued:  12 mails in mails.outgoing
//! ready:   4 mails at a time, Ctrl-C to stop
//! stop:    <n> being sent, 20 s to finish
//! stopped: sent <n>, <n> of them delivered before; given back <n>
//! ready:   4 mails at a time, Ctrl-C to stop
//! stop:    <n> being sent, 20 s to finish
//! stopped: sent <n>, <n> of them delivered before; given back <n>
//! done:    12 mails, 0 of them sent twice
//! ```
//!
//! Left out on purpose: mails that fail again and again, see rabbitmq_retry_delay.

use std::{
    collections::{HashMap, HashSet},
    env,
    future::Future,
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::graceful_shutdown::{Hold, MailServer, line, mail, send};
use tokio::{
    sync::Notify,
    task::{Id, JoinError, JoinSet},
    time::timeout,
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const DEFAULT_MAIL_SERVER: &str = "localhost:2525";
const QUEUE: &str = "mails.outgoing";
const CONSUMER_TAG: &str = "mail-worker";
const USAGE: &str = "usage: graceful_shutdown_rabbitmq [producer FIRST LAST | \
                     mail-server | worker [--deadline SECONDS | --no-drain]]";

/// How many mails a worker sends at the same time.
const AT_ONCE: usize = 4;
/// How many it holds: the next ones are at hand when one is sent.
const PREFETCH: u16 = 8;

/// How long a worker that is told to stop may take. Less than the patience of who
/// told it: Kubernetes kills after 30 s, `docker stop` after 10.
const DEADLINE: Duration = Duration::from_secs(20);

/// How long the mail server takes for a mail.
const MAIL: Duration = Duration::from_millis(300);

/// How many mails the story sends.
const MAILS: u64 = 12;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the mails of the story may take to come.
const FIRST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["producer", first, last] => match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => producer(first, last).await,
            _ => return usage(),
        },
        ["mail-server"] => mail_server().await,
        ["worker"] => worker_until_signal(DEADLINE, AtSignal::Drain).await,
        ["worker", "--deadline", seconds] => match seconds.parse() {
            Ok(seconds) => {
                let deadline = Duration::from_secs(seconds);
                worker_until_signal(deadline, AtSignal::Drain).await
            }
            Err(_) => return usage(),
        },
        ["worker", "--no-drain"] => {
            worker_until_signal(DEADLINE, AtSignal::End).await
        }
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum AtSignal {
    Drain,
    /// The mistake, to see what it costs: the signal ends the loop, and the mails
    /// that are being sent end with it.
    End,
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let connection = connect().await?;
    // Lives until the connection is closed: a channel that is dropped closes in
    // the background, and `close` fails while that is going on.
    let channel = connection.create_channel().await?;
    queue_mails(&channel, (first..=last).map(mail)).await?;
    println!("queued:  mail-{first} to mail-{last} in {QUEUE}");
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn queue_mails(
    channel: &Channel,
    mails: impl Iterator<Item = String>,
) -> Result<()> {
    declare(channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    for mail in mails {
        let properties =
            BasicProperties::default().with_message_id(mail.as_str().into());
        publish(channel, QUEUE, mail.as_bytes(), properties).await?;
    }
    Ok(())
}

/// Puts one message into a queue and waits until RabbitMQ has stored it.
async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions {
                mandatory: true, // return it if no queue takes it
                ..BasicPublishOptions::default()
            },
            payload,
            properties.with_delivery_mode(2), // persistent
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(returned)) => {
            bail!("{queue} did not take it: {}", returned.reply_text)
        }
        Confirmation::Nack(_) => bail!("{queue} refused it"),
        Confirmation::NotRequested => bail!("confirm_select was not called"),
    }
}

// ---- Mail server -----------------------------------------------------------

async fn mail_server() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let address = mail_server_address();
    let server = MailServer::start(&address, MAIL, Hold::Nobody).await;
    let server = server.with_context(|| format!("cannot listen at {address}"))?;
    println!(
        "ready:   mail server at {}, Ctrl-C to stop",
        server.address()
    );
    let mut shown = 0;
    loop {
        tokio::select! {
            () = &mut stop_signal => break,
            more = server.until(|mails| mails.len() > shown) => more?,
        }
        let mails = server.mails();
        while let Some(mail) = mails.get(shown) {
            let twice = if mails[..shown].contains(mail) {
                ", not for the first time"
            } else {
                ""
            };
            println!("mail:    {mail}{twice}");
            shown += 1;
        }
    }
    println!("stopped");
    Ok(())
}

fn mail_server_address() -> String {
    env::var("MAIL_SERVER").unwrap_or_else(|_| DEFAULT_MAIL_SERVER.to_owned())
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(deadline: Duration, at: AtSignal) -> Result<()> {
    let stop = stop_signal()?;
    worker(&mail_server_address(), deadline, at, stop).await
}

// ANCHOR: worker
async fn worker(
    mail_server: &str,
    deadline: Duration,
    at_signal: AtSignal,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let connection = connect().await?;
    let (channel, mut deliveries) = take_mails(&connection).await?;
    println!("ready:   {AT_ONCE} mails at a time, Ctrl-C to stop");
    let mut mails = Mails::new(mail_server);
    tokio::pin!(stop);
    while mails.failed.is_none() {
        tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            Some(ended) = mails.sending.join_next_with_id() => {
                mails.finish(ended).await?;
            }
            delivery = deliveries.next(), if mails.sending.len() < AT_ONCE => {
                let delivery = delivery.with_context(|| {
                    format!("RabbitMQ ended it: is {QUEUE} deleted?")
                })?;
                mails.begin(delivery.context("lost RabbitMQ")?);
            }
        }
    }
    if at_signal == AtSignal::End {
        println!("stopped: in the middle of {} mails", mails.sending.len());
        return Ok(());
    }

    let now = mails.sending.len();
    println!(
        "stop:    {now} being sent, {} s to finish",
        deadline.as_secs()
    );
    // Take no more. What has been delivered still comes, and then the end.
    let tag = CONSUMER_TAG.into();
    let cancel = channel.basic_cancel(tag, BasicCancelOptions::default());
    timeout(PATIENCE, cancel).await.context("lost RabbitMQ")??;
    match timeout(deadline, mails.finish_all(&mut deliveries)).await {
        Ok(finished) => finished?,
        Err(_elapsed) => mails.sending.shutdown().await,
    }
    let given_back = mails.give_back(&mut deliveries).await?;
    // An acknowledgement has no answer, and one that is on its way when the channel
    // closes can be lost. RabbitMQ takes what comes on a channel in order: when it
    // answers this, it has them.
    let asked = channel.basic_qos(PREFETCH, BasicQosOptions::default());
    timeout(PATIENCE, asked).await.context("lost RabbitMQ")??;
    connection.close(200, "stopped".into()).await?;
    let Mails {
        sent,
        again,
        failed,
        ..
    } = mails;
    println!(
        "stopped: sent {sent}, {again} of them delivered before; \
         given back {given_back}"
    );
    failed.map_or(Ok(()), Err)
}
// ANCHOR_END: worker

// ANCHOR: mails
/// The mails that this worker has to do with.
struct Mails<'a> {
    server: &'a str,
    /// Each in a task of its own, and not more than [`AT_ONCE`].
    sending: JoinSet<io::Result<()>>,
    /// What to acknowledge, by the task.
    held: HashMap<Id, Delivery>,
    sent: u32,
    again: u32,
    /// Why no more mails can be sent.
    failed: Option<anyhow::Error>,
    /// Whether all that was delivered has been taken out of the stream.
    ended: bool,
}

impl<'a> Mails<'a> {
    fn new(server: &'a str) -> Self {
        Self {
            server,
            sending: JoinSet::new(),
            held: HashMap::new(),
            sent: 0,
            again: 0,
            failed: None,
            ended: false,
        }
    }

    fn begin(&mut self, delivery: Delivery) {
        let (server, mail) = (self.server.to_owned(), line(&delivery.data));
        let task = self
            .sending
            .spawn(async move { send(&server, &mail).await });
        self.held.insert(task.id(), delivery);
    }

    /// Acknowledges a mail that is sent.
    async fn finish(
        &mut self,
        ended: Result<(Id, io::Result<()>), JoinError>,
    ) -> Result<()> {
        let (task, result) = ended?;
        if let Err(error) = result {
            // It stays in `held`, to be given back.
            let what = format!("cannot send by the mail server {}", self.server);
            self.failed
                .get_or_insert(anyhow::Error::new(error).context(what));
            return Ok(());
        }
        let delivery = self.held.remove(&task).context("a task without a mail")?;
        let ack = delivery.ack(BasicAckOptions::default());
        timeout(PATIENCE, ack).await.context("lost RabbitMQ")??;
        self.sent += 1;
        self.again += u32::from(delivery.redelivered);
        Ok(())
    }

    /// Sends what has been delivered, up to the end of the deliveries.
    async fn finish_all(&mut self, deliveries: &mut Consumer) -> Result<()> {
        loop {
            let room = self.sending.len() < AT_ONCE && self.failed.is_none();
            let more = room && !self.ended;
            tokio::select! {
                Some(ended) = self.sending.join_next_with_id() => {
                    self.finish(ended).await?;
                }
                delivery = deliveries.next(), if more => match delivery {
                    Some(delivery) => self.begin(delivery?),
                    None => self.ended = true,
                },
                else => return Ok(()),
            }
        }
    }

    /// Gives back what is not sent: another worker gets it at once, marked as
    /// redelivered. Those that were being sent may be sent all the same.
    async fn give_back(&mut self, deliveries: &mut Consumer) -> Result<u32> {
        let mut rest: Vec<Delivery> = self
            .held
            .drain()
            .map(|(_task, delivery)| delivery)
            .collect();
        // Nothing comes after the end, and asking again would wait for ever.
        while !self.ended
            && let Some(delivery) = deliveries.next().await
        {
            rest.push(delivery?);
        }
        for delivery in &rest {
            eprintln!("given back: {}", line(&delivery.data));
            let options = BasicNackOptions {
                requeue: true,
                ..Default::default()
            };
            timeout(PATIENCE, delivery.nack(options))
                .await
                .context("lost RabbitMQ")??;
        }
        Ok(u32::try_from(rest.len())?)
    }
}
// ANCHOR_END: mails

/// Starts to consume.
async fn take_mails(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    declare(&channel, QUEUE).await?;
    // Without it RabbitMQ delivers all there is, and all of it has to be finished or
    // given back at the end.
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
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

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let ids = (1..=MAILS).map(|number| format!("{run}-{}", mail(number)));
    let ids: HashSet<String> = ids.collect();
    queue_mails(&channel, ids.iter().cloned()).await?;
    println!("queued:  {MAILS} mails in {QUEUE}");
    connection.close(200, "done".into()).await?;

    let server = MailServer::start("127.0.0.1:0", Duration::ZERO, Hold::Everybody);
    let server = server.await?;
    // The mail server answers nobody, and the first worker is told to stop when it
    // can begin no more.
    let busy = async {
        let busy = server.until(|mails| mails.len() == AT_ONCE);
        // What has not come is missed at the end.
        let _came = timeout(FIRST, busy).await;
        server.hold(Hold::Nobody);
    };
    worker(server.address(), DEADLINE, AtSignal::Drain, busy).await?;

    let all = async {
        let of_this_run = |mails: &[String]| ids.iter().all(|id| mails.contains(id));
        let _came = timeout(FIRST, server.until(of_this_run)).await;
    };
    worker(server.address(), DEADLINE, AtSignal::Drain, all).await?;

    let mut mails = server.mails();
    mails.retain(|mail| ids.contains(mail));
    let sent: HashSet<&String> = mails.iter().collect();
    ensure!(
        sent.len() == ids.len(),
        "not all came; has another worker taken them?"
    );
    let twice = mails.len() - sent.len();
    println!("done:    {MAILS} mails, {twice} of them sent twice");
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
