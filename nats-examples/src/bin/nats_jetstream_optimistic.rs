//! Optimistic concurrency: two writers, and no change is lost.
//!
//! Teaches: a publisher says which message it has read last, and the stream
//! refuses it when there is a newer one. Then read again and decide again; to
//! send the same message once more would overwrite what the other one wrote.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_jetstream_optimistic
//! ```
//!
//! Expected output:
//!
//! ```text
//! opened: account-7 with 100
//! till 1 read 100 (sequence 1)
//! till 2 read 100 (sequence 1)
//! till 1 wrote 70 (sequence 2)
//! till 2 refused: wrong last sequence
//! till 2 read 70 (sequence 2)
//! till 2 wrote 40 (sequence 3)
//! without the expectation: 100 - 30 - 30 = 70
//! ```
//!
//! Left out on purpose: a limit for how often a writer tries again.

use std::{env, process::ExitCode};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, ErrorCode,
        context::{DeleteStreamErrorKind, PublishError, PublishErrorKind},
        message::PublishMessage,
        stream::{self, Stream},
    },
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const STREAM: &str = "ACCOUNTS";
const SUBJECTS: &str = "accounts.*";
const CAREFUL: &str = "accounts.7";
const CARELESS: &str = "accounts.8";

/// What both tills take out of the account.
const PRICE: i64 = 30;

#[tokio::main]
async fn main() -> ExitCode {
    match pay_twice().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn pay_twice() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // The sequences below are those of a new stream.
    forget(&jetstream, STREAM).await?;
    let stream = jetstream
        .create_stream(stream::Config {
            name: STREAM.to_owned(),
            subjects: vec![SUBJECTS.to_owned()],
            ..stream::Config::default()
        })
        .await
        .context("cannot create the stream; is JetStream on (-js)?")?;

    // 0 means that there must be no message yet: an account is opened once.
    write(&jetstream, CAREFUL, 100, 0).await?;
    println!("opened: account-7 with 100");

    // Both read before either writes.
    let first = read(&stream, CAREFUL).await?;
    println!(
        "till 1 read {} (sequence {})",
        first.balance, first.sequence
    );
    let second = read(&stream, CAREFUL).await?;
    println!(
        "till 2 read {} (sequence {})",
        second.balance, second.sequence
    );

    let balance = first.balance - PRICE;
    let sequence = write(&jetstream, CAREFUL, balance, first.sequence).await?;
    println!("till 1 wrote {balance} (sequence {sequence})");

    let balance = second.balance - PRICE;
    match write(&jetstream, CAREFUL, balance, second.sequence).await {
        Ok(sequence) => bail!("overwrote what till 1 wrote, at {sequence}"),
        Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
            println!("till 2 refused: {}", error.kind());
        }
        Err(error) => return Err(error.into()),
    }
    // Not the same message again: the decision was made on an old balance.
    let second = read(&stream, CAREFUL).await?;
    println!(
        "till 2 read {} (sequence {})",
        second.balance, second.sequence
    );
    let balance = second.balance - PRICE;
    let sequence = write(&jetstream, CAREFUL, balance, second.sequence).await?;
    println!("till 2 wrote {balance} (sequence {sequence})");

    let balance = carelessly(&jetstream, &stream).await?;
    println!("without the expectation: 100 - {PRICE} - {PRICE} = {balance}");
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: write
/// Writes a balance, if the last message of this account is still the one that
/// was read. Returns the new sequence.
async fn write(
    jetstream: &jetstream::Context,
    account: &'static str,
    balance: i64,
    last_read: u64,
) -> Result<u64, PublishError> {
    let message = PublishMessage::build()
        .payload(balance.to_string().into())
        // Of this subject: writers of other accounts do not disturb each other.
        .expected_last_subject_sequence(last_read);
    Ok(jetstream
        .send_publish(account, message)
        .await?
        .await?
        .sequence)
}
// ANCHOR_END: write

struct Account {
    balance: i64,
    sequence: u64,
}

async fn read(stream: &Stream, account: &'static str) -> Result<Account> {
    let last = stream.get_last_raw_message_by_subject(account).await?;
    let balance = String::from_utf8_lossy(&last.payload);
    Ok(Account {
        balance: balance
            .parse()
            .with_context(|| format!("{balance:?} is no balance"))?,
        sequence: last.sequence,
    })
}

// ANCHOR: careless
/// The same two tills, each of which writes what it has worked out.
async fn carelessly(jetstream: &jetstream::Context, stream: &Stream) -> Result<i64> {
    jetstream.publish(CARELESS, "100".into()).await?.await?;
    let first = read(stream, CARELESS).await?;
    let second = read(stream, CARELESS).await?;
    for till in [first, second] {
        let balance = (till.balance - PRICE).to_string();
        jetstream.publish(CARELESS, balance.into()).await?.await?;
    }
    Ok(read(stream, CARELESS).await?.balance)
}
// ANCHOR_END: careless

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
