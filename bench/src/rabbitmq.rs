//! RabbitMQ: its cases, and PerfTest, the tool of its makers.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use lab::{native, tools};

use crate::{
    measure::{
        Before, Bench, Context, Plan, SIZE, Task, Values, locked_version, number,
        rate_of_example, versions,
    },
    process::Call,
    report::{Measure, Text, Versions},
};

pub const EXAMPLES: &[&str] = &[PIPELINED, THROUGHPUT];

const PIPELINED: &str = "rabbitmq_confirms_pipelined";
const THROUGHPUT: &str = "rabbitmq_consumer_throughput";

/// The queues of the two examples, which the tool uses too.
const PUBLISHED: &str = "confirms.pipelined.payments";
const CONSUMED: &str = "throughput.readings";

/// How many messages may be without a confirm: the example's window.
const WINDOW: u64 = 1000;
/// How many deliveries may be without an acknowledgement: the example's prefetch.
const PREFETCH: u64 = 500;
/// How many deliveries the example acknowledges at once.
const GROUP: u64 = 64;

pub fn bench(context: &Context<'_>) -> Result<(Bench, Versions)> {
    let jars = tools::install_perf_test(context.yes)?;
    let versions = versions(
        format!("RabbitMQ {}", context.version),
        format!("lapin {}", locked_version("lapin")?),
        format!("PerfTest {}", tools::perf_test_version()?),
    );
    let tasks = RabbitMq {
        context,
        java: native::java()?,
        classes: jars.join("*"),
    }
    .tasks();
    // Each sample begins with an example that empties its queue.
    let clean = Box::new(|| Ok(()));
    let bench = Bench {
        tasks,
        message_bytes: Some(SIZE),
        clean,
    };
    Ok((bench, versions))
}

struct RabbitMq<'a> {
    context: &'a Context<'a>,
    java: PathBuf,
    classes: PathBuf,
}

