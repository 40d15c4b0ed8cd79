//! Claim check: a document of ten megabytes, and a message of a hundred bytes.
//!
//! Teaches: NATS refuses a message above its `max_payload`, one megabyte by default, and
//! brings a store for what is larger. So the document lies in the object store, and the
//! message says what it is: its SHA-256, which is also its name, and its length. The
//! document is stored before anybody is told of it, and it is checked against the
//! message before it is used: the store checks only that it gives what it was given. A
//! claim without its document goes to a subject of dead ones, with the reason.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin claim_check_nats                  # the whole story
//! cargo run --bin claim_check_nats archive          # terminal 1
//! cargo run --bin claim_check_nats publish 1 5      # terminal 2
//! cargo run --bin claim_check_nats publish 6 6 --die # an orphan
//! cargo run --bin claim_check_nats sweep 86400      # older than a day
//! cargo run --bin claim_check_nats whole 10         # in one message
//! ```
//!
//! Expected output:
//!
//! ```text
//! published: invoice-1, a claim of 117 bytes for 10000000
//! archived:  invoice-1, 10000000 bytes, the right ones
//! published: invoice-2, a claim of 117 bytes for 10000000
//! dead:      another digest
//! published: invoice-3, a claim of 117 bytes for 10000000
//! dead:      no such document
//! published: a claim for ../../etc/passwd
//! dead:      not a claim
//! orphan:    invoice-4 is stored, and its publisher dies
//! swept:     3 documents
//! ```
//!
//! Left out on purpose: who may read the store. Whoever has the claim has the name of the
//! document, and that must not be enough.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Message,
        consumer::{AckPolicy, pull},
        message::PublishMessage,
        object_store::{self, GetErrorKind, InfoErrorKind, ObjectStore},
        stream,
    },
};
use futures_lite::StreamExt as _;
use patterns::claim_check::{Claim, Fault, document, invoice};
use time::OffsetDateTime;
use tokio::{
    io::{self, AsyncReadExt as _},
    sync::Notify,
    time::timeout,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SHOP: Place = Place {
    stream: "INVOICE_CLAIMS",
    claims: "invoice.claims",
    dead: "invoice.claims.dead",
    bucket: "invoice_documents",
};
/// The story has places of its own, which it deletes: its sweep takes everything.
const STORY: Place = Place {
    stream: "INVOICE_CLAIMS_STORY",
    claims: "invoice.story.claims",
    dead: "invoice.story.claims.dead",
    bucket: "invoice_documents_story",
};
const CONSUMER: &str = "invoice-archive";
/// After this time NATS delivers again what is not acknowledged: longer than it takes to
/// fetch a document.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// The header that says why a claim is dead.
const REASON: &str = "Reason";
/// What somebody sends who would like to read another file.
const CURIOUS: &str =
    r#"{"invoice":"invoice-0","sha256":"../../etc/passwd","length":9}"#;
const USAGE: &str = "usage: claim_check_nats [publish FIRST LAST [--die] | archive | \
                     sweep SECONDS | whole MEGABYTES]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a document may take.
const FETCH: Duration = Duration::from_secs(20);

/// Where claims and documents lie.
struct Place {
    stream: &'static str,
    claims: &'static str,
    /// Where claims without their document are kept.
    dead: &'static str,
    bucket: &'static str,
}

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last, ref rest @ ..] => {
            let fate = match rest {
                [] => Fate::Lives,
                ["--die"] => Fate::Dies,
                _ => return usage(),
            };
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if first <= last => {
                    publish_all(first, last, fate).await
                }
                _ => return usage(),
            }
        }
        ["archive"] => archive().await,
        ["sweep", seconds] => match seconds.parse() {
            Ok(seconds) => sweep_all(Duration::from_secs(seconds)).await,
            Err(_no_number) => return usage(),
        },
        ["whole", megabytes] => match megabytes.parse() {
            Ok(megabytes @ 1..=50) => whole(megabytes).await,
            _ => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// What becomes of a publisher between its two steps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lives,
    /// To see what is left then.
    Dies,
}

// ---- Publisher -------------------------------------------------------------

async fn publish_all(first: u64, last: u64, fate: Fate) -> Result<()> {
    let client = connect().await?;
    let shop = open(&client, &SHOP).await?;
    for number in first..=last {
        check_in(&shop, number, fate).await?;
    }
    client.drain().await?;
    Ok(())
}

