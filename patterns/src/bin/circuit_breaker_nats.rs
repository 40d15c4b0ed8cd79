//! Circuit breaker: while the payment gateway is down, nobody calls it.
//!
//! Teaches: after three failures in a row the breaker opens. The worker asks for no more
//! and keeps the one payment in hand, with a sign of life every half second: a nak
//! would count as a delivery, and silence would bring it again. When the wait is over
//! this payment is the probe. Told to stop while it is open, the worker gives it back by
//! a nak, so that the next one need not wait.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin circuit_breaker_nats                         # the whole story
//! cargo run --bin circuit_breaker_nats gateway shop.db         # terminal 1: kill it
//! cargo run --bin circuit_breaker_nats worker                  # terminal 2
//! cargo run --bin circuit_breaker_nats producer 1 1000         # terminal 3
//! cargo run --bin circuit_breaker_nats gateway shop.db --down  # answers with 503
//! cargo run --bin circuit_breaker_nats worker --wait 30        # the first wait
//! cargo run --bin circuit_breaker_nats worker --no-breaker     # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent:   5 payments to charges.due
//! ready:  payments from charges.due, Ctrl-C to stop
//! done:   payment-1, charged
//! done:   payment-2, charged
//! failed: payment-3, 503 out of order
//! failed: payment-3, 503 out of order
//! failed: payment-3, 503 out of order
//! state:  open, a probe in 500 ms
//! state:  half-open, one probe
//! failed: payment-3, 503 out of order
//! state:  open, a probe in 1000 ms
//! state:  half-open, one probe
//! state:  closed
//! done:   payment-3, charged
//! aside:  payment-1001, declined
//! done:   payment-4, charged
//! stopped
//! calls:  9, and 4 cards charged
//! ```
//!
//! Left out on purpose: several payments at a time, and a breaker that workers share:
//! each of them finds out for itself. The card is charged once because the gateway
//! knows the id; where it does not, see idempotent_consumer_nats.

