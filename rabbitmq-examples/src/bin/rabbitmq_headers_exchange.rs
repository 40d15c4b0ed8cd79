//! More routing: by headers, not by the key.
//!
//! Teaches: a headers exchange compares a table of headers with those of each
//! message: `all` of them must agree, or `any`. A value agrees with the same value
//! of the same type only, and a header that starts with `x-` is left out, unless the
//! binding says `all-with-x`.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin rabbitmq_headers_exchange
//! ```
//!
//! Expected output:
//!
//! ```text
//! pdf, de:          pdf-germany, any, x-copies
//! pdf, fr:          any
//! html, fr:         nowhere
//! pdf, de, 2 pages: pdf-germany, any, two-pages, x-copies
//! pages as text:    pdf-germany, any, x-copies
//! x-copies 3:       pdf-germany, any, x-copies, with-x
//! ```
//!
//! Left out on purpose: topics (`rabbitmq_topics`), which do most of this with one
//! word and are quicker.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "headers.documents";

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
    let bindings = [
        (
            "headers.pdf-germany",
            "all",
            vec![format("pdf"), country("de")],
        ),
        ("headers.any", "any", vec![format("pdf"), country("de")]),
        ("headers.two-pages", "all", vec![("pages", 2.into())]),
        // Nothing is left to compare but the country.
        ("headers.x-copies", "all", vec![country("de"), copies(3)]),
        (
            "headers.with-x",
            "all-with-x",
            vec![country("de"), copies(3)],
        ),
    ];
    declare(&channel, &bindings).await?;

    let german = || vec![format("pdf"), country("de")];
    let with = |header| [german(), vec![header]].concat();
    let documents = [
        ("pdf, de", german()),
        ("pdf, fr", vec![format("pdf"), country("fr")]),
        ("html, fr", vec![format("html"), country("fr")]),
        ("pdf, de, 2 pages", with(("pages", 2.into()))),
        ("pages as text", with(("pages", text("2")))),
        ("x-copies 3", with(copies(3))),
    ];
    for (name, headers) in documents {
        publish(&channel, name, headers).await?;
        let mut queues = Vec::new();
        for (queue, ..) in &bindings {
            let document = channel
                .basic_get((*queue).into(), BasicGetOptions::default())
                .await?;
            if let Some(document) = document {
                document.ack(BasicAckOptions::default()).await?;
                queues.push(queue.trim_start_matches("headers."));
            }
        }
        let queues = match &queues[..] {
            [] => "nowhere".to_owned(),
            queues => queues.join(", "),
        };
        println!("{:17} {queues}", format!("{name}:"));
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: declare
type Header = (&'static str, AMQPValue);

async fn declare(
    channel: &Channel,
    bindings: &[(&str, &str, Vec<Header>)],
) -> Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    channel
        .exchange_declare(EXCHANGE.into(), ExchangeKind::Headers, durable, none)
        .await?;
    for (name, matching, headers) in bindings {
        queue(channel, name).await?;
        let mut arguments = table(headers.clone());
        // Without it: `all`.
        arguments.insert("x-match".into(), text(matching));
        channel
            .queue_bind(
                (*name).into(),
                EXCHANGE.into(),
                // The key is not looked at.
                "".into(),
                QueueBindOptions::default(),
                arguments,
            )
            .await?;
    }
    Ok(())
}
// ANCHOR_END: declare

fn format(format: &str) -> Header {
    ("format", text(format))
}

fn country(country: &str) -> Header {
    ("country", text(country))
}

fn copies(count: i32) -> Header {
    ("x-copies", count.into())
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn table(headers: Vec<Header>) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert(name.into(), value);
    }
    table
}

/// Publishes, and returns when RabbitMQ has it in its queues.
async fn publish(
    channel: &Channel,
    document: &str,
    headers: Vec<Header>,
) -> Result<()> {
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_headers(table(headers));
    let (options, body) = (BasicPublishOptions::default(), document.as_bytes());
    let confirm = channel
        .basic_publish(EXCHANGE.into(), "".into(), options, body, properties)
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {document}");
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
