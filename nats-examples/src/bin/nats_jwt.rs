//! JWT accounts: an account issues its users, and the server is not told.
//!
//! Teaches: the operator signs the account, the account signs the user, and the
//! server only checks the signatures. A JWT holds the permissions of its user and
//! the end of its time. So users come and go without a change on the server.
//! Limits that a JWT leaves out are 0, which is nothing; -1 is no limit.
//!
//! Run, with a server of its own, or after `cargo run --bin nats_jwt -- setup`
//! and `nats-server -c nats-examples/config/nats_jwt.conf`:
//!
//! ```text
//! cargo lab run nats_jwt     # makes the keys, starts such a server, runs:
//! cargo run --bin nats_jwt
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused:  a user of an account that no operator has signed
//! allowed:  alice: jwt.orders.new arrived
//! denied:   alice: Permissions Violation for Publish to "jwt.billing.refund"
//! refused:  bob, whose time is over
//! ```
//!
//! Left out on purpose: the operator's seed, which is thrown away here and kept
//! offline in a company; and a resolver that takes new accounts while it runs.

use std::{
    env,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    AuthError, Client, ConnectError, ConnectErrorKind, ConnectOptions, Event,
    ServerAddr, ServerError,
};
use data_encoding::BASE64URL_NOPAD;
use futures_lite::StreamExt as _;
use nkeys::KeyPair;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::{self, Receiver},
    time::timeout,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_jwt.conf";
/// Where `setup` puts the files, unless NATS_GENERATED names another folder.
const GENERATED: &str = "nats-examples/config/generated";
const SEED: &str = "nats_jwt.account.seed";
const SERVER: &str = "nats_jwt.conf";
const ORDER: &str = "jwt.orders.new";
const REFUND: &str = "jwt.billing.refund";

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [] => onboard().await,
        ["setup"] => setup(),
        _ => {
            eprintln!("usage: nats_jwt [setup]");
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
async fn onboard() -> Result<()> {
    // Anybody can sign JWTs. They open nothing without the operator's signature.
    let foreign = KeyPair::new_account();
    refused(&foreign, "mallory", 3600).await?;
    println!("refused:  a user of an account that no operator has signed");

    let account = read_account()?;
    let (alice, mut denials) = connect(&account, "alice", 3600).await?;
    let mut orders = alice.subscribe(ORDER).await?;
    alice.publish(ORDER, "1 kettle".into()).await?;
    let order = timeout(PATIENCE, orders.next()).await;
    let order = order.context("no order came back; may alice publish?")?;
    let order = order.context("the server ended the subscription")?;
    println!("allowed:  alice: {} arrived", order.subject);

    alice.publish(REFUND, "all of it".into()).await?;
    let denial = timeout(PATIENCE, denials.recv()).await;
    let denial = denial.context("the server has denied nothing")?;
    let denial = denial.context("the connection is closed")?;
    println!("denied:   alice: {denial}");
    alice.drain().await?;

    // The right account, and a JWT that ended a minute ago.
    refused(&account, "bob", -60).await?;
    println!("refused:  bob, whose time is over");
    Ok(())
}
// ANCHOR_END: story

async fn refused(account: &KeyPair, name: &str, seconds: i64) -> Result<()> {
    match connect(account, name, seconds).await {
        Err(error) if error.is::<ConnectError>() => Ok(()),
        Err(error) => Err(error),
        Ok(_) => bail!("the server lets {name} in; start it with {CONFIG}"),
    }
}

// ANCHOR: user
/// What the account says about a user, signed, for this many seconds.
fn user_jwt(
    account: &KeyPair,
    user: &KeyPair,
    name: &str,
    seconds: i64,
) -> Result<String> {
    let nats = json!({
        "type": "user", "version": 2,
        "pub": { "allow": ["jwt.orders.>"] },
        "sub": { "allow": ["jwt.orders.>", "_INBOX.>"] },
        "subs": -1, "data": -1, "payload": -1,
    });
    jwt(account, &user.public_key(), name, Some(seconds), nats)
}

fn jwt(
    issuer: &KeyPair,
    subject: &str,
    name: &str,
    seconds: Option<i64>,
    nats: Value,
) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let now = i64::try_from(now)?;
    let mut claims = json!({
        "jti": format!("{subject}-{now}"),
        "iat": now, "iss": issuer.public_key(),
        "name": name, "sub": subject, "nats": nats,
    });
    if let Some(seconds) = seconds {
        claims["exp"] = (now + seconds).into();
    }
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let encoded = |part: &Value| BASE64URL_NOPAD.encode(part.to_string().as_bytes());
    let text = format!("{}.{}", encoded(&header), encoded(&claims));
    let signature = issuer.sign(text.as_bytes())?;
    Ok(format!("{text}.{}", BASE64URL_NOPAD.encode(&signature)))
}
// ANCHOR_END: user