use std::{
    env,
    future::{Future, pending},
    ops::Range,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr,
    jetstream::{
        self, AckKind, Message,
        consumer::{AckPolicy, PullConsumer, pull},
        message::PublishMessage,
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::circuit_breaker::{
    Answer, Breaker, FIRST_WAIT, Gateway, Ledger, Payment, charge, decode, payment,
};
use tokio::{
    sync::Notify,
    time::{interval, sleep_until, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const DEFAULT_GATEWAY: &str = "127.0.0.1:2626";
const STREAM: &str = "CHARGES";
const SUBJECT: &str = "charges.due";
const ASIDE: &str = "CHARGES_ASIDE";
const ASIDE_SUBJECT: &str = "charges.aside";
const CONSUMER: &str = "charger";
const USAGE: &str = "usage: circuit_breaker_nats [producer FIRST LAST | gateway FILE \
                     [--down] | worker [--wait SECONDS | --no-breaker]]";

/// After this time without a sign of life NATS delivers again. Longer than three calls.
const ACK_WAIT: Duration = Duration::from_secs(5);
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);
/// How long a request for a payment stands. The worker needs so much longer to stop.
const REQUEST: Duration = Duration::from_secs(1);
/// How often the worker without a breaker tries each payment.
const ATTEMPTS: u32 = 3;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long the payments of the story may take.
const STORY: Duration = Duration::from_secs(20);

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
        ["gateway", file] => gateway(file, 0..0).await,
        ["gateway", file, "--down"] => gateway(file, 0..u64::MAX).await,
        ["worker"] => worker_until_signal(Care::Breaker(FIRST_WAIT)).await,
        ["worker", "--wait", seconds] => match seconds.parse::<u32>() {
            Ok(seconds) if seconds > 0 => {
                let wait = Duration::from_secs(seconds.into());
                worker_until_signal(Care::Breaker(wait)).await
            }
            _ => return usage(),
        },
        ["worker", "--no-breaker"] => worker_until_signal(Care::None).await,
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
enum Care {
    /// It is open for so long before the first probe.
    Breaker(Duration),
    /// The mistake, to see what it costs.
    None,
}

impl Care {
    fn breaker(self) -> Breaker {
        match self {
            Self::Breaker(wait) => Breaker::new(wait),
            // Is never asked.
            Self::None => Breaker::new(FIRST_WAIT),
        }
    }
}

// ---- Producer --------------------------------------------------------------

async fn producer(first: u64, last: u64) -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream).await?;
    send(&jetstream, first..=last).await?;
    println!("sent:   payment-{first} to payment-{last} to {SUBJECT}");
    client.drain().await?;
    Ok(())
}

async fn send(
    jetstream: &jetstream::Context,
    numbers: impl IntoIterator<Item = u64>,
) -> Result<()> {
    for number in numbers {
        let payload = serde_json::to_vec(&payment(number))?;
        // Two awaits: the first hands the message to the connection, the second waits
        // for the answer of the stream.
        jetstream
            .publish(SUBJECT, payload.into())
            .await?
            .await
            .with_context(|| format!("NATS did not store payment-{number}"))?;
    }
    Ok(())
}

// ---- Gateway ---------------------------------------------------------------

async fn gateway(file: &str, down: Range<u64>) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let ledger = Ledger::open(Path::new(file));
    let ledger =
        ledger.with_context(|| format!("cannot keep a ledger in {file}"))?;
    let address = gateway_address();
    let gateway = Gateway::start(&address, ledger, down).await;
    let gateway = gateway.with_context(|| format!("cannot listen at {address}"))?;
    println!("ready:  gateway at {}, Ctrl-C to stop", gateway.address());
    let mut shown = 0;
    loop {
        tokio::select! {
            () = &mut stop_signal => break,
            more = gateway.until(shown + 1) => more?,
        }
        for call in &gateway.calls()[shown..] {
            println!("call:   {call}");
            shown += 1;
        }
    }
    println!("stopped");
    Ok(())
}

fn gateway_address() -> String {
    env::var("GATEWAY").unwrap_or_else(|_| DEFAULT_GATEWAY.to_owned())
}

// ---- Worker ----------------------------------------------------------------

async fn worker_until_signal(care: Care) -> Result<()> {
    let stop = stop_signal()?;
    worker(&gateway_address(), care, stop).await
}

// ANCHOR: worker
async fn worker(
    gateway: &str,
    care: Care,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let client = connect().await?;
    let worker = Worker {
        jetstream: jetstream::new(client.clone()),
        gateway,
        care,
    };
    let consumer = take_payments(&worker.jetstream).await?;
    println!("ready:  payments from {SUBJECT}, Ctrl-C to stop");
    let mut breaker = care.breaker();
    let mut sign_of_life = interval(SIGN_OF_LIFE);
    let (mut request, mut in_hand) = (None, None);
    tokio::pin!(stop);
    loop {
        if request.is_none() && in_hand.is_none() {
            request = Some(ask(&consumer).await?);
        }
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            () = probe_due(breaker) => {
                breaker = turn(breaker, breaker.at(Instant::now()));
                in_hand.take()
            }
            _now = sign_of_life.tick(), if in_hand.is_some() => {
                still_at_it(in_hand.as_ref()).await?;
                continue;
            }
            delivery = next(&mut request) => delivery?,
        };
        let Some(delivery) = delivery else {
            // The request has run out, or is answered.
            request = None;
            continue;
        };
        worker.work(&mut breaker, &delivery).await?;
        if breaker.is_open() {
            in_hand = Some(delivery);
        }
    }
    give_back(in_hand, request).await?;
    client.drain().await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: worker

struct Worker<'a> {
    jetstream: jetstream::Context,
    gateway: &'a str,
    care: Care,
}

