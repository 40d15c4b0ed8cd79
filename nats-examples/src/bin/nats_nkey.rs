//! NKey: a service shows that it has a key, and never sends it.
//!
//! Teaches: the server sends a number, the client signs it, and the server checks
//! that with the public key in its configuration. What the server stores and what
//! crosses the network is of no use to a thief. The seed, from which the key is
//! made, stays in a file that only its owner may read, and out of each log.
//!
//! Run, with a server of its own, or after `cargo run --bin nats_nkey -- setup`
//! and `nats-server -c nats-examples/config/nats_nkey.conf`:
//!
//! ```text
//! cargo lab run nats_nkey     # makes the keys, starts such a server, runs:
//! cargo run --bin nats_nkey
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused:  <key>, which the server does not know
//! known as: <key>, by its signature
//! allowed:  nkey.stock.kettle arrived
//! ```
//!
//! Left out on purpose: TLS, as a signature proves who connects and hides nothing
//! of what is said afterwards.

use std::{
    env,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, ServerAddr,
};
use futures_lite::StreamExt as _;
use nkeys::KeyPair;
use tokio::time::timeout;

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_nkey.conf";
/// Where `setup` puts the files, unless NATS_GENERATED names another folder.
const GENERATED: &str = "nats-examples/config/generated";
const SEED: &str = "nats_nkey.seed";
const PUBLIC: &str = "nats_nkey.conf";
const SUBJECT: &str = "nkey.stock.kettle";
/// Here a server tells each connection about itself.
const WHO_AM_I: &str = "$SYS.REQ.USER.INFO";

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [] => sign_in().await,
        ["setup"] => setup(),
        _ => {
            eprintln!("usage: nats_nkey [setup]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn sign_in() -> Result<()> {
    // Anybody can make a key. It opens nothing until a server knows it.
    let stranger = KeyPair::new_user();
    match connect(&stranger).await {
        Err(error) if error.is::<ConnectError>() => println!(
            "refused:  {}, which the server does not know",
            stranger.public_key()
        ),
        Err(error) => return Err(error),
        Ok(_) => bail!("the server lets a stranger in; start it with {CONFIG}"),
    }

    let client = connect(&read_key()?).await?;
    println!("known as: {}, by its signature", user_of(&client).await?);

    let mut stock = client.subscribe(SUBJECT).await?;
    client.publish(SUBJECT, "7".into()).await?;
    let message = timeout(PATIENCE, stock.next()).await;
    let message = message.context("nothing came back; may this key publish?")?;
    let message = message.context("the server ended the subscription")?;
    println!("allowed:  {} arrived", message.subject);
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: setup
/// Makes a key: the seed for the service, the public half for the server.
fn setup() -> Result<()> {
    let folder = generated();
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let seed = folder.join(SEED);
    if !seed.exists() {
        write_secret(&seed, &KeyPair::new_user().seed()?)
            .with_context(|| format!("cannot write {}", seed.display()))?;
    }
    let public = read_key()?.public_key();
    let path = folder.join(PUBLIC);
    fs::write(&path, format!("STOCK_NKEY: {public}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("public key: {public}");
    println!("files are in {}", folder.display());
    Ok(())
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // From the start: a file that is closed to others later was open before.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(text.as_bytes())?;
    Ok(())
}

fn read_key() -> Result<KeyPair> {
    let path = generated().join(SEED);
    let seed = fs::read_to_string(&path).with_context(|| {
        let path = path.display();
        format!("cannot read {path}; make it: cargo run --bin nats_nkey -- setup")
    })?;
    // The error is not shown: nothing of the file may get into a log.
    KeyPair::from_seed(seed.trim())
        .map_err(|_hidden| anyhow!("{} holds no seed of an NKey", path.display()))
}
// ANCHOR_END: setup

fn generated() -> PathBuf {
    env::var_os("NATS_GENERATED").map_or_else(|| GENERATED.into(), PathBuf::from)
}

/// The user for whom the server takes this connection.
async fn user_of(client: &Client) -> Result<String> {
    let reply = timeout(PATIENCE, client.request(WHO_AM_I, "".into()))
        .await
        .with_context(|| format!("no answer on {WHO_AM_I}; may this key ask?"))??;
    let info: serde_json::Value = serde_json::from_slice(&reply.payload)?;
    let user = info["data"]["user"].as_str().unwrap_or_default();
    ensure!(
        !user.is_empty(),
        "the server knows no user; start it with {CONFIG}"
    );
    Ok(user.to_owned())
}

// ANCHOR: connect
async fn connect(key: &KeyPair) -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    ConnectOptions::with_nkey(key.seed()?)
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => {
                let key = key.public_key();
                Error::new(error).context(format!("NATS at {place} refuses {key}"))
            }
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
// ANCHOR_END: connect
