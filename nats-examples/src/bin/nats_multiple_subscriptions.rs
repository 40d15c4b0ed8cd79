//! Subjects: several subscriptions, read as one stream.
//!
//! Teaches: `select_all` merges subscriptions, so one task handles all in one
//! place. It says nothing when one of them ends: put a mark at the end of each,
//! or a subject that fell silent looks like one where nothing happens.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_multiple_subscriptions
//! ```
//!
//! Expected output:
//!
//! ```text
//! subscribed: courier.cars, courier.planes, courier.ships
//! arrived:    parcel 1 on courier.cars
//! ended:      courier.cars; 2 others go on
//! published:  6 more parcels
//! ended:      all
//! courier.cars   brought parcel 1
//! courier.planes brought parcel 2, parcel 5
//! courier.ships  brought parcel 3, parcel 6
//! ```
//!
//! Left out on purpose: the order between subjects, as there is none to rely on.
//! The last three lines are therefore sorted.

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{Client, ConnectErrorKind, Message, ServerAddr, Subscriber};
use futures_util::{
    Stream, StreamExt as _,
    stream::{self, select_all},
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const CARS: &str = "courier.cars";
const PLANES: &str = "courier.planes";
const SHIPS: &str = "courier.ships";
/// Of another team; nobody here subscribes.
const DRONES: &str = "courier.drones";

/// After parcel 1, by car. The last one comes when nobody reads cars any more.
const LATER: [&str; 6] = [PLANES, SHIPS, DRONES, PLANES, SHIPS, CARS];

/// How long the next arrival may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match collect_parcels().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn collect_parcels() -> Result<()> {
    let client = connect().await?;
    let mut cars = client.subscribe(CARS).await?;
    // The garage closes after one car: this subscription ends by itself.
    cars.unsubscribe_after(1).await?;
    let planes = client.subscribe(PLANES).await?;
    let ships = client.subscribe(SHIPS).await?;
    let mut arrivals = merge([(CARS, cars), (PLANES, planes), (SHIPS, ships)]);
    println!("subscribed: {CARS}, {PLANES}, {SHIPS}");

    let mut brought: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut open = 3;
    client.publish(CARS, "parcel 1".into()).await?;
    client.flush().await?;
    while open == 3 {
        match next(&mut arrivals).await? {
            Arrival::Parcel(subject, message) => {
                let parcel = text(&message);
                println!("arrived:    {parcel} on {subject}");
                brought.entry(subject).or_default().push(parcel);
            }
            Arrival::Ended(subject) => {
                open -= 1;
                println!("ended:      {subject}; {open} others go on");
            }
        }
    }

    for (number, subject) in (2..).zip(LATER) {
        let parcel = format!("parcel {number}");
        client.publish(subject, parcel.into()).await?;
    }
    round_trip(&client).await?;
    println!("published:  {} more parcels", LATER.len());

    // Ends every subscription behind the last message that has arrived.
    client.drain().await?;
    while open > 0 {
        match next(&mut arrivals).await? {
            Arrival::Parcel(subject, message) => {
                brought.entry(subject).or_default().push(text(&message));
            }
            Arrival::Ended(_subject) => open -= 1,
        }
    }
    println!("ended:      all");
    for (subject, parcels) in brought {
        println!("{subject:<14} brought {}", parcels.join(", "));
    }
    Ok(())
}
// ANCHOR_END: story

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

// ANCHOR: merge
enum Arrival {
    Parcel(&'static str, Message),
    Ended(&'static str),
}

/// All subscriptions as one stream, with a mark where each of them ends.
fn merge<const N: usize>(
    subscriptions: [(&'static str, Subscriber); N],
) -> impl Stream<Item = Arrival> + Unpin {
    select_all(subscriptions.map(|(subject, subscriber)| {
        subscriber
            .map(move |message| Arrival::Parcel(subject, message))
            // `select_all` drops a stream that ended, without a word.
            .chain(stream::iter([Arrival::Ended(subject)]))
    }))
}
// ANCHOR_END: merge

// ANCHOR: next
async fn next(
    arrivals: &mut (impl Stream<Item = Arrival> + Unpin),
) -> Result<Arrival> {
    match timeout(PATIENCE, arrivals.next()).await {
        Ok(Some(arrival)) => Ok(arrival),
        Ok(None) => bail!("all subscriptions had ended before"),
        Err(_elapsed) => bail!(
            "nothing came within {PATIENCE:?}; may this user publish and \
             subscribe on courier.>?"
        ),
    }
}
// ANCHOR_END: next

fn text(message: &Message) -> String {
    String::from_utf8_lossy(&message.payload).into_owned()
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
