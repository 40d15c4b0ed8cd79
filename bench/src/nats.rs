//! NATS: its cases, and `nats bench`, the tool of its makers.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use lab::{shell, tools};

use crate::{
    measure::{
        Before, Bench, Beside, Context, Plan, Printed, Task, Values,
        latencies_of_example, locked_version, number, rate_of_example, versions,
    },
    process::Call,
    report::{Measure, Text, Versions},
};

pub const EXAMPLES: &[&str] =
    &[THROUGHPUT, PUBLISH_ASYNC, PUBLISH, PULL_CONSUMER, LATENCY];

const THROUGHPUT: &str = "nats_throughput";
const PUBLISH_ASYNC: &str = "nats_jetstream_publish_async";
const PUBLISH: &str = "nats_jetstream_publish";
const PULL_CONSUMER: &str = "nats_jetstream_pull_consumer";
const LATENCY: &str = "nats_request_latency";

/// Of each message, in bytes.
const SIZE: u32 = 128;

const SUBJECT: &str = "bench.core";
const SERVICE: &str = "bench.service";
const STREAM: &str = "BENCH_TOOL";
const STREAM_SUBJECT: &str = "bench.stream";

/// How many acknowledgements of the server may be outstanding: the window of
/// `nats_jetstream_publish_async`, and the tool's batch.
const WINDOW: u64 = 5000;

/// Requests a second of the case with a fixed rate.
const RATE: u64 = 1000;

/// The tool says that it starts, and subscribes a moment later.
const SETTLE: Duration = Duration::from_millis(500);

pub fn bench(context: &Context<'_>) -> Result<(Bench, Versions)> {
    let tool = tools::install_nats_cli(context.yes)?;
    let version = shell::output(Command::new(&tool).arg("--version"))?;
    let versions = versions(
        format!("nats-server {}", context.version),
        format!("async-nats {}", locked_version("async-nats")?),
        format!("natscli {}", version.trim_start_matches('v')),
    );
    let tasks = Nats {
        context,
        tool: tool.clone(),
    }
    .tasks();
    let list = context.call(&tool, &["stream", "ls", "--names"]);
    let clean = move || clean(&list);
    let clean = Box::new(clean);
    let bench = Bench {
        tasks,
        message_bytes: Some(SIZE),
        clean,
    };
    Ok((bench, versions))
}

/// Deletes all streams.
fn clean(list: &Call) -> Result<()> {
    for stream in list.output()?.lines().filter(|line| !line.is_empty()) {
        let mut delete = list.clone();
        delete.arguments = ["stream", "rm", "--force", stream]
            .map(str::to_owned)
            .into();
        delete.output()?;
    }
    Ok(())
}

struct Nats<'a> {
    context: &'a Context<'a>,
    tool: PathBuf,
}

