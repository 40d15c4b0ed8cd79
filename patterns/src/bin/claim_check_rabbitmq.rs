//! Claim check: a document of ten megabytes, and a message of a hundred bytes.
//!
//! Teaches: RabbitMQ takes ten megabytes in one message (its limit is 16 MiB), and then
//! holds them in the queue, on each of its nodes, and sends them for every delivery; a
//! message with more closes the channel. So the document lies in a store, here a folder in
//! the place of S3, and the message says what it is: its SHA-256, which is also its
//! name, and its length. The document is on the disk before anybody is told of it, and
//! it is checked before it is used. A claim without its document goes to a queue of dead
//! ones, with the reason.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin claim_check_rabbitmq                            # the whole story
//! cargo run --bin claim_check_rabbitmq archive documents          # terminal 1
//! cargo run --bin claim_check_rabbitmq publish 1 5 documents      # terminal 2
//! cargo run --bin claim_check_rabbitmq publish 6 6 documents --die # an orphan
//! cargo run --bin claim_check_rabbitmq sweep 86400 documents      # older than a day
//! cargo run --bin claim_check_rabbitmq whole 10                   # in one message
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
    env, fs,
    future::Future,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::claim_check::{Claim, Fault, Folder, document, invoice};
use tokio::{sync::Notify, task::block_in_place, time::timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "invoice.claims";
/// Where claims without their document are kept.
const DEAD: &str = "invoice.claims-dead";
/// Where the mistake puts the documents themselves.
const WHOLE: &str = "invoice.documents";
const CONSUMER_TAG: &str = "invoice-archive";
/// How many claims may be on their way to the consumer. With the documents in the
/// messages, that would be two hundred megabytes.
const PREFETCH: u16 = 20;
/// The header that says why a claim is dead.
const REASON: &str = "reason";
/// What somebody sends who would like to read another file.
const CURIOUS: &str =
    r#"{"invoice":"invoice-0","sha256":"../../etc/passwd","length":9}"#;
const USAGE: &str = "usage: claim_check_rabbitmq [publish FIRST LAST FOLDER [--die] | \
                     archive FOLDER | sweep SECONDS FOLDER | whole MEGABYTES]";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last, folder, ref rest @ ..] => {
            let fate = match rest {
                [] => Fate::Lives,
                ["--die"] => Fate::Dies,
                _ => return usage(),
            };
            match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) if first <= last => {
                    publish_all(first, last, folder, fate).await
                }
                _ => return usage(),
            }
        }
        ["archive", folder] => archive(folder).await,
        ["sweep", seconds, folder] => match seconds.parse() {
            Ok(seconds) => sweep(Duration::from_secs(seconds), folder),
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

async fn publish_all(first: u64, last: u64, folder: &str, fate: Fate) -> Result<()> {
    let folder = open(folder)?;
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    for number in first..=last {
        check_in(&channel, &folder, number, fate).await?;
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn publisher(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    for queue in [QUEUE, DEAD] {
        declare(&channel, queue).await?;
    }
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

// ANCHOR: publish
/// Stores the document, and then tells of it. In this order: a document that nobody was
/// told of costs a place on the disk, a claim without a document costs the invoice.
async fn check_in(
    channel: &Channel,
    folder: &Folder,
    number: u64,
    fate: Fate,
) -> Result<Claim> {
    let document = document(number);
    let claim = Claim::new(invoice(number), &document);
    // A file blocks its thread.
    block_in_place(|| folder.put(&claim.sha256, &document))
        .with_context(|| format!("{} is not stored", claim.invoice))?;
    if fate == Fate::Dies {
        bail!("{} is stored, and its publisher dies", claim.invoice);
    }
    let payload = serde_json::to_vec(&claim)?;
    publish(channel, QUEUE, &payload, None).await?;
    let (invoice, length) = (&claim.invoice, payload.len());
    println!(
        "published: {invoice}, a claim of {length} bytes for {}",
        claim.length
    );
    Ok(claim)
}
// ANCHOR_END: publish

async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    reason: Option<&Fault>,
) -> Result<()> {
    let mut headers = FieldTable::default();
    if let Some(reason) = reason {
        let reason = AMQPValue::LongString(reason.to_string().into());
        headers.insert(REASON.into(), reason);
    }
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_delivery_mode(2); // persistent
    let options = BasicPublishOptions {
        mandatory: true, // return it if no queue takes it
        ..BasicPublishOptions::default()
    };
    let confirm = channel
        .basic_publish("".into(), queue.into(), options, payload, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(None) => Ok(()),
        answer => bail!("RabbitMQ did not store it in {queue}: {answer:?}"),
    }
}

/// The mistake: the document itself as the message.
async fn whole(megabytes: usize) -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    declare(&channel, WHOLE).await?;
    // What an earlier run has left there is heavy.
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(WHOLE.into(), purge).await?;
    let document = vec![b'%'; megabytes * 1_000_000];
    match publish(&channel, WHOLE, &document, None).await {
        Ok(()) => println!("taken:     {megabytes} MB in one message"),
        Err(error) => println!("refused:   {megabytes} MB in one message ({error})"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ---- Consumer --------------------------------------------------------------

// ANCHOR: archive
async fn archive(folder: &str) -> Result<()> {
    let folder = open(folder)?;
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let connection = connect().await?;
    let (channel, mut deliveries) = take_claims(&connection).await?;
    println!("ready:     claims from {QUEUE}, Ctrl-C to stop");
    loop {
        let delivery = tokio::select! {
            // In this order: by default `select!` picks at random among what is
            // ready, and would go on for a while when there is much to do.
            biased;
            () = &mut stop_signal => break,
            delivery = deliveries.next() => delivery,
        };
        let delivery = delivery
            .with_context(|| format!("RabbitMQ ended it: is {QUEUE} deleted?"))?
            .context("lost RabbitMQ; what is not acknowledged will come again")?;
        check_out(&channel, &folder, &delivery).await?;
        // If the program ends before this line, the claim comes again.
        let ack = timeout(PATIENCE, delivery.ack(BasicAckOptions::default()));
        ack.await.context("lost RabbitMQ")??;
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped");
    Ok(())
}

/// Returns when the document is archived, or the claim is kept among the dead ones. An
/// error says that neither could be done now.
async fn check_out(
    channel: &Channel,
    folder: &Folder,
    delivery: &Delivery,
) -> Result<()> {
    let payload = &delivery.data;
    let document = match Claim::read(payload) {
        Ok(claim) => block_in_place(|| folder.get(&claim))
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
            publish(channel, DEAD, payload, Some(&fault)).await?;
            println!("dead:      {fault}");
        }
    }
    Ok(())
}
// ANCHOR_END: archive

async fn take_claims(connection: &Connection) -> Result<(Channel, Consumer)> {
    let channel = publisher(connection).await?;
    channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    let deliveries = channel
        .basic_consume(
            QUEUE.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok((channel, deliveries))
}

// ---- Store -----------------------------------------------------------------

// ANCHOR: sweep
/// Deletes the documents that are older than any claim can be, the dead ones too. No
/// consumer deletes: none knows whether it is the last, and a claim may come twice.
/// RabbitMQ keeps a claim as long as nobody takes it, so look first how old they are.
fn sweep(age: Duration, folder: &str) -> Result<()> {
    let swept = open(folder)?.sweep(age);
    let swept = swept.with_context(|| format!("cannot sweep {folder}"))?;
    println!("swept:     {swept} documents");
    Ok(())
}
// ANCHOR_END: sweep

fn open(folder: &str) -> Result<Folder> {
    Folder::open(Path::new(folder)).with_context(|| format!("cannot use {folder}"))
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let connection = connect().await?;
    let channel = publisher(&connection).await?;
    let purge = QueuePurgeOptions::default();
    channel.queue_purge(QUEUE.into(), purge).await?;
    let place = env::temp_dir().join(format!("claim_check-{}", std::process::id()));
    let name = place.to_string_lossy();
    let folder = open(&name)?;
    let (_channel, mut deliveries) = take_claims(&connection).await?;

    check_in(&channel, &folder, 1, Fate::Lives).await?;
    check_out_next(&channel, &folder, &mut deliveries).await?;

    let claim = check_in(&channel, &folder, 2, Fate::Lives).await?;
    // Somebody overwrites it with another document of the same length.
    folder.put(&claim.sha256, &document(9))?;
    check_out_next(&channel, &folder, &mut deliveries).await?;

    let claim = check_in(&channel, &folder, 3, Fate::Lives).await?;
    // Somebody sweeps too early.
    fs::remove_file(place.join(claim.sha256.as_str()))?;
    check_out_next(&channel, &folder, &mut deliveries).await?;

    publish(&channel, QUEUE, CURIOUS.as_bytes(), None).await?;
    println!("published: a claim for ../../etc/passwd");
    check_out_next(&channel, &folder, &mut deliveries).await?;

    let died = check_in(&channel, &folder, 4, Fate::Dies).await;
    println!("orphan:    {}", died.err().context("it lives")?);
    // Nobody can come with a claim any more. In production, never so soon.
    sweep(Duration::ZERO, &name)?;
    fs::remove_dir_all(&place)?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn check_out_next(
    channel: &Channel,
    folder: &Folder,
    deliveries: &mut Consumer,
) -> Result<()> {
    let delivery = timeout(PATIENCE, deliveries.next()).await;
    let delivery = delivery.context("no claim came; has another taken it?")?;
    let delivery = delivery.context("RabbitMQ ended the consumer")??;
    check_out(channel, folder, &delivery).await?;
    delivery.ack(BasicAckOptions::default()).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Queue and connection --------------------------------------------------

/// Declares a queue that outlives a restart of the broker.
async fn declare(channel: &Channel, queue: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {queue} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    Ok(())
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

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