// ANCHOR: setup
/// Makes an operator and an account: JWTs for the server, the account's seed for
/// whoever issues users.
fn setup() -> Result<()> {
    let folder = generated();
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let seed = folder.join(SEED);
    if !seed.exists() {
        write_secret(&seed, &KeyPair::new_account().seed()?)
            .with_context(|| format!("cannot write {}", seed.display()))?;
    }
    let account = read_account()?.public_key();
    let operator = KeyPair::new_operator();
    let nats = json!({ "type": "operator", "version": 2 });
    let own = jwt(&operator, &operator.public_key(), "shop", None, nats)?;
    let nats = json!({
        "type": "account", "version": 2,
        "limits": {
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1,
            "wildcards": true, "conn": -1, "leaf": -1,
        },
    });
    let signed = jwt(&operator, &account, "ORDERS", None, nats)?;
    let path = folder.join(SERVER);
    let config = format!(
        "operator: {own}\nresolver: MEMORY\n\
         resolver_preload: {{ {account}: {signed} }}\n"
    );
    fs::write(&path, config)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("account:  {account}");
    println!("files are in {}", folder.display());
    Ok(())
}
// ANCHOR_END: setup

// ANCHOR: connect
/// Issues a user that has these seconds to live, and signs in with it.
async fn connect(
    account: &KeyPair,
    name: &str,
    seconds: i64,
) -> Result<(Client, Receiver<String>)> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    let user = KeyPair::new_user();
    let jwt = user_jwt(account, &user, name, seconds)?;
    // The JWT is no secret. That it is ours is shown by a signature on what the
    // server has just made up.
    let user = Arc::new(user);
    let sign = move |nonce: Vec<u8>| {
        let user = Arc::clone(&user);
        async move { user.sign(&nonce).map_err(AuthError::new) }
    };
    let (sender, denials) = mpsc::channel(16);
    let client = ConnectOptions::with_jwt(jwt, sign)
        .event_callback(move |event| {
            if let Event::ServerError(ServerError::Other(text)) = event {
                let _ = sender.try_send(text);
            }
            async {}
        })
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => Error::new(error).context(
                format!("NATS at {place} refuses {name}; does it know the account?"),
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })?;
    Ok((client, denials))
}
// ANCHOR_END: connect

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // From the start: a file that is closed to others later was open before.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(text.as_bytes())?;
    Ok(())
}

fn read_account() -> Result<KeyPair> {
    let path = generated().join(SEED);
    let seed = fs::read_to_string(&path).with_context(|| {
        let path = path.display();
        format!("cannot read {path}; make it: cargo run --bin nats_jwt -- setup")
    })?;
    // The error is not shown: nothing of the file may get into a log.
    KeyPair::from_seed(seed.trim())
        .map_err(|_hidden| anyhow!("{} holds no seed of an account", path.display()))
}
fn generated() -> PathBuf {
    env::var_os("NATS_GENERATED").map_or_else(|| GENERATED.into(), PathBuf::from)
}
