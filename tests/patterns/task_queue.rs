//! What the tests of the task queue share on all brokers: counting what was done.

use std::collections::BTreeMap;

use patterns::task_queue::tasks;

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
