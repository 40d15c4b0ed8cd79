//! Publish and subscribe: every subscriber that is there gets every message.
//!
//! Teaches: subscribe first, then publish. Core NATS keeps nothing: a message
//! that nobody waits for is gone. And `publish` and `subscribe` only queue
//! their command in the client; `flush` is what sends it on its way.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_pubsub
//! ```
//!
//! Expected output:
//!
//! ```text
//! subscribed: my.subject
//! published:  Hello NATS!
//! received:   Hello NATS! (on my.subject)
//! ```
//!
//! Left out on purpose: anything that keeps a message for a subscriber who
//! comes late; that is what JetStream adds.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{Client, ConnectErrorKind, ServerAddr};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "my.subject";

#[tokio::main]
async fn main() -> ExitCode {
    match publish_and_receive().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: pubsub
async fn publish_and_receive() -> Result<()> {
    let client = connect().await?;
    let mut subscriber = client.subscribe(SUBJECT).await?;
    // `subscribe` only queues the command; this writes it to the socket. The
    // server takes the commands of one connection in their order, so what we
    // publish below cannot overtake it. A publisher elsewhere could.
    client.flush().await?;
    println!("subscribed: {SUBJECT}");

    client.publish(SUBJECT, "Hello NATS!".into()).await?;
    // Without this, a program that ends here may end before the message left.
    client.flush().await?;
    println!("published:  Hello NATS!");

    // A server that forbids the subject tells the connection, not this stream,
    // so waiting without a limit could wait forever.
    let message = timeout(Duration::from_secs(5), subscriber.next())
        .await
        .context(
            "nothing came back within 5 s; may this user publish and subscribe \
             on my.subject?",
        )?
        .context("the server ended the subscription")?;
    let text = String::from_utf8_lossy(&message.payload);
    println!("received:   {text} (on {})", message.subject);

    // Ends the subscription and closes the connection, in the background. What
    // has to be sent has been flushed above.
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: pubsub

// ANCHOR: connect
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
// ANCHOR_END: connect
