//! Object store: a file of any size, in chunks, with a digest over the whole.
//!
//! Teaches: a message has a limit (1 MiB by default), an object has none: it is
//! streamed in and out, and never whole in memory. The digest is known when the
//! last chunk has been read, so nothing that was read before may be trusted.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_object_store         # the whole story
//! cargo run --bin nats_object_store put     # one half
//! cargo run --bin nats_object_store get     # the other, again and again
//! ```
//!
//! Expected output:
//!
//! ```text
//! stored:  invoices/2026-11.pdf, 3000000 bytes in 23 chunks
//! digest:  SHA-256=HIgoz0b0X35Y17eOntHnyzfeYrXavHPA0yBMqatsk44=
//! listed:  invoices/2026-11.pdf, 3000000 bytes
//! fetched: 3000000 bytes, digest right, as <file>
//! missing: invoices/2026-12.pdf (object not found)
//! ```
//!
//! Left out on purpose: replicas (`num_replicas`, in a cluster), an age for all
//! objects (`max_age`), links from one name to another.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self,
        object_store::{self, GetErrorKind, ObjectMetadata, ObjectStore},
    },
};
use futures_lite::StreamExt as _;
use tokio::{
    fs::{self, File},
    io::{AsyncWriteExt as _, BufWriter},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const BUCKET: &str = "shop_invoices";
const INVOICE: &str = "invoices/2026-11.pdf";
const NEXT_INVOICE: &str = "invoices/2026-12.pdf";
const USAGE: &str = "usage: nats_object_store [put | get]";
const LINES: usize = 100_000;

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["put"] => put().await,
        ["get"] => get().await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story() -> Result<()> {
    let invoices = bucket().await?;
    store(&invoices).await?;
    list(&invoices).await?;
    fetch(&invoices).await?;
    match invoices.get(NEXT_INVOICE).await {
        Err(error) if error.kind() == GetErrorKind::NotFound => {
            println!("missing: {NEXT_INVOICE} ({error})");
            Ok(())
        }
        Err(error) => Err(error).context(format!("cannot ask for {NEXT_INVOICE}")),
        Ok(_object) => bail!("{NEXT_INVOICE} is there; who stored it?"),
    }
}

async fn put() -> Result<()> {
    store(&bucket().await?).await
}

async fn get() -> Result<()> {
    fetch(&bucket().await?).await
}

// ANCHOR: store
async fn store(invoices: &ObjectStore) -> Result<()> {
    let file = own_file("to-store");
    write_invoice(&file).await?;
    let meta = ObjectMetadata {
        name: INVOICE.to_owned(),
        description: Some("what the shop sold in November".to_owned()),
        ..ObjectMetadata::default()
    };
    let mut reader = File::open(&file).await?;
    // Reads a chunk, publishes it, waits for its acknowledgement, reads the next.
    // The name points at the new object once the last chunk is stored; a
    // program that dies before leaves the old one as it is.
    let stored = invoices.put(meta, &mut reader).await?;
    fs::remove_file(&file).await?;
    println!(
        "stored:  {}, {} bytes in {} chunks",
        stored.name, stored.size, stored.chunks
    );
    println!("digest:  {}", stored.digest.unwrap_or_default());
    Ok(())
}
// ANCHOR_END: store

async fn list(invoices: &ObjectStore) -> Result<()> {
    let mut objects: Vec<_> = invoices.list().await?.try_collect().await?;
    objects.sort_by(|a, b| a.name.cmp(&b.name));
    for object in objects {
        println!("listed:  {}, {} bytes", object.name, object.size);
    }
    Ok(())
}

// ANCHOR: fetch
async fn fetch(invoices: &ObjectStore) -> Result<()> {
    let mut object = invoices.get(INVOICE).await.map_err(|error| {
        anyhow!("cannot get {INVOICE} ({error}); store it first: put")
    })?;
    let part = own_file("part");
    let whole = env::temp_dir().join("invoice-2026-11.pdf");
    let mut file = File::create(&part).await?;
    let copied = tokio::io::copy(&mut object, &mut file).await;
    let flushed = file.sync_all().await;
    match copied.and_then(|bytes| flushed.map(|()| bytes)) {
        Ok(bytes) => {
            // Only now does the file get the name by which others know it: the
            // last chunk was read, and with it the digest was compared.
            fs::rename(&part, &whole).await?;
            println!(
                "fetched: {bytes} bytes, digest right, as {}",
                whole.display()
            );
            Ok(())
        }
        Err(error) => {
            fs::remove_file(&part).await?;
            if error.kind() == io::ErrorKind::InvalidData {
                bail!("{INVOICE} is damaged ({error}), nothing was kept of it")
            }
            Err(error).context(format!("cannot fetch {INVOICE}"))
        }
    }
}
// ANCHOR_END: fetch

/// Stands in for a program that makes invoices: thirty bytes a line.
async fn write_invoice(file: &Path) -> Result<()> {
    let mut file = BufWriter::new(File::create(file).await?);
    for line in 0..LINES {
        let line = format!("{line:>8} mug, white      3.50\n");
        file.write_all(line.as_bytes()).await?;
    }
    file.flush().await?;
    Ok(())
}

/// A file that no other run uses.
fn own_file(what: &str) -> PathBuf {
    let process = std::process::id();
    env::temp_dir().join(format!("nats_object_store-{process}.{what}"))
}

// ANCHOR: bucket
async fn bucket() -> Result<ObjectStore> {
    let config = object_store::Config {
        bucket: BUCKET.to_owned(),
        description: Some("invoices of the shop".to_owned()),
        ..object_store::Config::default()
    };
    // Changes nothing if it is there with the same settings.
    jetstream::new(connect().await?)
        .create_object_store(config)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot open the bucket {BUCKET} ({error}); the server needs \
                 JetStream (nats-server -js), and a bucket that was made with \
                 other settings has to be deleted first"
            )
        })
}
// ANCHOR_END: bucket

async fn connect() -> Result<Client> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    async_nats::connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })
}