impl RabbitMq<'_> {
    fn tasks(&self) -> Vec<Task> {
        vec![
            self.publish(),
            self.consume(Consume {
                id: "consume-joined",
                title: Text::new(
                    "Consume, an ack for each, joined",
                    "消费，逐条确认，一起发",
                ),
                way: "joined",
                target: Some(1.7),
            }),
            self.consume(Consume {
                id: "consume-each",
                title: Text::new(
                    "Consume, an ack for each, awaited one by one",
                    "消费，逐条确认，逐条等待",
                ),
                way: "each",
                target: None,
            }),
            self.consume(Consume {
                id: "consume-multiple",
                title: Text::new("Consume, one ack for many", "消费，多条一个确认"),
                way: "multiple",
                target: Some(1.3),
            }),
        ]
    }

    /// PerfTest on a queue that is there.
    fn perf_test(&self, queue: &str, words: &[&str]) -> Call {
        let fixed = [
            "com.rabbitmq.perf.PerfTest",
            "--predeclared",
            "--queue",
            queue,
        ];
        let mut call = self.context.call(&self.java, &[&fixed, words].concat());
        // By the environment: a reader's path and address are others.
        let classes = self.classes.to_string_lossy().into_owned();
        call.environment = vec![
            ("CLASSPATH".to_owned(), classes),
            ("URI".to_owned(), self.context.address.to_owned()),
        ];
        call
    }

    fn publish(&self) -> Task {
        let messages = self.context.messages(200_000);
        let (count, size) = (messages.to_string(), SIZE.to_string());
        let window = WINDOW.to_string();
        let example = |count: &str| self.context.example(PIPELINED, &[count, &size]);
        // Empties the queue, and leaves one message in it.
        let before = || vec![Before::Run(example("1"))];
        let words = [
            ["--producers", "1"],
            ["--consumers", "0"],
            ["--pmessages", &count],
            ["--size", &size],
            ["--flag", "persistent"],
            ["--confirm", &window],
        ];
        Task {
            id: "publish-window",
            title: Text::new(
                "Publish, confirms in a window",
                "发布，窗口内等 confirm",
            ),
            settings: Text::new(
                &format!(
                    "persistent messages, a quorum queue with one member; at most \
                     {WINDOW} without a confirm"
                ),
                &format!(
                    "持久消息，单成员的 quorum 队列；最多 {WINDOW} 条没有 confirm"
                ),
            ),
            messages,
            target: Some(2.0),
            example: PIPELINED,
            rust: Plan {
                before: before(),
                beside: None,
                call: example(&count),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)
                }),
            },
            tool: Plan {
                before: before(),
                beside: None,
                call: self.perf_test(PUBLISHED, words.as_flattened()),
                read: Box::new(|printed| rate_of_tool(&printed.call, "sending")),
            },
        }
    }

    fn consume(&self, case: Consume) -> Task {
        let messages = self.context.messages(200_000);
        let (count, size) = (messages.to_string(), SIZE.to_string());
        let prefetch = PREFETCH.to_string();
        let before = || {
            let words = ["producer", count.as_str(), size.as_str()];
            vec![Before::Run(self.context.example(THROUGHPUT, &words))]
        };
        let words = [
            ["--producers", "0"],
            ["--consumers", "1"],
            ["--cmessages", &count],
            ["--qos", &prefetch],
        ];
        let every = GROUP.to_string();
        let multiple = match case.way {
            "multiple" => &["--multi-ack-every", every.as_str()][..],
            _ => &[],
        };
        let words = [words.as_flattened(), multiple].concat();
        let settings = match case.way {
            "multiple" => Text::new(
                &format!(
                    "a quorum queue with one member, filled before; prefetch \
                     {PREFETCH}; the example acknowledges up to {GROUP} at once, the \
                     tool each {GROUP}"
                ),
                &format!(
                    "单成员的 quorum 队列，事先填满；prefetch {PREFETCH}；例子一次最多\
                     确认 {GROUP} 条，工具每 {GROUP} 条确认一次"
                ),
            ),
            _ => Text::new(
                &format!(
                    "a quorum queue with one member, filled before; prefetch \
                     {PREFETCH}; an acknowledgement for each message"
                ),
                &format!(
                    "单成员的 quorum 队列，事先填满；prefetch {PREFETCH}；每条一个确认"
                ),
            ),
        };
        Task {
            id: case.id,
            title: case.title,
            settings,
            messages,
            target: case.target,
            example: THROUGHPUT,
            rust: Plan {
                before: before(),
                beside: None,
                call: self.context.example(THROUGHPUT, &[case.way, &count]),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "consumed", messages)
                }),
            },
            tool: Plan {
                before: before(),
                beside: None,
                call: self.perf_test(CONSUMED, &words),
                read: Box::new(|printed| rate_of_tool(&printed.call, "receiving")),
            },
        }
    }
}

/// A way of consuming.
struct Consume {
    id: &'static str,
    title: Text,
    way: &'static str,
    target: Option<f64>,
}

/// Reads `id: test-1, sending rate avg: 27770 msg/s`.
fn rate_of_tool(printed: &str, verb: &str) -> Result<Values> {
    let mark = format!("{verb} rate avg: ");
    let mut lines = printed.lines();
    let found = lines.find_map(|line| line.split_once(&mark));
    let (_, rest) = found.context("the tool has printed no average")?;
    let (rate, _) = rest.split_once(" msg/s").context("no rate")?;
    Ok(Values::from([(Measure::Rate, number(rate)?)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As PerfTest 2.22.1 prints them.
    #[test]
    fn the_lines_of_the_tool_are_read() -> Result<()> {
        let printed = "id: test-1, sending rate avg: 27770 msg/s\n\
                       id: test-1, receiving rate avg: 0 msg/s\n";
        let rate = rate_of_tool(printed, "sending")?;
        assert_eq!(rate, Values::from([(Measure::Rate, 27_770.0)]));
        assert!(rate_of_tool("Main thread caught exception", "sending").is_err());
        Ok(())
    }
}
