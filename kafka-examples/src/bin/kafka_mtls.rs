//! Mutual TLS: a certificate is the user, and permissions decide the rest.
//!
//! Teaches: with `ssl.certificate.pem` and `ssl.key.pem` a client shows who it is;
//! Kafka takes the user from the certificate. What that user may not do fails by
//! itself, and not the connection: `TopicAuthorizationFailed` from a producer,
//! `GroupAuthorizationFailed` from a consumer.
//!
//! Run, with a Kafka of its own, or after `cargo run --bin make_certs -- certs`
//! and the commands in `kafka-examples/config/kafka_mtls.properties`:
//!
//! ```text
//! cargo lab run kafka_mtls    # makes certificates, starts Kafka, runs:
//! cargo run --bin kafka_mtls --features tls
//! ```
//!
//! Expected output:
//!
//! ```text
//! connected: over TLS, with a certificate of our own
//! allowed:   mtls.orders has order-1 (partition 0, offset <offset>)
//! allowed:   mtls-billing has read order-1
//! denied:    mtls.refunds, TopicAuthorizationFailed
//! denied:    mtls-audit, GroupAuthorizationFailed
//! ```
//!
//! Left out on purpose: how certificates get to the machines and are replaced
//! before they expire, and certificates for the brokers among themselves.

use std::{
    env, fs,
    process::ExitCode,
    sync::mpsc::{self, Sender},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig, ClientContext, Message as _,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{CommitMode, Consumer as _, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{
        FutureProducer, FutureRecord, Producer as _, future_producer::Delivery,
    },
};

const DEFAULT_BROKERS: &str = "localhost:9092";
const ORDERS: &str = "mtls.orders";
const BILLING: &str = "mtls-billing";
/// Nobody has permitted these two.
const REFUNDS: &str = "mtls.refunds";
const AUDIT: &str = "mtls-audit";
/// The files and the variables that name others; an empty one leaves it out.
const CA: (&str, &str) = ("KAFKA_CA", "certs/ca.pem");
const CERT: (&str, &str) = ("KAFKA_CERT", "certs/client.pem");
const KEY: (&str, &str) = ("KAFKA_KEY", "certs/client.key");

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look meanwhile whether it is refused.
const A_WHILE: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match order_by_certificate().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn order_by_certificate() -> Result<()> {
    let brokers = brokers()?;
    let config = secured(&brokers)?;
    let (at, of_producer) = (brokers.clone(), config.clone());
    // It blocks, hence a thread of its own.
    let connected = tokio::task::spawn_blocking(move || connect(&at, of_producer));
    let producer = connected.await??;
    let shown = path(CERT).map_or("no certificate", |_| "a certificate");
    println!("connected: over TLS, with {shown} of our own");

    ensure_topic(&config).await?;
    let sent = send(&producer, ORDERS).await;
    let Delivery {
        partition, offset, ..
    } = permitted(ORDERS, sent)?;
    println!(
        "allowed:   {ORDERS} has order-1 (partition {partition}, offset {offset})"
    );
    permitted(BILLING, read(&config, BILLING, offset).await)?;
    println!("allowed:   {BILLING} has read order-1");

    let denial = denied(send(&producer, REFUNDS).await)?;
    println!("denied:    {REFUNDS}, {denial:?}");
    let denial = denied(read(&config, AUDIT, offset).await)?;
    println!("denied:    {AUDIT}, {denial:?}");
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
        .set("security.protocol", "SSL");
    // As text: it may come from a store of secrets and never be in a file. By
    // path, the same settings end with `.location`.
    for (setting, name) in [
        ("ssl.ca.pem", CA),
        ("ssl.certificate.pem", CERT),
        ("ssl.key.pem", KEY),
    ] {
        if let Some(text) = file(name)? {
            config.set(setting, text);
        }
    }
    Ok(config)
}
// ANCHOR_END: secured

// ANCHOR: denied
async fn send(
    producer: &FutureProducer<Reports>,
    topic: &str,
) -> Result<Delivery, KafkaError> {
    let record = FutureRecord::to(topic).key("order-1").payload("1 kettle");
    let sent = producer.send(record, PATIENCE).await;
    sent.map_err(|(error, _record)| error)
}

/// As a member of the group, reads up to the record at this offset.
async fn read(
    config: &ClientConfig,
    group: &str,
    offset: i64,
) -> Result<(), KafkaError> {
    let consumer: StreamConsumer = config
        .clone()
        .set("group.id", group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .create()?;
    consumer.subscribe(&[ORDERS])?;
    while consumer.recv().await?.offset() < offset {}
    // To commit and to leave the group both block.
    let commit = move || consumer.commit_consumer_state(CommitMode::Sync);
    let committed = tokio::task::spawn_blocking(commit).await;
    committed.unwrap_or(Err(KafkaError::Canceled))
}

/// Neither is an error of the connection: that stays, and other topics and groups
/// go on.
fn denial(error: &KafkaError) -> Option<RDKafkaErrorCode> {
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        _ => error.rdkafka_error_code(),
    };
    let denials = [
        RDKafkaErrorCode::TopicAuthorizationFailed,
        RDKafkaErrorCode::GroupAuthorizationFailed,
    ];
    code.filter(|code| denials.contains(code))
}

fn denied<T>(result: Result<T, KafkaError>) -> Result<RDKafkaErrorCode> {
    match result.map_err(|error| denial(&error).ok_or(error)) {
        Err(Ok(denial)) => Ok(denial),
        Err(Err(error)) => Err(error.into()),
        Ok(_) => bail!(
            "Kafka permits everything; start one that does not: cargo lab run \
             kafka_mtls"
        ),
    }
}

fn permitted<T>(name: &str, result: Result<T, KafkaError>) -> Result<T> {
    result.map_err(|error| match denial(&error) {
        Some(_) => anyhow!(
            "Kafka does not permit {name} to the user of this certificate; how to: \
             kafka-examples/config/kafka_mtls.properties"
        ),
        None => error.into(),
    })
}
// ANCHOR_END: denied

// ANCHOR: connect
/// Passes on what librdkafka reports of its own accord.
struct Reports(Sender<(RDKafkaErrorCode, String)>);

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            // Nobody listens any more once the producer is connected.
            let _ = self.0.send((code, reason.to_owned()));
        }
    }
}