impl Nats<'_> {
    fn tasks(&self) -> Vec<Task> {
        vec![
            self.publish(),
            self.publish_and_subscribe(),
            self.stored_in_a_window(),
            self.stored_one_at_a_time(),
            self.consume(),
            self.request(),
            self.request_at_a_rate(),
        ]
    }

    fn bench(&self, words: &[&str], messages: u64, more: &[&str]) -> Call {
        let (messages, size) = (messages.to_string(), SIZE.to_string());
        let fixed = ["--msgs", &messages, "--size", &size, "--no-progress"];
        let words = [&["bench"], words, &fixed, more].concat();
        self.context.call(&self.tool, &words)
    }

    fn example(&self, name: &str, role: &str, count: u64) -> Call {
        let count = count.to_string();
        let size = SIZE.to_string();
        let words: Vec<&str> = match role {
            // It publishes or stores, so it takes the size as well.
            "" => vec![&count, &size],
            "publisher" | "producer" => vec![role, &count, &size],
            _ => vec![role, &count],
        };
        self.context.example(name, &words)
    }

    fn publish(&self) -> Task {
        let messages = self.context.messages(4_000_000);
        Task {
            id: "core-publish",
            title: Text::new("Core publish", "core 发布"),
            settings: Text::new(
                "nothing stored, no subscriber; ends when the server has answered \
                 the last message",
                "不存储，没有订阅者；服务器回答了最后一条才算结束",
            ),
            messages,
            target: Some(1.2),
            example: THROUGHPUT,
            rust: Plan {
                before: vec![],
                beside: None,
                call: self.example(THROUGHPUT, "publisher", messages),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)
                }),
            },
            tool: Plan {
                before: vec![],
                beside: None,
                call: self.bench(&["pub", SUBJECT], messages, &[]),
                read: Box::new(|printed| rate_of_tool(&printed.call)),
            },
        }
    }

    fn publish_and_subscribe(&self) -> Task {
        let messages = self.context.messages(2_000_000);
        Task {
            id: "core-publish-subscribe",
            title: Text::new("Core publish to subscribe", "core 发布到订阅"),
            settings: Text::new(
                "nothing stored; the subscriber's rate, from its first message to \
                 its last; the example keeps at most 65536 messages on their way, \
                 the tool as many as come",
                "不存储；以订阅者从第一条到最后一条的速率为准；例子的在途消息不超过 \
                 65536 条，工具不设上限",
            ),
            messages,
            target: Some(1.1),
            example: THROUGHPUT,
            rust: Plan {
                before: vec![],
                beside: Some(Beside {
                    call: self.example(THROUGHPUT, "subscriber", messages),
                    ready: "ready: ",
                    settle: Duration::ZERO,
                    ends: true,
                }),
                call: self.example(THROUGHPUT, "publisher", messages),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)?;
                    rate_of_example(&printed.beside, "consumed", messages)
                }),
            },
            tool: Plan {
                before: vec![],
                beside: Some(Beside {
                    call: self.bench(&["sub", SUBJECT], messages, &[]),
                    ready: "Starting Core NATS subscriber",
                    settle: SETTLE,
                    ends: true,
                }),
                call: self.bench(&["pub", SUBJECT], messages, &[]),
                read: Box::new(|printed| rate_of_tool(&printed.beside)),
            },
        }
    }

    fn stored_in_a_window(&self) -> Task {
        let messages = self.context.messages(300_000);
        Task {
            id: "jetstream-publish-window",
            title: Text::new(
                "JetStream publish, acks in a window",
                "JetStream 发布，窗口内等确认",
            ),
            settings: Text::new(
                &format!(
                    "file storage, one replica, the server's sync interval of two \
                     minutes; at most {WINDOW} acks outstanding"
                ),
                &format!(
                    "文件存储，单副本，服务器默认两分钟同步一次磁盘；最多 {WINDOW} \
                     个确认未到"
                ),
            ),
            messages,
            target: Some(1.3),
            example: PUBLISH_ASYNC,
            rust: Plan {
                before: vec![Before::Clean],
                beside: None,
                call: self.example(PUBLISH_ASYNC, "", messages),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)
                }),
            },
            tool: Plan {
                before: vec![Before::Clean],
                beside: None,
                call: self.fill(messages),
                read: Box::new(|printed| rate_of_tool(&printed.call)),
            },
        }
    }

    /// The tool's own way to fill a stream.
    fn fill(&self, messages: u64) -> Call {
        let window = WINDOW.to_string();
        let stream = ["--stream", STREAM, "--create", "--storage", "file"];
        let more = [&stream[..], &["--batch", &window]].concat();
        self.bench(&["js", "pub", "async", STREAM_SUBJECT], messages, &more)
    }

    fn stored_one_at_a_time(&self) -> Task {
        let messages = self.context.messages(20_000);
        let stream = ["--stream", STREAM, "--create", "--storage", "file"];
        Task {
            id: "jetstream-publish-single",
            title: Text::new(
                "JetStream publish, one at a time",
                "JetStream 发布，逐条等确认",
            ),
            settings: Text::new(
                "file storage, one replica, the server's sync interval of two \
                 minutes; each ack awaited before the next message",
                "文件存储，单副本，服务器默认两分钟同步一次磁盘；等到确认再发下一条",
            ),
            messages,
            target: Some(1.3),
            example: PUBLISH,
            rust: Plan {
                before: vec![Before::Clean],
                beside: None,
                call: self.example(PUBLISH, "", messages),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)
                }),
            },
            tool: Plan {
                before: vec![Before::Clean],
                beside: None,
                call: self.bench(
                    &["js", "pub", "sync", STREAM_SUBJECT],
                    messages,
                    &stream,
                ),
                read: Box::new(|printed| rate_of_tool(&printed.call)),
            },
        }
    }

    fn consume(&self) -> Task {
        const EXAMPLE: &str = PULL_CONSUMER;
        let messages = self.context.messages(200_000);
        let more = ["--stream", STREAM, "--acks", "explicit"];
        Task {
            id: "jetstream-consume",
            title: Text::new(
                "JetStream consume, an ack for each",
                "JetStream 消费，逐条确认",
            ),
            settings: Text::new(
                "file storage, one replica; explicit acks, sent and not confirmed",
                "文件存储，单副本；逐条显式确认，不等服务器对确认的回应",
            ),
            messages,
            target: Some(1.0),
            example: EXAMPLE,
            rust: Plan {
                before: vec![
                    Before::Clean,
                    Before::Run(self.example(EXAMPLE, "producer", messages)),
                ],
                beside: None,
                call: self.example(EXAMPLE, "worker", messages),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "consumed", messages)
                }),
            },
            tool: Plan {
                before: vec![Before::Clean, Before::Run(self.fill(messages))],
                beside: None,
                call: self.bench(&["js", "consume"], messages, &more),
                read: Box::new(|printed| rate_of_tool(&printed.call)),
            },
        }
    }

    fn request(&self) -> Task {
        let messages = self.context.messages(20_000);
        let settings = Text::new(
            "nothing stored; each request as soon as the last is answered",
            "不存储；上一个有了应答，立即发下一个",
        );
        let count = messages.to_string();
        let title = Text::new("Request and reply", "请求/应答");
        self.requests("request", title, settings, messages, &[&count], &[])
    }

    fn request_at_a_rate(&self) -> Task {
        let messages = self.context.messages(5000);
        let settings = Text::new(
            &format!(
                "nothing stored; {RATE} requests a second; the example measures \
                 from the moment a request was due, the tool from the sending"
            ),
            &format!(
                "不存储；每秒 {RATE} 个请求；例子从请求该发出的时刻算起，工具从实际\
                 发出算起"
            ),
        );
        let title = Text::new(
            &format!("Request and reply, {RATE} a second"),
            &format!("请求/应答，每秒 {RATE} 个"),
        );
        let (count, rate) = (messages.to_string(), RATE.to_string());
        let throttle = ["--throughput", &rate];
        let words = [&*count, &*rate];
        self.requests("request-rate", title, settings, messages, &words, &throttle)
    }

    fn requests(
        &self,
        id: &'static str,
        title: Text,
        settings: Text,
        messages: u64,
        words: &[&str],
        throttle: &[&str],
    ) -> Task {
        const EXAMPLE: &str = LATENCY;
        Task {
            id,
            title,
            settings,
            messages,
            target: None,
            example: EXAMPLE,
            rust: Plan {
                before: vec![],
                beside: Some(Beside {
                    call: self.context.example(EXAMPLE, &["responder"]),
                    ready: "ready: ",
                    settle: Duration::ZERO,
                    ends: false,
                }),
                call: self
                    .context
                    .example(EXAMPLE, &[&["requester"], words].concat()),
                read: Box::new(move |printed| {
                    latencies_of_example(&printed.call, messages)
                }),
            },
            tool: Plan {
                before: vec![],
                beside: Some(Beside {
                    call: self.bench(&["service", "serve", SERVICE], messages, &[]),
                    ready: "Starting Core NATS service server",
                    settle: SETTLE,
                    ends: false,
                }),
                call: self.bench(
                    &["service", "request", SERVICE],
                    messages,
                    throttle,
                ),
                read: Box::new(|printed: &Printed| latencies_of_tool(&printed.call)),
            },
        }
    }
}

