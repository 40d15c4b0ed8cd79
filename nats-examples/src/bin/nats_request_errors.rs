//! Request errors: four ways to get no answer, each with its own next step.
//!
//! Teaches: look at the kind of the error. "No responders" is known at once, and
//! asking again is safe; a time-out costs the whole limit, and the work may have
//! been done; a payload above the server's limit and an invalid subject never
//! leave the client, and asking again never helps.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_request_errors
//! ```
//!
//! Expected output:
//!
//! ```text
//! nobody listens:      no responders (at once); ask again soon
//! nobody answers:      request timed out (after 2 s); it may have been done
//! payload too large:   max payload size exceeded (at once); send less
//! space in a subject:  invalid subject (at once); mend the code
//! the refusal says:    Payload size limit of <n> exceeded by message size of <n>
//! after all four:      7 on hand, on connection 1
//! ```
//!
//! Left out on purpose: asking again. How often and how long is a decision of
//! the caller, who knows until when an answer is of use.

use std::{
    env,
    error::Error as _,
    process::ExitCode,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, Request, RequestError, RequestErrorKind, ServerAddr,
    Subscriber,
};
use bytes::Bytes;
use futures_lite::StreamExt as _;

const DEFAULT_URL: &str = "nats://localhost:4222";
/// Here nobody listens, as during a deploy.
const NOT_DEPLOYED: &str = "request_errors.stock.reserve";
/// Here the stock service listens; it keeps silent about an unknown article.
const ON_HAND: &str = "request_errors.stock.on_hand";
const WITH_A_SPACE: &str = "request_errors.stock on hand";

/// How long one request may take. The client's own default is 10 s.
const PATIENCE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    match four_errors().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn four_errors() -> Result<()> {
    let client = connect().await?;
    let questions = client.subscribe(ON_HAND).await?;
    client.flush().await?;
    let service = tokio::spawn(answer_all(client.clone(), questions));

    fail(&client, "nobody listens:", NOT_DEPLOYED, "sku-1".into()).await?;
    fail(&client, "nobody answers:", ON_HAND, "no such sku".into()).await?;
    // What the server allows, as it told this client when it connected. Headers
    // count too.
    let too_large = Bytes::from(vec![b'x'; client.max_payload() + 1]);
    let refused =
        fail(&client, "payload too large:", ON_HAND, too_large.clone()).await?;
    fail(&client, "space in a subject:", WITH_A_SPACE, "sku-1".into()).await?;
    let reason = refused.source().context("a refusal without a reason")?;
    println!("the refusal says:    {reason}");

    // The client has sent nothing of the large one, so the server had no reason
    // to close the connection, and the next question is answered on it.
    let answer = ask(&client, ON_HAND, "sku-1".into()).await?;
    let connects = client.statistics().connects.load(Ordering::Relaxed);
    println!("after all four:      {answer} on hand, on connection {connects}");

    client.drain().await?;
    service.await?
}
// ANCHOR_END: story

// ANCHOR: fail
/// Asks, tells what became of it, and returns the error that is the point.
async fn fail(
    client: &Client,
    case: &str,
    subject: &'static str,
    payload: Bytes,
) -> Result<RequestError> {
    let asked = Instant::now();
    let error = match ask(client, subject, payload).await {
        Ok(answer) => bail!("{case} somebody answered {subject}: {answer}"),
        Err(error) => error,
    };
    let took = asked.elapsed();
    let when = if took < PATIENCE {
        "at once".to_owned()
    } else {
        format!("after {} s", took.as_secs())
    };
    let kind = error.kind();
    println!("{case:<20} {kind} ({when}); {}", next_step(&error)?);
    Ok(error)
}
// ANCHOR_END: fail

// ANCHOR: next_step
fn next_step(error: &RequestError) -> Result<&'static str> {
    Ok(match error.kind() {
        // The server knew of no subscription: nobody has seen the request.
        RequestErrorKind::NoResponders => "ask again soon",
        // Somebody has it and may still work on it. A user who may not subscribe
        // to its own inbox also sees this, with the work done each time.
        RequestErrorKind::TimedOut => "it may have been done",
        // These two were found by the client before anything was sent.
        RequestErrorKind::MaxPayloadExceeded => "send less",
        RequestErrorKind::InvalidSubject => "mend the code",
        RequestErrorKind::Other => bail!("cannot ask: {error}"),
    })
}
// ANCHOR_END: next_step

// ANCHOR: ask
async fn ask(
    client: &Client,
    subject: &'static str,
    payload: Bytes,
) -> Result<String, RequestError> {
    // `Client::request` would wait for the limit of the whole connection.
    let request = Request::new().payload(payload).timeout(Some(PATIENCE));
    let answer = client.send_request(subject, request).await?;
    Ok(String::from_utf8_lossy(&answer.payload).into_owned())
}
// ANCHOR_END: ask

async fn answer_all(client: Client, mut questions: Subscriber) -> Result<()> {
    while let Some(question) = questions.next().await {
        // A service should answer "unknown"; this silence is the fault to see.
        if &question.payload[..] != b"sku-1" {
            continue;
        }
        let Some(reply_to) = question.reply else {
            continue;
        };
        client.publish(reply_to, "7".into()).await?;
    }
    Ok(())
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
