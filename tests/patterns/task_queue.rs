//! What the tests of the task queue share on all brokers: its roles, counting what
//! was done, and what is the same lesson on each.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use patterns::task_queue::tasks;
use tests::Example;

/// Queues all tasks.
pub async fn producer(binary: &str, address: (&str, &str)) -> Result<()> {
    let ended = Example::start(binary, &["producer"], address)?;
    ended.end().await?.succeeded()?;
    Ok(())
}

pub fn worker(binary: &str, address: (&str, &str)) -> Result<Example> {
    Example::start(binary, &["worker"], address)
}

/// The tasks that these outputs call done, each with the number of times.
pub fn done<'a>(
    outputs: impl IntoIterator<Item = &'a str>,
) -> BTreeMap<String, usize> {
    let mut done = BTreeMap::new();
    for task in outputs
        .into_iter()
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("done:  "))
    {
        *done.entry(task.to_owned()).or_default() += 1;
    }
    done
}

/// Every task, done once.
pub fn each_once() -> BTreeMap<String, usize> {
    tasks().map(|task| (task, 1)).collect()
}

/// Two workers do all tasks, each of them this many at least, and none is done
/// twice. `ready` waits until both would get some, `empty` until none is left.
pub async fn two_workers_share_the_tasks(
    binary: &str,
    address: (&str, &str),
    each: usize,
    ready: impl AsyncFnOnce() -> Result<()>,
    empty: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let mut workers = [worker(binary, address)?, worker(binary, address)?];
    for worker in &mut workers {
        worker.prints("waiting for tasks").await?;
    }
    ready().await?;
    producer(binary, address).await?;
    for worker in &mut workers {
        for _task in 0..each {
            worker.prints("done:").await?;
        }
    }
    empty().await?;
    let mut outputs = Vec::new();
    for worker in workers {
        worker.interrupt().await?;
        outputs.push(worker.end().await?.succeeded()?.stdout);
    }
    assert_eq!(done(outputs.iter().map(String::as_str)), each_once());
    Ok(())
}

/// A word that is no role, or none of its options, gets the usage, without a broker.
pub async fn an_unknown_role_gets_the_usage(
    binary: &str,
    nowhere: (&str, &str),
    usage: &str,
) -> Result<()> {
    for args in [&["consumer"][..], &["worker", "--fast"]] {
        let ended = Example::start(binary, args, nowhere)?.end().await?;
        assert_eq!(ended.status.code(), Some(2));
        ensure!(ended.stderr.starts_with(usage), "{}", ended.stderr);
    }
    Ok(())
}
