//! Request and reply: a question to a subject, one answer back.
//!
//! Teaches: when nobody listens on the subject, the server says so at once
//! ("no responders"), which is different from a responder that is slow. So the
//! responder's subscription must reach the server before the request does.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_request_reply
//! ```
//!
//! Expected output:
//!
//! ```text
//! too early: no responders on request.subject (known after <ms> ms)
//! responder: ready on request.subject
//! responder: got Request!
//! response:  Response!
//! ```
//!
//! Left out on purpose: several responders that share the requests (subscribe
//! them with one queue group), and errors in an answer (the service API).

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, Request, RequestErrorKind, ServerAddr, Subscriber,
};
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "request.subject";

/// How long a responder may take. The client's own default is 10 s.
const PATIENCE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    match ask_and_answer().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn ask_and_answer() -> Result<()> {
    let client = connect().await?;

    let asked = Instant::now();
    match ask(&client).await? {
        None => println!(
            "too early: no responders on {SUBJECT} (known after {} ms)",
            asked.elapsed().as_millis()
        ),
        Some(answer) => println!("another responder is there already: {answer}"),
    }

    let requests = client.subscribe(SUBJECT).await?;
    // `subscribe` only queues the command; this writes it to the socket. The
    // server takes the commands of one connection in their order, so our own
    // request below finds the responder. A requester elsewhere that is a moment
    // too early still meets "no responders", and should ask again.
    client.flush().await?;
    println!("responder: ready on {SUBJECT}");
    let responder = tokio::spawn(answer_all(client.clone(), requests));

    match ask(&client).await? {
        Some(answer) => println!("response:  {answer}"),
        None => bail!("no responders on {SUBJECT}, although one subscribed"),
    }

    // Ends the subscription, sends what is queued, closes the connection; the
    // responder then sees the end of its stream.
    client.drain().await?;
    responder.await?
}
// ANCHOR_END: story

// ANCHOR: ask
/// The answer, or `None` when nobody listens on the subject.
async fn ask(client: &Client) -> Result<Option<String>> {
    let request = Request::new()
        .payload("Request!".into())
        .timeout(Some(PATIENCE));
    match client.send_request(SUBJECT, request).await {
        Ok(answer) => {
            Ok(Some(String::from_utf8_lossy(&answer.payload).into_owned()))
        }
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(None),
        // Also what a user sees who may not subscribe to its own inbox.
        Err(error) if error.kind() == RequestErrorKind::TimedOut => {
            bail!("a responder got the request but did not answer in {PATIENCE:?}")
        }
        Err(error) => Err(error).context(format!("cannot ask {SUBJECT}")),
    }
}
// ANCHOR_END: ask

// ANCHOR: answer
async fn answer_all(client: Client, mut requests: Subscriber) -> Result<()> {
    while let Some(request) = requests.next().await {
        // A plain publish to the same subject has no reply subject: nobody
        // waits for an answer.
        let Some(reply_to) = request.reply else {
            continue;
        };
        let text = String::from_utf8_lossy(&request.payload);
        println!("responder: got {text}");
        client.publish(reply_to, "Response!".into()).await?;
    }
    Ok(())
}
// ANCHOR_END: answer

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