impl Worker<'_> {
    /// Decides a payment, unless the breaker opens.
    async fn work(&self, breaker: &mut Breaker, delivery: &Message) -> Result<()> {
        let payment = match decode(&delivery.payload) {
            Ok(payment) => payment,
            Err(error) => {
                let name = format!("{} bytes", delivery.payload.len());
                let reason = format!("no payment: {error}");
                return self.set_aside(delivery, &name, &reason).await;
            }
        };
        let answer = match self.care {
            Care::Breaker(_) => call(self.gateway, breaker, &payment).await,
            Care::None => call_without_breaker(self.gateway, &payment).await,
        };
        match answer {
            Some(Answer::Declined) => {
                self.set_aside(delivery, &payment.id, "declined").await
            }
            Some(charged) => {
                answer_with(delivery, AckKind::Ack).await?;
                println!("done:   {}, {charged}", payment.id);
                Ok(())
            }
            // It is about the gateway and not about the payment.
            None if self.care != Care::None => Ok(()),
            None => {
                let reason = format!("no answer, {ATTEMPTS} attempts");
                self.set_aside(delivery, &payment.id, &reason).await
            }
        }
    }

    /// Stored first, then ended. Killed in between, the next worker stores it again;
    /// NATS knows the id and keeps one, within two minutes.
    async fn set_aside(
        &self,
        delivery: &Message,
        name: &str,
        reason: &str,
    ) -> Result<()> {
        let info = delivery.info().map_err(Error::from_boxed)?;
        let sequence = info.stream_sequence;
        // The time as well: a stream that is made anew counts from 1 again.
        let time = info.published.unix_timestamp_nanos();
        let message = PublishMessage::build()
            // The bytes as they came.
            .payload(delivery.payload.clone())
            .message_id(format!("{STREAM}.{sequence}.{time}"))
            .header("Origin", format!("{STREAM} {sequence}"))
            // A line break would end the header.
            .header("Reason", reason.escape_debug().to_string());
        self.jetstream
            .send_publish(ASIDE_SUBJECT, message)
            .await?
            .await
            .context("cannot set aside; the payment stays where it is")?;
        answer_with(delivery, AckKind::Term).await?;
        println!("aside:  {name}, {reason}");
        Ok(())
    }
}

// ANCHOR: in_hand
/// Keeps NATS from delivering again what is in hand. It does not count as a delivery.
async fn still_at_it(in_hand: Option<&Message>) -> Result<()> {
    if let Some(delivery) = in_hand {
        let told = delivery.ack_with(AckKind::Progress).await;
        told.map_err(Error::from_boxed)?;
    }
    Ok(())
}

/// Gives back what is not decided: another worker gets it at once.
async fn give_back(
    in_hand: Option<Message>,
    mut request: Option<pull::Batch>,
) -> Result<()> {
    let mut rest: Vec<Message> = in_hand.into_iter().collect();
    // Read to its end: what comes to a request that is dropped is nobody's until
    // `ACK_WAIT` is over. While the breaker is open there is none.
    while request.is_some()
        && let Some(delivery) = next(&mut request).await?
    {
        rest.push(delivery);
    }
    for delivery in &rest {
        answer_with(delivery, AckKind::Nak(None)).await?;
    }
    Ok(())
}
// ANCHOR_END: in_hand

/// Answers a delivery and waits until NATS has the answer.
async fn answer_with(delivery: &Message, kind: AckKind) -> Result<()> {
    let answered = timeout(PATIENCE, delivery.double_ack_with(kind)).await;
    answered.context("lost NATS")?.map_err(Error::from_boxed)
}

// ANCHOR: call
/// Calls the gateway until it answers, or until the breaker opens: then there is no
/// answer.
async fn call(
    gateway: &str,
    breaker: &mut Breaker,
    payment: &Payment,
) -> Option<Answer> {
    loop {
        match charge(gateway, payment).await {
            Ok(answer) => {
                *breaker = turn(*breaker, breaker.succeeded());
                return Some(answer);
            }
            Err(outage) => {
                println!("failed: {}, {outage}", payment.id);
                *breaker = turn(*breaker, breaker.failed(Instant::now()));
                if breaker.is_open() {
                    return None;
                }
            }
        }
    }
}

