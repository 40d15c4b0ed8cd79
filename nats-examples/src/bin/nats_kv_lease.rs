//! Lease: one leader, replaced when it is gone, and harmless when it comes back.
//!
//! Teaches: a key with a time to live is a lease: its holder renews it, and when
//! the holder is gone the lease ends by itself. A holder that was frozen does not
//! know that it was replaced. So each write carries the revision with which its
//! term began, and an older one is refused (a fencing token).
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_kv_lease                    # the whole story
//! cargo run --bin nats_kv_lease unfenced           # the mistake
//! cargo run --bin nats_kv_lease candidate anna     # terminal 1
//! cargo run --bin nats_kv_lease candidate bert     # terminal 2
//! ```
//!
//! Expected output:
//!
//! ```text
//! leader:   anna (token 1)
//! wrote:    anna with token 1
//! waits:    bert, the lease is anna's
//! frozen:   anna, so the lease is not renewed
//! expired:  the lease of anna, after 3 s
//! leader:   bert (token <token>)
//! wrote:    bert with token <token>
//! awake:    anna, and it still believes that it leads
//! refused:  anna with token 1, there is a newer one
//! report:   by bert
//! ```
//!
//! Left out on purpose: a leader for each of many parts, which is a key for each.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Context, ErrorCode,
        context::{
            CreateKeyValueErrorKind, DeleteStreamErrorKind, PublishErrorKind,
        },
        kv::{self, Operation, Store, UpdateErrorKind, Watch},
        message::PublishMessage,
    },
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const BUCKET: &str = "shop_scheduler";
/// The stream in which NATS keeps a bucket has this prefix and the bucket's name.
const STREAM: &str = "KV_shop_scheduler";
const LEADER: &str = "leader";
/// What the leader works on, and nobody else may change.
const REPORT: &str = "report";
const USAGE: &str = "usage: nats_kv_lease [unfenced | candidate NAME]";

/// How long a leader may be silent. In whole seconds; short, to watch it happen.
const LEASE: Duration = Duration::from_secs(3);
/// How often it is renewed: two renewals may fail before the lease ends.
const RENEW: Duration = Duration::from_secs(1);
/// How long the marker of an expired lease stays. It must be no longer than the
/// lease, as the server raises a shorter time to live to it.
const MARKER: Duration = Duration::from_secs(1);
const HISTORY: i64 = 16;
/// How long the story waits for a lease to end.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(true).await,
        ["unfenced"] => story(false).await,
        ["candidate", name] => candidate(name).await,
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

// ---- The lease -------------------------------------------------------------

// ANCHOR: lease
/// The right to lead, for as long as it is renewed.
struct Term {
    name: String,
    /// The revision with which it began. A later term has a higher one.
    token: u64,
    /// The revision of the last renewal.
    revision: u64,
    /// When it ends at the latest, by our clock: counted from before the last
    /// renewal was sent, so it is over here before it is over on the server.
    until: Instant,
}

/// Takes the lease if nobody has it.
async fn claim(bucket: &Bucket, name: &str) -> Result<Option<Term>> {
    let until = Instant::now() + LEASE;
    let free = match bucket.store.entry(LEADER).await? {
        None => 0,
        Some(held) if held.operation == Operation::Put => return Ok(None),
        Some(marker) => marker.revision,
    };
    let taken = write_lease(bucket, name, free).await?;
    Ok(taken.map(|revision| Term {
        name: name.to_owned(),
        token: revision,
        revision,
        until,
    }))
}

/// False if the lease is over, for whatever reason.
async fn renew(bucket: &Bucket, term: &mut Term) -> Result<bool> {
    let until = Instant::now() + LEASE;
    match write_lease(bucket, &term.name, term.revision).await? {
        Some(revision) => {
            (term.revision, term.until) = (revision, until);
            Ok(true)
        }
        None => Ok(false),
    }
}

