//! Dead letters, at least once: what nobody takes is kept, and fills its queue.
//!
//! Teaches: by default RabbitMQ passes a dead letter on once, to whatever queues are
//! there; if there is none, or it is full or away, the message is gone without a word.
//! With the strategy at-least-once a quorum queue keeps it until a queue has confirmed
//! it. The price: what is kept counts in the length of the queue, which refuses new
//! messages when it is full.
//!
//! Run, after `cargo lab up rabbitmq`; the number is how many seconds to wait for the
//! dead letter, for which RabbitMQ tries again every three minutes:
//!
//! ```text
//! cargo run --bin rabbitmq_dead_letter_at_least_once
//! cargo run --bin rabbitmq_dead_letter_at_least_once 240
//! ```
//!
//! Expected output:
//!
//! ```text
//! rejected: invoice-1 of both queues; no queue takes their dead letters
//! default:  invoice-1 is gone, and 5 more invoices are taken
//! careful:  invoice-1 is kept, it fills the queue, and more are refused
//! bound:    a queue for dead letters, now; RabbitMQ tries again every 3 minutes
//! ```
//!
//! Left out on purpose: whoever looks at the dead letters; and the other reasons to
//! die, see rabbitmq_dead_letter.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind,
    options::{
        BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions,
        ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{Instant, sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "atleast.dead";
const DEFAULT: &str = "atleast.invoices.default";
const CAREFUL: &str = "atleast.invoices.careful";
const LETTERS: &str = "atleast.letters";
/// More than a full queue takes, as its limit is not exact.
const MORE: usize = 5;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let seconds = match &words[..] {
        [] => Some(0),
        [seconds] => seconds.parse().ok(),
        _ => None,
    };
    let Some(seconds) = seconds else {
        eprintln!("usage: rabbitmq_dead_letter_at_least_once [SECONDS]");
        return ExitCode::from(2);
    };
    match story(Duration::from_secs(seconds)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story(wait: Duration) -> Result<()> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    declare(&channel).await?;
    for queue in [DEFAULT, CAREFUL] {
        ensure!(publish(&channel, queue, "invoice-1").await?, "refused");
        reject(&channel, queue).await?;
    }
    println!(
        "rejected: invoice-1 of both queues; no queue takes their dead letters"
    );

    let taken = publish_more(&channel, DEFAULT).await?;
    ensure!(taken == MORE, "{DEFAULT} takes {taken} of {MORE}");
    println!("default:  invoice-1 is gone, and {taken} more invoices are taken");
    let taken = publish_more(&channel, CAREFUL).await?;
    ensure!(taken < MORE, "{CAREFUL} takes all of them");
    println!(
        "careful:  invoice-1 is kept, it fills the queue, and more are refused"
    );

    bind_letters(&channel).await?;
    println!(
        "bound:    a queue for dead letters, now; RabbitMQ tries again every 3 minutes"
    );
    if !wait.is_zero() {
        let letter = letter(&channel, wait).await?;
        println!("arrived:  {letter}");
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
/// An exchange for dead letters without a queue, and two queues that use it.
async fn declare(channel: &Channel) -> Result<()> {
    for queue in [DEFAULT, CAREFUL, LETTERS] {
        let options = QueueDeleteOptions::default();
        channel.queue_delete(queue.into(), options).await?;
    }
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Fanout, durable, none)
        .await?;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-dead-letter-exchange".into(), text(EXCHANGE));
    let options = QueueDeclareOptions::durable();
    channel
        .queue_declare(DEFAULT.into(), options, arguments.clone())
        .await?;

    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    // Without it RabbitMQ falls back to the default strategy, with a line in its log:
    // a queue that drops its oldest has no place to keep anything.
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    channel
        .queue_declare(CAREFUL.into(), options, arguments)
        .await?;
    Ok(())
}
// ANCHOR_END: declare

async fn reject(channel: &Channel, queue: &str) -> Result<()> {
    let get = channel.basic_get(queue.into(), BasicGetOptions::default());
    let invoice = get.await?.with_context(|| format!("{queue} is empty"))?;
    let reject = BasicNackOptions {
        requeue: false,
        ..BasicNackOptions::default()
    };
    invoice.nack(reject).await?;
    Ok(())
}

/// How many of some more invoices a queue takes, one after the other.
async fn publish_more(channel: &Channel, queue: &str) -> Result<usize> {
    let mut taken = 0;
    for number in 2..MORE + 2 {
        let invoice = format!("invoice-{number}");
        if publish(channel, queue, &invoice).await? {
            taken += 1;
        }
    }
    Ok(taken)
}

/// Whether the queue has taken it: a `Nack` is a refusal.
async fn publish(channel: &Channel, queue: &str, invoice: &str) -> Result<bool> {
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            invoice.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    match answer {
        Confirmation::Ack(_) => Ok(true),
        Confirmation::Nack(_) => Ok(false),
        Confirmation::NotRequested => bail!("confirm_select was not called"),
    }
}

async fn bind_letters(channel: &Channel) -> Result<()> {
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    channel
        .queue_declare(LETTERS.into(), QueueDeclareOptions::durable(), arguments)
        .await?;
    let bind = QueueBindOptions::default();
    let none = FieldTable::default();
    channel
        .queue_bind(LETTERS.into(), EXCHANGE.into(), "".into(), bind, none)
        .await?;
    Ok(())
}

/// Waits for a dead letter.
async fn letter(channel: &Channel, wait: Duration) -> Result<String> {
    let start = Instant::now();
    while start.elapsed() < wait {
        let get = channel.basic_get(LETTERS.into(), BasicGetOptions::default());
        if let Some(letter) = get.await? {
            let text = String::from_utf8_lossy(&letter.data).into_owned();
            letter.ack(BasicAckOptions::default()).await?;
            return Ok(text);
        }
        sleep(Duration::from_millis(200)).await;
    }
    bail!("no dead letter within {} s", wait.as_secs())
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
