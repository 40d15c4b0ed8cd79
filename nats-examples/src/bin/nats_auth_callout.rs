//! Auth callout: your own service decides who may log in, and where to.
//!
//! Teaches: the server knows no user but this service. For each login it asks on
//! `$SYS.REQ.USER.AUTH`, with the password that was given; the answer is a JWT of
//! the user, signed by the issuer whom the server trusts, with the account, the
//! permissions and the end of the login. The service says no by an error, which
//! only the server's log shows. While no service runs, nobody logs in.
//!
//! Run, with a server of its own, or after
//! `cargo run --bin nats_auth_callout -- setup` and
//! `nats-server -c nats-examples/config/nats_auth_callout.conf`:
//!
//! ```text
//! cargo lab run nats_auth_callout     # makes the keys, starts such a server:
//! cargo run --bin nats_auth_callout
//! cargo run --bin nats_auth_callout service     # only the service
//! ```
//!
//! Expected output:
//!
//! ```text
//! refused:  alice, while no service answers
//! service:  yes to alice
//! allowed:  alice: callout.orders.new arrived
//! denied:   alice: Permissions Violation for Publish to "callout.billing.refund"
//! service:  no to alice: wrong password
//! refused:  alice, with a wrong password
//! service:  no to mallory: unknown user
//! refused:  mallory
//! ```
//!
//! Left out on purpose: an `xkey`, by which the server encrypts its questions for
//! the service, and the second instance that a service of this weight needs.

use std::{
    env,
    fs::{self, OpenOptions},
    future::Future,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, RequestErrorKind,
    ServerAddr, ServerError, Subscriber,
};
use data_encoding::BASE64URL_NOPAD;
use futures_lite::StreamExt as _;
use nkeys::KeyPair;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{
        Notify,
        mpsc::{self, Receiver},
    },
    time::timeout,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const CONFIG: &str = "nats-examples/config/nats_auth_callout.conf";
/// Where `setup` puts the files, unless NATS_GENERATED names another folder.
const GENERATED: &str = "nats-examples/config/generated";
const ISSUER: &str = "nats_auth_callout.issuer.seed";
const SERVICE: &str = "nats_auth_callout.service.seed";
const SERVER: &str = "nats_auth_callout.conf";

const CALLOUT: &str = "$SYS.REQ.USER.AUTH";
const ORDER: &str = "callout.orders.new";
const REFUND: &str = "callout.billing.refund";

/// How long a login lasts; the server then cuts the connection, and the client
/// logs in anew. So a user who is struck off is out after this time.
const LOGIN: Duration = Duration::from_secs(3600);

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [] => story().await,
        ["setup"] => setup(),
        ["service"] => service().await,
        _ => {
            eprintln!("usage: nats_auth_callout [setup | service]");
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
async fn story() -> Result<()> {
    refused("alice", "kettle").await?;
    println!("refused:  alice, while no service answers");

    let (issuer, service) = (read_seed(ISSUER)?, read_seed(SERVICE)?);
    let (client, questions) = connect_service(&service).await?;
    let answering = tokio::spawn(answer_all(client.clone(), questions, issuer));

    let (alice, mut denials) = log_in("alice", "kettle").await?;
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

    refused("alice", "teapot").await?;
    println!("refused:  alice, with a wrong password");
    refused("mallory", "kettle").await?;
    println!("refused:  mallory");

    client.drain().await?;
    answering.await?
}
// ANCHOR_END: story

async fn refused(user: &str, password: &str) -> Result<()> {
    match log_in(user, password).await {
        Err(error) if error.is::<ConnectError>() => Ok(()),
        Err(error) => Err(error),
        Ok(_) => bail!("the server lets {user} in; start it with {CONFIG}"),
    }
}

async fn service() -> Result<()> {
    let (issuer, service) = (read_seed(ISSUER)?, read_seed(SERVICE)?);
    let stop_signal = stop_signal()?;
    let (client, questions) = connect_service(&service).await?;
    println!("ready: answers for the server, Ctrl-C to stop");
    let answering = tokio::spawn(answer_all(client.clone(), questions, issuer));
    stop_signal.await;
    client.drain().await?;
    answering.await??;
    println!("stopped");
    Ok(())
}

// ---- The service -----------------------------------------------------------

/// What the server asks, as far as it matters here.
#[derive(Deserialize)]
struct Question {
    nats: Login,
}

#[derive(Deserialize)]
struct Login {
    server_id: Id,
    /// The key that the server made for this login; the user gets its name.
    user_nkey: String,
    connect_opts: Given,
}

#[derive(Deserialize)]
struct Id {
    id: String,
}

/// What the client has sent. Never print it.
#[derive(Deserialize)]
struct Given {
    #[serde(default)]
    user: String,
    #[serde(default)]
    pass: String,
}

// ANCHOR: answer
async fn answer_all(
    client: Client,
    mut questions: Subscriber,
    issuer: KeyPair,
) -> Result<()> {
    while let Some(question) = questions.next().await {
        let Some(reply) = question.reply else {
            continue;
        };
        // One question that cannot be read must not end the answers to all others.
        let Ok(login) = read_question(&question.payload) else {
            eprintln!("warning: a question that cannot be read gets no answer");
            continue;
        };
        let given = &login.connect_opts;
        // A stranger has chosen the name: without its line feeds into the log.
        let user = given.user.escape_debug();
        let verdict = match check(&given.user, &given.pass) {
            Ok(()) => {
                println!("service:  yes to {user}");
                json!({ "jwt": user_jwt(&issuer, &login)? })
            }
            Err(reason) => {
                println!("service:  no to {user}: {reason}");
                json!({ "error": reason })
            }
        };
        let response = response_jwt(&issuer, &login, verdict)?;
        client.publish(reply, response.into()).await?;
    }
    Ok(())
}

/// Your directory of users, with hashes of passwords, stands here.
fn check(user: &str, password: &str) -> Result<(), &'static str> {
    match (user, password) {
        ("alice", "kettle") => Ok(()),
        ("alice", _) => Err("wrong password"),
        _ => Err("unknown user"),
    }
}
// ANCHOR_END: answer

