//! What members give up and get when others come and go: by word of the members, and
//! by who reads what another client writes into each partition.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use tests::{Example, example::Ended, observe, wait};

use crate::{kafka, ran_twice};

const COOPERATIVE: &str = env!("CARGO_BIN_EXE_kafka_cooperative_rebalance");
const NEXT_GEN: &str = env!("CARGO_BIN_EXE_kafka_next_gen_rebalance");
const STATIC: &str = env!("CARGO_BIN_EXE_kafka_static_membership");

/// The numbers in a line such as `gets:     partitions 0 1`.
fn partitions(line: &str) -> Result<BTreeSet<i32>> {
    let (_, numbers) = line.split_once("partitions ").context("no partitions")?;
    let numbers = numbers.split_whitespace().map(str::parse);
    Ok(numbers.collect::<Result<_, _>>()?)
}

/// Writes one record into each of the four partitions.
async fn write_one_each(address: &str, topic: &str, what: &str) -> Result<()> {
    for partition in 0..4 {
        let payload = format!("{what}-{partition}");
        observe::kafka::produce_to(address, topic, partition, &payload, None)
            .await?;
    }
    Ok(())
}

/// Waits until the worker has read these, and no others of that name.
async fn reads(worker: &mut Example, what: &str, own: &BTreeSet<i32>) -> Result<()> {
    let mut read = BTreeSet::new();
    for _record in own {
        let line = worker.prints(&format!("read:     {what}-")).await?;
        let (_, number) = line.rsplit_once(' ').context("no number")?;
        read.insert(number.parse()?);
    }
    assert_eq!(&read, own);
    Ok(())
}

/// How often a line with these words was printed.
fn count(ended: &Ended, words: &str) -> usize {
    let lines = ended.stdout.lines();
    lines.filter(|line| line.contains(words)).count()
}

async fn stopped(worker: Example) -> Result<Ended> {
    worker.interrupt().await?;
    worker.end().await?.succeeded()
}

/// Two workers share four partitions. Returns the first worker's word of what it gave
/// up for the second.
async fn two_workers(
    example: &'static str,
    words: &[&str],
    topic: &str,
) -> Result<BTreeSet<i32>> {
    let kafka = kafka().await?;
    // What was written before is not read again.
    observe::kafka::forget(kafka.1, topic, "none").await?;
    let mut first = Example::start(example, words, kafka)?;
    let all = partitions(&first.prints("gets:").await?)?;
    assert_eq!(all, BTreeSet::from([0, 1, 2, 3]));
    let mut second = Example::start(example, words, kafka)?;
    let given_up = partitions(&first.prints("gives up:").await?)?;
    let other = partitions(&second.prints("gets:").await?)?;
    assert_eq!(other.len(), 2);
    if given_up.len() > 2 {
        // Some of it came back.
        first.prints("gets:").await?;
    }
    write_one_each(kafka.1, topic, "shared").await?;
    reads(&mut second, "shared", &other).await?;
    reads(&mut first, "shared", &(&all - &other)).await?;

    let second = stopped(second).await?;
    assert_eq!(count(&second, "read:"), 2);
    first.prints("gets:").await?;
    write_one_each(kafka.1, topic, "alone").await?;
    reads(&mut first, "alone", &all).await?;
    let first = stopped(first).await?;
    assert_eq!(count(&first, "read:"), 6);
    Ok(given_up)
}

#[tokio::test]
async fn only_what_moves_is_given_up_unless_the_way_is_eager() -> Result<()> {
    let topic = "cooperative.readings";
    ran_twice(COOPERATIVE, &[topic]).await?;
    let cooperative = two_workers(COOPERATIVE, &["worker", "cooperative"], topic);
    assert_eq!(cooperative.await?.len(), 2);
    // The control.
    let eager = two_workers(COOPERATIVE, &["worker", "eager"], topic);
    assert_eq!(eager.await?.len(), 4);
    Ok(())
}

#[tokio::test]
async fn the_broker_takes_only_what_moves() -> Result<()> {
    let topic = "next-gen.readings";
    ran_twice(NEXT_GEN, &[topic]).await?;
    let given_up = two_workers(NEXT_GEN, &["worker"], topic).await?;
    assert_eq!(given_up.len(), 2);
    Ok(())
}

#[tokio::test]
async fn who_is_killed_and_comes_back_in_time_has_its_partitions_unnoticed()
-> Result<()> {
    let topic = "static.orders";
    ran_twice(STATIC, &[topic]).await?;
    let kafka = kafka().await?;
    let worker = |name| Example::start(STATIC, &["worker", name], kafka);
    let mut first = worker("cache-1")?;
    first.prints("gets:").await?;
    let mut second = worker("cache-2")?;
    let own = partitions(&second.prints("gets:").await?)?;
    first.prints("gives up:").await?;
    let kept = partitions(&first.prints("gets:").await?)?;

    second.kill().await?;
    let mut second = worker("cache-2")?;
    let back = partitions(&second.prints("gets:").await?)?;
    assert_eq!(back, own);
    write_one_each(kafka.1, topic, "back").await?;
    reads(&mut second, "back", &own).await?;
    reads(&mut first, "back", &kept).await?;

    // A second one of the name ends this one, which says why.
    let mut third = worker("cache-2")?;
    third.prints("gets:").await?;
    let ended = second.end().await?;
    let error = ended.one_line_error()?;
    ensure!(error.contains("another cache-2 has joined"), "{error}");

    // To stop is a restart too: only when its time is up do the others get its own.
    stopped(third).await?;
    let members = observe::kafka::members(kafka.1, "static-workers").await?;
    assert_eq!(members, 2);
    let given_up = partitions(&first.prints("gives up:").await?)?;
    assert_eq!(given_up, kept, "before its time was up, it gave up others");
    wait::until("the dead member to be gone", async || {
        let members = observe::kafka::members(kafka.1, "static-workers").await?;
        ensure!(members == 1, "there are {members}");
        Ok(())
    })
    .await?;
    let all = partitions(&first.prints("gets:").await?)?;
    assert_eq!(all, BTreeSet::from([0, 1, 2, 3]));
    let first = stopped(first).await?;
    // When the second one joined, and when it was gone for good.
    assert_eq!(count(&first, "gives up:"), 3, "with its own end");
    Ok(())
}
