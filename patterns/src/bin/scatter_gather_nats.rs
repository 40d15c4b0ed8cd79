//! Scatter and gather: three carriers are asked, and the cheapest in time is taken.
//!
//! Teaches: a question is published once, and each subscriber gets it. The answers come
//! to an inbox made for this one question, so a late one goes to an inbox that nobody
//! has any more. The asker stops at its deadline, or when as many have answered as it
//! knows of. Where nobody listens at all NATS says so at once.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin scatter_gather_nats                            # the whole story
//! cargo run --bin scatter_gather_nats carrier swift 790          # terminal 1
//! cargo run --bin scatter_gather_nats carrier snail 390 --slow   # terminal 2
//! cargo run --bin scatter_gather_nats carrier nope 500 --refuses # or --garbled, --twice
//! cargo run --bin scatter_gather_nats ask 2                      # 2 kg, by the deadline
//! cargo run --bin scatter_gather_nats ask 2 10000                # within 10 s
//! cargo run --bin scatter_gather_nats ask 2 10000 --first        # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! ready:    3 carriers on shipping.offers
//! asked:    2 kg, within 2500 ms
//! answered: 2 of 3, by the deadline: nope no, swift 1580
//! taken:    swift for 1580 cents
//! asked:    3 kg, within 10000 ms
//! answered: 3 of 3, before the deadline: nope no, snail 1170, swift 2370
//! taken:    snail for 1170 cents
//! asked:    4 kg, within 500 ms
//! answered: 0 of 3, nobody listens
//! none:     no offer
//! ```
//!
//! Left out on purpose: several questions at a time in one carrier, and a carrier with
//! several instances, which would be a queue group of its own. Other rules for the end
//! are in nats_request_many.

use std::{
    env,
    future::Future,
    num::NonZeroU32,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, HeaderMap, Message, Request,
    RequestErrorKind, ServerAddr, StatusCode,
};
use futures_lite::StreamExt as _;
use patterns::scatter_gather::{
    Carrier, DEADLINE, End, Gather, Question, Reply, Taken,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "shipping.offers";
/// The header that says whose answer it is.
const CARRIER: &str = "carrier";
const USAGE: &str = "usage: scatter_gather_nats \
    [carrier NAME CENTS [--slow | --refuses | --garbled | --twice] \
    | ask KILOGRAMS [DEADLINE_MS] [--first]]";

/// How long NATS may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The carriers of the story, with their cents for each kilogram.
const STORY: [&[&str]; 3] = [
    &["swift", "790"],
    &["snail", "390", "--slow"],
    &["nope", "500", "--refuses"],
];

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["carrier", ref carrier @ ..] => match Carrier::parse(carrier) {
            Some(carrier) => carrier_until_stopped(&carrier).await,
            None => return usage(),
        },
        ["ask", ref words @ ..] => match to_ask(words) {
            Some((weight, deadline, rule)) => ask_once(weight, deadline, rule).await,
            None => return usage(),
        },
        _ => return usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// When the asker stops before its deadline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    AllHaveAnswered,
    /// The mistake: who is first is seldom the cheapest.
    FirstOffer,
}

/// Weight, deadline and rule from the words behind `ask`, if they are right.
fn to_ask(words: &[&str]) -> Option<(NonZeroU32, Duration, Rule)> {
    let (words, rule) = match words {
        [words @ .., "--first"] => (words, Rule::FirstOffer),
        words => (words, Rule::AllHaveAnswered),
    };
    let (weight, deadline) = match words {
        [weight] => (weight, DEADLINE),
        [weight, deadline] => {
            let deadline: NonZeroU32 = deadline.parse().ok()?;
            (weight, Duration::from_millis(deadline.get().into()))
        }
        _ => return None,
    };
    Some((weight.parse().ok()?, deadline, rule))
}

// ---- Carrier ---------------------------------------------------------------

async fn carrier_until_stopped(carrier: &Carrier) -> Result<()> {
    let stop = stop_signal()?;
    serve(carrier, |line| println!("{line}"), stop).await?;
    println!("stopped");
    Ok(())
}

// ANCHOR: carrier
async fn serve(
    carrier: &Carrier,
    say: impl Fn(String),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let client = connect().await?;
    let mut questions = client.subscribe(SUBJECT).await?;
    known(&client).await?;
    say(format!("ready:    {} on {SUBJECT}", carrier.name));
    tokio::pin!(stop);
    loop {
        let question = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            question = questions.next() => question,
        };
        let question = question.context("NATS ended the subscription")?;
        answer(&client, carrier, &question, &say).await?;
    }
    questions.unsubscribe().await?;
    // What is sent goes out, and NATS knows that nobody listens here any more.
    known(&client).await?;
    client.drain().await?;
    Ok(())
}

async fn answer(
    client: &Client,
    carrier: &Carrier,
    question: &Message,
    say: &impl Fn(String),
) -> Result<()> {
    let Some(inbox) = question.reply.clone() else {
        say("skipped:  nobody wants an answer".to_owned());
        return Ok(());
    };
    let Some(work) = carrier.work(&question.payload, SystemTime::now())? else {
        say("skipped:  nobody waits any more".to_owned());
        return Ok(());
    };
    say(format!("asked:    {}", work.asked));
    sleep(work.takes).await;
    for reply in work.replies {
        let mut headers = HeaderMap::new();
        headers.insert(CARRIER, carrier.name.as_str());
        client
            .publish_with_headers(inbox.clone(), headers, reply.into())
            .await?;
    }
    say(format!("answered: {}", work.asked));
    Ok(())
}
// ANCHOR_END: carrier

