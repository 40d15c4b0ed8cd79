//! Scatter and gather: three carriers are asked, and the cheapest in time is taken.
//!
//! Teaches: a fanout exchange copies a question into the queue of each carrier. The
//! answers come back by direct reply-to, all on the channel that has asked, so the
//! correlation id must tell a late one from one to the next question. A question
//! expires when its deadline has passed, and `mandatory` brings it back at once when
//! nobody listens at all.
//!
//! Run, after `cargo lab up rabbitmq`:
//!
//! ```text
//! cargo run --bin scatter_gather_rabbitmq                            # the whole story
//! cargo run --bin scatter_gather_rabbitmq carrier swift 790          # terminal 1
//! cargo run --bin scatter_gather_rabbitmq carrier snail 390 --slow   # terminal 2
//! cargo run --bin scatter_gather_rabbitmq carrier nope 500 --refuses # or --garbled, --twice
//! cargo run --bin scatter_gather_rabbitmq ask 2                      # 2 kg, by the deadline
//! cargo run --bin scatter_gather_rabbitmq ask 2 10000                # within 10 s
//! cargo run --bin scatter_gather_rabbitmq ask 2 10000 --first        # the mistake
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
//! passed:   snail, to another question
//! answered: 3 of 3, before the deadline: nope no, snail 1170, swift 2370
//! taken:    snail for 1170 cents
//! asked:    4 kg, within 500 ms
//! answered: 0 of 3, nobody listens
//! none:     no offer
//! ```
//!
//! Left out on purpose: several questions at a time in one carrier, and a carrier with
//! several instances: they would share one queue with a name, and no exclusive one.

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
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    Consumer, ExchangeKind,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::FieldTable,
    uri::AMQPUri,
};
use patterns::scatter_gather::{
    Carrier, DEADLINE, End, Gather, Question, Reply, Taken,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const EXCHANGE: &str = "shipping.offers";
/// Not a queue: RabbitMQ sends what goes here to the channel that has asked.
const REPLY_TO: &str = "amq.rabbitmq.reply-to";
const USAGE: &str = "usage: scatter_gather_rabbitmq \
    [carrier NAME CENTS [--slow | --refuses | --garbled | --twice] \
    | ask KILOGRAMS [DEADLINE_MS] [--first]]";

/// How long RabbitMQ may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);
/// After so long it is asked again, when a carrier has gone in between.
const AGAIN: Duration = Duration::from_millis(20);

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
    let connection = connect().await?;
    let channel = connection.create_channel().await?;
    let mut questions = questions(&channel).await?;
    say(format!("ready:    {} on {EXCHANGE}", carrier.name));
    tokio::pin!(stop);
    loop {
        let question = tokio::select! {
            // In this order: by default `select!` picks at random.
            biased;
            () = &mut stop => break,
            question = questions.next() => question,
        };
        let question = question
            .context("RabbitMQ ended it: is the queue deleted?")?
            .context("lost RabbitMQ")?;
        answer(&channel, carrier, &question, &say).await?;
        let ack = timeout(PATIENCE, question.ack(BasicAckOptions::default()));
        ack.await.context("lost RabbitMQ")??;
    }
    // When this returns, the queue is gone with it.
    let close = timeout(PATIENCE, connection.close(200, "stopped".into()));
    close.await.context("lost RabbitMQ")??;
    Ok(())
}

