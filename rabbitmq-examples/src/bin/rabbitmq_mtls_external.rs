//! TLS: the client's certificate is its user, and no password is sent.
//!
//! Teaches: with the mechanism EXTERNAL, RabbitMQ takes the user from the
//! certificate, here from its common name, and gives it that user's permissions.
//! lapin does not know the name; `user_id` in a message is checked by the server,
//! so whoever reads it knows who has sent it.
//!
//! Run, with a RabbitMQ of its own, or after `cargo run --bin make_certs -- certs`
//! and as rabbitmq-examples/config/rabbitmq_mtls_external.conf says:
//!
//! ```text
//! cargo lab run rabbitmq_mtls_external     # makes the certificates, starts it, runs:
//! cargo run --bin rabbitmq_mtls_external
//! ```
//!
//! Expected output:
//!
//! ```text
//! connected: with a certificate, without a password
//! stored:    1 kettle, from the user app
//! refused:   1 kettle from the user guest (PRECONDITION_FAILED)
//! denied:    the queue orders, which is not ours (ACCESS_REFUSED)
//! ```
//!
//! Left out on purpose: a list of certificates that were withdrawn; and PKCS #12,
//! which `OwnedIdentity::PKCS12` reads.

use std::{env, fs, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    runtime,
    tcp::{OwnedIdentity, OwnedTLSConfig},
    types::{AMQPValue, FieldTable},
    uri::{AMQPScheme, AMQPUri, SASLMechanism},
};
use tokio::time::timeout;

const DEFAULT_URL: &str = "amqps://guest:guest@localhost:5671/%2f";
/// The files, and the variables that name others.
const CA: (&str, &str) = ("AMQP_CA", "certs/ca.pem");
const CERT: (&str, &str) = ("AMQP_CERT", "certs/client.pem");
const KEY: (&str, &str) = ("AMQP_KEY", "certs/client.key");
const QUEUE: &str = "mtls.orders";

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
    let mut uri = address()?;
    if uri.scheme == AMQPScheme::AMQPS {
        // User and password of the address are not sent.
        uri.query.auth_mechanism = Some(SASLMechanism::External);
    }
    let connection = connect(&uri, identity(&uri)?).await;
    let connection = connection.map_err(|error| explained(&uri, error))?;
    ensure!(
        uri.scheme == AMQPScheme::AMQPS,
        "AMQP_URL is without TLS; a right one: {DEFAULT_URL}"
    );
    println!("connected: with a certificate, without a password");

    let channel = connection.create_channel().await?;
    queue(&channel, QUEUE).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, "app").await?;
    println!("stored:    1 kettle, from the user app");

    // Each refusal closes its channel.
    match publish(&channel, "guest").await {
        Err(error) if reason(&error).contains("PRECONDITION_FAILED") => {
            println!("refused:   1 kettle from the user guest (PRECONDITION_FAILED)")
        }
        other => bail!("a wrong user is believed: {other:?}"),
    }
    let other = connection.create_channel().await?;
    match queue(&other, "orders").await {
        Err(error) if reason(&error).contains("ACCESS_REFUSED") => println!(
            "denied:    the queue orders, which is not ours (ACCESS_REFUSED)"
        ),
        other => bail!("the permissions are not those of app: {other:?}"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// With a name that RabbitMQ compares with the user of the connection.
async fn publish(channel: &Channel, user: &str) -> Result<()> {
    let confirm = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            b"1 kettle",
            BasicProperties::default()
                .with_delivery_mode(2)
                .with_user_id(user.into()),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    ensure!(answer.is_ack(), "RabbitMQ did not store the order");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: connect
/// Whom to trust, and who we are. The files are asked for where they are needed
/// only.
fn identity(uri: &AMQPUri) -> Result<OwnedTLSConfig> {
    if uri.scheme != AMQPScheme::AMQPS {
        return Ok(OwnedTLSConfig::default());
    }
    // An empty variable leaves our certificate out.
    let identity = match (read(CERT)?, read(KEY)?) {
        (Some(pem), Some(key)) => Some(OwnedIdentity::PKCS8 { pem, key }),
        _ => None,
    };
    let ca = read(CA)?.context("AMQP_CA names no file")?;
    Ok(OwnedTLSConfig {
        cert_chain: Some(String::from_utf8(ca)?),
        identity,
    })
}

fn read((variable, default): (&str, &str)) -> Result<Option<Vec<u8>>> {
    let path = env::var(variable).unwrap_or_else(|_| default.to_owned());
    if path.is_empty() {
        return Ok(None);
    }
    let data = fs::read(&path).with_context(|| {
        format!("cannot read {path}; make it: cargo run --bin make_certs -- certs")
    })?;
    Ok(Some(data))
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
    if has(&["CertificateRequired"]) {
        return anyhow!(
            "RabbitMQ at {place} asks for a certificate; set AMQP_CERT and AMQP_KEY"
        );
    }
    if has(&["UnknownCA"]) {
        return anyhow!(
            "RabbitMQ at {place} does not trust the authority of our certificate; \
             is AMQP_CERT the right file?"
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

/// A durable, replicated queue.
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
    Ok(())
}
