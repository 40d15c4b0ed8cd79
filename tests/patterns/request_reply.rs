//! Each question gets its own answer, and nobody works on one that is no longer waited
//! for.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::broker::Broker;
use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tests::{Example, observe};
use tokio::sync::Mutex;

use crate::common::Pattern;

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_request_reply_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_request_reply_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_request_reply_nats"),
    topics: &[
        ("price-requests", "price-servers"),
        ("price-replies", "price-callers"),
    ],
    queues: &["price.requests"],
    streams: &[],
};

/// Queue, topics and subject belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_answer_each_question() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// Two clients with a hundred questions each, and two servers that share them. The
/// clients compare each answer with its question.
#[tokio::test]
async fn two_servers_answer_two_clients() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let serve = || Example::start(binary, &["serve"], variable);
        let mut servers = [serve()?, serve()?];
        for server in &mut servers {
            server.prints("ready:").await?;
        }
        let mut rounds = 0;
        loop {
            let ask = || Example::start(binary, &["ask", "100"], variable);
            let clients = [ask()?, ask()?];
            for client in clients {
                let ended = client.end().await?.succeeded()?;
                let expected = "answered: 100 of 100, each with its own answer\n";
                assert_eq!(ended.stdout, expected, "{broker:?}");
            }
            rounds += 1;
            for server in &mut servers {
                server.pass_over();
            }
            // Kafka's second server has no partitions before the group has agreed.
            if servers.iter().all(|server| server.has_printed("answered:")) {
                break;
            }
            ensure!(rounds < 50, "{broker:?}: one of them answers nobody");
        }
        let mut answered = Vec::new();
        for server in servers {
            server.interrupt().await?;
            let ended = server.end().await?.succeeded()?;
            answered.push(ended.stdout.matches("answered:").count());
        }
        // On Kafka a partition that moves may bring a question to both.
        let sum = answered.iter().sum::<usize>();
        ensure!(sum >= 200 * rounds, "{broker:?} {answered:?}");
        ensure!(
            sum == 200 * rounds || broker == Broker::Kafka,
            "{answered:?}"
        );
    }
    Ok(())
}

/// Only NATS says that nobody answers. The question of the others lies there, and is
/// too late when a server comes: RabbitMQ drops it, on Kafka the server does.
#[tokio::test]
async fn without_a_server_nobody_waits_for_ever() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let started = Instant::now();
        let ended = Example::start(binary, &["ask", "1"], variable)?
            .end()
            .await?;
        let line = ended.one_line_error()?;
        if broker == Broker::Nats {
            ensure!(line == "error: nobody answers to price.requests", "{line}");
            ensure!(started.elapsed() < Duration::from_secs(4), "that took long");
            continue;
        }
        ensure!(line.starts_with("error: no answer from price"), "{line}");
        let mut server = Example::start(binary, &["serve"], variable)?;
        server.prints("ready:").await?;
        if broker == Broker::Kafka {
            server.prints("skipped:  nobody waits any more").await?;
        }
        server.interrupt().await?;
        let ended = server.end().await?.succeeded()?;
        ensure!(!ended.stdout.contains("answered:"), "{}", ended.stdout);
        if broker == Broker::RabbitMq {
            ensure!(!ended.stdout.contains("skipped:"), "{}", ended.stdout);
            let ready =
                observe::rabbitmq::ready(variable.1, "price.requests").await?;
            assert_eq!(ready, 0);
        }
    }
    Ok(())
}

/// A server that hangs is no server that is missing: PATTERN.nats, too, can only wait.
#[tokio::test]
async fn control_a_server_that_hangs_is_a_time_out() -> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::Nats).await?;
    let mut server = Example::start(PATTERN.nats, &["serve"], variable)?;
    server.prints("ready:").await?;
    server.signal("STOP").await?;
    let ended = Example::start(PATTERN.nats, &["ask", "1"], variable)?
        .end()
        .await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.starts_with("error: no answer from price.requests"),
        "{line}"
    );
    server.signal("CONT").await?;
    // Its answer would come too late, and it knows.
    server.prints("skipped:  nobody waits any more").await?;
    server.interrupt().await?;
    server.end().await?.succeeded()?;
    Ok(())
}

/// Whatever stands in the header of a question, the server goes on.
#[tokio::test]
async fn a_question_without_a_way_back_ends_no_server() -> Result<()> {
    let _turn = TURN.lock().await;
    let variable = PATTERN.fresh(Broker::Kafka).await?;
    let mut server = Example::start(PATTERN.kafka, &["serve"], variable)?;
    server.prints("ready:").await?;
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", variable.1)
        .create()?;
    for (partition, said) in [
        ("", "skipped:  nobody wants an answer"),
        ("-1", "skipped:  nobody wants an answer"),
        ("99", "skipped:  there is no such partition"),
        ("0", "answered: a question"),
    ] {
        let header = |key, value| Header {
            key,
            value: Some(value),
        };
        let headers = OwnedHeaders::new()
            .insert(header("reply-partition", partition))
            .insert(header("correlation-id", "one"));
        let record: FutureRecord<'_, (), _> = FutureRecord::to("price-requests")
            .headers(headers)
            .payload("not a question");
        let sent = producer.send(record, Duration::from_secs(10)).await;
        sent.map_err(|(error, _record)| error)?;
        server.prints(said).await?;
    }
    server.interrupt().await?;
    server.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 3] = [&["ask"], &["ask", "many"], &["serve", "1"]];
    PATTERN.says_what_is_wrong(&wrong).await
}