// ANCHOR: publish
/// Stores the document, and then tells of it. In this order: a document that nobody was
/// told of costs a place on the disk, a claim without a document costs the invoice.
async fn check_in(shop: &Shop, number: u64, fate: Fate) -> Result<Claim> {
    let document = document(number);
    let claim = Claim::new(invoice(number), &document);
    put(&shop.documents, claim.sha256.as_str(), &document)
        .await
        .with_context(|| format!("{} is not stored", claim.invoice))?;
    if fate == Fate::Dies {
        bail!("{} is stored, and its publisher dies", claim.invoice);
    }
    let payload = serde_json::to_vec(&claim)?;
    let length = payload.len();
    publish(shop, shop.place.claims, payload, None).await?;
    let invoice = &claim.invoice;
    println!(
        "published: {invoice}, a claim of {length} bytes for {}",
        claim.length
    );
    Ok(claim)
}
// ANCHOR_END: publish

async fn publish(
    shop: &Shop,
    subject: &'static str,
    payload: Vec<u8>,
    reason: Option<&Fault>,
) -> Result<()> {
    let mut message = PublishMessage::build().payload(payload.into());
    if let Some(reason) = reason {
        message = message.header(REASON, reason.to_string());
    }
    shop.jetstream
        .send_publish(subject, message)
        .await?
        .await
        .with_context(|| format!("NATS did not store it in {subject}"))?;
    Ok(())
}

/// The mistake: the document itself as the message.
async fn whole(megabytes: usize) -> Result<()> {
    let client = connect().await?;
    let shop = open(&client, &SHOP).await?;
    let document = vec![b'%'; megabytes * 1_000_000];
    match publish(&shop, SHOP.claims, document, None).await {
        Ok(()) => println!("taken:     {megabytes} MB in one message"),
        Err(error) => println!("refused:   {megabytes} MB in one message ({error})"),
    }
    client.drain().await?;
    Ok(())
}

// ---- Consumer --------------------------------------------------------------

// ANCHOR: archive
async fn archive() -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let shop = open(&client, &SHOP).await?;
    let mut deliveries = take_claims(&shop).await?;
    println!("ready:     claims from {}, Ctrl-C to stop", SHOP.claims);
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .context("NATS ended the deliveries")?
            .context("cannot take claims; is the stream or its consumer deleted?")?;
        check_out(&shop, &delivery).await?;
        // If the program ends before this line, the claim comes again.
        delivery.ack().await.map_err(Error::from_boxed)?;
    }
    client.drain().await?;
    println!("stopped");
    Ok(())
}

/// Returns when the document is archived, or the claim is kept among the dead ones. An
/// error says that neither could be done now.
async fn check_out(shop: &Shop, delivery: &Message) -> Result<()> {
    let payload = &delivery.payload;
    let document = match Claim::read(payload) {
        Ok(claim) => get(&shop.documents, &claim)
            .await
            .with_context(|| format!("cannot read {}", claim.invoice))?
            .map(|document| (claim, document)),
        Err(fault) => Err(fault),
    };
    match document {
        Ok((claim, document)) => {
            let (invoice, length) = (claim.invoice, document.len());
            println!("archived:  {invoice}, {length} bytes, the right ones");
        }
        Err(fault) => {
            let dead = shop.place.dead;
            publish(shop, dead, payload.to_vec(), Some(&fault)).await?;
            println!("dead:      {fault}");
        }
    }
    Ok(())
}
// ANCHOR_END: archive

async fn take_claims(shop: &Shop) -> Result<pull::Stream> {
    let consumer = shop
        .stream
        .create_consumer(pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            filter_subject: shop.place.claims.to_owned(),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            ..pull::Config::default()
        })
        .await
        .context("cannot make the consumer of the archive")?;
    // What is asked for has to be done within `ACK_WAIT`.
    let deliveries = consumer.stream().max_messages_per_batch(1).messages();
    Ok(deliveries.await?)
}

// ---- Store -----------------------------------------------------------------

