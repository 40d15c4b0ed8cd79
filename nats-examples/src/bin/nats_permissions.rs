//! Permissions: a denied publish is no error, but an event of the connection.
//!
//! Teaches: `publish` and `subscribe` return `Ok` even where the server forbids
//! them, since they wait for no answer. The denial comes later, as an event.
//! Without a callback for events nobody hears of it.
//!
//! Run, with a server of its own, or after
//! `nats-server -c nats-examples/config/nats_permissions.conf`:
//!
//! ```text
//! cargo lab run nats_permissions     # starts such a server, and runs:
//! cargo run --bin nats_permissions
//! ```
//!
//! Expected output:
//!
//! ```text
//! allowed:   permissions.orders.new arrived
//! answered:  permissions.stock.check says 7
//! published: permissions.billing.refund, and no error came back
//! event:     Permissions Violation for Publish to "permissions.billing.refund"
//! subscribed: permissions.billing.>, and no error came back
//! event:     Permissions Violation for Subscription to "permissions.billing.>"
//! unasked:   Permissions Violation for Publish to "permissions.orders.new"
//! refused:   NATS at <address> refuses clerk; check the password
//! ```
//!
//! Left out on purpose: TLS, without which a password crosses the network as it
//! is; and users that come and go without a change of the server's file (JWT).

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, Request,
    ServerAddr, ServerError,
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::mpsc::{self, Receiver},
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_permissions.conf";
const NEW_ORDER: &str = "permissions.orders.new";
const STOCK: &str = "permissions.stock.check";
const REFUND: &str = "permissions.billing.refund";
const ALL_BILLING: &str = "permissions.billing.>";

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match try_everything().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn try_everything() -> Result<()> {
    let (clerk, mut denials) = connect_as("clerk", "clerk-password").await?;
    let mut orders = clerk.subscribe(NEW_ORDER).await?;
    clerk.publish(NEW_ORDER, "1 kettle".into()).await?;
    let order = timeout(PATIENCE, orders.next())
        .await
        .with_context(|| format!("no order came back; start NATS with {CONFIG}"))?
        .context("the server ended the subscription")?;
    println!("allowed:   {} arrived", order.subject);

    let (stock, mut stock_denials) = connect_as("stock", "stock-password").await?;
    println!("answered:  {STOCK} says {}", ask(&clerk, &stock).await?);

    clerk.publish(REFUND, "all of it".into()).await?;
    // Not even this fails: it only says that the message has left.
    clerk.flush().await?;
    println!("published: {REFUND}, and no error came back");
    println!("event:     {}", denial(&mut denials).await?);

    // The subscription is there and stays silent for good.
    let _silent = clerk.subscribe(ALL_BILLING).await?;
    clerk.flush().await?;
    println!("subscribed: {ALL_BILLING}, and no error came back");
    println!("event:     {}", denial(&mut denials).await?);

    // Who may only answer cannot begin: `allow_responses` opens a reply subject
    // for one message.
    stock.publish(NEW_ORDER, "7 kettles".into()).await?;
    println!("unasked:   {}", denial(&mut stock_denials).await?);

    match connect_as("clerk", "guessed").await {
        Err(error) if error.is::<ConnectError>() => println!("refused:   {error}"),
        Err(error) => return Err(error),
        Ok(_) => bail!("a wrong password got in; start NATS with {CONFIG}"),
    }
    clerk.drain().await?;
    stock.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// A question of the clerk and the answer of the stock service.
async fn ask(clerk: &Client, stock: &Client) -> Result<String> {
    let mut requests = stock.subscribe(STOCK).await?;
    let answer = async {
        while let Some(request) = requests.next().await {
            if let Some(reply_to) = request.reply {
                stock.publish(reply_to, "7".into()).await?;
            }
        }
        bail!("the server ended the subscription to {STOCK}")
    };
    let ask = async {
        // Again and again: the subscription is on another connection, so the
        // first question may come before it.
        loop {
            let request = Request::new()
                .payload("kettle".into())
                .timeout(Some(Duration::from_millis(200)));
            if let Ok(reply) = clerk.send_request(STOCK, request).await {
                break reply.payload;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let text = tokio::select! {
        text = timeout(PATIENCE, ask) => {
            text.with_context(|| format!("nobody answers on {STOCK}"))?
        }
        failed = answer => failed?,
    };
    Ok(String::from_utf8_lossy(&text).into_owned())
}

// ANCHOR: denial
/// The next thing that the server has forbidden this connection.
async fn denial(denials: &mut Receiver<String>) -> Result<String> {
    let denial = timeout(PATIENCE, denials.recv())
        .await
        .map_err(|_elapsed| {
            anyhow!("the server has denied nothing; start it with {CONFIG}")
        })?;
    denial.context("the connection is closed")
}
// ANCHOR_END: denial

// ANCHOR: connect
/// A connection, and what the server will forbid it.
async fn connect_as(
    user: &str,
    password: &str,
) -> Result<(Client, Receiver<String>)> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    let (sender, denials) = mpsc::channel(16);
    let client = ConnectOptions::with_user_and_password(
        user.into(),
        password.into(),
    )
    .event_callback(move |event| {
        if let Event::ServerError(ServerError::Other(text)) = event {
            // Does not wait for room: a client that is denied a thousand
            // times a second must not fill the memory.
            let _ = sender.try_send(text);
        }
        async {}
    })
    .connect(server)
    .await
    .map_err(|error| match error.kind() {
        ConnectErrorKind::AuthorizationViolation => Error::new(error).context(
            format!("NATS at {place} refuses {user}; check the password"),
        ),
        _ => anyhow!(
            "no NATS server at {place} ({error}); start one: cargo lab up nats"
        ),
    })?;
    Ok((client, denials))
}
// ANCHOR_END: connect
