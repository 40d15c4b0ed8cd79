//! Instances of a service share its requests, and NATS can tell who they are and
//! what they have done.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, Request, service::Stats};
use futures_lite::StreamExt as _;
use tests::{Example, observe, wait, wait::DEADLINE};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const SERVICE: &str = env!("CARGO_BIN_EXE_nats_service");
const SUBJECT: &str = "shop.stock.check";

/// The name of the service belongs to the example.
static TURN: Mutex<()> = Mutex::const_new(());

/// What the first `count` instances that answer say about themselves.
async fn statistics(observer: &Client, count: usize) -> Result<Vec<Stats>> {
    let inbox = observer.new_inbox();
    let mut answers = observer.subscribe(inbox.clone()).await?;
    observer
        .publish_with_reply("$SRV.STATS.shop-stock", inbox, "".into())
        .await?;
    let mut statistics = Vec::new();
    while statistics.len() < count {
        let answer = timeout(DEADLINE, answers.next()).await?;
        let answer = answer.context("the subscription ended")?;
        ensure!(answer.status.is_none(), "only {}", statistics.len());
        statistics.push(serde_json::from_slice(&answer.payload)?);
    }
    Ok(statistics)
}

#[tokio::test]
async fn the_story_finds_and_counts_its_instances() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    for _run in 0..2 {
        let ended = Example::start(SERVICE, &[], nats)?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    Ok(())
}

#[tokio::test]
async fn every_request_is_answered_and_counted_once() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut instances = Vec::new();
    for _ in 0..2 {
        let mut instance = Example::start(SERVICE, &["instance"], nats)?;
        instance.prints("ready: shop-stock 1.0.0").await?;
        instances.push(instance);
    }

    let mut refused = 0;
    for number in 0..40 {
        let sku = if number % 4 == 0 { "sku-9" } else { "sku-1" };
        let answer = observe::nats::request(&observer, SUBJECT, sku).await?;
        let headers = answer.headers.unwrap_or_default();
        match headers.get("Nats-Service-Error-Code") {
            Some(code) => {
                assert_eq!((sku, code.as_str()), ("sku-9", "404"));
                assert_eq!(
                    headers.get("Nats-Service-Error").map(|text| text.as_str()),
                    Some("unknown sku")
                );
                refused += 1;
            }
            None => assert_eq!(&answer.payload[..], b"12 in stock"),
        }
    }
    assert_eq!(refused, 10);

    let statistics = statistics(&observer, 2).await?;
    let ids: HashSet<_> = statistics.iter().map(|stats| &stats.id).collect();
    assert_eq!(ids.len(), 2, "two instances with ids of their own");
    let endpoints: Vec<_> = statistics
        .iter()
        .flat_map(|stats| &stats.endpoints)
        .collect();
    let sum = |count: fn(&async_nats::service::endpoint::Stats) -> usize| {
        endpoints
            .iter()
            .map(|endpoint| count(endpoint))
            .sum::<usize>()
    };
    assert_eq!(sum(|endpoint| endpoint.requests), 40);
    assert_eq!(sum(|endpoint| endpoint.errors), 10);
    // Shared: with forty requests, one instance alone would be no accident.
    assert!(endpoints.iter().all(|endpoint| endpoint.requests > 0));

    for instance in instances {
        instance.terminate().await?;
        instance.end().await?.succeeded()?;
    }
    Ok(())
}

#[tokio::test]
async fn an_instance_that_stops_leaves_its_requests_to_the_other() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut first = Example::start(SERVICE, &["instance"], nats)?;
    first.prints("ready:").await?;
    let mut second = Example::start(SERVICE, &["instance"], nats)?;
    second.prints("ready:").await?;
    first.interrupt().await?;
    first.end().await?.succeeded()?;

    for _ in 0..20 {
        // A question that the server handed to the first one in the moment when
        // it left is lost with its connection; asking again is for the asker.
        let answer = wait::until("an answer", async || {
            let question = Request::new().payload("sku-2".into());
            let question = question.timeout(Some(Duration::from_secs(5)));
            Ok(observer.send_request(SUBJECT, question).await?)
        })
        .await?;
        assert_eq!(&answer.payload[..], b"0 in stock");
    }
    let left = &statistics(&observer, 1).await?[0];
    assert_eq!(left.endpoints[0].requests, 20);
    second.interrupt().await?;
    second.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn a_message_without_a_reply_subject_ends_no_instance() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut instance = Example::start(SERVICE, &["instance"], nats)?;
    instance.prints("ready:").await?;
    observer.publish(SUBJECT, "sku-1".into()).await?;
    let answer = observe::nats::request(&observer, SUBJECT, "sku-1").await?;
    assert_eq!(&answer.payload[..], b"12 in stock");
    instance.terminate().await?;
    instance.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn a_question_without_an_instance_is_one_line() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    // The instances of an earlier test may leave a moment after their program.
    wait::until("no instance", async || {
        let ended = Example::start(SERVICE, &["ask"], nats)?.end().await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("no instance of shop-stock"), "{line}");
        ended.printed_what_the_book_shows("alone")
    })
    .await
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let ended = Example::start(SERVICE, &["nobody"], ("NATS_URL", "nats://x"))?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_service"));
    Ok(())
}