/// Reads `NATS ... stats: 3,656,594 msgs/sec ~ 446 MiB/sec ~ ...`.
fn rate_of_tool(printed: &str) -> Result<Values> {
    let stats = stats_of_tool(printed)?;
    let (rate, _) = stats.split_once(" msgs/sec").context("no rate")?;
    Ok(Values::from([(Measure::Rate, number(rate)?)]))
}

/// Reads `NATS ... stats: ... ~ P50: 210.63us ~ P90: ... ~ P99: 488.34us ~ ...`.
fn latencies_of_tool(printed: &str) -> Result<Values> {
    let stats = stats_of_tool(printed)?;
    let after = |mark: &str| -> Result<f64> {
        let (_, rest) = stats.split_once(mark).context("no percentile")?;
        let value = rest.split_whitespace().next().unwrap_or_default();
        match value.strip_suffix("us") {
            Some(value) => number(value),
            None => bail!("{value} is not in microseconds"),
        }
    };
    Ok(Values::from([
        (Measure::P50, after("P50: ")?),
        (Measure::P99, after("P99: ")?),
    ]))
}

fn stats_of_tool(printed: &str) -> Result<&str> {
    let mut lines = printed.lines();
    lines
        .find_map(|line| line.split_once(" stats: "))
        .map(|(_, stats)| stats)
        .context("the tool has printed no statistics")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As natscli 0.5.1 prints them.
    #[test]
    fn the_line_of_the_tool_is_read() -> Result<()> {
        let printed = "\nNATS Core NATS publisher stats: 3,656,594 msgs/sec ~ 446 \
             MiB/sec ~ min: 0.05us ~ avg: 0.19us ~ max: 6,153.51us ~ P50: 0.06us ~ \
             P90: 0.10us ~ P99: 0.16us ~ P99.9: 32.58us\n";
        let rate = rate_of_tool(printed)?;
        assert_eq!(rate, Values::from([(Measure::Rate, 3_656_594.0)]));
        let printed = "NATS Core NATS service requester stats: 4,365 msgs/sec ~ 546 \
             KiB/sec ~ min: 65.11us ~ avg: 228.56us ~ max: 4,683.70us ~ P50: \
             210.63us ~ P90: 325.24us ~ P99: 1,488.34us ~ P99.9: 1,489.87us\n";
        let expected = [(Measure::P50, 210.63), (Measure::P99, 1488.34)];
        assert_eq!(latencies_of_tool(printed)?, Values::from(expected));
        assert!(rate_of_tool("nats: error: no responders").is_err());
        Ok(())
    }
}
