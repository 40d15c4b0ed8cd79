//! What an account has signed opens, for its time and within its permissions.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use tests::{
    Example,
    example::Ended,
    nats::{Server, Servers},
};

const JWT: &str = env!("CARGO_BIN_EXE_nats_jwt");

/// The configuration that a reader starts a server with.
const CONFIG: &str = include_str!("../../nats-examples/config/nats_jwt.conf");

async fn run(url: &str, keys: &Path, words: &[&str]) -> Result<Ended> {
    let keys = keys.to_string_lossy();
    let variables = [("NATS_URL", url), ("NATS_GENERATED", &keys)];
    Example::start_with(JWT, words, &variables)?.end().await
}

/// A folder with an account of an operator, and the account's seed.
async fn keys() -> Result<(TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let ended = run("nats://localhost:1", folder.path(), &["setup"]).await?;
    let ended = ended.succeeded()?;
    let seed = fs::read_to_string(folder.path().join("nats_jwt.account.seed"))?;
    ensure!(seed.starts_with("SA"), "no seed of an account");
    ensure!(!ended.stdout.contains(&seed), "setup prints the seed");
    Ok((folder, seed))
}

async fn server(keys: &Path) -> Result<Servers> {
    let signed = fs::read(keys.join("nats_jwt.conf"))?;
    let [port] = Servers::ports()?;
    let (name, config) = ("shop", CONFIG.to_owned());
    let files = [("generated/nats_jwt.conf".to_owned(), signed)];
    Servers::start(&[Server { name, config, port }], &files).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issued_user_opens_within_its_permissions_and_its_time() -> Result<()> {
    let (folder, seed) = keys().await?;
    let servers = server(folder.path()).await?;
    let ended = run(&servers.url("shop")?, folder.path(), &[]).await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    // What the server itself has noted of the three whom it did not oblige.
    let log = servers.log("shop").await?;
    let noted = |words: &[&str]| {
        log.lines()
            .any(|line| words.iter().all(|word| line.contains(word)))
    };
    ensure!(noted(&["Publish Violation", "jwt.billing.refund"]), "{log}");
    let refusals = log.matches("authentication error").count();
    ensure!(refusals == 2, "{refusals} refusals: {log}");
    ensure!(!log.contains(&seed), "the server knows the account's seed");
    ensure!(
        !fs::read_to_string(folder.path().join("nats_jwt.conf"))?.contains(&seed)
    );
    Ok(())
}

/// A complete set, by an operator whom this server was never told of.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_of_another_operator_is_refused() -> Result<()> {
    let (known, _) = keys().await?;
    let (other, seed) = keys().await?;
    let mut servers = server(known.path()).await?;
    let mut ended = run(&servers.url("shop")?, other.path(), &[]).await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.contains("refuses alice; does it know the account?"),
        "{line}"
    );
    ensure!(!line.contains(&seed), "the error shows the seed");
    ensure!(!ended.stdout.contains("allowed"), "{}", ended.stdout);
    let url = servers.url("shop")?;
    let address = url.trim_start_matches("nats://");
    ended.stderr = ended.stderr.replace(address, "<address>");
    ended.printed_what_the_book_shows("foreign")?;

    // The control: the same account, with the server of its operator.
    servers.kill("shop").await?;
    let signed = fs::read(other.path().join("nats_jwt.conf"))?;
    servers.write("generated/nats_jwt.conf", &signed).await?;
    servers.restart("shop").await?;
    run(&url, other.path(), &[]).await?.succeeded()?;
    Ok(())
}
