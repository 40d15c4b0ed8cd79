//! Accounts: two teams on one server that see of each other what they agreed on.
//!
//! Teaches: the same subject in two accounts is two subjects. What one team offers
//! is an export, what the other takes is an import, and only both together let a
//! message through: a service for questions, a stream for news.
//!
//! Run, with a server of its own, or after
//! `nats-server -c nats-examples/config/nats_accounts.conf`:
//!
//! ```text
//! cargo lab run nats_accounts     # starts such a server, and runs:
//! cargo run --bin nats_accounts
//! ```
//!
//! Expected output:
//!
//! ```text
//! service:  shipping asks ext.price and gets: 30 for kettle
//! stream:   shipping gets ext.accounts.placed.1: kettle
//! isolated: accounts.internal of ORDERS stays there; shipping has its own: parcel
//! ```
//!
//! Left out on purpose: JetStream, of which each account has streams and limits of
//! its own.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Message, Request, ServerAddr,
    Subscriber,
};
use futures_lite::StreamExt as _;
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_accounts.conf";
const PRICE: &str = "accounts.price";
const IMPORTED_PRICE: &str = "ext.price";
const PLACED: &str = "accounts.placed.1";
const IMPORTED_PLACED: &str = "ext.accounts.placed.>";
/// Neither exported nor imported, and used by both teams.
const INTERNAL: &str = "accounts.internal";

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match work_together().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn work_together() -> Result<()> {
    let orders = connect_as("orders").await?;
    let shipping = connect_as("shipping").await?;

    let questions = orders.subscribe(PRICE).await?;
    let answers = tokio::spawn(answer_all(orders.clone(), questions));
    // Before the question below, on the same connection: when that is answered,
    // the server knows of these two.
    let mut news = shipping.subscribe(IMPORTED_PLACED).await?;
    let mut internal = shipping.subscribe(INTERNAL).await?;
    let price = ask(&shipping).await?;
    println!("service:  shipping asks {IMPORTED_PRICE} and gets: {price}");

    // What must not arrive goes first: the news comes after it on the same way.
    orders.publish(INTERNAL, "margin 40 %".into()).await?;
    orders.publish(PLACED, "kettle".into()).await?;
    let placed = next(&mut news).await?;
    let text = String::from_utf8_lossy(&placed.payload);
    println!("stream:   shipping gets {}: {text}", placed.subject);

    shipping.publish(INTERNAL, "parcel".into()).await?;
    let own = next(&mut internal).await?;
    let text = String::from_utf8_lossy(&own.payload);
    ensure!(text == "parcel", "shipping reads of ORDERS: {text}");
    println!(
        "isolated: {INTERNAL} of ORDERS stays there; shipping has its own: {text}"
    );

    shipping.drain().await?;
    orders.drain().await?;
    answers.await?
}
// ANCHOR_END: story

// ANCHOR: ask
/// Asks again and again: the one who answers is on another connection, whose
/// subscription may come later than the first question.
async fn ask(shipping: &Client) -> Result<String> {
    let ask = async {
        loop {
            let request = Request::new()
                .payload("kettle".into())
                .timeout(Some(Duration::from_millis(200)));
            match shipping.send_request(IMPORTED_PRICE, request).await {
                Ok(reply) => break reply.payload,
                Err(_not_yet) => sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let price = timeout(PATIENCE, ask).await.map_err(|_elapsed| {
        anyhow!("nobody answers on {IMPORTED_PRICE}; start NATS with {CONFIG}")
    })?;
    Ok(String::from_utf8_lossy(&price).into_owned())
}

async fn answer_all(orders: Client, mut questions: Subscriber) -> Result<()> {
    while let Some(question) = questions.next().await {
        if let Some(reply_to) = question.reply {
            let item = String::from_utf8_lossy(&question.payload);
            let answer = format!("30 for {item}");
            orders.publish(reply_to, answer.into()).await?;
        }
    }
    Ok(())
}
// ANCHOR_END: ask

async fn next(messages: &mut Subscriber) -> Result<Message> {
    match timeout(PATIENCE, messages.next()).await {
        Ok(message) => message.context("the server ended the subscription"),
        Err(_elapsed) => bail!("nothing arrives; start NATS with {CONFIG}"),
    }
}

async fn connect_as(user: &str) -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    ConnectOptions::with_user_and_password(user.into(), format!("{user}-password"))
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses the user {user}; start it with {CONFIG}"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
