//! A key that the server knows opens, another does not, and the seed stays where
//! it is.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use nkeys::KeyPair;
use tempfile::TempDir;
use tests::{
    Example,
    example::Ended,
    nats::{Server, Servers},
    wait,
};

const NKEY: &str = env!("CARGO_BIN_EXE_nats_nkey");

/// The configuration that a reader starts a server with.
const CONFIG: &str = include_str!("../../nats-examples/config/nats_nkey.conf");

async fn run(url: &str, keys: &Path, words: &[&str]) -> Result<Ended> {
    let keys = keys.to_string_lossy();
    let variables = [("NATS_URL", url), ("NATS_GENERATED", &keys)];
    Example::start_with(NKEY, words, &variables)?.end().await
}

/// A folder with keys, and its seed.
async fn keys() -> Result<(TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let ended = run("nats://localhost:1", folder.path(), &["setup"]).await?;
    let ended = ended.succeeded()?;
    let seed = fs::read_to_string(folder.path().join("nats_nkey.seed"))?;
    ensure!(seed.starts_with("SU"), "no seed of a user");
    ensure!(!ended.stdout.contains(&seed), "setup prints the seed");
    let public = KeyPair::from_seed(&seed)?.public_key();
    ensure!(ended.stdout.contains(&public), "{}", ended.stdout);
    Ok((folder, seed))
}

async fn server(keys: &Path) -> Result<Servers> {
    let public = fs::read(keys.join("nats_nkey.conf"))?;
    let [port] = Servers::ports()?;
    let (name, config) = ("shop", CONFIG.to_owned());
    let files = [("generated/nats_nkey.conf".to_owned(), public)];
    Servers::start(&[Server { name, config, port }], &files).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_key_opens_and_its_seed_is_seen_nowhere() -> Result<()> {
    let (folder, seed) = keys().await?;
    let servers = server(folder.path()).await?;
    let url = servers.url("shop")?;
    let ended = run(&url, folder.path(), &[]).await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    let public = KeyPair::from_seed(&seed)?.public_key();
    let known = format!("known as: {public}, by its signature");
    ensure!(ended.stdout.contains(&known), "{}", ended.stdout);
    ensure!(!ended.stdout.contains(&seed), "the example prints the seed");
    // The stranger of the story, whom the server's own log tells of.
    let stranger = ended
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("refused:  ")?.split(',').next())
        .context("no stranger")?;
    let log = servers.log("shop").await?;
    ensure!(log.contains(stranger), "{stranger} is not in: {log}");
    ensure!(!log.contains(&seed), "the server logs the seed");
    Ok(())
}

/// The other half: a complete set of keys, made in the same way, which this
/// server was never told of.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_server_is_refused() -> Result<()> {
    let (known, _) = keys().await?;
    let (other, seed) = keys().await?;
    let servers = server(known.path()).await?;
    let ended = run(&servers.url("shop")?, other.path(), &[]).await?;
    let public = KeyPair::from_seed(&seed)?.public_key();
    let line = ended.one_line_error()?;
    ensure!(line.contains(&format!("refuses {public}")), "{line}");
    ensure!(!line.contains(&seed), "the error shows the seed");
    ensure!(!ended.stdout.contains("allowed"), "{}", ended.stdout);

    // The control: told of it, without a new start, the same server lets it in.
    let public = fs::read(other.path().join("nats_nkey.conf"))?;
    servers.write("generated/nats_nkey.conf", &public).await?;
    servers.signal("shop", "HUP").await?;
    wait::until("the new key", async || {
        let url = servers.url("shop")?;
        run(&url, other.path(), &[]).await?.succeeded()
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_without_a_seed_is_named_and_not_shown() -> Result<()> {
    let (folder, seed) = keys().await?;
    let servers = server(folder.path()).await?;
    let path = folder.path().join("nats_nkey.seed");
    let broken = &seed[..seed.len() - 1];
    fs::write(&path, broken)?;
    let ended = run(&servers.url("shop")?, folder.path(), &[]).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("holds no seed"), "{line}");
    ensure!(!line.contains(broken), "the error shows the seed");

    fs::remove_file(&path)?;
    let mut ended = run(&servers.url("shop")?, folder.path(), &[]).await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.contains("cargo run --bin nats_nkey -- setup"),
        "{line}"
    );
    // Stranger and folder are others on each run.
    let words: Vec<_> = ended.stdout.split(' ').filter(|w| w.len() > 50).collect();
    let stranger = words.first().context("no stranger")?.trim_end_matches(',');
    ended.stdout = ended.stdout.replace(stranger, "<key>");
    let shown = folder.path().to_string_lossy().into_owned();
    let usual = "nats-examples/config/generated";
    ended.stderr = ended.stderr.replace(&shown, usual);
    ended.printed_what_the_book_shows("nowhere")
}

#[cfg(unix)]
#[tokio::test]
async fn setup_keeps_a_key_that_is_there_and_closes_it_to_others() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    let (folder, seed) = keys().await?;
    let path = folder.path().join("nats_nkey.seed");
    assert_eq!(path.metadata()?.permissions().mode() & 0o077, 0);
    run("", folder.path(), &["setup"]).await?.succeeded()?;
    ensure!(fs::read_to_string(path)? == seed, "setup made another key");
    Ok(())
}
