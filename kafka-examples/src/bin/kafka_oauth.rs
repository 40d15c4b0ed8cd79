//! OAUTHBEARER: a token instead of a password, and a new one in time.
//!
//! Teaches: `ENABLE_REFRESH_OAUTH_TOKEN` makes librdkafka ask
//! `generate_oauth_token` for a token before it connects, and for the next one
//! when four fifths of its time are over. Kafka takes the user from the token and
//! ends a connection whose token has expired.
//!
//! Run, with a Kafka of its own, or after `cargo run --bin make_certs -- certs`
//! and the commands in `kafka-examples/config/kafka_oauth.properties`:
//!
//! ```text
//! cargo lab run kafka_oauth    # makes certificates, starts Kafka, runs:
//! cargo run --bin kafka_oauth --features tls
//! ```
//!
//! Expected output:
//!
//! ```text
//! token 1:   for orders
//! delivered: order-1 (partition 0, offset <offset>)
//! token 2:   for orders
//! delivered: order-2 (partition 0, offset <offset>)
//! token 3:   for orders
//! delivered: order-3 (partition 0, offset <offset>)
//! denied:    oauth.refunds, TopicAuthorizationFailed
//! ```
//!
//! Left out on purpose: the identity provider. The token here is one that nobody
//! has signed, unless `KAFKA_TOKEN_FILE` names a file with one.

use std::{
    env, fs,
    path::Path,
    process::ExitCode,
    sync::mpsc::{self, Receiver, Sender},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use data_encoding::BASE64URL_NOPAD;
use rdkafka::{
    ClientConfig, ClientContext,
    client::OAuthToken,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{
        FutureProducer, FutureRecord, Producer as _, future_producer::Delivery,
    },
};
use serde_json::{Value, json};

const DEFAULT_BROKERS: &str = "localhost:9092";
const ORDERS: &str = "oauth.orders";
/// Nobody has permitted this one.
const REFUNDS: &str = "oauth.refunds";
const USER: &str = "orders";
/// The variable, and the file for the Kafka of this example; an empty name leaves
/// the choice of whom to trust to the system.
const CA: (&str, &str) = ("KAFKA_CA", "certs/ca.pem");
/// Where somebody else keeps a fresh token, as Kubernetes does for a service.
const TOKEN_FILE: &str = "KAFKA_TOKEN_FILE";

/// Of a token, and short, so that you can see the next one; an hour is usual.
const LIFETIME: Duration = Duration::from_secs(4);
/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look meanwhile whether it is refused.
const A_WHILE: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> ExitCode {
    match order_with_tokens().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn order_with_tokens() -> Result<()> {
    let brokers = brokers()?;
    let config = secured(&brokers)?;
    // It blocks, hence a thread of its own.
    let connected = tokio::task::spawn_blocking(move || connect(&brokers, config));
    let (producer, tokens) = connected.await??;
    for number in 1..=3 {
        let next = || tokens.recv_timeout(2 * LIFETIME);
        let user = tokio::task::block_in_place(next);
        let user = user.with_context(|| format!("no token {number} in time"))?;
        println!("token {number}:   for {user}");
        // The connection may be the one that the first token has opened.
        let key = format!("order-{number}");
        let sent = send(&producer, ORDERS, &key).await;
        let sent = sent.map_err(|error| not_sent(&producer, &error))?;
        let (partition, offset) = (sent.partition, sent.offset);
        println!("delivered: {key} (partition {partition}, offset {offset})");
    }
    match send(&producer, REFUNDS, "order-1").await {
        Err(KafkaError::MessageProduction(code)) => {
            println!("denied:    {REFUNDS}, {code:?}");
        }
        other => bail!("{REFUNDS} is not denied: {other:?}"),
    }
    tokio::task::spawn_blocking(move || producer.flush(PATIENCE)).await??;
    Ok(())
}
// ANCHOR_END: story

/// A user who may write nowhere is not even given a number for idempotence. That
/// ends the producer for good, and its records only say that they were thrown away.
fn not_sent(producer: &FutureProducer<Workload>, error: &KafkaError) -> Error {
    let fatal = producer.client().fatal_error().map(|(code, _reason)| code);
    match fatal.or(error.rdkafka_error_code()) {
        Some(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed,
        ) => anyhow!(
            "Kafka does not permit {ORDERS} to the user of this token; how to: \
             kafka-examples/config/kafka_oauth.properties"
        ),
        _ => anyhow!("not delivered to {ORDERS}: {error}"),
    }
}

async fn send(
    producer: &FutureProducer<Workload>,
    topic: &str,
    key: &str,
) -> Result<Delivery, KafkaError> {
    let record = FutureRecord::to(topic).key(key).payload("1 kettle");
    let sent = producer.send(record, PATIENCE).await;
    sent.map_err(|(error, _record)| error)
}

// ANCHOR: token
struct Workload {
    /// The user of each token that was handed over.
    tokens: Sender<String>,
    reports: Sender<(RDKafkaErrorCode, String)>,
}

impl ClientContext for Workload {
    // Without this the method below is never called, and nobody gets in.
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    /// Runs on the thread that serves delivery reports: what asks a server here
    /// needs a short time limit. After an error librdkafka asks again in 10 s.
    fn generate_oauth_token(
        &self,
        _config: Option<&str>,
    ) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        let token = fetch_token()?;
        let claims = claims(&token)?;
        let user = claims["sub"].as_str().context("the token is for nobody")?;
        let end = claims["exp"].as_i64().context("the token never ends")?;
        // Nobody listens any more once the last order is sent.
        let _ = self.tokens.send(user.to_owned());
        Ok(OAuthToken {
            principal_name: user.to_owned(),
            // A point in time, in spite of the name.
            lifetime_ms: end * 1000,
            token,
        })
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            // Nobody listens any more once the producer has logged in.
            let _ = self.reports.send((code, reason.to_owned()));
        }
    }
}