/// Writes the lease over this very revision, `None` if that is not the last.
///
/// By hand, and not with `create_with_ttl` and `update`: in async-nats 0.51 the
/// one forgets the time to live when it meets a marker, and the other has none,
/// so either would make a lease that never ends.
async fn write_lease(bucket: &Bucket, name: &str, over: u64) -> Result<Option<u64>> {
    let message = PublishMessage::build()
        .payload(name.to_owned().into())
        .ttl(LEASE)
        .expected_last_subject_sequence(over);
    let subject = format!("$KV.{BUCKET}.{LEADER}");
    let jetstream = &bucket.jetstream;
    let written = async {
        match jetstream.send_publish(subject, message).await?.await {
            Ok(stored) => Ok(Some(stored.sequence)),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    };
    timeout(LEASE, written)
        .await
        .context("no answer about the lease before its end")?
}
// ANCHOR_END: lease

// ---- The work of the leader ------------------------------------------------

// ANCHOR: fence
/// Writes the report, unless a leader with a higher token has written before.
async fn write_report(bucket: &Bucket, term: &Term) -> Result<bool> {
    let text = format!("{} {}", term.token, term.name);
    for _attempt in 0..10 {
        let (newest, revision) = match bucket.store.entry(REPORT).await? {
            None => (0, 0),
            Some(report) => (token_of(&report.value)?, report.revision),
        };
        if newest > term.token {
            return Ok(false);
        }
        // Whoever wrote since we looked makes us look again, so that a process
        // may be frozen between these two lines too.
        match bucket
            .store
            .update(REPORT, text.clone().into(), revision)
            .await
        {
            Ok(_revision) => return Ok(true),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {}
            Err(error) => return Err(error).context("cannot write the report"),
        }
    }
    bail!("the report changes all the time; who else writes it?")
}
// ANCHOR_END: fence

/// The mistake, to see what it costs: no look at who has written before.
async fn write_report_unfenced(bucket: &Bucket, term: &Term) -> Result<bool> {
    let text = format!("{} {}", term.token, term.name);
    bucket.store.put(REPORT, text.into()).await?;
    Ok(true)
}

fn token_of(report: &[u8]) -> Result<u64> {
    let text = String::from_utf8_lossy(report);
    let token = text.split(' ').next().unwrap_or_default();
    token
        .parse()
        .with_context(|| format!("the report {text:?} has no token"))
}

// ---- A candidate -----------------------------------------------------------

// ANCHOR: candidate
async fn candidate(name: &str) -> Result<()> {
    let bucket = bucket(&jetstream::new(connect().await?)).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    'terms: loop {
        // The watch first: a lease that ends after we have looked is announced.
        let mut watch = bucket.store.watch(LEADER).await?;
        let mut said = false;
        let mut term = loop {
            if let Some(term) = claim(&bucket, name).await? {
                break term;
            }
            if !said {
                println!("waits:    {name}, Ctrl-C to stop");
                said = true;
            }
            tokio::select! {
                biased;
                () = &mut stop => break 'terms,
                free = free(&mut watch) => free?,
                // In case that the announcement was lost.
                () = sleep(LEASE) => {}
            }
        };
        println!("leader:   {name} (token {}), Ctrl-C to stop", term.token);
        loop {
            // Also asked for here, and not by `renew` alone: after a freeze the
            // time may be over although nobody has taken the lease yet.
            if Instant::now() > term.until || !renew(&bucket, &mut term).await? {
                println!("lost:     {name}, the lease is over");
                break;
            }
            if !write_report(&bucket, &term).await? {
                println!("refused:  {name} with token {}", term.token);
                break;
            }
            tokio::select! {
                biased;
                () = &mut stop => {
                    // The next one need not wait for the lease to end.
                    bucket.store.delete_expect_revision(LEADER, Some(term.revision))
                        .await?;
                    break 'terms;
                }
                () = sleep(RENEW) => {}
            }
        }
    }
    println!("stopped");
    Ok(())
}

/// Returns when the lease was given back or has run out.
async fn free(watch: &mut Watch) -> Result<()> {
    loop {
        let entry = watch.next().await.context("the watch was ended")?;
        match entry {
            Ok(entry) if entry.operation == Operation::Put => {}
            Ok(_marker) => return Ok(()),
            Err(error) => eprintln!("trouble: {error}"),
        }
    }
}
// ANCHOR_END: candidate

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story(fenced: bool) -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // The lease of a run that was killed would have to end first.
    delete_leftovers(&jetstream).await?;
    let bucket = bucket(&jetstream).await?;
    let mut watch = bucket.store.watch(LEADER).await?;

    let anna = claim(&bucket, "anna")
        .await?
        .context("anna came too late")?;
    println!("leader:   anna (token {})", anna.token);
    ensure!(write_report(&bucket, &anna).await?, "anna was refused");
    println!("wrote:    anna with token {}", anna.token);
    if claim(&bucket, "bert").await?.is_some() {
        bail!("there are two leaders");
    }
    println!("waits:    bert, the lease is anna's");

    println!("frozen:   anna, so the lease is not renewed");
    timeout(PATIENCE, free(&mut watch))
        .await
        .context("the lease does not end; does somebody renew it?")??;
    println!("expired:  the lease of anna, after {} s", LEASE.as_secs());
    let bert = claim(&bucket, "bert")
        .await?
        .context("bert came too late")?;
    println!("leader:   bert (token {})", bert.token);
    ensure!(write_report(&bucket, &bert).await?, "bert was refused");
    println!("wrote:    bert with token {}", bert.token);

    println!("awake:    anna, and it still believes that it leads");
    let written = if fenced {
        write_report(&bucket, &anna).await?
    } else {
        write_report_unfenced(&bucket, &anna).await?
    };
    if written {
        println!("wrote:    anna with token {}", anna.token);
    } else {
        println!(
            "refused:  anna with token {}, there is a newer one",
            anna.token
        );
    }
    let report = bucket.store.get(REPORT).await?.context("no report")?;
    let report = String::from_utf8_lossy(&report);
    let by = report.split(' ').nth(1).unwrap_or_default();
    println!("report:   by {by}");
    Ok(())
}
// ANCHOR_END: story

// ---- Bucket and connection -------------------------------------------------

/// The bucket, and what a write with a time to live needs beside it.
struct Bucket {
    jetstream: Context,
    store: Store,
}

async fn bucket(jetstream: &Context) -> Result<Bucket> {
    let config = kv::Config {
        bucket: BUCKET.to_owned(),
        history: HISTORY,
        // Lets a key have a time to live, and tells watchers when it is over.
        limit_markers: Some(MARKER),
        ..kv::Config::default()
    };
    // Changes nothing if it is there with the same settings.
    let store = jetstream.create_key_value(config).await.map_err(
        |error| match error.kind() {
            CreateKeyValueErrorKind::BucketCreate => anyhow!(
                "cannot create the bucket {BUCKET} ({error}); if it was made with \
                 other settings, delete it first"
            ),
            CreateKeyValueErrorKind::LimitMarkersNotSupported => anyhow!(
                "this server is too old for a time to live of keys; it came with \
                 NATS 2.11"
            ),
            _ => anyhow!(
                "JetStream does not answer ({error}); the server needs it: \
                 nats-server -js"
            ),
        },
    )?;
    Ok(Bucket {
        jetstream: jetstream.clone(),
        store,
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
