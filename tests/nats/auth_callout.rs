//! Who may log in is what the service says, and nobody while it is away.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, ConnectErrorKind, ConnectOptions};
use serde_json::Value;
use tempfile::TempDir;
use tests::{
    Example,
    nats::{Server, Servers},
};
use tokio::time::timeout;

const AUTH_CALLOUT: &str = env!("CARGO_BIN_EXE_nats_auth_callout");

/// The configuration that a reader starts a server with.
const CONFIG: &str =
    include_str!("../../nats-examples/config/nats_auth_callout.conf");

fn start(url: &str, keys: &Path, words: &[&str]) -> Result<Example> {
    let keys = keys.to_string_lossy();
    let variables = [("NATS_URL", url), ("NATS_GENERATED", &keys)];
    Example::start_with(AUTH_CALLOUT, words, &variables)
}

/// A folder with new keys.
async fn keys() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let setup = start("nats://localhost:1", folder.path(), &["setup"])?;
    setup.end().await?.succeeded()?;
    Ok(folder)
}

fn seed(keys: &Path, whose: &str) -> Result<String> {
    let path = keys.join(format!("nats_auth_callout.{whose}.seed"));
    Ok(fs::read_to_string(path)?)
}

async fn server(keys: &Path) -> Result<Servers> {
    let known = fs::read(keys.join("nats_auth_callout.conf"))?;
    let [port] = Servers::ports()?;
    let (name, config) = ("shop", CONFIG.to_owned());
    let files = [("generated/nats_auth_callout.conf".to_owned(), known)];
    Servers::start(&[Server { name, config, port }], &files).await
}

async fn log_in(url: &str, user: &str, password: &str) -> Result<Option<Client>> {
    let options =
        ConnectOptions::with_user_and_password(user.into(), password.into());
    match options.connect(url).await {
        Ok(client) => Ok(Some(client)),
        Err(error) if error.kind() == ConnectErrorKind::AuthorizationViolation => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_story_is_what_the_server_has_noted() -> Result<()> {
    let keys = keys().await?;
    let servers = server(keys.path()).await?;
    for run in 1..=2 {
        let ended = start(&servers.url("shop")?, keys.path(), &[])?
            .end()
            .await?;
        ended.succeeded()?.printed_what_its_header_says()?;
        let log = servers.log("shop").await?;
        let refusals = log.matches("authentication error").count();
        ensure!(refusals == 3 * run, "{refusals} refusals: {log}");
        let denials = log.matches("Publish Violation").count();
        ensure!(denials == run, "{denials} denials: {log}");
        // The reason is told to the server alone.
        ensure!(log.matches("wrong password").count() == run, "{log}");
        for secret in [
            &seed(keys.path(), "issuer")?,
            &seed(keys.path(), "service")?,
        ] {
            ensure!(!log.contains(secret), "the server knows a seed");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_decides_for_other_clients_and_only_the_server_asks()
-> Result<()> {
    let keys = keys().await?;
    let servers = server(keys.path()).await?;
    let url = servers.url("shop")?;
    let mut service = start(&url, keys.path(), &["service"])?;
    service.prints("ready:").await?;

    // Nobody asks in the server's name, not even who holds the service's seed.
    let own = ConnectOptions::with_nkey(seed(keys.path(), "service")?);
    let own = own.connect(&url).await?;
    let question = own.request("$SYS.REQ.USER.AUTH", "nonsense".into());
    let asked = timeout(Duration::from_millis(500), question).await;
    ensure!(!matches!(asked, Ok(Ok(_))), "a client was answered");
    let log = servers.log("shop").await?;
    ensure!(log.contains(r#"Subject "$SYS.REQ.USER.AUTH""#), "{log}");

    let alice = log_in(&url, "alice", "kettle").await?;
    let alice = alice.context("the service knows alice")?;
    let who = alice.request("$SYS.REQ.USER.INFO", "".into()).await?;
    let who: Value = serde_json::from_slice(&who.payload)?;
    assert_eq!(who["data"]["account"], "APP");
    ensure!(log_in(&url, "alice", "teapot").await?.is_none());
    ensure!(log_in(&url, "a\nline", "kettle").await?.is_none());
    service
        .prints("service:  no to a\\nline: unknown user")
        .await?;

    service.terminate().await?;
    let ended = service.end().await?;
    let ended = ended.succeeded()?;
    ensure!(!ended.stdout.contains("kettle"), "a password is printed");
    ensure!(ended.stderr.is_empty(), "{}", ended.stderr);

    // Nobody answers, nobody gets in; and whoever is in stays.
    ensure!(log_in(&url, "alice", "kettle").await?.is_none());
    let still = alice.request("$SYS.REQ.USER.INFO", "".into()).await?;
    ensure!(still.payload.len() > 2);
    Ok(())
}

/// An issuer whom the server was never told of says yes to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_issuer_opens_nothing() -> Result<()> {
    let (known, other) = (keys().await?, keys().await?);
    let servers = server(known.path()).await?;
    let url = servers.url("shop")?;
    let issuer = "nats_auth_callout.issuer.seed";
    fs::copy(other.path().join(issuer), known.path().join(issuer))?;
    let mut service = start(&url, known.path(), &["service"])?;
    service.prints("ready:").await?;
    ensure!(log_in(&url, "alice", "kettle").await?.is_none());
    service.prints("service:  yes to alice").await?;
    service.terminate().await?;
    service.end().await?.succeeded()?;

    // And a service with another key does not even get in.
    let mut ended = start(&url, other.path(), &["service"])?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("refuses the service"), "{line}");
    let address = url.trim_start_matches("nats://");
    ended.stderr = ended.stderr.replace(address, "<address>");
    ended.printed_what_the_book_shows("foreign")
}
