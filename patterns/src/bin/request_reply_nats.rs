//! Request and reply: a hundred questions at a time, and each gets its own answer.
//!
//! Teaches: `request` makes an inbox for the answer, and one subscription serves all
//! of a client's. Where nobody listens to the subject the server says so at once;
//! where somebody listens and does not answer, the time limit ends it. The deadline
//! goes along in a header, so a server that is late need not work for nobody.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin request_reply_nats             # the whole story
//! cargo run --bin request_reply_nats serve       # terminal 1, and 2
//! cargo run --bin request_reply_nats ask 100     # terminal 3
//! ```
//!
//! Expected output:
//!
//! ```text
//! asked:    100 questions at the same time
//! answered: 100, each with its own answer
//! late:     a question whose deadline has passed has no answer
//! nobody:   NATS says at once that nobody answers
//! ```
//!
//! Left out on purpose: answers in several parts, and all that the service API adds;
//! see nats_service.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, Message, Request, RequestErrorKind,
    ServerAddr, Subscriber,
};
use futures_lite::StreamExt as _;
use patterns::request_reply::{
    Answer, DEADLINE, answer, deadline, is_late, question,
};
use tokio::{sync::Notify, task::JoinSet};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "price.requests";
/// Of several servers, one gets each question.
const QUEUE_GROUP: &str = "price-servers";
const USAGE: &str = "usage: request_reply_nats [serve | ask COUNT]";

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
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
    let client = connect().await?;
    let mut questions = questions(&client).await?;
    println!("ready:    answers to {SUBJECT}, Ctrl-C to stop");
    loop {
        let message = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            message = questions.next() => message,
        };
        let message = message.context("NATS ended the subscription")?;
        println!("{}", serve(&client, &message).await?);
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

async fn questions(client: &Client) -> Result<Subscriber> {
    let questions = client
        .queue_subscribe(SUBJECT, QUEUE_GROUP.to_owned())
        .await?;
    known(client).await?;
    Ok(questions)
}

/// Returns when the server knows of what this connection has subscribed to, or no more:
/// it reads a connection in order, and answers this at once. A flush only writes.
async fn known(client: &Client) -> Result<()> {
    match client.request("nobody.listens.here", "".into()).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(()),
        other => bail!("NATS does not say that nobody listens: {other:?}"),
    }
}

// ANCHOR: serve
async fn serve(client: &Client, message: &Message) -> Result<&'static str> {
    let headers = message.headers.as_ref();
    let deadline = headers.and_then(|headers| headers.get(DEADLINE));
    if is_late(deadline.map(|value| value.as_str()), SystemTime::now()) {
        return Ok("skipped:  nobody waits any more");
    }
    let Some(inbox) = message.reply.clone() else {
        return Ok("skipped:  nobody wants an answer");
    };
    let answer = serde_json::to_vec(&answer(&message.payload))?;
    client.publish(inbox, answer.into()).await?;
    Ok("answered: a question")
}
// ANCHOR_END: serve

// ---- Client ----------------------------------------------------------------

async fn ask_many(count: u64) -> Result<()> {
    let client = connect().await?;
    let caller = Arc::new(Caller {
        client: client.clone(),
    });
    let answered = ask_all(&caller, count).await?;
    println!("answered: {answered} of {count}, each with its own answer");
    client.drain().await?;
    Ok(())
}

// ANCHOR: ask
/// The inboxes and who waits for which are the client's own.
struct Caller {
    client: Client,
}

impl Caller {
    async fn ask(&self, number: u64, patience: Duration) -> Result<Answer> {
        let mut headers = HeaderMap::new();
        headers.insert(DEADLINE, deadline(SystemTime::now(), patience));
        let request = Request::new()
            .headers(headers)
            .payload(serde_json::to_vec(&question(number))?.into())
            .timeout(Some(patience));
        let answer = self.client.send_request(SUBJECT, request).await;
        let answer = answer.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => anyhow!("nobody answers to {SUBJECT}"),
            RequestErrorKind::TimedOut => {
                anyhow!("no answer from {SUBJECT} within {patience:?}")
            }
            _ => error.into(),
        })?;
        Ok(serde_json::from_slice(&answer.payload)?)
    }
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
    let client = connect().await?;
    let server = connect().await?;
    let mut incoming = questions(&server).await?;
    let answers = server.clone();
    let answering = tokio::spawn(async move {
        while let Some(message) = incoming.next().await {
            serve(&answers, &message).await?;
        }
        Ok::<_, anyhow::Error>(())
    });
    let caller = Arc::new(Caller {
        client: client.clone(),
    });
    println!("asked:    100 questions at the same time");
    let answered = ask_all(&caller, 100).await?;
    println!("answered: {answered}, each with its own answer");

    // Its deadline has passed before it is sent, as if it had lain for long.
    let mut headers = HeaderMap::new();
    headers.insert(DEADLINE, "0");
    let late = Request::new()
        .headers(headers)
        .payload(serde_json::to_vec(&question(1))?.into())
        .timeout(Some(IMPATIENCE));
    match client.send_request(SUBJECT, late).await {
        Err(error) if error.kind() == RequestErrorKind::TimedOut => {
            println!("late:     a question whose deadline has passed has no answer");
        }
        other => bail!("a late question got {other:?}"),
    }

    answering.abort();
    // It ends with an error, that of having been ended; its subscription ends with it.
    let _aborted = answering.await;
    known(&server).await?;
    match caller.ask(1, PATIENCE).await {
        Err(error) if error.to_string().starts_with("nobody answers") => {
            println!("nobody:   NATS says at once that nobody answers");
        }
        other => bail!("without a server there is {other:?}"),
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Connection ------------------------------------------------------------

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