/// A producer that has shown its certificate. Left to itself it would go on
/// trying, and its records would fail when their time is up.
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
             kafka_mtls"
        );
    }
    Ok(producer)
}
// ANCHOR_END: connect

// ANCHOR: explained
/// What to do about it, in one line, if another try would not mend it.
fn explained(code: RDKafkaErrorCode, reason: &str) -> Option<Error> {
    // A report begins with `ssl://localhost:9092/bootstrap: `.
    let place = reason.split_once("://")?.1.split('/').next()?;
    let (host, _port) = place.rsplit_once(':')?;
    if code == RDKafkaErrorCode::SSL {
        // librdkafka does not tell which of the three it is; OpenSSL's own tool
        // does.
        return Some(anyhow!(
            "the certificate of Kafka at {place} does not hold: by another \
             authority than KAFKA_CA, for another host, or expired; which: openssl \
             s_client -connect {place} -verify_hostname {host}{}",
            path(CA).map_or_else(String::new, |ca| format!(" -CAfile {ca}"))
        ));
    }
    // What Kafka has against us it says as a TLS alert: the same one for no
    // certificate and for one by a foreign authority.
    if reason.contains("SSL alert") {
        return Some(match path(CERT) {
            None => anyhow!(
                "Kafka at {place} asks for a certificate; set KAFKA_CERT and KAFKA_KEY"
            ),
            Some(certificate) => anyhow!(
                "Kafka at {place} does not accept {certificate}; is it by an \
                 authority that Kafka trusts, for a client, and not expired?"
            ),
        });
    }
    // Other reports, that nobody listens on the IPv6 address of localhost for
    // example, are not the end.
    reason.contains("connecting to a PLAINTEXT").then(|| {
        anyhow!(
            "Kafka at {place} speaks no TLS; start one that does: cargo lab run \
             kafka_mtls"
        )
    })
}
// ANCHOR_END: explained

fn not_created(error: KafkaError) -> Error {
    match error.to_string() {
        text if text.contains("OpenSSL not available") => anyhow!(
            "built without TLS; run: cargo run --bin kafka_mtls --features tls"
        ),
        _ => error.into(),
    }
}

/// Creates the topic, unless it is there.
async fn ensure_topic(config: &ClientConfig) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = NewTopic::new(ORDERS, 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    for result in admin.create_topics([&topic], &options).await? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return permitted(&name, Err(KafkaError::AdminOp(code)));
            }
        }
    }
    Ok(())
}

/// The text of a file, unless it is left out.
fn file(name: (&str, &str)) -> Result<Option<String>> {
    let Some(path) = path(name) else {
        return Ok(None);
    };
    let text = fs::read_to_string(&path).with_context(|| {
        format!("cannot read {path}; make it: cargo run --bin make_certs -- certs")
    })?;
    Ok(Some(text))
}

fn path((name, default): (&str, &str)) -> Option<String> {
    let path = env::var(name).unwrap_or_else(|_| default.to_owned());
    Some(path).filter(|path| !path.is_empty())
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
