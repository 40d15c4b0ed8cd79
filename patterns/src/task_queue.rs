//! Task queue: what a worker does with a message that claims to be a task.

use std::str;

/// How many tasks the producer queues.
pub const TASKS: usize = 10;

/// The tasks, in the order in which the producer queues them.
pub fn tasks() -> impl Iterator<Item = String> {
    (0..TASKS).map(|number| format!("Task {number}"))
}

/// What becomes of a message from the queue.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Do the work, then acknowledge.
    Work(&'a str),
    /// No worker will ever be able to read it. Keep it where a person can look
    /// at it, then acknowledge: handed back, it would come again and again.
    SetAside,
}

/// A task is a text that is not empty.
pub fn verdict(payload: &[u8]) -> Verdict<'_> {
    match str::from_utf8(payload) {
        Ok(task) if !task.trim().is_empty() => Verdict::Work(task),
        _ => Verdict::SetAside,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_that_is_queued_is_work() {
        let tasks: Vec<_> = tasks().collect();
        assert_eq!(tasks.len(), TASKS);
        assert_eq!(tasks[0], "Task 0");
        for task in &tasks {
            assert_eq!(verdict(task.as_bytes()), Verdict::Work(task));
        }
    }

    #[test]
    fn what_nobody_can_read_is_set_aside() {
        for payload in [&b"\xff\xfe"[..], b"", b"  \n"] {
            assert_eq!(verdict(payload), Verdict::SetAside, "{payload:?}");
        }
    }
}
