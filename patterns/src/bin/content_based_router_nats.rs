//! Content-based router: each order to one destination, by its country and its value.
//!
//! Teaches: NATS routes by subject, and the publisher makes the subject from the order:
//! `route.orders.FR.small`. Each destination is a stream, and the subjects that it takes
//! are the route table. The server refuses a subject that another stream has, so no order
//! can get into two. What no stream takes comes back to the publisher as an error, and
//! the publisher stores it in `unrouted`. So does what comes while a route is moved.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin content_based_router_nats                         # the whole story
//! cargo run --bin content_based_router_nats watch FR                # terminal 1
//! cargo run --bin content_based_router_nats route large review      # terminal 2
//! cargo run --bin content_based_router_nats route DE berlin
//! cargo run --bin content_based_router_nats route FR berlin
//! cargo run --bin content_based_router_nats publish 1 10
//! cargo run --bin content_based_router_nats show
//! cargo run --bin content_based_router_nats route FR lyon           # at runtime
//! cargo run --bin content_based_router_nats route FR berlin --slow  # time to kill it
//! cargo run --bin content_based_router_nats again                   # what is unrouted
//! cargo run --bin content_based_router_nats publish 11 20 --careless
//! ```
//!
//! Expected output:
//!
//! ```text
//! route:    large to review
//! route:    DE to berlin
//! route:    FR to berlin
//! sent:     order-1 to order-10
//! review:   order-3, order-7
//! berlin:   order-1, order-2, order-4, order-5, order-8
//! lyon:     nothing
//! unrouted: order-6, no route for IS.small
//! unrouted: order-9, no route for IT.small
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! route:    FR to lyon
//! route:    IT to lyon
//! sent:     order-11 to order-20
//! again:    1 routed, 4 stay in unrouted
//! review:   order-3, order-7, order-13, order-17
//! berlin:   order-1, order-2, order-4, order-5, order-8, order-11, order-15, order-18
//! lyon:     order-9, order-12, order-14, order-19
//! unrouted: order-6, no route for IS.small
//! unrouted: order-16, no route for IS.small
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! unrouted: 11 bytes, no order: expected value at line 1 column 1
//! ```
//!
//! Left out on purpose: two people who change routes at the same time. The later one
//! could take back what the earlier one has done; no order would be lost by it.

use std::{
    env,
    future::Future,
    ops::RangeInclusive,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ServerAddr,
    jetstream::{
        self,
        context::{PublishError, PublishErrorKind},
        message::{PublishMessage, StreamMessage},
        stream::{self, RawMessageErrorKind, Republish},
    },
};
use futures_lite::StreamExt as _;
use patterns::content_based_router::{
    Country, Key, Place, Rule, address, id, listing, name, numbers, order,
};
use tokio::{sync::Notify, time::sleep};

const DEFAULT_URL: &str = "nats://localhost:4222";
/// Its streams are `ROUTE_REVIEW`, `ROUTE_BERLIN`, `ROUTE_LYON` and `ROUTE_UNROUTED`.
/// Orders have subjects such as `route.orders.FR.small`, and where no stream takes that,
/// `route.unrouted.FR.small`.
const SHOP: Shop = Shop("route");
/// The same, beside it: a route of the shop is not changed by a story.
const STORY: Shop = Shop("route-story");
const USAGE: &str = "usage: content_based_router_nats [publish FIRST LAST [--careless] \
                     | route (large | COUNTRY) (review | berlin | lyon | unrouted) \
                     [--slow] | again | show | watch COUNTRY]";

/// With `--slow`: how long there is time to kill the program.
const PAUSE: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last, ref flags @ ..] => {
            let numbers = numbers(first, last);
            match (numbers, flags) {
                (Some(numbers), []) => publish(numbers).await,
                (Some(numbers), ["--careless"]) => publish_carelessly(numbers).await,
                _ => return usage(),
            }
        }
        ["route", rule, place, ref flags @ ..] => {
            let pace = match flags {
                [] => Pace::Quick,
                ["--slow"] => Pace::Slow,
                _ => return usage(),
            };
            match (rule.parse(), place.parse()) {
                (Ok(rule), Ok(place)) => route(&rule, place, pace).await,
                _ => return usage(),
            }
        }
        ["again"] => again().await,
        ["show"] => show().await,
        ["watch", country] => match country.parse() {
            Ok(country) => watch(&country).await,
            Err(_no_country) => return usage(),
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    Quick,
    /// With a pause in which no stream takes the orders of the route.
    Slow,
}