// ANCHOR: store
/// Returns when all pieces of the document are stored, and its name with them.
async fn put(documents: &ObjectStore, name: &str, document: &[u8]) -> Result<()> {
    match documents.info(name).await {
        // To put it once more would take the pieces from under who reads them. So it
        // keeps its age, and a sweep has to leave time for that.
        Ok(info) if !info.deleted => return Ok(()),
        Ok(_deleted) => {}
        Err(error) if error.kind() == InfoErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let mut document = document;
    documents.put(name, &mut document).await?;
    Ok(())
}

/// The document that is claimed, checked. The outer error may pass, the inner one will
/// not.
async fn get(
    documents: &ObjectStore,
    claim: &Claim,
) -> Result<Result<Vec<u8>, Fault>> {
    let object = match documents.get(claim.sha256.as_str()).await {
        Ok(object) => object,
        Err(error) if error.kind() == GetErrorKind::NotFound => {
            return Ok(Err(Fault::Missing));
        }
        Err(error) => return Err(error.into()),
    };
    let mut document = Vec::new();
    // One more than claimed, to see whether there is more.
    let mut object = object.take(claim.length + 1);
    let read = timeout(FETCH, object.read_to_end(&mut document));
    match read.await.context("it takes longer than 20 s")? {
        // The store has compared its own digest, and this is the claimed one.
        Ok(_length) => Ok(claim.check(&document).map(|()| document)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Ok(Err(Fault::Digest))
        }
        Err(error) => Err(error.into()),
    }
}
// ANCHOR_END: store

async fn sweep_all(age: Duration) -> Result<()> {
    let client = connect().await?;
    let shop = open(&client, &SHOP).await?;
    sweep(&shop, age).await?;
    client.drain().await?;
    Ok(())
}

// ANCHOR: sweep
/// Deletes the documents that are older than any claim can be, the dead ones too. No
/// consumer deletes: none knows whether it is the last, and a claim may come twice. The
/// bucket could do it by itself (`max_age`), if the age is known when it is made.
async fn sweep(shop: &Shop, age: Duration) -> Result<()> {
    let mut swept = 0;
    let mut documents = shop.documents.list().await?;
    while let Some(document) = documents.next().await {
        let document = document?;
        let stored = document.modified.context("a document without a date")?;
        if OffsetDateTime::now_utc() - stored >= age {
            shop.documents.delete(&document.name).await?;
            swept += 1;
        }
    }
    println!("swept:     {swept} documents");
    Ok(())
}
// ANCHOR_END: sweep

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // An error says that there is none.
    let _deleted = jetstream.delete_stream(STORY.stream).await;
    let _deleted = jetstream.delete_object_store(STORY.bucket).await;
    let shop = open(&client, &STORY).await?;
    let mut deliveries = take_claims(&shop).await?;

    check_in(&shop, 1, Fate::Lives).await?;
    check_out_next(&shop, &mut deliveries).await?;

    let claim = check_in(&shop, 2, Fate::Lives).await?;
    // Somebody overwrites it with another document of the same length.
    let other = document(9);
    let name = claim.sha256.as_str();
    shop.documents.put(name, &mut other.as_slice()).await?;
    check_out_next(&shop, &mut deliveries).await?;

    let claim = check_in(&shop, 3, Fate::Lives).await?;
    // Somebody sweeps too early.
    shop.documents.delete(claim.sha256.as_str()).await?;
    check_out_next(&shop, &mut deliveries).await?;

    publish(&shop, STORY.claims, CURIOUS.into(), None).await?;
    println!("published: a claim for ../../etc/passwd");
    check_out_next(&shop, &mut deliveries).await?;

    let died = check_in(&shop, 4, Fate::Dies).await;
    println!("orphan:    {}", died.err().context("it lives")?);
    // Nobody can come with a claim any more. In production, never so soon.
    sweep(&shop, Duration::ZERO).await?;
    client.drain().await?;
    Ok(())
}

async fn check_out_next(shop: &Shop, deliveries: &mut pull::Stream) -> Result<()> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no claim came; has another taken it?")?;
    let delivery = delivery.context("NATS ended the deliveries")??;
    check_out(shop, &delivery).await?;
    delivery.ack().await.map_err(Error::from_boxed)?;
    Ok(())
}
// ANCHOR_END: story

// ---- Stream and connection -------------------------------------------------

/// A stream of claims, and the bucket with their documents.
struct Shop {
    place: &'static Place,
    jetstream: jetstream::Context,
    stream: stream::Stream,
    documents: ObjectStore,
}

/// Makes both, unless they are there.
async fn open(client: &Client, place: &'static Place) -> Result<Shop> {
    let jetstream = jetstream::new(client.clone());
    let stream = jetstream
        .create_stream(stream::Config {
            name: place.stream.to_owned(),
            subjects: vec![place.claims.to_owned(), place.dead.to_owned()],
            // A claim is removed when it is acknowledged.
            retention: stream::RetentionPolicy::WorkQueue,
            // The default; a stream in memory is gone after a restart.
            storage: stream::StorageType::File,
            ..stream::Config::default()
        })
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the stream {} ({error}); if it was made with \
                 another configuration, delete it first; if JetStream is off, start \
                 the server with -js",
                place.stream
            )
        })?;
    let config = object_store::Config {
        bucket: place.bucket.to_owned(),
        ..object_store::Config::default()
    };
    // Changes nothing if it is there with the same settings.
    let documents =
        jetstream
            .create_object_store(config)
            .await
            .map_err(|error| {
                anyhow!(
                    "cannot open the bucket {} ({error}); if it was made with other \
             settings, delete it first",
                    place.bucket
                )
            })?;
    Ok(Shop {
        place,
        jetstream,
        stream,
        documents,
    })
}

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
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
