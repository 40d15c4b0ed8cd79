//! Topics from code: create, resize, delete.
//!
//! Teaches: an administrative call has two results. The outer one says whether Kafka
//! has answered; whether it did what was asked is inside, for each topic on its own.
//! A program that looks at the outer one only believes it has a topic. Partitions
//! can be added and never taken away.
//!
//! Run, after `cargo lab up kafka`:
//!
//! ```text
//! cargo run --bin kafka_admin_topics
//! ```
//!
//! Expected output:
//!
//! ```text
//! created: admin.orders with 3 partitions
//! again:   the call is Ok, and inside of it is TopicAlreadyExists
//! mixed:   admin.returns is created, "no good" is not (InvalidTopic)
//! resized: admin.orders has 6 partitions
//! smaller: 3 partitions are refused (InvalidPartitions)
//! deleted: admin.orders and admin.returns
//! ```
//!
//! Left out on purpose: replicas, of which one server can have one; the settings of
//! topics; and that a new partition breaks the order of keys, see
//! kafka_keys_partitions.

use std::{
    collections::BTreeMap, env, process::ExitCode, sync::Arc, time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rdkafka::{
    ClientConfig,
    admin::{
        AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication,
        TopicResult,
    },
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

/// Shared with the threads for blocking calls.
type Admin = Arc<AdminClient<DefaultClientContext>>;

const DEFAULT_BROKERS: &str = "localhost:9092";
const ORDERS: &str = "admin.orders";
const RETURNS: &str = "admin.returns";

/// How long Kafka may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let admin = connect(&brokers()?).await?;
    // What an earlier run may have left.
    delete(&admin).await?;
    let orders = || topic(ORDERS, 3).set("retention.ms", "86400000");

    let results = create(&admin, &[orders()]).await?;
    results[0].clone().map_err(explained)?;
    until(&admin, ORDERS, Some(3)).await?;
    println!("created: {ORDERS} with 3 partitions");

    let results = create(&admin, &[orders()]).await?;
    let code = refused(&results[0])?;
    println!("again:   the call is Ok, and inside of it is {code:?}");

    let results = create(&admin, &[topic(RETURNS, 1), topic("no good", 1)]).await?;
    results[0].clone().map_err(explained)?;
    let code = refused(&results[1])?;
    println!("mixed:   {RETURNS} is created, \"no good\" is not ({code:?})");

    resize(&admin, 6).await?.map_err(explained)?;
    until(&admin, ORDERS, Some(6)).await?;
    println!("resized: {ORDERS} has 6 partitions");
    let code = refused(&resize(&admin, 3).await?)?;
    println!("smaller: 3 partitions are refused ({code:?})");

    delete(&admin).await?;
    println!("deleted: {ORDERS} and {RETURNS}");
    Ok(())
}
// ANCHOR_END: story

// ANCHOR: calls
fn topic(name: &str, partitions: i32) -> NewTopic<'_> {
    NewTopic::new(name, partitions, TopicReplication::Fixed(1))
}

/// How long the servers may take to do it; without it, the answer may come before
/// the topic is there.
fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(PATIENCE))
}

/// One result for each topic, in their order.
async fn create(admin: &Admin, topics: &[NewTopic<'_>]) -> Result<Vec<TopicResult>> {
    Ok(admin.create_topics(topics, &options()).await?)
}

/// How many there are to be in the end, and not how many more.
async fn resize(admin: &Admin, partitions: usize) -> Result<TopicResult> {
    let more = NewPartitions::new(ORDERS, partitions);
    let results = admin.create_partitions(&[more], &options()).await?;
    results.into_iter().next().context("no result")
}

async fn delete(admin: &Admin) -> Result<()> {
    for result in admin.delete_topics(&[ORDERS, RETURNS], &options()).await? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err(error) => return Err(explained(error)),
        }
    }
    // The answer says that it was accepted; the topic goes a moment later.
    until(admin, ORDERS, None).await?;
    until(admin, RETURNS, None).await
}

/// The error code of what should not have worked.
fn refused(result: &TopicResult) -> Result<RDKafkaErrorCode> {
    match result {
        Err((_name, code)) => Ok(*code),
        Ok(name) => bail!("{name}: not refused"),
    }
}

fn explained((name, code): (String, RDKafkaErrorCode)) -> anyhow::Error {
    anyhow!("cannot change the topic {name} ({code}); ask who may")
}
// ANCHOR_END: calls

// ANCHOR: metadata
/// All topics with the numbers of their partitions. Asked for one topic, the answer
/// could be that Kafka has just created it.
async fn topics(admin: &Admin) -> Result<BTreeMap<String, usize>> {
    let admin = Arc::clone(admin);
    let fetch = move || admin.inner().fetch_metadata(None, PATIENCE);
    // A blocking call, hence a thread of its own.
    let metadata = spawn_blocking(fetch).await??;
    let topics = metadata.topics().iter();
    Ok(topics
        .map(|topic| (topic.name().to_owned(), topic.partitions().len()))
        .collect())
}
// ANCHOR_END: metadata

/// Waits until the topic has so many partitions; `None`: until it is gone.
async fn until(admin: &Admin, topic: &str, wanted: Option<usize>) -> Result<()> {
    let start = Instant::now();
    loop {
        let topics = topics(admin).await?;
        if topics.get(topic).copied() == wanted {
            return Ok(());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{topic} has not {wanted:?} partitions after 5 s: {topics:?}"
        );
        sleep(Duration::from_millis(50)).await;
    }
}

async fn connect(brokers: &str) -> Result<Admin> {
    let admin = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()?;
    let admin = Admin::new(admin);
    topics(&admin).await.map_err(|error| {
        anyhow!("no Kafka at {brokers} ({error}); start one: cargo lab up kafka")
    })?;
    Ok(admin)
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