/// The streams and subjects of a shop.
#[derive(Clone, Copy)]
struct Shop(&'static str);

impl Shop {
    fn subject(self, part: &str, rest: &str) -> String {
        format!("{}.{part}.{rest}", self.0)
    }

    fn stream(self, place: Place) -> String {
        format!("{}_{place}", self.0.replace('-', "_")).to_uppercase()
    }
}

// ---- Publisher -------------------------------------------------------------

async fn publish(numbers: RangeInclusive<u64>) -> Result<()> {
    let (client, jetstream) = open(SHOP).await?;
    send(&jetstream, SHOP, numbers).await?;
    client.drain().await?;
    Ok(())
}

// ANCHOR: send
async fn send(
    jetstream: &jetstream::Context,
    shop: Shop,
    numbers: RangeInclusive<u64>,
) -> Result<()> {
    let mut known = 0;
    for number in numbers.clone() {
        let (id, payload) = (id(number), order(number)?);
        let address = address(&payload);
        let routed = match Key::of(&payload) {
            Ok(_key) => put(jetstream, shop, &address, &id, &payload).await?,
            // Nobody can say where it belongs.
            Err(_no_order) => None,
        };
        let duplicate = match routed {
            Some(duplicate) => duplicate,
            None => {
                let unrouted = shop.subject("unrouted", &address);
                store(jetstream, unrouted, &id, &payload)
                    .await
                    .with_context(|| format!("{id} is not stored"))?
            }
        };
        known += u64::from(duplicate);
    }
    let (first, last) = (numbers.start(), numbers.end());
    match known {
        0 => println!("sent:     order-{first} to order-{last}"),
        _ => println!("sent:     order-{first} to order-{last}, {known} known"),
    }
    Ok(())
}

/// Stores an order in the stream that takes its address, if there is one.
async fn put(
    jetstream: &jetstream::Context,
    shop: Shop,
    address: &str,
    id: &str,
    payload: &[u8],
) -> Result<Option<bool>> {
    let subject = shop.subject("orders", address);
    match store(jetstream, subject.clone(), id, payload).await {
        Ok(duplicate) => Ok(Some(duplicate)),
        // Nobody listens there, so no stream does. A stream whose servers are choosing
        // a leader looks the same.
        Err(error) if error.kind() == PublishErrorKind::StreamNotFound => Ok(None),
        Err(error) if error.kind() == PublishErrorKind::TimedOut => Err(error)
            .with_context(|| {
                format!("{id} may be stored or not; who else listens on {subject}?")
            }),
        Err(error) => Err(error).with_context(|| format!("{id} is not stored")),
    }
}

/// Waits until a stream has it. Says whether the stream had it already: sent again
/// within two minutes, an order counts once in each stream.
async fn store(
    jetstream: &jetstream::Context,
    subject: String,
    id: &str,
    payload: &[u8],
) -> Result<bool, PublishError> {
    let message = PublishMessage::build()
        .payload(payload.to_vec().into())
        .message_id(id);
    let ack = jetstream.send_publish(subject, message).await?.await?;
    Ok(ack.duplicate)
}
// ANCHOR_END: send

// ANCHOR: careless
/// The mistake, to see what it costs: no answer, so nobody says that no stream takes it.
async fn publish_carelessly(numbers: RangeInclusive<u64>) -> Result<()> {
    let (client, _jetstream) = open(SHOP).await?;
    for number in numbers.clone() {
        let payload = order(number)?;
        let subject = SHOP.subject("orders", &address(&payload));
        client.publish(subject, payload.into()).await?;
    }
    client.flush().await?;
    println!(
        "sent:     order-{} to order-{}",
        numbers.start(),
        numbers.end()
    );
    Ok(())
}
// ANCHOR_END: careless

// ---- Route table -----------------------------------------------------------

async fn route(rule: &Rule, place: Place, pace: Pace) -> Result<()> {
    let (client, jetstream) = open(SHOP).await?;
    change(&jetstream, SHOP, rule, place, pace).await?;
    client.drain().await?;
    Ok(())
}

// ANCHOR: change
/// Changes a route while orders come in. The new stream cannot take the subject before
/// the old one has let it go. What comes in between goes to `unrouted`, and `again`
/// brings it back.
async fn change(
    jetstream: &jetstream::Context,
    shop: Shop,
    rule: &Rule,
    place: Place,
    pace: Pace,
) -> Result<()> {
    let subject = shop.subject("orders", &rule.pattern());
    for other in place.others() {
        let stream = jetstream.get_stream(shop.stream(other)).await?;
        let mut config = stream.cached_info().config.clone();
        if config.subjects.contains(&subject) {
            config.subjects.retain(|taken| *taken != subject);
            jetstream.update_stream(&config).await?;
            if pace == Pace::Slow {
                println!(
                    "pause:    {} s, {rule} has no route; time to kill it",
                    PAUSE.as_secs()
                );
                sleep(PAUSE).await;
            }
        }
    }
    if place != Place::Unrouted {
        let stream = jetstream.get_stream(shop.stream(place)).await?;
        let mut config = stream.cached_info().config.clone();
        if !config.subjects.contains(&subject) {
            config.subjects.push(subject);
            jetstream.update_stream(&config).await.with_context(|| {
                format!("{rule} has no route now; is somebody else changing it?")
            })?;
        }
    }
    println!("route:    {rule} to {place}");
    Ok(())
}
// ANCHOR_END: change

// ---- What is unrouted ------------------------------------------------------

async fn again() -> Result<()> {
    let (client, jetstream) = open(SHOP).await?;
    route_again(&jetstream, SHOP).await?;
    client.drain().await?;
    Ok(())
}

// ANCHOR: again
/// Routes what is unrouted now. What still has no route stays where it is.
async fn route_again(jetstream: &jetstream::Context, shop: Shop) -> Result<()> {
    let unrouted = jetstream.get_stream(shop.stream(Place::Unrouted)).await?;
    let (mut routed, mut stay) = (0, 0);
    for message in messages(&unrouted).await? {
        // Its address is in the subject, its id in the header.
        let address = message.subject.strip_prefix(&shop.subject("unrouted", ""));
        let id = message.headers.get(async_nats::header::NATS_MESSAGE_ID);
        let taken = match (address, id) {
            (Some(address), Some(id)) if Key::of(&message.payload).is_ok() => {
                let (id, payload) = (id.as_str(), &message.payload);
                put(jetstream, shop, address, id, payload).await?.is_some()
            }
            _ => false,
        };
        if taken {
            // Stored there, so it may go here. Killed before this line, it is sent
            // again, and the stream knows the id.
            unrouted.delete_message(message.sequence).await?;
            routed += 1;
        } else {
            stay += 1;
        }
    }
    println!("again:    {routed} routed, {stay} stay in unrouted");
    Ok(())
}
// ANCHOR_END: again

// ---- Show and watch --------------------------------------------------------

async fn show() -> Result<()> {
    let (client, jetstream) = open(SHOP).await?;
    show_all(&jetstream, SHOP).await?;
    client.drain().await?;
    Ok(())
}

/// Shows what is in each stream, and leaves it there.
async fn show_all(jetstream: &jetstream::Context, shop: Shop) -> Result<()> {
    for place in Place::ALL {
        let stream = jetstream.get_stream(shop.stream(place)).await?;
        let messages = messages(&stream).await?;
        let payloads = messages.iter().map(|message| message.payload.to_vec());
        println!("{}", listing(place, &payloads.collect::<Vec<_>>()));
    }
    Ok(())
}

/// What is in a stream at this moment.
async fn messages(stream: &stream::Stream) -> Result<Vec<StreamMessage>> {
    let state = stream.get_info().await?.state;
    let mut messages = Vec::new();
    // A stream that never had any begins at 0, which is none.
    for sequence in state.first_sequence.max(1)..=state.last_sequence {
        match stream.get_raw_message(sequence).await {
            Ok(message) => messages.push(message),
            // Somebody has taken it out.
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {}
            Err(error) => return Err(error).context("cannot read a stream"),
        }
    }
    Ok(messages)
}

// ANCHOR: watch
/// The message filter: a copy of the orders of one country. NATS passes over the rest.
/// It listens where the streams republish: on the subject of the orders itself it would
/// be somebody who listens, and a publisher would wait in vain for the error.
async fn watch(country: &Country) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let client = connect().await?;
    let subject = SHOP.subject("seen", &format!("{country}.*"));
    let mut orders = client.subscribe(subject).await?;
    // Answered behind it, so NATS knows of the subscription.
    declare(&jetstream::new(client.clone()), SHOP).await?;
    println!("ready:    watching {country}, Ctrl-C to stop");
    let mut came = 0;
    loop {
        let order = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            order = orders.next() => order.context("NATS ended it")?,
        };
        came += 1;
        println!("seen:     {}", name(&order.payload));
    }
    client.drain().await?;
    println!("stopped:  {came} came, {came} from {country}");
    Ok(())
}
// ANCHOR_END: watch

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    // With what an earlier story has left in them, and with its routes.
    for place in Place::ALL {
        // An error says that there is none.
        let _deleted = jetstream.delete_stream(STORY.stream(place)).await;
    }
    declare(&jetstream, STORY).await?;
    let route = async |rule: &str, place| {
        let rule = rule.parse().map_err(anyhow::Error::msg)?;
        change(&jetstream, STORY, &rule, place, Pace::Quick).await
    };
    route("large", Place::Review).await?;
    route("DE", Place::Berlin).await?;
    route("FR", Place::Berlin).await?;
    send(&jetstream, STORY, 1..=10).await?;
    show_all(&jetstream, STORY).await?;

    route("FR", Place::Lyon).await?;
    route("IT", Place::Lyon).await?;
    send(&jetstream, STORY, 11..=20).await?;
    route_again(&jetstream, STORY).await?;
    show_all(&jetstream, STORY).await?;
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Streams and connection ------------------------------------------------

