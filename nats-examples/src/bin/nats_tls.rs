//! TLS: encrypted, and the client's certificate is its user.
//!
//! Teaches: `add_root_certificates` says whom to trust, `require_tls` that plain
//! text is no way out, `add_client_certificate` who we are. With
//! `verify_and_map` the server takes the user from the certificate, and no
//! password is needed. Whatever does not fit is refused, for a reason that can be
//! told in one line.
//!
//! Run, with a server of its own, or after `cargo run --bin make_certs -- certs`
//! and `nats-server -c nats-examples/config/nats_tls.conf`:
//!
//! ```text
//! cargo lab run nats_tls     # makes the certificates, starts the server, runs:
//! cargo run --bin nats_tls
//! ```
//!
//! Expected output:
//!
//! ```text
//! connected: the server requires TLS: true
//! known as:  app@shop.example, by the certificate
//! allowed:   tls.orders.new arrived
//! denied:    Permissions Violation for Publish to "tls.refunds.new"
//! ```
//!
//! Left out on purpose: how certificates get to the machines and are replaced
//! before they expire; and a list of those that were withdrawn.

use std::{env, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow};
use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr,
    ServerError,
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::mpsc::{self, Receiver},
    time::timeout,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
/// The files and the variables that name others; an empty one leaves it out.
const CA: (&str, &str) = ("NATS_CA", "certs/ca.pem");
const CERT: (&str, &str) = ("NATS_CERT", "certs/client.pem");
const KEY: (&str, &str) = ("NATS_KEY", "certs/client.key");
const ORDER: &str = "tls.orders.new";
const REFUND: &str = "tls.refunds.new";
/// Here a server tells each connection about itself.
const WHO_AM_I: &str = "$SYS.REQ.USER.INFO";

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match order_over_tls().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn order_over_tls() -> Result<()> {
    let (client, mut denials) = connect().await?;
    let tls = client.server_info().tls_required;
    println!("connected: the server requires TLS: {tls}");

    let user = user_of(&client).await?;
    match &user {
        Some(user) => println!("known as:  {user}, by the certificate"),
        None => println!("known as:  nobody, as the server asks for no certificate"),
    }

    let mut orders = client.subscribe(ORDER).await?;
    client.publish(ORDER, "1 kettle".into()).await?;
    let order = timeout(PATIENCE, orders.next()).await;
    let order = order.context("no order came back")?;
    let order = order.context("the server ended the subscription")?;
    println!("allowed:   {} arrived", order.subject);

    if user.is_some() {
        client.publish(REFUND, "all of it".into()).await?;
        let denial = timeout(PATIENCE, denials.recv()).await;
        let denial = denial.context("the server has denied nothing")?;
        let denial = denial.context("the connection is closed")?;
        println!("denied:    {denial}");
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// The user for whom the server takes this connection.
async fn user_of(client: &Client) -> Result<Option<String>> {
    let reply = timeout(PATIENCE, client.request(WHO_AM_I, "".into()))
        .await
        .with_context(|| format!("no answer on {WHO_AM_I}; may this user ask?"))??;
    let info: serde_json::Value = serde_json::from_slice(&reply.payload)?;
    let user = info["data"]["user"].as_str().unwrap_or_default();
    Ok(Some(user.to_owned()).filter(|user| !user.is_empty()))
}

// ANCHOR: connect
async fn connect() -> Result<(Client, Receiver<String>)> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let (sender, denials) = mpsc::channel(16);
    let mut options = ConnectOptions::new().event_callback(move |event| {
        if let Event::ServerError(ServerError::Other(text)) = event {
            let _ = sender.try_send(text);
        }
        async {}
    });
    if let Some(ca) = file(CA) {
        // Without `require_tls` the server decides: whoever answers in its place
        // and asks for no TLS would get everything in plain text.
        options = options.add_root_certificates(ca).require_tls(true);
    }
    if let (Some(cert), Some(key)) = (file(CERT), file(KEY)) {
        options = options.add_client_certificate(cert, key);
    }
    let client = options.connect(server.clone()).await;
    Ok((client.map_err(|error| explained(&server, error))?, denials))
}
// ANCHOR_END: connect

fn file((variable, default): (&str, &str)) -> Option<PathBuf> {
    let path = env::var_os(variable).unwrap_or_else(|| default.into());
    (!path.is_empty()).then(|| path.into())
}

// ANCHOR: explained
/// What to do about it, in one line. The reason is deep inside the error, as the
/// name of what rustls, or the server in its alert, has against it.
fn explained(server: &ServerAddr, error: ConnectError) -> Error {
    let place = format!("{}:{}", server.host(), server.port());
    let (text, host) = (format!("{error:?}"), server.host());
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if error.kind() == ConnectErrorKind::AuthorizationViolation {
        return anyhow!("NATS at {place} knows no user for this certificate");
    }
    if has(&["NotFound"]) {
        let mut files = [CA, CERT, KEY].into_iter().filter_map(file);
        let missing = files.find(|path| !path.is_file());
        let missing = missing.unwrap_or_default();
        return anyhow!(
            "cannot read {}; make it: cargo run --bin make_certs -- certs",
            missing.display()
        );
    }
    if has(&["NotValidForName"]) {
        return anyhow!(
            "the certificate of NATS at {place} is not for {host}; use a name that \
             is in it"
        );
    }
    if has(&["Expired"]) {
        return anyhow!("the certificate of NATS at {place} has expired; renew it");
    }
    if has(&["UnknownIssuer", "BadSignature"]) {
        return anyhow!(
            "nobody whom we trust vouches for NATS at {place}; is NATS_CA the file \
             of its authority?"
        );
    }
    if has(&["CertificateRequired"]) {
        return anyhow!(
            "NATS at {place} asks for a certificate; set NATS_CERT and NATS_KEY"
        );
    }
    if has(&["UnknownCA", "BadCertificate"]) {
        return anyhow!(
            "NATS at {place} does not trust the authority of our certificate; check \
             NATS_CERT"
        );
    }
    if has(&["InvalidContentType"]) {
        return anyhow!(
            "NATS at {place} speaks no TLS, and we insist on it; start it with \
             nats-examples/config/nats_tls.conf"
        );
    }
    anyhow!("no NATS server at {place} ({error}); start one: cargo lab up nats")
}
// ANCHOR_END: explained
