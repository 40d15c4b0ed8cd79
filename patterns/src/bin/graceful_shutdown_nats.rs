//! Graceful shutdown: a worker that is told to stop finishes what it has begun.
//!
//! Teaches: on SIGTERM, ask for no more, finish what has come, acknowledge it and wait
//! for the answer, drain. A worker that asks for as many as it can begin has nothing
//! that is delivered and not begun; and the last request has to run out, as a message
//! that comes to nobody is out for `ACK_WAIT`. What the deadline cuts off is given
//! back by a nak. A second signal ends the worker at once.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin graceful_shutdown_nats                      # the whole story
//! cargo run --bin graceful_shutdown_nats mail-server          # terminal 1
//! cargo run --bin graceful_shutdown_nats worker               # terminal 2
//! cargo run --bin graceful_shutdown_nats producer 1 1000      # terminal 3
//! cargo run --bin graceful_shutdown_nats worker --deadline 5
//! cargo run --bin graceful_shutdown_nats worker --no-drain    # the mistake
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
//! Left out on purpose: mails that fail again and again, which need a limit
//! (`max_deliver`) and a place to go.

use std::{
    collections::{HashMap, HashSet},
    env,
    future::{Future, pending},
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{AckPolicy, PullConsumer, pull},
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::graceful_shutdown::{Hold, MailServer, line, mail, send};
use tokio::{
    sync::Notify,
    task::{Id, JoinError, JoinSet},
    time::{Interval, interval, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const DEFAULT_MAIL_SERVER: &str = "localhost:2525";
const STREAM: &str = "MAILS_OUTGOING";
const SUBJECT: &str = "mails.outgoing";
const CONSUMER: &str = "mail-worker";
const USAGE: &str = "usage: graceful_shutdown_nats [producer FIRST LAST | \
                     mail-server | worker [--deadline SECONDS | --no-drain]]";

/// How many mails a worker sends at the same time.
const AT_ONCE: usize = 4;
/// How long a request for mails stands. The worker needs so much longer to stop.
const REQUEST: Duration = Duration::from_secs(1);
/// How long NATS waits for a sign of life of a mail before it delivers it again. A
/// mail that takes longer sends one meanwhile; that of a killed worker does not.
const ACK_WAIT: Duration = Duration::from_secs(10);

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
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    queue_mails(&jetstream, (first..=last).map(mail)).await?;
    println!("queued:  mail-{first} to mail-{last} in {SUBJECT}");
    client.drain().await?;
    Ok(())
}

async fn queue_mails(
    jetstream: &jetstream::Context,
    mails: impl Iterator<Item = String>,
) -> Result<()> {
    declare(jetstream, STREAM, SUBJECT).await?;
    for mail in mails {
        // Without an id: NATS would drop what is queued a second time.
        let message = PublishMessage::build().payload(mail.into());
        // Two awaits: the first hands the message to the connection, the second
        // waits for the answer of the stream.
        jetstream
            .send_publish(SUBJECT, message)
            .await?
            .await
            .with_context(|| format!("{SUBJECT} did not take it"))?;
    }
    Ok(())
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
    let client = connect().await?;
    let consumer = take_mails(&jetstream::new(client.clone())).await?;
    let mut request = None;
    println!("ready:   {AT_ONCE} mails at a time, Ctrl-C to stop");
    let mut mails = Mails::new(mail_server);
    tokio::pin!(stop);
    while mails.failed.is_none() {
        // No more than can be begun at once.
        let room = AT_ONCE - mails.sending.len();
        if request.is_none() && room > 0 {
            request = Some(ask(&consumer, room).await?);
        }
        tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop => break,
            _now = mails.sign_of_life.tick() => mails.still_at_it().await?,
            Some(ended) = mails.sending.join_next_with_id() => {
                mails.finish(ended).await?;
            }
            delivery = next(&mut request) => match delivery {
                Some(delivery) => mails.begin(delivery?),
                None => request = None,
            },
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
    // Take no more: no further request. The one that stands is answered up to its
    // end; dropped, what comes for it would be nobody's until `ACK_WAIT` is over.
    match timeout(deadline, mails.finish_all(&mut request)).await {
        Ok(finished) => finished?,
        Err(_elapsed) => mails.sending.shutdown().await,
    }
    let given_back = mails.give_back(&mut request).await?;
    client.drain().await?;
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
    held: HashMap<Id, Message>,
    sent: u32,
    again: u32,
    /// Why no more mails can be sent.
    failed: Option<Error>,
    sign_of_life: Interval,
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
            sign_of_life: interval(ACK_WAIT / 4),
        }
    }

    fn begin(&mut self, delivery: Message) {
        let (server, mail) = (self.server.to_owned(), line(&delivery.payload));
        let task = self
            .sending
            .spawn(async move { send(&server, &mail).await });
        self.held.insert(task.id(), delivery);
    }

    /// Acknowledges a mail that is sent, and waits until NATS knows.
    async fn finish(
        &mut self,
        ended: Result<(Id, io::Result<()>), JoinError>,
    ) -> Result<()> {
        let (task, result) = ended?;
        if let Err(error) = result {
            // It stays in `held`, to be given back.
            let what = format!("cannot send by the mail server {}", self.server);
            self.failed.get_or_insert(Error::new(error).context(what));
            return Ok(());
        }
        let delivery = self.held.remove(&task).context("a task without a mail")?;
        answer(&delivery, AckKind::Ack).await?;
        self.sent += 1;
        let info = delivery.info().map_err(Error::from_boxed)?;
        self.again += u32::from(info.delivered > 1);
        Ok(())
    }

    /// Sends what has been delivered, up to the end of the last request.
    async fn finish_all(&mut self, request: &mut Option<pull::Batch>) -> Result<()> {
        while !self.sending.is_empty() || request.is_some() && self.failed.is_none()
        {
            tokio::select! {
                _now = self.sign_of_life.tick() => self.still_at_it().await?,
                Some(ended) = self.sending.join_next_with_id() => {
                    self.finish(ended).await?;
                }
                delivery = next(request), if self.failed.is_none() => match delivery {
                    Some(delivery) => self.begin(delivery?),
                    None => *request = None,
                },
            }
        }
        Ok(())
    }

    /// Gives back what is not sent: another worker gets it at once. Those that were
    /// being sent may be sent all the same.
    async fn give_back(&mut self, request: &mut Option<pull::Batch>) -> Result<u32> {
        let mut rest: Vec<Message> = self
            .held
            .drain()
            .map(|(_task, delivery)| delivery)
            .collect();
        if let Some(request) = request {
            while let Some(delivery) = request.next().await {
                rest.push(delivery.map_err(Error::from_boxed)?);
            }
        }
        for delivery in &rest {
            eprintln!("given back: {}", line(&delivery.payload));
            answer(delivery, AckKind::Nak(None)).await?;
        }
        Ok(u32::try_from(rest.len())?)
    }

    /// Keeps NATS from delivering again what takes long.
    async fn still_at_it(&self) -> Result<()> {
        for delivery in self.held.values() {
            let answer = delivery.ack_with(AckKind::Progress).await;
            answer.map_err(Error::from_boxed)?;
        }
        Ok(())
    }
}

/// Answers a delivery and waits until NATS has the answer. A plain `ack` only queues
/// it in the client, and is lost with it.
async fn answer(delivery: &Message, kind: AckKind) -> Result<()> {
    let answered = timeout(PATIENCE, delivery.double_ack_with(kind)).await;
    answered.context("lost NATS")?.map_err(Error::from_boxed)
}
// ANCHOR_END: mails

// ANCHOR: ask
/// Asks for so many mails. The stream ends with them, or when the request is over.
async fn ask(consumer: &PullConsumer, mails: usize) -> Result<pull::Batch> {
    let request = consumer.batch().max_messages(mails).expires(REQUEST);
    let request = request.messages().await;
    request.context("cannot take mails; is the stream or its consumer deleted?")
}

/// The next delivery for a request; without one it waits for ever.
async fn next(request: &mut Option<pull::Batch>) -> Option<Result<Message>> {
    match request {
        Some(request) => {
            let delivery = request.next().await?;
            Some(delivery.map_err(Error::from_boxed))
        }
        None => pending().await,
    }
}
// ANCHOR_END: ask

async fn take_mails(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    let stream = declare(jetstream, STREAM, SUBJECT).await?;
    stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the workers")
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
    let client = connect().await?;
    let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let ids = (1..=MAILS).map(|number| format!("{run}-{}", mail(number)));
    let ids: HashSet<String> = ids.collect();
    queue_mails(&jetstream::new(client.clone()), ids.iter().cloned()).await?;
    println!("queued:  {MAILS} mails in {SUBJECT}");
    client.drain().await?;

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

// ---- Stream and connection -------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn declare(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            // A mail is removed when it is acknowledged.
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {stream} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js"
            )
        })
}

async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