/// A connection on which the streams of the shop are declared.
async fn open(shop: Shop) -> Result<(Client, jetstream::Context)> {
    let client = connect().await?;
    let jetstream = jetstream::new(client.clone());
    declare(&jetstream, shop).await?;
    Ok((client, jetstream))
}

// ANCHOR: declare
/// Streams without a single route. One that is there is left as it is: its subjects are
/// the route table.
async fn declare(jetstream: &jetstream::Context, shop: Shop) -> Result<()> {
    for place in Place::ALL {
        let (subjects, source, retention) = if place == Place::Unrouted {
            let all = shop.subject("unrouted", ">");
            (all.clone(), all, stream::RetentionPolicy::Limits)
        } else {
            (
                // Its own address: a stream without a subject takes its name for one.
                shop.subject("to", place.name()),
                shop.subject("orders", ">"),
                stream::RetentionPolicy::WorkQueue,
            )
        };
        let name = shop.stream(place);
        jetstream
            .get_or_create_stream(stream::Config {
                name: name.clone(),
                subjects: vec![subjects],
                retention,
                // For those who only watch: each order as soon as it is stored.
                republish: Some(Republish {
                    source,
                    destination: shop.subject("seen", ">"),
                    headers_only: false,
                }),
                // The default; a stream in memory is gone after a restart.
                storage: stream::StorageType::File,
                ..stream::Config::default()
            })
            .await
            .map_err(|error| {
                anyhow!(
                    "cannot declare the stream {name} ({error}); if JetStream is \
                     off, start the server with -js"
                )
            })?;
    }
    Ok(())
}
// ANCHOR_END: declare

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
