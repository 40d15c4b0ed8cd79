//! Queue groups: each order goes to one packer of the group.
//!
//! Teaches: subscribers that name the same group share the messages, and nothing
//! is configured on the server. It picks a member at random for each message;
//! who subscribes without the group still gets everything.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_queue_groups
//! cargo run --bin nats_queue_groups plain    # the mistake: no group
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: 200 orders to packers.orders
//! packer a:  <n> orders
//! packer b:  <n> orders
//! packed:    200 orders once, 0 twice
//! audit:     200 orders
//! ```
//!
//! Left out on purpose: acknowledgements, as core NATS has none. What a packer
//! has received and not finished when it dies is lost, and no other gets it.

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::{Client, ConnectErrorKind, ServerAddr, Subscriber};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "packers.orders";
const GROUP: &str = "packers";
const ORDERS: usize = 200;
/// How long the server may take to deliver.
const PATIENCE: Duration = Duration::from_secs(5);
const USAGE: &str = "usage: nats_queue_groups [plain]";

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => pack(Packers::InOneGroup).await,
        ["plain"] => pack(Packers::Plain).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Clone, Copy)]
enum Packers {
    InOneGroup,
    /// The mistake, to see what it costs: every packer packs every order.
    Plain,
}

// ANCHOR: story
async fn pack(packers: Packers) -> Result<()> {
    let client = connect().await?;
    let a = packer(&client, packers).await?;
    let b = packer(&client, packers).await?;
    // No group: the audit wants to see everything.
    let audit = client.subscribe(SUBJECT).await?;

    for number in 1..=ORDERS {
        let order = format!("order {number}");
        client.publish(SUBJECT, order.into()).await?;
    }
    round_trip(&client).await?;
    println!("published: {ORDERS} orders to {SUBJECT}");

    let (a, b) = (received(a).await?, received(b).await?);
    println!("packer a:  {} orders", a.len());
    println!("packer b:  {} orders", b.len());
    let mut times: BTreeMap<String, u32> = BTreeMap::new();
    for order in a.into_iter().chain(b) {
        *times.entry(order).or_default() += 1;
    }
    let twice = times.values().filter(|&&times| times > 1).count();
    println!(
        "packed:    {} orders once, {twice} twice",
        times.len() - twice
    );

    let audited = received(audit).await?.len();
    ensure!(
        audited == ORDERS,
        "the audit saw {audited} of {ORDERS} orders; may this user publish and \
         subscribe on {SUBJECT}?"
    );
    println!("audit:     {audited} orders");
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: packer
async fn packer(client: &Client, packers: Packers) -> Result<Subscriber> {
    let subscriber = match packers {
        // The name is all that makes a group. A typing error makes another one,
        // which gets all orders once more.
        Packers::InOneGroup => client.queue_subscribe(SUBJECT, GROUP.into()).await?,
        Packers::Plain => client.subscribe(SUBJECT).await?,
    };
    Ok(subscriber)
}
// ANCHOR_END: packer

// ANCHOR: round_trip
/// Returns when all that the server has delivered to this connection for what
/// was published on it is here.
async fn round_trip(client: &Client) -> Result<()> {
    // A message to ourselves, behind all others: the server takes the commands
    // of one connection, and delivers to it, in their order. `flush` waits for
    // no answer, and `drain` of async-nats 0.51 does not either: what is still
    // on its way from the server when a subscription is drained is lost.
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await?;
    client.publish(inbox, "".into()).await?;
    timeout(PATIENCE, echo.next())
        .await
        .with_context(|| {
            format!(
                "nothing came back within {PATIENCE:?}; may this user subscribe \
                 to _INBOX.>?"
            )
        })?
        .context("the server ended the subscription")?;
    Ok(())
}
// ANCHOR_END: round_trip

// ANCHOR: received
/// All that is here for this subscription, which ends with it.
async fn received(mut subscriber: Subscriber) -> Result<Vec<String>> {
    // The stream still yields what has arrived, and then ends. Dropped instead,
    // the subscriber would take those orders with it.
    subscriber.drain().await?;
    let mut orders = Vec::new();
    while let Some(message) = subscriber.next().await {
        orders.push(String::from_utf8_lossy(&message.payload).into_owned());
    }
    Ok(orders)
}
// ANCHOR_END: received

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