/// Returns when the server knows of what this connection has subscribed to, or no more:
/// it reads a connection in order, and answers this at once. A flush only writes.
async fn known(client: &Client) -> Result<()> {
    let question = Request::new().timeout(Some(PATIENCE));
    match client.send_request("nobody.listens.here", question).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(()),
        Err(error) if error.kind() == RequestErrorKind::TimedOut => {
            bail!("no answer from NATS within {PATIENCE:?}")
        }
        other => bail!("NATS does not say that nobody listens: {other:?}"),
    }
}

// ---- Asker -----------------------------------------------------------------

async fn ask_once(weight: NonZeroU32, deadline: Duration, rule: Rule) -> Result<()> {
    let client = connect().await?;
    ask(&client, weight, deadline, rule).await?;
    client.drain().await?;
    Ok(())
}

// ANCHOR: ask
/// Asks all, and says who has answered and whose offer is taken.
async fn ask(
    client: &Client,
    weight: NonZeroU32,
    patience: Duration,
    rule: Rule,
) -> Result<()> {
    println!("asked:    {weight} kg, within {} ms", patience.as_millis());
    let deadline = Instant::now() + patience;
    let question = Question::new(weight, patience, SystemTime::now());
    // One for each question: its name is the correlation id.
    let inbox = client.new_inbox();
    let mut gather = Gather::new(&inbox);
    let mut replies = client.subscribe(inbox.clone()).await?;
    let payload = serde_json::to_vec(&question)?;
    client
        .publish_with_reply(SUBJECT, inbox, payload.into())
        .await?;

    let end = loop {
        if gather.is_complete() {
            break End::Complete;
        }
        if rule == Rule::FirstOffer && gather.best().is_some() {
            break End::First;
        }
        let reply = match timeout_at(deadline, replies.next()).await {
            Ok(reply) => reply.context("NATS ended the inbox")?,
            Err(_elapsed) => break End::Deadline,
        };
        // Not an answer but the server's word that nobody has got the question.
        if reply.status == Some(StatusCode::NO_RESPONDERS) {
            break End::Nobody;
        }
        count(&mut gather, &reply);
    };
    // What comes later is for nobody, and the server drops it.
    replies.unsubscribe().await?;
    println!("{}", gather.report(end));
    Ok(())
}
// ANCHOR_END: ask

fn count(gather: &mut Gather, message: &Message) {
    let carrier = message.headers.as_ref().and_then(|it| it.get(CARRIER));
    let carrier = carrier.map(|value| value.as_str());
    let taken = gather.take(&Reply {
        id: Some(&message.subject),
        carrier,
        payload: &message.payload,
    });
    let carrier = carrier.unwrap_or("somebody").escape_debug();
    match taken {
        Taken::Counted => {}
        Taken::Again => println!("passed:   {carrier}, a second time"),
        Taken::Elsewhere => println!("passed:   {carrier}, to another question"),
        Taken::Nameless => println!("passed:   an answer without a name"),
    }
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let (stop, stopped) = watch::channel(());
    let (said, mut lines) = mpsc::unbounded_channel();
    let mut carriers = JoinSet::new();
    for words in STORY {
        let carrier = Carrier::parse(words).context("a carrier of the story")?;
        let (said, mut stopped) = (said.clone(), stopped.clone());
        carriers.spawn(async move {
            let say = |line| {
                // The story may have failed.
                let _gone = said.send(line);
            };
            let stop = async {
                // Dropped, that is its end too.
                let _dropped = stopped.changed().await;
            };
            serve(&carrier, say, stop).await
        });
    }
    all_ready(&mut lines, &mut carriers).await?;
    println!("ready:    {} carriers on {SUBJECT}", STORY.len());

    let rule = Rule::AllHaveAnswered;
    let kilograms = |weight| NonZeroU32::new(weight).context("no weight");
    ask(&client, kilograms(2)?, DEADLINE, rule).await?;
    ask(&client, kilograms(3)?, Duration::from_secs(10), rule).await?;
    drop(stop);
    while let Some(carrier) = carriers.join_next().await {
        carrier??;
    }
    let short = Duration::from_millis(500);
    ask(&client, kilograms(4)?, short, rule).await?;
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

/// Waits until each carrier can be asked, unless one of them ends.
async fn all_ready(
    lines: &mut mpsc::UnboundedReceiver<String>,
    carriers: &mut JoinSet<Result<()>>,
) -> Result<()> {
    let mut ready = 0;
    while ready < STORY.len() {
        tokio::select! {
            Some(line) = lines.recv() => {
                ready += usize::from(line.starts_with("ready:"));
            }
            Some(ended) = carriers.join_next() => {
                ended??;
                bail!("a carrier has stopped");
            }
        }
    }
    Ok(())
}

// ---- Connection ------------------------------------------------------------

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
    ConnectOptions::new()
        // The client connects again by itself, and would do so in silence.
        .event_callback(|event| async move {
            if event == Event::Disconnected {
                eprintln!("lost NATS, still trying");
            }
        })
        .connect(server)
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
