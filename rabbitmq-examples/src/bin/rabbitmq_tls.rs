//! TLS: encrypted, to a RabbitMQ that shows who it is.
//!
//! Teaches: `amqps://` encrypts, and the server is checked against the authorities
//! of this machine. Those of a company are its own, so the authority comes from a
//! file. A server that nobody vouches for, whose name is another, or whose time is
//! over, is refused before a password is sent.
//!
//! Run, with a RabbitMQ of its own, or after `cargo run --bin make_certs -- certs`
//! and as rabbitmq-examples/config/rabbitmq_tls.conf says:
//!
//! ```text
//! cargo lab run rabbitmq_tls     # makes the certificates, starts it, runs:
//! cargo run --bin rabbitmq_tls
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused:   with the authorities of this machine alone (UnknownIssuer)
//! connected: over TLS, with an authority of our own
//! stored:    1 kettle
//! received:  1 kettle
//! ```
//!
//! Left out on purpose: a certificate of the client, see rabbitmq_mtls_external;
//! and how certificates get to the machines and are replaced before they expire.

use std::{env, fs, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueuePurgeOptions,
    },
    runtime,
    tcp::OwnedTLSConfig,
    types::{AMQPValue, FieldTable},
    uri::{AMQPScheme, AMQPUri},
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqps://guest:guest@localhost:5671/%2f";
/// The authority, and the variable that names another file.
const CA: (&str, &str) = ("AMQP_CA", "certs/ca.pem");
const QUEUE: &str = "tls.orders";

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
    let uri = address()?;
    if uri.scheme == AMQPScheme::AMQPS {
        match connect(&uri, OwnedTLSConfig::default()).await {
            Err(error) if reason(&error).contains("UnknownIssuer") => println!(
                "refused:   with the authorities of this machine alone (UnknownIssuer)"
            ),
            Err(error) => return Err(explained(&uri, error)),
            Ok(_) => println!("connected: this machine knows its authority"),
        }
    }
    let connection = connect(&uri, trust(&uri)?).await;
    let connection = connection.map_err(|error| explained(&uri, error))?;
    ensure!(
        uri.scheme == AMQPScheme::AMQPS,
        "AMQP_URL is without TLS; a right one: {DEFAULT_URL}"
    );
    println!("connected: over TLS, with an authority of our own");

    let channel = connection.create_channel().await?;
    queue(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, QUEUE, "1 kettle").await?;
    println!("stored:    1 kettle");
    let order = channel
        .basic_get(QUEUE.into(), BasicGetOptions::default())
        .await?;
    let order = order.context("the queue is empty")?;
    println!("received:  {}", String::from_utf8_lossy(&order.data));
    order.ack(BasicAckOptions::default()).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: connect
/// Whom to trust. The file is asked for where it is needed only.
fn trust(uri: &AMQPUri) -> Result<OwnedTLSConfig> {
    if uri.scheme != AMQPScheme::AMQPS {
        return Ok(OwnedTLSConfig::default());
    }
    let (variable, default) = CA;
    let path = env::var(variable).unwrap_or_else(|_| default.to_owned());
    let ca = fs::read_to_string(&path).with_context(|| {
        format!("cannot read {path}; make it: cargo run --bin make_certs -- certs")
    })?;
    Ok(OwnedTLSConfig {
        cert_chain: Some(ca),
        identity: None,
    })
}

async fn connect(uri: &AMQPUri, tls: OwnedTLSConfig) -> Result<Connection> {
    let connecting = Connection::connect_uri_with_config(
        uri.clone(),
        ConnectionProperties::default(),
        tls,
        runtime::default_runtime()?,
    );
    let connection = timeout(PATIENCE, connecting).await;
    Ok(connection.context("no answer from RabbitMQ")??)
}
// ANCHOR_END: connect

fn address() -> Result<AMQPUri> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })
}

/// The whole error with all that is inside.
fn reason(error: &Error) -> String {
    format!("{error:?}")
}

// ANCHOR: explained
/// What to do about it, in one line. The reason is deep inside the error, in the
/// words of rustls, or of the alert that the server has sent.
fn explained(uri: &AMQPUri, error: Error) -> Error {
    // Only host, port and vhost are shown: the address may hold a password.
    let (host, port) = (&uri.authority.host, uri.authority.port);
    let place = format!("{host}:{port}, vhost {:?}", uri.vhost);
    let text = reason(&error);
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if has(&["certificate not valid for name"]) {
        return anyhow!(
            "the certificate of RabbitMQ at {place} is not for {host}; use a name \
             that is in it"
        );
    }
    if has(&["certificate expired"]) {
        return anyhow!(
            "the certificate of RabbitMQ at {place} has expired; renew it"
        );
    }
    if has(&["UnknownIssuer", "BadSignature"]) {
        return anyhow!(
            "nobody whom we trust vouches for RabbitMQ at {place}; is AMQP_CA the \
             file of its authority?"
        );
    }
    if has(&["InvalidContentType"]) {
        return anyhow!("RabbitMQ at {place} speaks no TLS on this port");
    }
    if has(&["failed to parse"]) {
        return anyhow!(
            "what answers at {place} is no AMQP without TLS; with TLS, AMQP_URL \
             begins with amqps://"
        );
    }
    if text.contains("no answer from RabbitMQ") {
        return anyhow!("no answer from RabbitMQ at {place}");
    }
    match error.downcast_ref::<lapin::Error>() {
        Some(error) if error.is_io_error() => anyhow!(
            "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
        ),
        _ => anyhow!(
            "RabbitMQ at {place} refuses the connection ({error}); check user, \
             password and vhost in AMQP_URL"
        ),
    }
}
// ANCHOR_END: explained

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

async fn publish(channel: &Channel, queue: &str, text: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            BasicPublishOptions::default(),
            text.as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store {text}");
    Ok(())
}