/// The questions, in a queue that nobody else has and that is gone with this
/// connection: a carrier that is down is not asked.
async fn questions(channel: &Channel) -> Result<Consumer> {
    declare(channel).await?;
    let exclusive = QueueDeclareOptions::exclusive();
    let queue = channel
        .queue_declare("".into(), exclusive, FieldTable::default())
        .await?
        .name()
        .clone();
    let bind = QueueBindOptions::default();
    channel
        .queue_bind(
            queue.clone(),
            EXCHANGE.into(),
            "".into(),
            bind,
            FieldTable::default(),
        )
        .await?;
    // The others stay in the queue, where they can expire.
    channel.basic_qos(1, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions::default();
    let questions = channel
        .basic_consume(queue, "".into(), consume, FieldTable::default())
        .await?;
    Ok(questions)
}

async fn answer(
    channel: &Channel,
    carrier: &Carrier,
    question: &Delivery,
    say: &impl Fn(String),
) -> Result<()> {
    let asker = &question.properties;
    let (Some(reply_to), Some(id)) = (asker.reply_to(), asker.correlation_id())
    else {
        say("skipped:  nobody wants an answer".to_owned());
        return Ok(());
    };
    let Some(work) = carrier.work(&question.data, SystemTime::now())? else {
        say("skipped:  nobody waits any more".to_owned());
        return Ok(());
    };
    say(format!("asked:    {}", work.asked));
    sleep(work.takes).await;
    for reply in work.replies {
        let properties = BasicProperties::default()
            .with_correlation_id(id.clone())
            .with_app_id(carrier.name.as_str().into());
        let options = BasicPublishOptions::default();
        // Nobody confirms it: whoever has asked and is gone needs no answer.
        channel
            .basic_publish("".into(), reply_to.clone(), options, &reply, properties)
            .await?;
    }
    say(format!("answered: {}", work.asked));
    Ok(())
}
// ANCHOR_END: carrier

// ---- Asker -----------------------------------------------------------------

async fn ask_once(weight: NonZeroU32, deadline: Duration, rule: Rule) -> Result<()> {
    let connection = connect().await?;
    let mut asker = Asker::new(&connection).await?;
    asker.ask(weight, deadline, rule).await?;
    connection.close(200, "done".into()).await?;
    Ok(())
}

// ANCHOR: ask
struct Asker {
    channel: Channel,
    /// All that come on this channel, whichever question they answer.
    replies: Consumer,
    questions: u32,
}

impl Asker {
    async fn new(connection: &Connection) -> Result<Self> {
        let channel = connection.create_channel().await?;
        declare(&channel).await?;
        let confirms = ConfirmSelectOptions::default();
        channel.confirm_select(confirms).await?;
        let no_ack = BasicConsumeOptions {
            no_ack: true, // direct reply-to knows no other way
            ..BasicConsumeOptions::default()
        };
        // Before the first question, and on the channel that asks.
        let replies = channel
            .basic_consume(REPLY_TO.into(), "".into(), no_ack, FieldTable::default())
            .await?;
        Ok(Self {
            channel,
            replies,
            questions: 0,
        })
    }

    /// Asks all, and says who has answered and whose offer is taken.
    async fn ask(
        &mut self,
        weight: NonZeroU32,
        patience: Duration,
        rule: Rule,
    ) -> Result<()> {
        println!("asked:    {weight} kg, within {} ms", patience.as_millis());
        let deadline = Instant::now() + patience;
        self.questions += 1;
        let id = format!("question-{}", self.questions);
        let mut gather = Gather::new(&id);
        let question = Question::new(weight, patience, SystemTime::now());
        let publish = self.publish(&id, &question, patience);
        let listened = timeout_at(deadline, publish)
            .await
            .context("RabbitMQ has not confirmed in time; it may be blocked")??;
        let end = loop {
            if !listened {
                break End::Nobody;
            }
            if gather.is_complete() {
                break End::Complete;
            }
            if rule == Rule::FirstOffer && gather.best().is_some() {
                break End::First;
            }
            match timeout_at(deadline, self.replies.next()).await {
                Ok(Some(Ok(reply))) => count(&mut gather, &reply),
                Ok(Some(Err(error))) => return Err(error).context("lost RabbitMQ"),
                Ok(None) => bail!("RabbitMQ has ended the replies"),
                Err(_elapsed) => break End::Deadline,
            }
        };
        println!("{}", gather.report(end));
        Ok(())
    }

    /// Says whether anybody listens.
    async fn publish(
        &self,
        id: &str,
        question: &Question,
        patience: Duration,
    ) -> Result<bool> {
        let properties = BasicProperties::default()
            .with_reply_to(REPLY_TO.into())
            .with_correlation_id(id.into())
            // RabbitMQ drops what nobody has taken after this time, in milliseconds.
            .with_expiration(patience.as_millis().to_string().into());
        let options = BasicPublishOptions {
            mandatory: true, // return it if no queue takes it
            ..BasicPublishOptions::default()
        };
        let payload = serde_json::to_vec(question)?;
        loop {
            let properties = properties.clone();
            let confirm = self
                .channel
                .basic_publish(
                    EXCHANGE.into(),
                    "".into(),
                    options,
                    &payload,
                    properties,
                )
                .await?;
            match confirm.await? {
                Confirmation::Ack(None) => return Ok(true),
                Confirmation::Ack(Some(_returned)) => return Ok(false),
                // A carrier has gone while it was being asked. The others may have the
                // question already: who answers it twice counts once.
                Confirmation::Nack(_) => sleep(AGAIN).await,
                Confirmation::NotRequested => bail!("confirms are not selected"),
            }
        }
    }
}
// ANCHOR_END: ask

fn count(gather: &mut Gather, delivery: &Delivery) {
    let id = delivery.properties.correlation_id().as_ref();
    let carrier = delivery.properties.app_id().as_ref();
    let carrier = carrier.map(|name| name.as_str());
    let taken = gather.take(&Reply {
        id: id.map(|id| id.as_str()),
        carrier,
        payload: &delivery.data,
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
    let connection = connect().await?;
    let mut asker = Asker::new(&connection).await?;
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
    println!("ready:    {} carriers on {EXCHANGE}", STORY.len());

    let rule = Rule::AllHaveAnswered;
    let kilograms = |weight| NonZeroU32::new(weight).context("no weight");
    asker.ask(kilograms(2)?, DEADLINE, rule).await?;
    let patient = Duration::from_secs(10);
    asker.ask(kilograms(3)?, patient, rule).await?;
    drop(stop);
    while let Some(carrier) = carriers.join_next().await {
        carrier??;
    }
    let short = Duration::from_millis(500);
    asker.ask(kilograms(4)?, short, rule).await?;
    connection.close(200, "done".into()).await?;
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

// ---- Exchange and connection -----------------------------------------------

/// Declares the exchange, which keeps nothing.
async fn declare(channel: &Channel) -> Result<()> {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(
            EXCHANGE.into(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        )
        .await
        .map_err(|error| {
            anyhow!(
                "cannot declare the exchange {EXCHANGE} ({error}); if it was made \
                 with other arguments, delete it first"
            )
        })
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