/// From a file, or one that says the same as a real one, without a signature.
fn fetch_token() -> Result<String> {
    if let Ok(path) = env::var(TOKEN_FILE) {
        let token = fs::read_to_string(&path);
        let token = token.with_context(|| format!("no token in {path}"))?;
        return Ok(token.trim().to_owned());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let end = (now + LIFETIME).as_secs();
    let parts = [
        json!({"alg": "none"}),
        json!({"sub": USER, "iat": now.as_secs(), "exp": end}),
    ];
    let [head, claims] = parts.map(|part| part.to_string());
    let encoded = |part: String| BASE64URL_NOPAD.encode(part.as_bytes());
    Ok(format!("{}.{}.", encoded(head), encoded(claims)))
}

/// What a token claims. It is for Kafka to find out whether that is true.
fn claims(token: &str) -> Result<Value> {
    let claims = token
        .split('.')
        .nth(1)
        .context("not a token of three parts")?;
    let claims = BASE64URL_NOPAD.decode(claims.as_bytes())?;
    Ok(serde_json::from_slice(&claims)?)
}
// ANCHOR_END: token

fn secured(brokers: &str) -> Result<ClientConfig> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("security.protocol", "SASL_SSL")
        .set("sasl.mechanism", "OAUTHBEARER")
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", "5000");
    if let Some(ca) = given_ca() {
        ensure!(
            Path::new(&ca).is_file(),
            "cannot read {ca}; make it: cargo run --bin make_certs -- certs"
        );
        config.set("ssl.ca.location", ca);
    }
    Ok(config)
}

/// A producer that has logged in, and the users of its tokens.
fn connect(
    brokers: &str,
    config: ClientConfig,
) -> Result<(FutureProducer<Workload>, Receiver<String>)> {
    let (tokens, made) = mpsc::channel();
    let (sender, reports) = mpsc::channel();
    let context = Workload {
        tokens,
        reports: sender,
    };
    let producer: FutureProducer<Workload> =
        config.create_with_context(context).map_err(not_created)?;
    let started = Instant::now();
    while let Err(error) = producer.client().fetch_metadata(None, A_WHILE) {
        let mut reports = reports.try_iter();
        let refusal = reports.find_map(|(code, reason)| explained(code, &reason));
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "no Kafka at {brokers} ({error}); start one: cargo lab run kafka_oauth"
        );
    }
    Ok((producer, made))
}

// ANCHOR: explained
/// What to do about it, in one line, if another try would not mend it.
fn explained(code: RDKafkaErrorCode, reason: &str) -> Option<Error> {
    if let Some(reason) = reason.strip_prefix("Failed to acquire SASL OAUTHBEARER ")
    {
        return Some(anyhow!("{reason}; a fresh one is wanted in {TOKEN_FILE}"));
    }
    // Other reports begin with `sasl_ssl://localhost:9092/bootstrap: `.
    let place = reason.split_once("://")?.1.split('/').next()?;
    let (host, _port) = place.rsplit_once(':')?;
    match code {
        // It tells nobody why; that would help whoever makes tokens up.
        RDKafkaErrorCode::Authentication => Some(anyhow!(
            "Kafka at {place} does not accept the token; is it from an identity \
             provider that Kafka trusts?"
        )),
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
             kafka_oauth"
        )),
        // That nobody listens on the IPv6 address of localhost, for example.
        _ => None,
    }
}
// ANCHOR_END: explained

fn not_created(error: KafkaError) -> Error {
    match error.to_string() {
        text if text.contains("OpenSSL not available") => anyhow!(
            "built without TLS; run: cargo run --bin kafka_oauth --features tls"
        ),
        _ => error.into(),
    }
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
