//! SASL/SCRAM: a user and a password, over TLS.
//!
//! Teaches: four settings make any client of librdkafka log in: the protocol, the
//! mechanism, user and password; `ssl.ca.location` says whom to trust. If they do
//! not fit, a producer only says that time is up. The reason comes through
//! `ClientContext::error`, so an example that can explain a failure listens there.
//!
//! Run, with a Kafka of its own, or after `cargo run --bin make_certs -- certs`
//! and the commands in `kafka-examples/config/kafka_sasl_scram.properties`:
//!
//! ```text
//! cargo lab run kafka_sasl_scram    # makes certificates, starts Kafka, runs:
//! cargo run --bin kafka_sasl_scram --features tls
//! ```
//!
//! Expected output:
//!
//! ```text
//! logged in: as orders, SCRAM-SHA-512 over TLS
//! delivered: order-1 = 1 kettle (partition 0, offset <offset>)
//! ```
//!
//! Left out on purpose: permissions, which are in `kafka_mtls`; here a user may do
//! everything. And how a password gets to the program; an environment variable is
//! the least that one should do.

use std::{
    env,
    path::Path,
    process::ExitCode,
    sync::mpsc::{self, Sender},
    time::{Duration, Instant},
};

use anyhow::{Error, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord, Producer as _},
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const TOPIC: &str = "scram.orders";
const MECHANISM: &str = "SCRAM-SHA-512";
/// The variables, and what they are for the Kafka of this example. An empty file
/// name leaves the choice of whom to trust to the system.
const USER: (&str, &str) = ("KAFKA_USER", "orders");
const PASSWORD: (&str, &str) = ("KAFKA_PASSWORD", "orders-password");
const CA: (&str, &str) = ("KAFKA_CA", "certs/ca.pem");

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look meanwhile whether it is refused.
const A_WHILE: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match order_as_a_user().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn order_as_a_user() -> Result<()> {
    let brokers = brokers()?;
    let (config, at) = (secured(&brokers)?, brokers.clone());
    // It blocks, hence a thread of its own.
    let connected = tokio::task::spawn_blocking(move || connect(&at, config));
    let producer = connected.await??;
    println!("logged in: as {}, {MECHANISM} over TLS", variable(USER));
    ensure_topic(&secured(&brokers)?).await?;

    let record = FutureRecord::to(TOPIC).key("order-1").payload("1 kettle");
    let delivery = producer.send(record, PATIENCE).await;
    let delivery = delivery
        .map_err(|(error, _record)| anyhow!("not delivered to {TOPIC}: {error}"))?;
    println!(
        "delivered: order-1 = 1 kettle (partition {}, offset {})",
        delivery.partition, delivery.offset
    );
    tokio::task::spawn_blocking(move || producer.flush(PATIENCE)).await??;
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: secured
/// What producers, consumers and admin clients have in common here.
fn secured(brokers: &str) -> Result<ClientConfig> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        // SASL_PLAINTEXT would do the same without TLS. The password would not
        // be seen, as SCRAM never sends it, but every record would.
        .set("security.protocol", "SASL_SSL")
        .set("sasl.mechanism", MECHANISM)
        .set("sasl.username", variable(USER))
        .set("sasl.password", variable(PASSWORD));
    if let Some(ca) = given_ca() {
        ensure!(
            Path::new(&ca).is_file(),
            "cannot read {ca}; make it: cargo run --bin make_certs -- certs"
        );
        config.set("ssl.ca.location", ca);
    }
    Ok(config)
}
// ANCHOR_END: secured

// ANCHOR: connect
/// Passes on what librdkafka reports of its own accord.
struct Reports(Sender<(RDKafkaErrorCode, String)>);

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            // Nobody listens any more once the producer has logged in.
            let _ = self.0.send((code, reason.to_owned()));
        }
    }
}

/// A producer that has logged in. Left to itself it would go on trying, with the
/// same password, and its records would fail when their time is up.
fn connect(
    brokers: &str,
    mut config: ClientConfig,
) -> Result<FutureProducer<Reports>> {
    let (sender, reports) = mpsc::channel();
    let producer: FutureProducer<Reports> = config
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000")
        .create_with_context(Reports(sender))
        .map_err(not_created)?;
    let started = Instant::now();
    while let Err(error) = producer.client().fetch_metadata(None, A_WHILE) {
        let mut reports = reports.try_iter();
        let refusal = reports.find_map(|(code, reason)| explained(code, &reason));
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "no Kafka at {brokers} ({error}); start one: cargo lab run \
             kafka_sasl_scram"
        );
    }
    Ok(producer)
}
// ANCHOR_END: connect

// ANCHOR: explained
/// What to do about it, in one line, if another try would not mend it.
fn explained(code: RDKafkaErrorCode, reason: &str) -> Option<Error> {
    // A report begins with `sasl_ssl://localhost:9092/bootstrap: `.
    let place = reason.split_once("://")?.1.split('/').next()?;
    let (host, _port) = place.rsplit_once(':')?;
    let user = variable(USER);
    match code {
        RDKafkaErrorCode::Authentication if reason.contains("credentials") => {
            Some(anyhow!(
                "Kafka at {place} does not let {user} in with this password; check \
                 KAFKA_USER and KAFKA_PASSWORD"
            ))
        }
        RDKafkaErrorCode::Authentication => {
            Some(anyhow!("Kafka at {place} does not let {user} in: {reason}"))
        }
        // librdkafka does not tell which of the three it is; OpenSSL's own tool
        // does.
        RDKafkaErrorCode::SSL => Some(anyhow!(
            "the certificate of Kafka at {place} does not hold: by another \
             authority than KAFKA_CA, for another host, or expired; which: openssl \
             s_client -connect {place} -verify_hostname {host}{}",
            given_ca().map_or_else(String::new, |ca| format!(" -CAfile {ca}"))
        )),
        _ if reason.contains("connecting to a PLAINTEXT") => Some(anyhow!(
            "Kafka at {place} speaks no TLS; start one that does: cargo lab run \
             kafka_sasl_scram"
        )),
        // That nobody listens on the IPv6 address of localhost, for example.
        _ => None,
    }
}
// ANCHOR_END: explained

fn not_created(error: KafkaError) -> Error {
    match error.to_string() {
        text if text.contains("OpenSSL not available") => anyhow!(
            "built without TLS; run: cargo run --bin kafka_sasl_scram --features tls"
        ),
        _ => error.into(),
    }
}

/// Creates the topic, unless it is there.
async fn ensure_topic(config: &ClientConfig) -> Result<()> {
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

fn given_ca() -> Option<String> {
    Some(variable(CA)).filter(|path| !path.is_empty())
}

fn variable((name, default): (&str, &str)) -> String {
    env::var(name).unwrap_or_else(|_| default.to_owned())
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
