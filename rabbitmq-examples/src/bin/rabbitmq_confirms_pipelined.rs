//! Confirms: a window of messages in flight, and each is settled by its id.
//!
//! Teaches: publish while earlier messages wait for their confirms, up to a limit.
//! Hand messages to the connection in groups, as to await each `basic_publish`
//! alone costs a round through lapin's loop. A refused message is published again.
//! Of a returned one only its own id is to be trusted: with several in flight,
//! lapin may hang it on the confirmation of another (4.12).
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_confirms_pipelined
//! cargo run --release --bin rabbitmq_confirms_pipelined 200000 100
//! ```
//!
//! The second publishes that many messages of that many bytes, and says how fast.
//!
//! Expected output:
//!
//! ```text
//! published: 1000 payments, at most 1000 at a time without an answer
//! refused:   <refused>, published again
//! stored:    999
//! returned:  1, payment-500
//! ```
//!
//! Left out on purpose: what to do when the connection is lost. All that is in
//! flight then has no answer; published again, some of it is there twice.

use std::{
    collections::{BTreeSet, VecDeque},
    env, iter,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{StreamExt as _, future::try_join_all, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    PublisherConfirm,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "confirms.pipelined.payments";
/// A queue that nobody has declared.
const NOWHERE: &str = "confirms.pipelined.nowhere";

/// How many may wait for their confirms.
const WINDOW: usize = 1000;
/// How many are handed to the connection together.
const GROUP: usize = 100;
/// How often one message is published before the broker's refusal is believed, and
/// how long to leave the broker in peace between.
const ATTEMPTS: usize = 50;
const BREATH: Duration = Duration::from_millis(100);

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let numbers: Option<Vec<usize>> =
        words.iter().map(|word| word.parse().ok()).collect();
    let result = match numbers.as_deref() {
        Some([]) => story().await,
        Some([count, size]) if *count > 0 => measure(*count, *size).await,
        _ => {
            eprintln!("usage: rabbitmq_confirms_pipelined [COUNT BYTES]");
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
    let connection = connect().await?;
    let channel = prepare(&connection).await?;
    let payments = (1..=1000).map(|number| Payment {
        id: format!("payment-{number}"),
        // One has a wrong address.
        queue: if number == 500 { NOWHERE } else { QUEUE },
        body: b"9.90".to_vec(),
    });
    let settled = publish_all(&channel, payments).await?;
    println!(
        "published: 1000 payments, at most {WINDOW} at a time without an answer"
    );
    println!("refused:   {}, published again", settled.repeated);
    println!("stored:    {}", settled.stored);
    let returned = Vec::from_iter(settled.returned);
    println!("returned:  {}, {}", returned.len(), returned.join(", "));
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

async fn measure(count: usize, size: usize) -> Result<()> {
    let connection = connect().await?;
    let channel = prepare(&connection).await?;
    let payments = (1..=count).map(|number| Payment {
        id: number.to_string(),
        queue: QUEUE,
        body: vec![b'x'; size],
    });
    let started = Instant::now();
    let settled = publish_all(&channel, payments).await?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(settled.stored == count, "{} are stored", settled.stored);
    println!(
        "published: {count} messages of {size} B in {seconds:.3} s ({:.0} msg/s), all \
         confirmed",
        count as f64 / seconds
    );
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: window
struct Payment {
    id: String,
    queue: &'static str,
    body: Vec<u8>,
}

struct Settled {
    stored: usize,
    /// How many publishes were refused, and tried once more.
    repeated: usize,
    /// The ids of those that no queue took.
    returned: BTreeSet<String>,
}

async fn publish_all(
    channel: &Channel,
    payments: impl Iterator<Item = Payment>,
) -> Result<Settled> {
    let mut fresh = payments.map(|payment| (payment, 1));
    let mut again: VecDeque<(Payment, usize)> = VecDeque::new();
    let mut in_flight = FuturesUnordered::new();
    let mut confirmed = 0;
    let mut repeated = 0;
    let mut returned = BTreeSet::new();
    loop {
        let mut group: Vec<_> = Vec::new();
        if in_flight.len() + again.len() + GROUP <= WINDOW {
            group.extend(fresh.by_ref().take(GROUP));
        }
        // What was refused comes when nothing else is to be done: a full queue is
        // not emptier by being asked at once.
        if group.is_empty() && in_flight.is_empty() && !again.is_empty() {
            sleep(BREATH).await;
            group.extend(again.drain(..again.len().min(GROUP)));
        }
        if !group.is_empty() {
            let publishes =
                group.iter().map(|(payment, _)| publish(channel, payment));
            let confirms = try_join_all(publishes).await?;
            in_flight.extend(iter::zip(group, confirms).map(answer));
            continue;
        }
        if in_flight.is_empty() {
            break;
        }
        // No room, or nothing left to publish: an answer comes first.
        let settled = timeout(PATIENCE, in_flight.next()).await;
        let settled = settled
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")?;
        let (payment, attempt, answer) = settled.context("nothing is in flight")?;
        match answer? {
            Confirmation::Ack(message) => {
                confirmed += 1;
                // Whose id it is, and not whose confirmation.
                let message = message.map(|message| message.delivery.properties);
                let id =
                    message.and_then(|properties| properties.message_id().clone());
                returned.extend(id.map(|id| id.to_string()));
            }
            Confirmation::Nack(_) => {
                let id = &payment.id;
                ensure!(attempt < ATTEMPTS, "{id} is refused {attempt} times");
                repeated += 1;
                again.push_back((payment, attempt + 1));
            }
            Confirmation::NotRequested => bail!("confirm_select was not called"),
        }
    }
    Ok(Settled {
        stored: confirmed - returned.len(),
        repeated,
        returned,
    })
}

/// The answer of one message, with the message, should it be needed again.
async fn answer(
    ((payment, attempt), confirm): ((Payment, usize), PublisherConfirm),
) -> (Payment, usize, lapin::Result<Confirmation>) {
    let answer = confirm.await;
    (payment, attempt, answer)
}

async fn publish(
    channel: &Channel,
    payment: &Payment,
) -> lapin::Result<PublisherConfirm> {
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(payment.id.as_str().into());
    channel
        .basic_publish(
            "".into(),
            payment.queue.into(),
            BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            },
            &payment.body,
            properties,
        )
        .await
}
// ANCHOR_END: window

async fn prepare(connection: &Connection) -> Result<Channel> {
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    queue(&channel, QUEUE).await?;
    Ok(channel)
}

/// A durable, replicated queue, without what an earlier run may have left in it.
async fn queue(channel: &Channel, name: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    channel
        .queue_declare(name.into(), QueueDeclareOptions::durable(), arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the queue {name} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
    channel
        .queue_purge(name.into(), QueuePurgeOptions::default())
        .await?;
    Ok(())
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
