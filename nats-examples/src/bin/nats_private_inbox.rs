//! Permissions: an inbox of one's own keeps replies private.
//!
//! Teaches: a reply is a message to `_INBOX.…`, so whoever may subscribe to
//! `_INBOX.>` reads the replies of all. Give each user a prefix of its own, in
//! the client and in its permissions. A client that keeps the usual prefix then
//! only sees a time-out; the reason comes as an event.
//!
//! Run, with a server of its own, or after
//! `nats-server -c nats-examples/config/nats_private_inbox.conf`:
//!
//! ```text
//! cargo lab run nats_private_inbox     # starts such a server, and runs:
//! cargo run --bin nats_private_inbox
//! ```
//!
//! Expected output:
//!
//! ```text
//! shared:   alice asks and gets: 7 left, alice
//! shared:   bob reads it too: 7 left, alice
//! private:  red asks and gets: 7 left, red
//! private:  blue may not listen: Permissions Violation for Subscription to "_INBOX_red.>"
//! forgotten: red asks without its prefix: no answer within 500 ms
//! forgotten: Permissions Violation for Subscription to "_INBOX.<id>"
//! ```
//!
//! Left out on purpose: accounts, which keep whole teams apart and not only their
//! replies.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, Request, RequestErrorKind,
    ServerAddr, ServerError,
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::mpsc::{self, Receiver},
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_private_inbox.conf";
const SUBJECT: &str = "inbox.stock";
const USUAL: &str = "_INBOX";

/// How long anything may take that is to succeed.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait for an answer that will not come.
const SHORT: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match ask_and_listen_in().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn ask_and_listen_in() -> Result<()> {
    let (stock, _) = connect_as("stock", USUAL).await?;
    let mut requests = stock.subscribe(SUBJECT).await?;
    stock.flush().await?;
    let responder = stock.clone();
    let answers = tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            if let Some(reply_to) = request.reply {
                let user = String::from_utf8_lossy(&request.payload);
                let answer = format!("7 left, {user}");
                responder.publish(reply_to, answer.into()).await?;
            }
        }
        anyhow::Ok(())
    });

    let (alice, _) = connect_as("alice", USUAL).await?;
    let (bob, _) = connect_as("bob", USUAL).await?;
    let mut inboxes = bob.subscribe("_INBOX.>").await?;
    // The server deals with the commands of one connection in their order: when
    // bob has an answer, it knows of the subscription above.
    let own = ask(&bob, "bob").await?;
    println!(
        "shared:   alice asks and gets: {}",
        ask(&alice, "alice").await?
    );
    for expected in [own, "7 left, alice".to_owned()] {
        let overheard = timeout(PATIENCE, inboxes.next())
            .await
            .with_context(|| format!("bob is deaf; start NATS with {CONFIG}"))?
            .context("the server ended the subscription")?;
        ensure!(overheard.payload == expected, "bob reads {overheard:?}");
    }
    println!("shared:   bob reads it too: 7 left, alice");

    let (red, _) = connect_as("red", "_INBOX_red").await?;
    let (blue, mut blue_denied) = connect_as("blue", "_INBOX_blue").await?;
    let _silent = blue.subscribe("_INBOX_red.>").await?;
    println!("private:  red asks and gets: {}", ask(&red, "red").await?);
    let denied = denial(&mut blue_denied).await?;
    println!("private:  blue may not listen: {denied}");

    // The same user, by a client that nobody has told of the prefix.
    let (red, mut red_denied) = connect_as("red", USUAL).await?;
    let request = Request::new().payload("red".into()).timeout(Some(SHORT));
    match red.send_request(SUBJECT, request).await {
        // Not "no responders", and not "forbidden" either.
        Err(error) if error.kind() == RequestErrorKind::TimedOut => println!(
            "forgotten: red asks without its prefix: no answer within {} ms",
            SHORT.as_millis()
        ),
        Err(error) => return Err(error.into()),
        Ok(_) => bail!("red may read any inbox; start NATS with {CONFIG}"),
    }
    println!("forgotten: {}", denial(&mut red_denied).await?);

    // The responder sees the end of its subscription.
    stock.drain().await?;
    answers.await?
}
// ANCHOR_END: story

async fn ask(client: &Client, user: &'static str) -> Result<String> {
    let ask = async {
        loop {
            match client.request(SUBJECT, user.into()).await {
                // The responder is on another connection and may be late.
                Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                    sleep(Duration::from_millis(20)).await;
                }
                answer => return answer,
            }
        }
    };
    let answer = timeout(PATIENCE, ask).await.with_context(|| {
        format!("no answer on {SUBJECT}; does NATS run with {CONFIG}?")
    })??;
    Ok(String::from_utf8_lossy(&answer.payload).into_owned())
}

async fn denial(denials: &mut Receiver<String>) -> Result<String> {
    let denial = timeout(PATIENCE, denials.recv())
        .await
        .map_err(|_elapsed| {
            anyhow!("the server has denied nothing; start it with {CONFIG}")
        })?;
    denial.context("the connection is closed")
}

// ANCHOR: connect
/// A connection with this inbox prefix, and what the server will forbid it.
async fn connect_as(user: &str, prefix: &str) -> Result<(Client, Receiver<String>)> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    let password = format!("{user}-password");
    let (sender, denials) = mpsc::channel(16);
    let client = ConnectOptions::with_user_and_password(user.into(), password)
        .custom_inbox_prefix(prefix)
        .event_callback(move |event| {
            if let Event::ServerError(ServerError::Other(text)) = event {
                let _ = sender.try_send(text);
            }
            async {}
        })
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses the user {user}; start it with {CONFIG}"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })?;
    Ok((client, denials))
}
// ANCHOR_END: connect
