//! Atomic batch: several messages that are stored together or not at all.
//!
//! Teaches: the headers that make messages a batch. The stream holds them back
//! until the last one says "commit"; a program that dies before leaves nothing.
//! async-nats has no call for it, so the headers are set by hand.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_atomic_batch
//! ```
//!
//! Expected output:
//!
//! ```text
//! sent: order and 2 ledger entries, without a commit
//! stored: 0 messages
//! committed: order and 2 ledger entries, 3 messages at once
//! stored: 3 messages
//! refused: a batch with a gap (code <code>)
//! stored: 3 messages
//! ```
//!
//! Left out on purpose: message ids and expected sequences within a batch, which
//! the server checks for the batch as a whole.

use std::{env, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, HeaderMap, ServerAddr,
    header::{NATS_BATCH_COMMIT, NATS_BATCH_ID, NATS_BATCH_SEQUENCE},
    jetstream::{
        self, ErrorCode, context::DeleteStreamErrorKind, publish::PublishAck, stream,
    },
};
use bytes::Bytes;

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "BOOKINGS";
const SUBJECTS: &str = "bookings.>";

/// One order with its entries in the ledger: subject and payload.
const BOOKING: [(&str, &str); 3] = [
    ("bookings.order", "order-17: 2 x sku-1, 30.00"),
    ("bookings.ledger.sales", "order-17: +30.00"),
    ("bookings.ledger.customer", "order-17: -30.00"),
];

#[tokio::main]
async fn main() -> ExitCode {
    match book().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn book() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The counts below are those of an empty stream.
    forget(&jetstream, STREAM).await?;
    let mut stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECTS.to_owned()],
            allow_atomic_publish: true,
            ..stream::Config::default()
        })
        .await
        .context(
            "cannot create the stream; is JetStream on (-js), and the server 2.12 \
             or newer?",
        )?;

    // A program that dies in the middle of a batch looks like this.
    let batch = Batch::begin(&client, BOOKING[0]).await?;
    for (number, entry) in (2..).zip(&BOOKING[1..]) {
        batch.add(&client, number, *entry).await?;
    }
    client.flush().await?;
    println!("sent: order and 2 ledger entries, without a commit");
    println!("stored: {} messages", stream.info().await?.state.messages);

    let batch = Batch::begin(&client, BOOKING[0]).await?;
    batch.add(&client, 2, BOOKING[1]).await?;
    let ack = batch.commit(&jetstream, 3, BOOKING[2]).await?;
    println!(
        "committed: order and 2 ledger entries, {} messages at once",
        ack.batch_size
            .context("an answer to a batch has its size")?
    );
    println!("stored: {} messages", stream.info().await?.state.messages);

    // The second message is missing, as if it had been lost on the way.
    let batch = Batch::begin(&client, BOOKING[0]).await?;
    match batch.commit(&jetstream, 3, BOOKING[2]).await {
        Ok(_ack) => bail!("a batch with a gap was stored"),
        Err(error) => match error.downcast_ref::<jetstream::Error>() {
            Some(error) => println!(
                "refused: a batch with a gap (code {})",
                error.error_code().0
            ),
            None => return Err(error),
        },
    }
    println!("stored: {} messages", stream.info().await?.state.messages);
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: batch
/// A batch that has been begun on the server.
struct Batch {
    id: String,
}

impl Batch {
    /// Sends the first message as a request, so that a stream that does not allow
    /// batches is heard of at once: it answers with an error, and one that does
    /// with an empty message.
    async fn begin(
        client: &Client,
        first: (&'static str, &'static str),
    ) -> Result<Self> {
        let batch = Self {
            // At most 64 characters, and new for each batch.
            id: client.new_inbox(),
        };
        let headers = batch.headers(1);
        let answer = client
            .request_with_headers(first.0, headers, first.1.into())
            .await
            .context("nobody has taken the first message")?;
        if !answer.payload.is_empty() {
            bail!("no batch: {}", String::from_utf8_lossy(&answer.payload));
        }
        Ok(batch)
    }

    /// Sends one of the messages between the first and the last. Nobody answers;
    /// that it has arrived is known from the answer to the commit.
    async fn add(
        &self,
        client: &Client,
        number: usize,
        message: (&'static str, &'static str),
    ) -> Result<()> {
        let headers = self.headers(number);
        client
            .publish_with_headers(message.0, headers, message.1.into())
            .await?;
        Ok(())
    }

    /// Sends the last message. The server counts, and stores all or nothing.
    async fn commit(
        self,
        jetstream: &jetstream::Context,
        number: usize,
        message: (&'static str, &'static str),
    ) -> Result<PublishAck> {
        let mut headers = self.headers(number);
        headers.insert(NATS_BATCH_COMMIT, "1");
        let payload = Bytes::from(message.1);
        let ack = jetstream.publish_with_headers(message.0, headers, payload);
        match ack.await?.await {
            Ok(ack) => Ok(ack),
            // The server's own error is behind the client's.
            Err(error) => Err(match into_server_error(&error) {
                Some(server) => server.into(),
                None => error.into(),
            }),
        }
    }

    fn headers(&self, number: usize) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_BATCH_ID, self.id.as_str());
        // Counted from 1, without a gap.
        headers.insert(NATS_BATCH_SEQUENCE, number.to_string());
        headers
    }
}
// ANCHOR_END: batch

fn into_server_error(error: &dyn std::error::Error) -> Option<jetstream::Error> {
    error.source()?.downcast_ref().cloned()
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
