//! Client context: what librdkafka has to say, as events of `tracing`.
//!
//! Teaches: librdkafka logs and reports errors of its own accord, and both arrive in
//! the `ClientContext` of a client. A producer with a wrong password only says that
//! time is up, so an authentication failure has to be spotted there.
//!
//! Run, with a Kafka of its own, or after the commands in
//! `kafka-examples/config/kafka_client_context.properties`:
//!
//! ```text
//! cargo lab run kafka_client_context
//! cargo run --bin kafka_client_context
//! ```
//!
//! Expected output:
//!
//! ```text
//! right password: delivered (partition 0, offset <offset>)
//! ERROR kafka: <broker> SASL authentication error: Authentication failed: Invalid username or password client="guess" code=Authentication
//! wrong password: spotted, while the record still waits
//! wrong password: in the end the record says MessageTimedOut
//!  WARN kafka: [thrd:app]: Configuration property message.timeout.ms is a producer property and will be ignored by this consumer instance client="reader"
//! ERROR kafka: <broker> SASL authentication error: Authentication failed: Invalid username or password client="reader" code=Authentication
//! wrong password: a consumer says Authentication
//!  WARN kafka: <broker> Connect to <address> failed: Connection refused client="lost" code=BrokerTransportFailure
//! wrong port:     nobody is there, and the record waits for somebody
//! ```
//!
//! Left out on purpose: statistics, which arrive in the same context.

use std::{
    env,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    config::RDKafkaLogLevel,
    consumer::{Consumer as _, ConsumerContext, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::timeout,
};
use tracing::{Level, debug, error, info, warn};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "context.orders";
const USER: &str = "orders";
/// The variable, and the password for the Kafka of this example.
const PASSWORD: (&str, &str) = ("KAFKA_PASSWORD", "orders-password");
/// What librdkafka is to log in detail: `broker,security`, for example.
const DEBUG: &str = "KAFKA_DEBUG";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look meanwhile whether it is refused.
const A_WHILE: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    let level = match env::var_os(DEBUG) {
        Some(_) => Level::DEBUG,
        None => Level::INFO,
    };
    let lines = tracing_subscriber::fmt().with_max_level(level);
    lines.with_ansi(false).without_time().init();
    match order_and_listen().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: context
/// The context of one client. librdkafka's threads call it, so it must not block.
struct Traced {
    client: &'static str,
    told: Mutex<Vec<RDKafkaErrorCode>>,
    errors: UnboundedSender<RDKafkaErrorCode>,
}

impl ClientContext for Traced {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        let client = self.client;
        match level {
            // Comes to `error` as well, which is enough.
            _ if facility == "FAIL" => debug!(target: "kafka", client, "{text}"),
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error => error!(target: "kafka", client, "{text}"),
            RDKafkaLogLevel::Warning => warn!(target: "kafka", client, "{text}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                info!(target: "kafka", client, "{text}");
            }
            RDKafkaLogLevel::Debug => {
                debug!(target: "kafka", client, facility, "{text}");
            }
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let client = self.client;
        let code = error
            .rdkafka_error_code()
            .unwrap_or(RDKafkaErrorCode::Unknown);
        // It comes again with every attempt, and a producer of rdkafka 0.39 passes
        // each report on twice.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.contains(&code) {
            debug!(target: "kafka", client, ?code, "{reason}");
            return;
        }
        told.push(code);
        // How long it took says nothing here.
        let reason = reason.split(" (after ").next().unwrap_or(reason);
        match code {
            // Follows another one, which says why.
            RDKafkaErrorCode::AllBrokersDown => {
                debug!(target: "kafka", client, ?code, "{reason}");
            }
            // The client tries again by itself, and may succeed.
            RDKafkaErrorCode::BrokerTransportFailure => {
                warn!(target: "kafka", client, ?code, "{reason}");
            }
            // It tries again here too, but with the same password.
            _ => error!(target: "kafka", client, ?code, "{reason}"),
        }
        // Nobody may be interested.
        let _ = self.errors.send(code);
    }
}

impl ConsumerContext for Traced {}
// ANCHOR_END: context