/// Says so if it is in another state now.
fn turn(breaker: Breaker, next: Breaker) -> Breaker {
    if next.turned(breaker) {
        println!("state:  {next}");
    }
    next
}

/// Waits until a probe is due; for ever, unless the breaker is open.
async fn probe_due(breaker: Breaker) {
    match breaker.probe_at() {
        Some(at) => sleep_until(at.into()).await,
        None => pending().await,
    }
}
// ANCHOR_END: call

// ANCHOR: no_breaker
/// The mistake: three attempts for each payment, whatever the ones before it have met.
async fn call_without_breaker(gateway: &str, payment: &Payment) -> Option<Answer> {
    for _attempt in 1..=ATTEMPTS {
        match charge(gateway, payment).await {
            Ok(answer) => return Some(answer),
            Err(outage) => println!("failed: {}, {outage}", payment.id),
        }
    }
    None
}
// ANCHOR_END: no_breaker

// ANCHOR: take
/// Asks for one payment. The stream ends with it, or when the request is over.
async fn ask(consumer: &PullConsumer) -> Result<pull::Batch> {
    let request = consumer.batch().max_messages(1).expires(REQUEST);
    let request = request.messages().await;
    request.context("cannot take payments; is the stream or its consumer deleted?")
}

/// The next delivery for a request, or its end; without one it waits for ever.
async fn next(request: &mut Option<pull::Batch>) -> Result<Option<Message>> {
    match request {
        Some(request) => {
            let delivery = request.next().await.transpose();
            delivery.map_err(Error::from_boxed)
        }
        None => pending().await,
    }
}

async fn take_payments(jetstream: &jetstream::Context) -> Result<PullConsumer> {
    let stream = declare(jetstream).await?;
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
// ANCHOR_END: take

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    for name in [STREAM, ASIDE] {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(name).await;
    }
    declare(&jetstream).await?;
    send(&jetstream, [1, 2, 3, 1001, 4]).await?;
    println!("sent:   5 payments to {SUBJECT}");
    client.drain().await?;

    let ledger = Ledger::open(Path::new(":memory:"))?;
    // Down for the third call and three more.
    let gateway = Gateway::start("127.0.0.1:0", ledger, 2..6).await?;
    let all = async {
        // What has not come is missed below.
        let _came = timeout(STORY, gateway.until(9)).await;
    };
    worker(gateway.address(), Care::Breaker(FIRST_WAIT), all).await?;
    let calls = gateway.calls();
    let charged = calls
        .iter()
        .filter(|call| call.ends_with("charged"))
        .count();
    println!("calls:  {}, and {charged} cards charged", calls.len());
    ensure!(
        charged == 4,
        "not all are charged; has another worker taken them?"
    );
    Ok(())
}
// ANCHOR_END: story

// ---- Streams and connection ------------------------------------------------

/// Declares the stream of the payments, and before it that for those set aside.
async fn declare(jetstream: &jetstream::Context) -> Result<stream::Stream> {
    use stream::RetentionPolicy::{Limits, WorkQueue};
    queue(jetstream, ASIDE, ASIDE_SUBJECT, Limits).await?;
    queue(jetstream, STREAM, SUBJECT, WorkQueue).await
}

async fn queue(
    jetstream: &jetstream::Context,
    stream: &str,
    subject: &str,
    retention: stream::RetentionPolicy,
) -> Result<stream::Stream> {
    jetstream
        .create_stream(stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            retention,
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
    ConnectOptions::new()
        .event_callback(|event| async move {
            // The client connects again by itself.
            if event == Event::Disconnected {
                eprintln!("lost NATS, still trying");
            }
        })
        .connect(server)
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
