//! Many replies: one question, and a rule for when enough have answered.
//!
//! Teaches: `request` returns the first answer and drops the rest. For several,
//! subscribe to an inbox of your own and decide when to stop: by their number,
//! at a deadline, or when none has come for a while. Each rule has its price.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_request_many
//! cargo run --bin nats_request_many one-group    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! nobody:      no responders, known at once
//! providers:   3 on quotes.shipping, one of them slow
//! by request:  1 quote
//! by count:    3 quotes: ship 4, bike 9, drone 12 (enough)
//! by deadline: 2 quotes: bike 9, drone 12 (the deadline)
//! by gap:      2 quotes: bike 9, drone 12 (none for a while)
//! ```
//!
//! Left out on purpose: knowing who has not answered. The server does not know
//! how many listen; an asker that must know keeps a list of its own.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{Client, ConnectErrorKind, ServerAddr, StatusCode, Subscriber};
use futures_lite::StreamExt as _;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "quotes.shipping";
const GROUP: &str = "providers";
const USAGE: &str = "usage: nats_request_many [one-group]";

/// Each provider with its price and the time that it takes to find it.
const PROVIDERS: [(&str, u32, Duration); 3] = [
    ("drone", 12, Duration::ZERO),
    ("bike", 9, Duration::ZERO),
    ("ship", 4, Duration::from_secs(3)),
];

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["one-group"] => one_group().await,
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

// ANCHOR: rules
/// When to stop. The deadline is always there: a provider may never answer.
#[derive(Clone, Copy)]
struct Rule {
    count: usize,
    deadline: Duration,
    gap: Duration,
}

const BY_COUNT: Rule = Rule {
    count: 3,
    deadline: Duration::from_secs(8),
    gap: Duration::MAX,
};
const BY_DEADLINE: Rule = Rule {
    count: usize::MAX,
    deadline: Duration::from_millis(1500),
    gap: Duration::MAX,
};
const BY_GAP: Rule = Rule {
    count: usize::MAX,
    deadline: Duration::from_secs(8),
    gap: Duration::from_millis(1500),
};
// ANCHOR_END: rules

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    match ask(&client, BY_COUNT).await? {
        None => println!("nobody:      no responders, known at once"),
        Some(_quotes) => println!("nobody:      other providers are there already"),
    }

    // Dropped at the end, it ends the providers.
    let mut providers = JoinSet::new();
    for provider in PROVIDERS {
        let requests = client.subscribe(SUBJECT).await?;
        providers.spawn(provide(client.clone(), requests, provider));
    }
    println!(
        "providers:   {} on {SUBJECT}, one of them slow",
        PROVIDERS.len()
    );

    let _first = client.request(SUBJECT, "parcel".into()).await?;
    println!("by request:  1 quote");
    for (name, rule) in [
        ("by count:", BY_COUNT),
        ("by deadline:", BY_DEADLINE),
        ("by gap:", BY_GAP),
    ] {
        let mut quotes = ask(&client, rule).await?.context("no provider left")?;
        quotes.offers.sort_by_key(|&(_, price)| price);
        let offers: Vec<String> = quotes
            .offers
            .iter()
            .map(|(provider, price)| format!("{provider} {price}"))
            .collect();
        let (offers, count) = (offers.join(", "), offers.len());
        println!("{name:<12} {count} quotes: {offers} ({})", quotes.end);
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// The mistake: providers that share a group share the questions too.
async fn one_group() -> Result<()> {
    let client = connect().await?;
    let mut providers = JoinSet::new();
    for provider in PROVIDERS {
        let requests = client.queue_subscribe(SUBJECT, GROUP.into()).await?;
        providers.spawn(provide(client.clone(), requests, provider));
    }
    let quotes = ask(&client, BY_COUNT).await?.context("no provider")?;
    let count = quotes.offers.len();
    println!("by count:    {count} of 3 quotes ({})", quotes.end);
    client.drain().await?;
    Ok(())
}

struct Quotes {
    offers: Vec<(String, u32)>,
    end: &'static str,
}

// ANCHOR: ask
/// The quotes that the rule lets in, or `None` when nobody listens.
async fn ask(client: &Client, rule: Rule) -> Result<Option<Quotes>> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply(SUBJECT, inbox, "parcel".into())
        .await?;

    let deadline = Instant::now() + rule.deadline;
    let mut offers = Vec::new();
    let end = loop {
        if offers.len() == rule.count {
            break "enough";
        }
        // The gap begins anew with each answer, the deadline does not.
        let until = match Instant::now().checked_add(rule.gap) {
            Some(gap) if gap < deadline => gap,
            _ => deadline,
        };
        let answer = match timeout_at(until, answers.next()).await {
            Ok(Some(answer)) => answer,
            Ok(None) => bail!("the server ended the inbox"),
            Err(_elapsed) if until < deadline => break "none for a while",
            Err(_elapsed) => break "the deadline",
        };
        // Not an answer but the server's word that nobody got the question.
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Ok(None);
        }
        // An answer that cannot be read is no offer, and not the end of all.
        offers.extend(offer(&answer.payload));
    };
    // Dropping `answers` would do it too. What comes later is for nobody, and
    // the server drops it.
    answers.unsubscribe().await?;
    Ok(Some(Quotes { offers, end }))
}
// ANCHOR_END: ask

fn offer(payload: &[u8]) -> Option<(String, u32)> {
    let text = std::str::from_utf8(payload).ok()?;
    let (provider, price) = text.split_once(' ')?;
    Some((provider.to_owned(), price.parse().ok()?))
}

// ANCHOR: provide
async fn provide(
    client: Client,
    mut requests: Subscriber,
    (name, price, takes): (&'static str, u32, Duration),
) {
    // Several questions may be open at the slow one.
    let mut open = JoinSet::new();
    while let Some(request) = requests.next().await {
        let Some(reply_to) = request.reply else {
            continue;
        };
        let client = client.clone();
        open.spawn(async move {
            sleep(takes).await;
            let quote = format!("{name} {price}");
            // The asker may have gone, and the connection with it.
            let _ = client.publish(reply_to, quote.into()).await;
        });
    }
}
// ANCHOR_END: provide

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