/// The middle of the JWT. Its signature would tell nothing more: the server lets
/// no client publish to this subject, not even the service.
fn read_question(jwt: &[u8]) -> Result<Login> {
    let mut parts = jwt.split(|byte| *byte == b'.');
    let claims = parts.nth(1).context("not a JWT")?;
    let claims = BASE64URL_NOPAD.decode(claims)?;
    Ok(serde_json::from_slice::<Question>(&claims)?.nats)
}

// ANCHOR: jwt
/// The user: for the key that the server has made, in the account APP.
fn user_jwt(issuer: &KeyPair, login: &Login) -> Result<String> {
    let mut claims = json!({
        "sub": login.user_nkey,
        "aud": "APP",
        "name": login.connect_opts.user,
        "exp": unix_time()? + LOGIN.as_secs(),
        "nats": {
            "type": "user", "version": 2,
            "pub": { "allow": ["callout.orders.>", "$SYS.REQ.USER.INFO"] },
            "sub": { "allow": ["callout.orders.>", "_INBOX.>"] },
            // No limits; what is left out is 0, which is nothing.
            "subs": -1, "data": -1, "payload": -1,
        },
    });
    sign(issuer, &mut claims)
}

/// The answer: for this server and this login only. `verdict` holds the JWT of
/// the user, or an error.
fn response_jwt(issuer: &KeyPair, login: &Login, verdict: Value) -> Result<String> {
    let mut claims = json!({
        "sub": login.user_nkey,
        "aud": login.server_id.id,
        "nats": verdict,
    });
    claims["nats"]["type"] = "authorization_response".into();
    claims["nats"]["version"] = 2.into();
    sign(issuer, &mut claims)
}
// ANCHOR_END: jwt

fn sign(issuer: &KeyPair, claims: &mut Value) -> Result<String> {
    let now = unix_time()?;
    claims["iat"] = now.into();
    claims["iss"] = issuer.public_key().into();
    claims["jti"] = format!("{}-{now}", issuer.public_key()).into();
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let encoded = |part: &Value| BASE64URL_NOPAD.encode(part.to_string().as_bytes());
    let text = format!("{}.{}", encoded(&header), encoded(claims));
    let signature = issuer.sign(text.as_bytes())?;
    Ok(format!("{text}.{}", BASE64URL_NOPAD.encode(&signature)))
}

fn unix_time() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

// ---- Keys and connections --------------------------------------------------

// ANCHOR: setup
/// Makes the issuer and the service's own key: public keys for the server, seeds
/// for the service.
fn setup() -> Result<()> {
    let folder = generated();
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let issuer = keep_seed(&folder.join(ISSUER), KeyPair::new_account)?;
    let service = keep_seed(&folder.join(SERVICE), KeyPair::new_user)?;
    let path = folder.join(SERVER);
    fs::write(&path, format!("ISSUER: {issuer}\nSERVICE: {service}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("issuer:   {issuer}");
    println!("files are in {}", folder.display());
    Ok(())
}
// ANCHOR_END: setup

/// Makes a seed where there is none, and returns its public key.
fn keep_seed(path: &Path, new: fn() -> KeyPair) -> Result<String> {
    if !path.exists() {
        write_secret(path, &new().seed()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(key_pair(path)?.public_key())
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

fn read_seed(name: &str) -> Result<KeyPair> {
    key_pair(&generated().join(name))
}

fn key_pair(path: &Path) -> Result<KeyPair> {
    let shown = path.display();
    let seed = fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {shown}; make it: cargo run --bin nats_auth_callout -- setup"
        )
    })?;
    // The error is not shown: nothing of the file may get into a log.
    KeyPair::from_seed(seed.trim())
        .map_err(|_hidden| anyhow!("{shown} holds no seed"))
}

fn generated() -> PathBuf {
    env::var_os("NATS_GENERATED").map_or_else(|| GENERATED.into(), PathBuf::from)
}

async fn connect_service(service: &KeyPair) -> Result<(Client, Subscriber)> {
    let options = ConnectOptions::with_nkey(service.seed()?).name("callout");
    let client = connect(options, "the service").await?;
    let questions = client.subscribe(CALLOUT).await?;
    // The server reads in order. When it knows that nobody listens here, it knows
    // of the subscription.
    match client.request("callout.nobody.listens", "".into()).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {}
        answer => drop(answer.context("the server does not answer")?),
    }
    Ok((client, questions))
}

async fn log_in(user: &str, password: &str) -> Result<(Client, Receiver<String>)> {
    let (sender, denials) = mpsc::channel(16);
    let options =
        ConnectOptions::with_user_and_password(user.to_owned(), password.to_owned())
            .event_callback(move |event| {
                if let Event::ServerError(ServerError::Other(text)) = event {
                    let _ = sender.try_send(text);
                }
                async {}
            });
    Ok((connect(options, user).await?, denials))
}

async fn connect(options: ConnectOptions, who: &str) -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    let place = format!("{}:{}", server.host(), server.port());
    options
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => {
                Error::new(error).context(format!("NATS at {place} refuses {who}"))
            }
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
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
