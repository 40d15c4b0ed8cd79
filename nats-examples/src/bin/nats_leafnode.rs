//! Leaf nodes: a server at the edge that works while the line is cut.
//!
//! Teaches: a till in the shop has a NATS server of its own, joined to the
//! office's as a leaf node. Subjects go over as if it were one server, while the
//! line is up. What must arrive goes into a stream of the till, in its JetStream
//! domain; a stream in the office has it as a source, in the other domain, and
//! catches up by itself.
//!
//! Run, with these two servers, each in a terminal:
//!
//! ```text
//! nats-server -c nats-examples/config/leafnode/office.conf -sd target/nats-leafnode/office
//! nats-server -c nats-examples/config/leafnode/till.conf -sd target/nats-leafnode/till
//!
//! cargo run --bin nats_leafnode            # both sides, the line is up
//! cargo run --bin nats_leafnode till       # needs only the till's server
//! cargo run --bin nats_leafnode office     # what the office has
//! ```
//!
//! Expected output:
//!
//! ```text
//! office: heard sale-1, as the line is up
//! till:   3 sales are in TILL_SALES here
//! office: 3 sales are in OFFICE_SALES here, none is missing
//! ```
//!
//! Left out on purpose: TLS and a user for the line, and many tills, each with a
//! domain and a source of its own.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr, Subscriber,
    jetstream::{
        self, ErrorCode,
        context::DeleteStreamErrorKind,
        stream::{Config, External, Source},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::{Instant, sleep, timeout};

/// Variable, the usual address, and the domain of its JetStream.
type Place = (&'static str, &'static str, &'static str);
const OFFICE: Place = ("NATS_URL", "nats://localhost:4222", "office");
const TILL: Place = ("NATS_TILL_URL", "nats://localhost:4223", "till");

/// Not stored anywhere: for those who listen, on both sides of the line.
const LIVE: &str = "leaf.live";
const SOLD: &str = "leaf.sold";
const TILL_SALES: &str = "TILL_SALES";
const OFFICE_SALES: &str = "OFFICE_SALES";
const SALES: u64 = 3;

const HOW: &str = "nats-server -c nats-examples/config/leafnode";
const USAGE: &str = "usage: nats_leafnode [till | office]";

/// How long the office may take to catch up. A server that has not found the
/// other's stream looks again after 10 s, then after 20 s, and so on.
const PATIENCE: Duration = Duration::from_secs(120);
const BREATH: Duration = Duration::from_millis(50);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["till"] => sell().await,
        ["office"] => count().await,
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

// ANCHOR: story
async fn story() -> Result<()> {
    let (office, till) = (connect(OFFICE).await?, connect(TILL).await?);
    // What this run stores is counted, so it begins with nothing.
    forget(&office, OFFICE, OFFICE_SALES).await?;
    forget(&till, TILL, TILL_SALES).await?;

    // Without JetStream: whoever listens in the office hears the till.
    let mut live = office.subscribe(LIVE).await?;
    hear(&till, &mut live).await?;
    println!("office: heard sale-1, as the line is up");

    sell().await?;
    count().await
}
// ANCHOR_END: story

/// Publishes at the till until the office has heard it: how long a subscription
/// takes to be known on the other side, nobody says.
async fn hear(till: &Client, live: &mut Subscriber) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        till.publish(LIVE, "sale-1".into()).await?;
        if let Ok(heard) = timeout(BREATH, live.next()).await {
            return heard.map(drop).context("the subscription has ended");
        }
        ensure!(
            Instant::now() < deadline,
            "the office hears nothing of the till; are both up? {HOW}/till.conf"
        );
    }
}

// ANCHOR: till
/// Stores at the till, which asks nobody else.
async fn sell() -> Result<()> {
    let client = connect(TILL).await?;
    let jetstream = jetstream::with_domain(client, TILL.2);
    let mut stream = jetstream
        .create_stream(Config {
            name: TILL_SALES.to_owned(),
            subjects: vec![SOLD.to_owned()],
            ..Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on, in its domain?")?;
    let before = stream.info().await?.state.messages;
    for number in 1..=SALES {
        let sale = format!("sale-{}", before + number);
        jetstream.publish(SOLD, sale.into()).await?.await?;
    }
    let count = stream.info().await?.state.messages;
    println!("till:   {count} sales are in {TILL_SALES} here");
    Ok(())
}
// ANCHOR_END: till

// ANCHOR: office
/// Has the office's server copy from the till's, and waits until it has.
async fn count() -> Result<()> {
    let jetstream = jetstream::with_domain(connect(OFFICE).await?, OFFICE.2);
    let mut gathered = jetstream
        .create_stream(Config {
            name: OFFICE_SALES.to_owned(),
            sources: Some(vec![Source {
                name: TILL_SALES.to_owned(),
                // The other domain; without it, the server looks in its own. The
                // field `domain` would say the same, but async-nats 0.51 sends
                // it along, and the server (2.15) refuses what it does not know.
                external: Some(External {
                    api_prefix: format!("$JS.{}.API", TILL.2),
                    delivery_prefix: None,
                }),
                ..Source::default()
            }]),
            ..Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on, in its domain?")?;

    // The till's stream, asked over the line.
    let till = jetstream::with_domain(connect(OFFICE).await?, TILL.2);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let there = match till.get_stream(TILL_SALES).await {
            Ok(stream) => stream.cached_info().state.last_sequence,
            // The line is cut, or was until a moment ago.
            Err(error) if Instant::now() > deadline => {
                let why =
                    format!("the till does not answer; is it up? {HOW}/till.conf");
                return Err(Error::new(error).context(why));
            }
            Err(_not_yet) => u64::MAX,
        };
        let here = gathered.info().await?.state.messages;
        if here == there {
            println!(
                "office: {here} sales are in {OFFICE_SALES} here, none is missing"
            );
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{here} of {there} sales are here"
        );
        sleep(BREATH).await;
    }
}
// ANCHOR_END: office
async fn forget(client: &Client, place: Place, stream: &str) -> Result<()> {
    let jetstream = jetstream::with_domain(client.clone(), place.2);
    match jetstream.delete_stream(stream).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => Err(anyhow!(
                "JetStream has no domain {domain} ({error}); its server: \
                 {HOW}/{domain}.conf",
                domain = place.2
            )),
        },
    }
}

async fn connect((variable, usual, name): Place) -> Result<Client> {
    let url = env::var(variable).unwrap_or_else(|_| usual.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("{variable} is not a NATS address; a right one: {usual}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 {variable}"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start the one of this lesson, \
                 not that of cargo lab up nats: {HOW}/{name}.conf"
            ),
        })
}
