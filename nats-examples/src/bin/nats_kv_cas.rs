//! Compare and set: fifty buyers, thirty pieces, nobody gets one that is not there.
//!
//! Teaches: `create` writes a key only where there is none, and `update` only
//! over the revision that was read. Who was overtaken reads again and decides
//! again. `put` asks for no revision, so it overwrites what another has decided.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_kv_cas           # the whole story
//! cargo run --bin nats_kv_cas put       # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! created:   mug = 30
//! refused:   mug is there already, so a second create changes nothing
//! buyers:    50 at the same moment, 1 piece each
//! sold:      30
//! sold out:  20 buyers were told so
//! left:      0
//! overtaken: <times> times a buyer had to read and decide again
//! ```
//!
//! Left out on purpose: two keys that must change together. A bucket has no
//! transactions; put what belongs together into one value.

use std::{env, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self, Context, ErrorCode,
        context::{CreateKeyValueErrorKind, DeleteStreamErrorKind},
        kv::{self, CreateErrorKind, Entry, Store, UpdateErrorKind},
    },
};
use tokio::{sync::Barrier, task::JoinSet};

const DEFAULT_URL: &str = "nats://localhost:4222";
const BUCKET: &str = "shop_stock";
/// The stream in which NATS keeps a bucket has this prefix and the bucket's name.
const STREAM: &str = "KV_shop_stock";
const KEY: &str = "mug";
const USAGE: &str = "usage: nats_kv_cas [put]";

/// As many revisions as a bucket can keep, to look at afterwards.
const HISTORY: i64 = 64;
const PIECES: u32 = 30;
const BUYERS: usize = 50;

/// How often a buyer reads and decides again. Each time somebody else has
/// bought, so with fewer pieces than this the limit is never reached.
const ATTEMPTS: u32 = 100;

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story(Write::Compare).await,
        ["put"] => story(Write::Put).await,
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    Compare,
    /// The mistake, to see what it costs.
    Put,
}

// ANCHOR: story
async fn story(write: Write) -> Result<()> {
    let jetstream = jetstream::new(connect().await?);
    // What an earlier run has sold is not sold today.
    delete_leftovers(&jetstream).await?;
    let stock = bucket(&jetstream).await?;
    create(&stock).await?;

    println!("buyers:    {BUYERS} at the same moment, 1 piece each");
    // All have read the stock before the first writes. Without this the buyers
    // would now and then be lucky, and the mistake would go unseen.
    let all_have_read = Arc::new(Barrier::new(BUYERS));
    let mut buyers = JoinSet::new();
    for _buyer in 0..BUYERS {
        let stock = stock.clone();
        let all_have_read = Arc::clone(&all_have_read);
        buyers.spawn(async move {
            let seen = read(&stock).await;
            // Also after an error: the others wait for this buyer.
            all_have_read.wait().await;
            match write {
                Write::Compare => buy(&stock, seen?).await,
                Write::Put => buy_with_put(&stock, seen?).await,
            }
        });
    }

    let (mut sold, mut sold_out, mut overtaken) = (0, 0, 0);
    while let Some(bought) = buyers.join_next().await {
        let bought = bought??;
        sold += u32::from(bought.piece);
        sold_out += u32::from(!bought.piece);
        overtaken += bought.overtaken;
    }
    let (left, _revision) = read(&stock).await?;
    println!("sold:      {sold}");
    println!("sold out:  {sold_out} buyers were told so");
    println!("left:      {left}");
    println!("overtaken: {overtaken} times a buyer had to read and decide again");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: create
async fn create(stock: &Store) -> Result<()> {
    let pieces = PIECES.to_string();
    stock
        .create(KEY, pieces.clone().into())
        .await
        .context("cannot create the stock; is another run going on?")?;
    println!("created:   {KEY} = {PIECES}");
    match stock.create(KEY, pieces.into()).await {
        Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
            println!(
                "refused:   {KEY} is there already, so a second create changes \
                 nothing"
            );
            Ok(())
        }
        Err(error) => Err(error).context("cannot ask for the stock"),
        Ok(revision) => bail!("{KEY} was created twice, revision {revision}"),
    }
}
// ANCHOR_END: create

struct Bought {
    piece: bool,
    overtaken: u32,
}

// ANCHOR: buy
async fn buy(stock: &Store, mut seen: (u32, u64)) -> Result<Bought> {
    for overtaken in 0..ATTEMPTS {
        let (left, revision) = seen;
        let Some(rest) = left.checked_sub(1) else {
            return Ok(Bought {
                piece: false,
                overtaken,
            });
        };
        match stock.update(KEY, rest.to_string().into(), revision).await {
            Ok(_revision) => {
                return Ok(Bought {
                    piece: true,
                    overtaken,
                });
            }
            // Somebody bought after we had read. What is left now, and whether
            // we still want it, has to be decided on what is there now.
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                seen = read(stock).await?;
            }
            // A time-out too: the write may have been stored, and a second one
            // could sell two pieces to one buyer.
            Err(error) => return Err(error).context("cannot tell if it is sold"),
        }
    }
    bail!("overtaken {ATTEMPTS} times, gave up")
}
// ANCHOR_END: buy

// ANCHOR: put
async fn buy_with_put(
    stock: &Store,
    (left, _revision): (u32, u64),
) -> Result<Bought> {
    let rest = left.checked_sub(1);
    if let Some(rest) = rest {
        stock.put(KEY, rest.to_string().into()).await?;
    }
    Ok(Bought {
        piece: rest.is_some(),
        overtaken: 0,
    })
}
// ANCHOR_END: put

/// How many pieces are left, and the revision that says so.
async fn read(stock: &Store) -> Result<(u32, u64)> {
    let Entry {
        value, revision, ..
    } = stock.entry(KEY).await?.context("the stock is gone")?;
    let left = std::str::from_utf8(&value)?
        .parse()
        .with_context(|| format!("the stock of {KEY} is not a number"))?;
    Ok((left, revision))
}

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
