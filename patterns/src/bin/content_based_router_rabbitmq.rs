//! Content-based router: each order to one destination, by its country and its value.
//!
//! Teaches: RabbitMQ routes by a key that the publisher takes from the order, and the
//! bindings are the route table. To move a route, bind the new before you unbind the
//! old: but not in the same exchange, where both would get the orders in between. Two
//! exchanges stand behind one another, each the `alternate-exchange` of the one before.
//! What the first one takes, the second one does not see. Behind both is `unrouted`.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin content_based_router_rabbitmq                     # the whole story
//! cargo run --bin content_based_router_rabbitmq watch FR            # terminal 1
//! cargo run --bin content_based_router_rabbitmq route large review  # terminal 2
//! cargo run --bin content_based_router_rabbitmq route DE berlin
//! cargo run --bin content_based_router_rabbitmq route FR berlin
//! cargo run --bin content_based_router_rabbitmq publish 1 10
//! cargo run --bin content_based_router_rabbitmq show
//! cargo run --bin content_based_router_rabbitmq route FR lyon         # at runtime
//! cargo run --bin content_based_router_rabbitmq route FR lyon --slow  # time to kill it
//! cargo run --bin content_based_router_rabbitmq again                 # what is unrouted
//! cargo run --bin content_based_router_rabbitmq route FR berlin --careless
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
//! Left out on purpose: a look into the order. The broker reads the key and nothing
//! else, so whoever publishes with a wrong key has routed wrongly.

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

