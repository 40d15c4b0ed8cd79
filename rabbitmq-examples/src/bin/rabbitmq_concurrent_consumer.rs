//! Concurrent consumer: several messages at once in one process, and not more.
//!
//! Teaches: the prefetch limit is the bound for everything. `for_each_concurrent`
//! works on as many deliveries at once as it is told, and acknowledges each when it
//! is done, in whatever order. A delegate, `set_delegate`, starts a task for each
//! delivery: without a prefetch limit that is as many as the queue has.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_concurrent_consumer
//! ```
//!
//! Expected output:
//!
//! ```text
//! stream:   50 mails, at most 10 at once, done in another order than they came
//! delegate: 50 mails, at most 10 at once
//! no limit: 50 mails, at most 50 at once
//! left:     0 mails
//! ```
//!
//! Left out on purpose: mails of one customer in their order; for that, one queue a
//! lane with a single active consumer.

use std::{
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::{Delivery, DeliveryResult},
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const QUEUE: &str = "concurrent.mails";
const MAILS: usize = 50;
const AT_ONCE: u16 = 10;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
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
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    queue(&channel, QUEUE).await?;

    publish_all(&channel).await?;
    let worker = connection.create_channel().await?;
    let mails = consume(&worker, AT_ONCE).await?;
    let (desk, order) = by_stream(mails).await?;
    ensure!(!order.is_sorted(), "they were done one after the other");
    println!(
        "stream:   {} mails, at most {} at once, done in another order than they \
         came",
        order.len(),
        desk.most()
    );
    worker.close(200, "done".into()).await?;

    for (name, limit) in [("delegate", AT_ONCE), ("no limit", 0)] {
        publish_all(&channel).await?;
        let worker = connection.create_channel().await?;
        let mails = consume(&worker, limit).await?;
        let (desk, count) = by_delegate(mails).await?;
        println!("{name}: {count} mails, at most {} at once", desk.most());
        // The delegate goes on until its channel is closed.
        worker.close(200, "done".into()).await?;
    }
    // What was with a worker would be back by now.
    println!("left:     {} mails", ready(&channel).await?);
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: stream
/// Sends all mails, so many at once, and tells in which order they were done.
async fn by_stream(mails: Consumer) -> Result<(Arc<Desk>, Vec<u64>)> {
    let desk = Arc::new(Desk::default());
    let (sent, mut order) = mpsc::unbounded_channel();
    let all = mails.take(MAILS).map_err(anyhow::Error::from);
    let all = all.try_for_each_concurrent(usize::from(AT_ONCE), |mail| {
        let (desk, sent) = (Arc::clone(&desk), sent.clone());
        async move {
            desk.send(&mail).await;
            // Each for itself: `multiple` would be for mails that are not sent yet.
            mail.ack(BasicAckOptions::default()).await?;
            sent.send(mail.delivery_tag)?;
            Ok(())
        }
    });
    let all = timeout(PATIENCE, all).await;
    all.context("the mails were not sent within 8 s")??;
    let mut tags = Vec::new();
    while let Ok(tag) = order.try_recv() {
        tags.push(tag);
    }
    Ok((desk, tags))
}
// ANCHOR_END: stream

// ANCHOR: delegate
/// Leaves it to lapin to start a task for each mail that comes.
async fn by_delegate(mails: Consumer) -> Result<(Arc<Desk>, usize)> {
    let desk = Arc::new(Desk::default());
    let (sent, mut done) = mpsc::unbounded_channel();
    let shared = Arc::clone(&desk);
    mails.set_delegate(move |mail: DeliveryResult| {
        let (desk, sent) = (Arc::clone(&shared), sent.clone());
        async move {
            let result = match mail {
                Ok(Some(mail)) => {
                    desk.send(&mail).await;
                    mail.ack(BasicAckOptions::default()).await.map(drop)
                }
                // The consumer was cancelled.
                Ok(None) => return,
                Err(error) => Err(error),
            };
            // Fails when nobody waits any more.
            let _ = sent.send(result);
        }
    });
    let mut count = 0;
    while count < MAILS {
        let result = timeout(PATIENCE, done.recv()).await;
        let result = result.context("no mail was sent within 8 s")?;
        match result {
            Some(result) => result?,
            None => bail!("the consumer has ended after {count} mails"),
        }
        count += 1;
    }
    Ok((desk, count))
}
// ANCHOR_END: delegate

/// Counts how many mails are being sent at the same time.
#[derive(Default)]
struct Desk {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Desk {
    async fn send(&self, mail: &Delivery) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        // Every other mail has an attachment, and takes longer.
        sleep(Duration::from_millis(100 + 100 * (mail.delivery_tag % 2))).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
    }

    fn most(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }
}

/// With this prefetch limit; 0 is none.
async fn consume(channel: &Channel, limit: u16) -> Result<Consumer> {
    channel.basic_qos(limit, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel
        .basic_consume(QUEUE.into(), "".into(), options, none)
        .await?;
    Ok(consumer)
}

/// How many messages are in the queue. Passive: it makes none.
async fn ready(channel: &Channel) -> Result<u32> {
    let options = QueueDeclareOptions::default().passive();
    let none = FieldTable::default();
    let queue = channel.queue_declare(QUEUE.into(), options, none).await?;
    Ok(queue.message_count())
}

async fn publish_all(channel: &Channel) -> Result<()> {
    let mails: Vec<String> = (1..=MAILS).map(|n| format!("mail-{n}")).collect();
    try_join_all(mails.iter().map(|mail| publish(channel, mail))).await?;
    Ok(())
}

/// Publishes, and returns when RabbitMQ has it in the queue.
async fn publish(channel: &Channel, message: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            message.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {message}");
    Ok(())
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
