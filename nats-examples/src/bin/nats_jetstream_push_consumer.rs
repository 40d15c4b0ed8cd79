//! Push consumer: the server sends, and the reader does not ask.
//!
//! Teaches: the older way to read a stream, which one still meets. The server
//! publishes to a subject of ours; a deliver group shares the messages, as a
//! queue group does. Nothing bounds what is on its way but `max_ack_pending`.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_push_consumer
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored: 20 prices
//! pushed: 20 prices to 2 boards, 20 in all
//! acknowledged: 20, none is left
//! refused: to pull from it, pull consumer cannot have delivery subject
//! ```
//!
//! Left out on purpose: flow control and heartbeats, which an ordered push
//! consumer uses. New code should pull: a reader that asks cannot be flooded.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        consumer::{PushConsumer, pull, push},
        context::DeleteStreamErrorKind,
        stream::{self, Stream},
    },
};
use futures_lite::StreamExt as _;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "PRICE_BOARD";
const SUBJECT: &str = "prices.board";
const CONSUMER: &str = "boards";
/// Where the server publishes what it delivers.
const DELIVER: &str = "prices.board.delivered";
const GROUP: &str = "boards";
const PRICES: usize = 20;

/// How long nothing may come before nothing more is to come.
const QUIET: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match show_prices().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn show_prices() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The counts below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;
    for price in 1..=PRICES {
        let price = price.to_string();
        jetstream.publish(SUBJECT, price.into()).await?.await?;
    }
    println!("stored: {PRICES} prices");

    let consumer = pushed(&stream).await?;
    // Two readers of one group; usually two programs.
    let (first, second) = tokio::join!(board(&consumer), board(&consumer));
    let (first, second) = (first?, second?);
    ensure!(
        first > 0 && second > 0,
        "one board got {first}, one {second}"
    );
    println!(
        "pushed: {PRICES} prices to 2 boards, {} in all",
        first + second
    );

    let info = consumer.get_info().await?;
    println!(
        "acknowledged: {}, {} is left",
        info.ack_floor.stream_sequence,
        match info.num_ack_pending + usize::try_from(info.num_pending)? {
            0 => "none".to_owned(),
            left => left.to_string(),
        }
    );
    be_refused(&stream).await?;
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: pushed
async fn pushed(stream: &Stream) -> Result<PushConsumer> {
    let consumer = stream
        .create_consumer(push::Config {
            durable_name: Some(CONSUMER.to_owned()),
            // Every plain subscriber of this subject would get a copy, too.
            deliver_subject: DELIVER.to_owned(),
            // Of the subscribers in this group, one gets each message.
            deliver_group: Some(GROUP.to_owned()),
            // All that keeps the server from sending the whole stream at once.
            max_ack_pending: 10,
            ..push::Config::default()
        })
        .await?;
    Ok(consumer)
}
// ANCHOR_END: pushed

// ANCHOR: board
/// Shows what it gets, and returns how many that were when no more comes.
async fn board(consumer: &PushConsumer) -> Result<usize> {
    let mut prices = consumer.messages().await?;
    let mut shown = 0;
    while let Ok(Some(price)) = timeout(QUIET, prices.next()).await {
        price?.ack().await.map_err(Error::from_boxed)?;
        shown += 1;
    }
    Ok(shown)
}
// ANCHOR_END: board

/// A consumer is of one kind: this one cannot be pulled from.
async fn be_refused(stream: &Stream) -> Result<()> {
    match stream.get_consumer::<pull::Config>(CONSUMER).await {
        Ok(_consumer) => bail!("a push consumer let itself be pulled from"),
        Err(error) => println!("refused: to pull from it, {error}"),
    }
    Ok(())
}

/// Deletes a stream, if there is one.
async fn forget(jetstream: &jetstream::Context, stream: &str) -> Result<()> {
    match jetstream.delete_stream(stream).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => Err(anyhow!(
                "cannot delete {stream} ({error}); is JetStream on?"
            )),
        },
    }
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