use anyhow::{Context as _, Result, anyhow, bail};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind, PublisherConfirm,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions,
        BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use patterns::content_based_router::{
    Country, Place, Rule, address, id, listing, name, numbers, order,
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
/// Its exchanges are `route.orders`, where all orders come in, then `route.moves`,
/// `route.table` and `route.unrouted`. Its queues are `route.to.review`,
/// `route.to.berlin`, `route.to.lyon` and `route.to.unrouted`.
const SHOP: Shop = Shop("route");
/// The same, beside it: a route of the shop is not changed by a story.
const STORY: Shop = Shop("route-story");
const CONSUMER_TAG: &str = "watcher";
const USAGE: &str = "usage: content_based_router_rabbitmq [publish FIRST LAST | route \
                     (large | COUNTRY) (review | berlin | lyon | unrouted) [--slow | \
                     --careless] | again | show | watch COUNTRY]";

/// How many orders are on their way to the broker, at most.
const WINDOW: usize = 32;

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// With `--slow`: how long there is time to kill the program.
const PAUSE: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publish", first, last] => match numbers(first, last) {
            Some(numbers) => publish(numbers).await,
            None => return usage(),
        },
        ["route", rule, place, ref flags @ ..] => {
            let way = match flags {
                [] => Way::Quick,
                ["--slow"] => Way::Slow,
                ["--careless"] => Way::Careless,
                _ => return usage(),
            };
            match (rule.parse(), place.parse()) {
                (Ok(rule), Ok(place)) => route(&rule, place, way).await,
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
enum Way {
    Quick,
    /// With a pause after each step.
    Slow,
    /// The mistake, to see what it costs: both steps in one exchange, and a pause
    /// between them.
    Careless,
}

/// The exchanges and queues of a shop.
#[derive(Clone, Copy)]
struct Shop(&'static str);

impl Shop {
    fn exchange(self, part: &str) -> String {
        format!("{}.{part}", self.0)
    }

    fn queue(self, place: Place) -> String {
        format!("{}.to.{place}", self.0)
    }
}

// ---- Publisher -------------------------------------------------------------

async fn publish(numbers: RangeInclusive<u64>) -> Result<()> {
    let (connection, channel) = open(SHOP).await?;
    send(&channel, SHOP, numbers).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: send
/// Publishes each order under its key, and waits until RabbitMQ has it.
async fn send(
    channel: &Channel,
    shop: Shop,
    numbers: RangeInclusive<u64>,
) -> Result<()> {
    let mut on_their_way = Vec::new();
    for number in numbers.clone() {
        let payload = order(number)?;
        // `unreadable` if it is no order: no rule fits that, and the bytes are kept.
        let key = address(&payload);
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(id(number).into());
        let confirm = put(channel, shop, &key, &payload, properties).await?;
        on_their_way.push(confirm);
        if on_their_way.len() == WINDOW {
            stored(&mut on_their_way).await?;
        }
    }
    stored(&mut on_their_way).await?;
    println!(
        "sent:     order-{} to order-{}",
        numbers.start(),
        numbers.end()
    );
    Ok(())
}

async fn put(
    channel: &Channel,
    shop: Shop,
    key: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<PublisherConfirm> {
    let options = BasicPublishOptions {
        // Comes back if no queue takes it: not even the one for what is unrouted.
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let entrance = shop.exchange("orders");
    let confirm = channel
        .basic_publish(entrance.into(), key.into(), options, payload, properties)
        .await?;
    Ok(confirm)
}

async fn stored(on_their_way: &mut Vec<PublisherConfirm>) -> Result<()> {
    for confirm in on_their_way.drain(..) {
        let answer = timeout(PATIENCE, confirm)
            .await
            .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
        match answer {
            Confirmation::Ack(None) => {}
            answer => bail!("RabbitMQ did not store an order: {answer:?}"),
        }
    }
    Ok(())
}
// ANCHOR_END: send

// ---- Route table -----------------------------------------------------------

async fn route(rule: &Rule, place: Place, way: Way) -> Result<()> {
    let (connection, channel) = open(SHOP).await?;
    change(&channel, SHOP, rule, place, way).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: change
/// Changes a route while orders come in. After each step a rule leads to one queue, as
/// each step is one binding.
async fn change(
    channel: &Channel,
    shop: Shop,
    rule: &Rule,
    place: Place,
    way: Way,
) -> Result<()> {
    lock(channel, shop).await?;
    let (moves, table) = (shop.exchange("moves"), shop.exchange("table"));
    let route = Route {
        channel,
        shop,
        key: rule.pattern(),
    };
    if way == Way::Careless {
        // Between the two, each order is in both queues.
        route.bind(&table, place).await?;
        pause(1).await;
        route.unbind(&table, place.others()).await?;
    } else {
        // What a change has left that was killed. If it led elsewhere, the table has
        // the word again.
        route.unbind(&moves, place.others()).await?;
        // From here on the new one has all. The table is not asked for them any more.
        route.bind(&moves, place).await?;
        way.step(1).await;
        route.unbind(&table, place.others()).await?;
        way.step(2).await;
        route.bind(&table, place).await?;
        way.step(3).await;
        // The table is asked again, and leads to the same queue.
        route.unbind(&moves, Place::DESTINATIONS).await?;
    }
    println!("route:    {rule} to {place}");
    Ok(())
}

struct Route<'a> {
    channel: &'a Channel,
    shop: Shop,
    key: String,
}

impl Route<'_> {
    async fn bind(&self, exchange: &str, place: Place) -> Result<()> {
        // What no binding takes is unrouted. A binding for that would be one more.
        if place != Place::Unrouted {
            bind(self.channel, exchange, &self.shop.queue(place), &self.key).await?;
        }
        Ok(())
    }

    /// Nobody can ask by AMQP what is bound. To unbind what is not, is no error.
    async fn unbind(
        &self,
        exchange: &str,
        places: impl IntoIterator<Item = Place>,
    ) -> Result<()> {
        for place in places {
            let queue = self.shop.queue(place).into();
            let (key, none) = (self.key.as_str().into(), FieldTable::default());
            self.channel
                .queue_unbind(queue, exchange.into(), key, none)
                .await?;
        }
        Ok(())
    }
}
// ANCHOR_END: change

impl Way {
    async fn step(self, number: u32) {
        if self == Self::Slow {
            pause(number).await;
        }
    }
}

/// Says when to kill the program, to see what becomes of the orders.
async fn pause(step: u32) {
    println!(
        "pause:    {} s after step {step}, time to kill it",
        PAUSE.as_secs()
    );
    sleep(PAUSE).await;
}

// ANCHOR: lock
/// Two changes of one rule at the same time could leave two bindings. An exclusive
/// queue belongs to one connection, and is gone with it.
async fn lock(channel: &Channel, shop: Shop) -> Result<()> {
    let options = QueueDeclareOptions::exclusive();
    let lock = shop.exchange("lock");
    channel
        .queue_declare(lock.into(), options, FieldTable::default())
        .await
        .map_err(|error| {
            anyhow!("somebody else is changing the route table ({error})")
        })?;
    Ok(())
}
// ANCHOR_END: lock

async fn bind(
    channel: &Channel,
    exchange: &str,
    queue: &str,
    key: &str,
) -> Result<()> {
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel
        .queue_bind(queue.into(), exchange.into(), key.into(), options, none)
        .await?;
    Ok(())
}

// ---- What is unrouted ------------------------------------------------------

async fn again() -> Result<()> {
    let (connection, channel) = open(SHOP).await?;
    route_again(&channel, SHOP).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: again
/// Publishes what is unrouted now once more. What still has no route comes back to the
/// end of the same queue.
async fn route_again(channel: &Channel, shop: Shop) -> Result<()> {
    let queue = shop.queue(Place::Unrouted);
    let count = count(channel, &queue).await?;
    for _order in 0..count {
        let options = BasicGetOptions::default();
        let taken = channel.basic_get(queue.as_str().into(), options).await?;
        let Some(taken) = taken else { break };
        let (key, properties) = (taken.routing_key.as_str(), &taken.properties);
        let again = put(channel, shop, key, &taken.data, properties.clone());
        stored(&mut vec![again.await?]).await?;
        // Killed before this line, it is there twice, with the same message id.
        taken.ack(BasicAckOptions::default()).await?;
    }
    let stay = self::count(channel, &queue).await?;
    let routed = count.saturating_sub(stay);
    println!("again:    {routed} routed, {stay} stay in unrouted");
    Ok(())
}
// ANCHOR_END: again

/// How many messages are ready in a queue.
async fn count(channel: &Channel, queue: &str) -> Result<u32> {
    let passive = QueueDeclareOptions::durable().passive();
    let declared = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await?;
    Ok(declared.message_count())
}

// ---- Show and watch --------------------------------------------------------

async fn show() -> Result<()> {
    let (connection, channel) = open(SHOP).await?;
    show_all(&channel, SHOP).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Shows what is in each queue, and leaves it there: all of it is taken, and given
/// back. Good for a look, and in the way of whoever works on it meanwhile.
async fn show_all(channel: &Channel, shop: Shop) -> Result<()> {
    for place in Place::ALL {
        let (mut payloads, mut last) = (Vec::new(), None);
        let (queue, options) = (shop.queue(place), BasicGetOptions::default());
        while let Some(taken) =
            channel.basic_get(queue.as_str().into(), options).await?
        {
            payloads.push(taken.data.clone());
            last = Some(taken);
        }
        if let Some(last) = last {
            let all = BasicNackOptions {
                multiple: true,
                requeue: true,
            };
            last.nack(all).await?;
        }
        println!("{}", listing(place, &payloads));
    }
    Ok(())
}

// ANCHOR: watch
/// The message filter: a copy of the orders of one country. RabbitMQ passes over the
/// rest. It is bound to the entrance: bound to the table, it would count as a route,
/// and what has no other would be missing in `unrouted`.
async fn watch(country: &Country) -> Result<()> {
    let stop_signal = stop_signal()?;
    tokio::pin!(stop_signal);
    let (connection, channel) = open(SHOP).await?;
    // Named by the server, and gone with this program.
    let exclusive = QueueDeclareOptions::exclusive();
    let queue = channel
        .queue_declare("".into(), exclusive, FieldTable::default())
        .await?;
    let queue = queue.name().as_str();
    let entrance = SHOP.exchange("orders");
    bind(&channel, &entrance, queue, &format!("{country}.*")).await?;
    let mut orders = channel
        .basic_consume(
            queue.into(),
            CONSUMER_TAG.into(),
            BasicConsumeOptions {
                no_ack: true, // a copy that nobody works on
                ..BasicConsumeOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    println!("ready:    watching {country}, Ctrl-C to stop");
    let mut came = 0;
    loop {
        let order = tokio::select! {
            biased;
            () = &mut stop_signal => break,
            order = orders.next() => order,
        };
        let order = order
            .context("RabbitMQ ended it")?
            .context("lost RabbitMQ")?;
        came += 1;
        println!("seen:     {}", name(&order.data));
    }
    channel
        .basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default())
        .await?;
    connection.close(200, "stopped".into()).await?;
    println!("stopped:  {came} came, {came} from {country}");
    Ok(())
}
// ANCHOR_END: watch

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let (connection, channel) = open(STORY).await?;
    // With what an earlier story has left in them, and with its routes.
    for place in Place::ALL {
        let (queue, options) = (STORY.queue(place), QueueDeleteOptions::default());
        channel.queue_delete(queue.into(), options).await?;
    }
    declare(&channel, STORY).await?;
    let route = async |rule: &str, place| {
        let rule = rule.parse().map_err(anyhow::Error::msg)?;
        change(&channel, STORY, &rule, place, Way::Quick).await
    };
    route("large", Place::Review).await?;
    route("DE", Place::Berlin).await?;
    route("FR", Place::Berlin).await?;
    send(&channel, STORY, 1..=10).await?;
    show_all(&channel, STORY).await?;

    route("FR", Place::Lyon).await?;
    route("IT", Place::Lyon).await?;
    send(&channel, STORY, 11..=20).await?;
    route_again(&channel, STORY).await?;
    show_all(&channel, STORY).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: story

// ---- Exchanges, queues and connection --------------------------------------

/// A connection, and a channel with confirms on which the shop is declared.
async fn open(shop: Shop) -> Result<(Connection, Channel)> {
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    declare(&channel, shop).await?;
    Ok((connection, channel))
}

// ANCHOR: declare
/// Exchanges and queues, without a single route: a route that is declared here would
/// come back with each start of a publisher.
async fn declare(channel: &Channel, shop: Shop) -> Result<()> {
    let (topic, fanout) = (ExchangeKind::Topic, ExchangeKind::Fanout);
    exchange(channel, shop, "unrouted", fanout, None).await?;
    exchange(channel, shop, "table", topic.clone(), Some("unrouted")).await?;
    // Empty but for the moment in which a route is changed.
    exchange(channel, shop, "moves", topic.clone(), Some("table")).await?;
    exchange(channel, shop, "orders", topic, None).await?;
    let (options, none) = (ExchangeBindOptions::default(), FieldTable::default());
    let (moves, orders) = (shop.exchange("moves"), shop.exchange("orders"));
    channel
        .exchange_bind(moves.into(), orders.into(), "#".into(), options, none)
        .await?;
    for place in Place::ALL {
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        let (queue, durable) = (shop.queue(place), QueueDeclareOptions::durable());
        channel
            .queue_declare(queue.as_str().into(), durable, arguments)
            .await
            .map_err(|error| {
                anyhow!(
                    "cannot declare the queue {queue} ({error}); if it was made \
                     with other arguments, delete it first"
                )
            })?;
    }
    let unrouted = shop.exchange("unrouted");
    bind(channel, &unrouted, &shop.queue(Place::Unrouted), "").await
}

async fn exchange(
    channel: &Channel,
    shop: Shop,
    part: &str,
    kind: ExchangeKind,
    alternate: Option<&str>,
) -> Result<()> {
    let (name, mut arguments) = (shop.exchange(part), FieldTable::default());
    if let Some(alternate) = alternate {
        let alternate = AMQPValue::LongString(shop.exchange(alternate).into());
        arguments.insert("alternate-exchange".into(), alternate);
    }
    let options = ExchangeDeclareOptions {
        durable: true,
        // Publishers have one entrance.
        internal: part != "orders",
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(name.as_str().into(), kind, options, arguments)
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the exchange {name} ({error}); if it was made with \
                 other arguments, delete it first"
            )
        })?;
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

async fn connect() -> Result<Connection> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let uri: AMQPUri = url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })?;
    // Only host, port and vhost are shown: the address may hold a password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    timeout(
        PATIENCE,
        Connection::connect_uri(uri, ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the connection ({error}); check user, \
                 password and vhost in AMQP_URL"
            )
        }
    })
}