// ANCHOR: story
async fn order_and_listen() -> Result<()> {
    let brokers = brokers()?;
    let password = env::var(PASSWORD.0).unwrap_or_else(|_| PASSWORD.1.to_owned());
    let config = config(&brokers, &password);
    ensure_topic(&brokers, &config).await?;

    let (context, _) = context("orders");
    let producer: FutureProducer<Traced> = config.create_with_context(context)?;
    let delivery = send(&producer)?.await?;
    let delivery = delivery.map_err(|(error, _record)| error)?;
    println!(
        "right password: delivered (partition {}, offset {})",
        delivery.partition, delivery.offset
    );
    tokio::task::spawn_blocking(move || producer.flush(PATIENCE)).await??;

    let config = self::config(&brokers, "a-guess");
    let (context, mut errors) = self::context("guess");
    let producer: FutureProducer<Traced> = config.create_with_context(context)?;
    let report = send(&producer)?;
    hears(&mut errors, RDKafkaErrorCode::Authentication).await?;
    println!("wrong password: spotted, while the record still waits");
    match report
        .await?
        .map_err(|(error, _record)| error.rdkafka_error_code())
    {
        Err(Some(code)) => {
            println!("wrong password: in the end the record says {code:?}");
        }
        other => bail!("sent with a wrong password: {other:?}"),
    }

    let (context, _) = self::context("reader");
    let consumer: StreamConsumer<Traced> = config
        .clone()
        .set("group.id", "context-billing")
        .create_with_context(context)?;
    consumer.subscribe(&[TOPIC])?;
    match consumer
        .recv()
        .await
        .map_err(|error| error.rdkafka_error_code())
    {
        Err(Some(code)) => println!("wrong password: a consumer says {code:?}"),
        other => bail!("read with a wrong password: {other:?}"),
    }
    // It would leave its group, and that blocks.
    tokio::task::spawn_blocking(move || drop(consumer)).await?;

    let (context, mut errors) = self::context("lost");
    let nowhere = self::config("localhost:1", &password);
    let producer: FutureProducer<Traced> = nowhere.create_with_context(context)?;
    let _report = send(&producer)?;
    hears(&mut errors, RDKafkaErrorCode::AllBrokersDown).await?;
    println!("wrong port:     nobody is there, and the record waits for somebody");
    Ok(())
}
// ANCHOR_END: story

fn config(brokers: &str, password: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("security.protocol", "SASL_PLAINTEXT")
        .set("sasl.mechanism", "PLAIN")
        .set("sasl.username", USER)
        .set("sasl.password", password)
        // Nobody listens on the IPv6 address of localhost here, and that would be
        // an event.
        .set("broker.address.family", "v4")
        // How long a record may wait, in milliseconds. The default, 300000, is a
        // long time not to know of a wrong password. It means nothing to a
        // consumer, and librdkafka logs a warning, for the log of this example.
        .set("message.timeout.ms", "2000");
    if let Ok(debug) = env::var(DEBUG) {
        // Both are needed: what is logged, and that it is passed on.
        config.set("debug", debug);
        config.set_log_level(RDKafkaLogLevel::Debug);
    }
    config
}

fn context(client: &'static str) -> (Traced, UnboundedReceiver<RDKafkaErrorCode>) {
    let (errors, receiver) = mpsc::unbounded_channel();
    let told = Mutex::default();
    let context = Traced {
        client,
        told,
        errors,
    };
    (context, receiver)
}

/// Hands an order to the client, and does not wait.
fn send(producer: &FutureProducer<Traced>) -> Result<DeliveryFuture> {
    let record = FutureRecord::to(TOPIC).key("order-1").payload("1 kettle");
    producer
        .send_result(record)
        .map_err(|(error, _record)| error.into())
}

/// Waits until the context has been told of this error.
async fn hears(
    errors: &mut UnboundedReceiver<RDKafkaErrorCode>,
    wanted: RDKafkaErrorCode,
) -> Result<()> {
    let heard = timeout(PATIENCE, async {
        while errors.recv().await.context("the client is gone")? != wanted {}
        anyhow::Ok(())
    });
    heard
        .await
        .with_context(|| format!("no word of {wanted:?}"))?
}

/// Creates the topic, unless it is there.
async fn ensure_topic(brokers: &str, config: &ClientConfig) -> Result<()> {
    let (context, mut errors) = context("admin");
    let client: FutureProducer<Traced> = config.create_with_context(context)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asking = client.clone();
        let ask = move || asking.client().fetch_metadata(None, A_WHILE).map(drop);
        let Err(error) = tokio::task::spawn_blocking(ask).await? else {
            break;
        };
        while let Ok(code) = errors.try_recv() {
            ensure!(
                code != RDKafkaErrorCode::Authentication,
                "Kafka at {brokers} does not let {USER} in with this password; \
                 check KAFKA_PASSWORD"
            );
        }
        ensure!(
            Instant::now() < deadline,
            "no Kafka at {brokers} ({error}); start one: cargo lab run \
             kafka_client_context"
        );
    }
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = NewTopic::new(TOPIC, 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    for result in admin.create_topics([&topic], &options).await? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => bail!("cannot create the topic {name} ({code})"),
        }
    }
    Ok(())
}

/// The brokers to ask first, as `host:port` with commas between.
///
/// librdkafka accepts any text and then finds no broker, so a slip is better
/// found here.
fn brokers() -> Result<String> {
    let brokers =
        env::var("KAFKA_BROKERS").unwrap_or_else(|_| DEFAULT_BROKERS.to_owned());
    let valid = brokers.split(',').all(|broker| {
        broker.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        })
    });
    ensure!(
        valid,
        "KAFKA_BROKERS is not a list of host:port; a right one: {DEFAULT_BROKERS}"
    );
    Ok(brokers)
}
