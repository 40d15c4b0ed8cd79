//! Watch: what a bucket holds now, and each change after it.
//!
//! Teaches: `watch_with_history` gives the current value of each key first and
//! the changes then, without a gap between them; `watch` gives the changes
//! alone. A deleted key comes as an operation, not as an empty value. After a
//! lost connection the watch goes on where it was.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_kv_watch             # the whole story
//! cargo run --bin nats_kv_watch watcher     # watch until Ctrl-C
//! ```
//!
//! Expected output:
//!
//! ```text
//! flag:    dark-mode = on
//! flag:    new-checkout = off
//! current: all flags are known, from here on it is changes
//! flag:    new-checkout = on
//! flag:    gift-cards = on
//! flag:    dark-mode is off, its key was deleted
//! flag:    gift-cards is off, its key was purged
//! ```
//!
//! Left out on purpose: what a program does with a flag while it cannot reach
//! the server. This one would go on with the last values it knows.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Context, ErrorCode,
        context::{CreateKeyValueErrorKind, DeleteStreamErrorKind},
        kv::{self, Entry, Operation, Store, Watch},
    },
};
use futures_lite::StreamExt as _;
use tokio::{sync::Notify, time::timeout};

const DEFAULT_URL: &str = "nats://localhost:4222";
const BUCKET: &str = "shop_flags";
/// The stream in which NATS keeps a bucket has this prefix and the bucket's name.
const STREAM: &str = "KV_shop_flags";
const USAGE: &str = "usage: nats_kv_watch [watcher]";

/// With a history of 1, a watcher that was away gets the last of several changes
/// of a key and not those between.
const HISTORY: i64 = 16;

/// How long the story waits for a change that it has made.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["watcher"] => watcher().await,
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

// ANCHOR: story
async fn story() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // Flags that an earlier run or a visitor left would come up in this one.
    delete_leftovers(&jetstream).await?;
    let flags = bucket(&jetstream).await?;
    flags.put("dark-mode", "on".into()).await?;
    flags.put("new-checkout", "off".into()).await?;

    // All keys. A part of them: `watch_with_history("checkout.>")`, and
    // `watch_many_with_history` for several such patterns.
    let mut watch = flags.watch_with_history(">").await?;
    let mut view = View::default();
    for _current in 0..2 {
        view.show(&next(&mut watch).await?);
    }

    flags.put("new-checkout", "on".into()).await?;
    flags.put("gift-cards", "on".into()).await?;
    flags.delete("dark-mode").await?;
    flags.purge("gift-cards").await?;
    for _change in 0..4 {
        view.show(&next(&mut watch).await?);
    }
    Ok(())
}

async fn next(watch: &mut Watch) -> Result<Entry> {
    let entry = timeout(PATIENCE, watch.next())
        .await
        .context("no change within 5 s; may this user create consumers?")?
        .context("the server ended the watch")??;
    Ok(entry)
}
// ANCHOR_END: story

// ANCHOR: watcher
async fn watcher() -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    let flags = bucket(&jetstream).await?;
    let mut watch = flags.watch_with_history(">").await?;
    let mut view = View::default();

    let stop = stop_signal()?;
    tokio::pin!(stop);
    println!("watching {BUCKET}, Ctrl-C to stop");
    loop {
        let entry = tokio::select! {
            biased;
            () = &mut stop => break,
            entry = watch.next() => entry,
        };
        match entry.context("the server ended the watch")? {
            Ok(entry) => view.show(&entry),
            // The client makes the watch anew, from the revision that came last,
            // and goes on.
            Err(error) => eprintln!("trouble: {error}"),
        }
    }
    println!("stopped");
    Ok(())
}
// ANCHOR_END: watcher

// ANCHOR: view
#[derive(Default)]
struct View {
    current: bool,
}

impl View {
    fn show(&mut self, entry: &Entry) {
        let flag = &entry.key;
        match entry.operation {
            Operation::Put => {
                let value = String::from_utf8_lossy(&entry.value);
                println!("flag:    {flag} = {value}");
            }
            // No value comes with these two. A program that reads the value all
            // the same takes a deleted flag for one that is set to "".
            Operation::Delete => {
                println!("flag:    {flag} is off, its key was deleted");
            }
            Operation::Purge => {
                println!("flag:    {flag} is off, its key was purged");
            }
        }
        if entry.seen_current && !self.current {
            self.current = true;
            println!("current: all flags are known, from here on it is changes");
        }
    }
}
// ANCHOR_END: view

async fn bucket(jetstream: &Context) -> Result<Store> {
    let config = kv::Config {
        bucket: BUCKET.to_owned(),
        history: HISTORY,
        ..kv::Config::default()
    };
    // Changes nothing if it is there with the same settings.
    jetstream
        .create_key_value(config)
        .await
        .map_err(|error| match error.kind() {
            CreateKeyValueErrorKind::BucketCreate => anyhow!(
                "cannot create the bucket {BUCKET} ({error}); if it was made with \
                 other settings, delete it first"
            ),
            _ => anyhow!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
        })
}

async fn delete_leftovers(jetstream: &Context) -> Result<()> {
    match jetstream.delete_stream(STREAM).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => bail!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
        },
    }
}

// ANCHOR: stop
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
// ANCHOR_END: stop

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
