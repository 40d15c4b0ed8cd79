//! RabbitMQ: its cases, and PerfTest, the tool of its makers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::{native, packages, shell, tools, workspace};

use crate::{
    measure::{
        Before, Bench, Beside, Context, Plan, Task, Values, latencies_of_example,
        locked_version, number, rate_of_example, versions,
    },
    process::Call,
    report::{Measure, Text, Versions},
};

pub const EXAMPLES: &[&str] = &[PIPELINED, THROUGHPUT, LATENCY];

const PIPELINED: &str = "rabbitmq_confirms_pipelined";
const THROUGHPUT: &str = "rabbitmq_consumer_throughput";
const LATENCY: &str = "rabbitmq_rpc_latency";

/// The other side of the latencies, which PerfTest does not measure.
const JAVA_LATENCY: &str = include_str!("../java/RpcLatency.java");
/// How many requests a second, where they come by the clock.
const RATE: u32 = 1000;

/// Of each message, in bytes; that of the questions is fixed in the example.
const SIZE: u32 = 100;

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
        latency: compile(&jars, context.yes)?,
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
    /// The folder with what [`JAVA_LATENCY`] was compiled to.
    latency: PathBuf,
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
            self.request(),
            self.request_at_a_rate(),
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
        self.java(&[&fixed, words].concat())
    }

    fn java(&self, words: &[&str]) -> Call {
        let mut call = self.context.call(&self.java, words);
        // By the environment: a reader's path and address are others.
        let classes = [&self.classes, &self.latency];
        let classes = classes.map(|path| path.to_string_lossy());
        let address = self.context.address.to_owned();
        call.environment = vec![
            ("CLASSPATH".to_owned(), classes.join(CLASS_PATH_SEPARATOR)),
            // Of PerfTest, and of ours.
            ("URI".to_owned(), address.clone()),
            ("AMQP_URL".to_owned(), address),
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

    fn request(&self) -> Task {
        let settings = Text::new(
            "each question as soon as the last is answered",
            "上一个有了应答，立即发下一个",
        );
        let title = Text::new(
            "RPC by direct reply-to, beside the Java client",
            "direct reply-to 的 RPC，对比 Java 客户端",
        );
        self.requests("rpc", title, settings, self.context.messages(20_000), None)
    }

    fn request_at_a_rate(&self) -> Task {
        let settings = Text::new(
            &format!(
                "{RATE} questions a second, measured on both sides from the moment a \
                 question was due"
            ),
            &format!("每秒 {RATE} 个问题，两边都从问题该发出的时刻算起"),
        );
        let title = Text::new(
            &format!("The same, {RATE} a second"),
            &format!("同上，每秒 {RATE} 个"),
        );
        let count = self.context.messages(5000);
        self.requests("rpc-rate", title, settings, count, Some(RATE))
    }

    fn requests(
        &self,
        id: &'static str,
        title: Text,
        settings: Text,
        messages: u64,
        rate: Option<u32>,
    ) -> Task {
        let mut words = vec!["direct".to_owned(), messages.to_string()];
        words.extend(rate.map(|rate| rate.to_string()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let beside = |call| {
            Some(Beside {
                call,
                ready: "ready: ",
                settle: Duration::ZERO,
                ends: false,
            })
        };
        let settings = Text::new(
            &format!(
                "a classic queue, nothing stored, no acknowledgements; {}; the other \
                 side is `RpcClient` of the Java client, after 5000 questions to warm \
                 up",
                settings.en
            ),
            &format!(
                "classic 队列，不落盘，不确认；{}；另一边是 Java 客户端的 \
                 `RpcClient`，先预热 5000 个问题",
                settings.zh
            ),
        );
        Task {
            id,
            title,
            settings,
            messages,
            target: None,
            example: LATENCY,
            rust: Plan {
                before: vec![],
                beside: beside(self.context.example(LATENCY, &["responder"])),
                call: self.context.example(LATENCY, &words),
                read: Box::new(move |printed| {
                    latencies_of_example(&printed.call, messages)
                }),
            },
            tool: Plan {
                before: vec![],
                beside: beside(self.java(&["RpcLatency", "responder"])),
                call: self.java(&[&["RpcLatency"], &words[..]].concat()),
                read: Box::new(move |printed| {
                    latencies_of_example(&printed.call, messages)
                }),
            },
        }
    }
}

/// Between the entries of Java's class path.
const CLASS_PATH_SEPARATOR: &str = if cfg!(windows) { ";" } else { ":" };

/// Compiles [`JAVA_LATENCY`] with the jars of PerfTest, in which the Java client is.
fn compile(jars: &Path, yes: bool) -> Result<PathBuf> {
    let folder = workspace::cache().join("rpc-latency");
    let source = folder.join("RpcLatency.java");
    fs::create_dir_all(&folder)?;
    fs::write(&source, JAVA_LATENCY)?;
    if shell::which("javac").is_none() {
        ensure!(yes, "javac is missing; run again with --yes");
        packages::install(&["default-jdk-headless"])?;
    }
    let mut javac = Command::new("javac");
    // The oldest Java that is taken to run it.
    javac.args(["--release", "17", "-d"]).arg(&folder);
    javac.arg("-cp").arg(jars.join("*")).arg(&source);
    shell::run(&mut javac)?;
    Ok(folder)
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
