//! Kafka: its cases, and the two measuring tools that come with Kafka.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use lab::native;

use crate::{
    measure::{
        Before, Bench, Context, Plan, Task, Values, locked_version, number,
        rate_of_example, versions,
    },
    process::Call,
    report::{Measure, Text, Versions},
};

pub const EXAMPLES: &[&str] = &[PIPELINED, CALLBACKS, CONSUMER];

const PIPELINED: &str = "kafka_producer_pipelined";
const CALLBACKS: &str = "kafka_producer_callbacks";
const CONSUMER: &str = "kafka_consumer_throughput";

/// The topics of the examples; that of the consumer has the size behind it.
const PIPELINED_TOPIC: &str = "pipelined.readings";
const CALLBACKS_TOPIC: &str = "callbacks.readings";
const CONSUMER_TOPIC: &str = "throughput.readings";

/// The sizes of messages in bytes, each with so many of them.
const SIZES: [(u32, u64); 2] = [(100, 1_000_000), (1024, 200_000)];

pub fn bench(context: &Context<'_>) -> Result<(Bench, Versions)> {
    let jars = native::kafka_jars()?;
    let versions = versions(
        format!("Kafka {}", context.version),
        format!("rdkafka {}", locked_version("rdkafka")?),
        format!("kafka-tools {}", context.version),
    );
    let kafka = Kafka {
        context,
        java: native::java()?,
        classes: jars.join("*"),
    };
    let mut tasks = Vec::new();
    for (size, count) in SIZES {
        let messages = context.messages(count);
        tasks.push(kafka.publish(
            size,
            messages,
            &Producer {
                example: PIPELINED,
                topic: PIPELINED_TOPIC,
                title: Text::new(
                    "Publish, futures in a window",
                    "发布，窗口内的 future",
                ),
                target: 3.0,
            },
        ));
        tasks.push(kafka.publish(
            size,
            messages,
            &Producer {
                example: CALLBACKS,
                topic: CALLBACKS_TOPIC,
                title: Text::new("Publish, callbacks", "发布，回调"),
                target: 5.0,
            },
        ));
        for (settings, title, target) in [
            (
                "tuned",
                Text::new("Consume, tuned", "消费，调过的设置"),
                Some(1.4),
            ),
            (
                "defaults",
                Text::new(
                    "Consume, librdkafka's defaults",
                    "消费，librdkafka 的默认设置",
                ),
                None,
            ),
        ] {
            tasks.push(kafka.consume(size, messages, settings, &title, target));
        }
    }
    // What is stored is read again, or is not looked at.
    let clean = Box::new(|| Ok(()));
    let bench = Bench {
        tasks,
        message_bytes: None,
        clean,
    };
    Ok((bench, versions))
}

struct Kafka<'a> {
    context: &'a Context<'a>,
    java: PathBuf,
    classes: PathBuf,
}

/// A way of publishing.
struct Producer {
    example: &'static str,
    topic: &'static str,
    title: Text,
    target: f64,
}

impl Kafka<'_> {
    /// One of Kafka's own programs.
    fn tool(&self, class: &str, words: &[&str]) -> Call {
        let class = format!("org.apache.kafka.tools.{class}");
        let fixed = [&*class, "--bootstrap-server", self.context.address];
        let mut call = self.context.call(&self.java, &[&fixed, words].concat());
        // By the environment: a reader's path is another.
        let classes = self.classes.to_string_lossy().into_owned();
        call.environment = vec![("CLASSPATH".to_owned(), classes)];
        call
    }

    fn publish(&self, size: u32, messages: u64, producer: &Producer) -> Task {
        let &Producer {
            example,
            topic,
            ref title,
            target,
        } = producer;
        let (count, bytes) = (messages.to_string(), size.to_string());
        let call = |count: &str| self.context.example(example, &[count, &bytes]);
        // Makes the topic.
        let before = || vec![Before::Run(call("1"))];
        let words = [
            ["--topic", topic],
            ["--num-records", &count],
            ["--record-size", &bytes],
            ["--throughput", "-1"],
            ["--command-property", "acks=all"],
            ["--command-property", "enable.idempotence=true"],
        ];
        Task {
            id: match (example, size) {
                (PIPELINED, 100) => "publish-futures-100",
                (PIPELINED, _) => "publish-futures-1024",
                (_, 100) => "publish-callbacks-100",
                _ => "publish-callbacks-1024",
            },
            title: sized(title, size),
            settings: Text::new(
                "acks=all and idempotence on both sides; one partition, one replica; \
                 batches and linger as each client's example and defaults have them",
                "两边都是 acks=all 和幂等；一个分区，一个副本；批次和 linger 各按\
                 例子和工具的默认",
            ),
            messages,
            target: Some(target),
            example,
            rust: Plan {
                before: before(),
                beside: None,
                call: call(&count),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "published", messages)
                }),
            },
            tool: Plan {
                before: before(),
                beside: None,
                call: self.tool("ProducerPerformance", words.as_flattened()),
                read: Box::new(move |printed| {
                    rate_of_producer(&printed.call, messages)
                }),
            },
        }
    }

    fn consume(
        &self,
        size: u32,
        messages: u64,
        settings: &'static str,
        title: &Text,
        target: Option<f64>,
    ) -> Task {
        let (count, bytes) = (messages.to_string(), size.to_string());
        let example =
            |word: &str| self.context.example(CONSUMER, &[word, &count, &bytes]);
        let before = || vec![Before::Run(example("fill"))];
        let topic = format!("{CONSUMER_TOPIC}-{size}");
        let words = [["--topic", &topic], ["--num-records", &count]];
        Task {
            id: match (settings, size) {
                ("tuned", 100) => "consume-tuned-100",
                ("tuned", _) => "consume-tuned-1024",
                (_, 100) => "consume-defaults-100",
                _ => "consume-defaults-1024",
            },
            title: sized(title, size),
            settings: Text::new(
                "one partition, filled before; measured from the first record on, \
                 without joining a group; at most 64 MiB of records wait in the example's memory",
                "一个分区，事先填满；从第一条记录开始计时，不算加入组；例子的内存里\
                 最多等 64 MiB 的记录",
            ),
            messages,
            target,
            example: CONSUMER,
            rust: Plan {
                before: before(),
                beside: None,
                call: example(settings),
                read: Box::new(move |printed| {
                    rate_of_example(&printed.call, "consumed", messages)
                }),
            },
            tool: Plan {
                before: before(),
                beside: None,
                call: self.tool("ConsumerPerformance", words.as_flattened()),
                read: Box::new(move |printed| {
                    rate_of_consumer(&printed.call, messages)
                }),
            },
        }
    }
}

fn sized(title: &Text, size: u32) -> Text {
    Text::new(
        &format!("{}, {size} B", title.en),
        &format!("{}，{size} B", title.zh),
    )
}

/// Reads the last line, `200000 records sent, 91869.5 records/sec (8.76 MB/sec), ...`.
fn rate_of_producer(printed: &str, messages: u64) -> Result<Values> {
    let begin = format!("{messages} records sent, ");
    let mut lines = printed.lines();
    let rest = lines.find_map(|line| line.strip_prefix(&begin));
    let rest = rest.context("the tool has not sent all")?;
    let (rate, _) = rest.split_once(" records/sec").context("no rate")?;
    Ok(Values::from([(Measure::Rate, number(rate)?)]))
}

/// Reads the line under the names of the columns: start, end, megabytes, megabytes a
/// second, messages, messages a second, then of the time without joining the group:
/// milliseconds of the join, of fetching, megabytes and messages a second.
fn rate_of_consumer(printed: &str, messages: u64) -> Result<Values> {
    let columns = printed.lines().find_map(|line| {
        let columns: Vec<&str> = line.split(", ").collect();
        let consumed: u64 = columns.get(4)?.parse().ok()?;
        (columns.len() == 10 && consumed >= messages).then_some(columns)
    });
    let columns = columns.context("the tool has not consumed all")?;
    Ok(Values::from([(Measure::Rate, number(columns[9])?)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the tools of Kafka 4.3.1 print them.
    #[test]
    fn the_lines_of_the_tools_are_read() -> Result<()> {
        let printed = "79360 records sent, 15872.0 records/sec (1.51 MB/sec), ...\n\
            200000 records sent, 91869.5 records/sec (8.76 MB/sec), 12.0 ms avg\n";
        let rate = rate_of_producer(printed, 200_000)?;
        assert_eq!(rate, Values::from([(Measure::Rate, 91_869.5)]));
        assert!(rate_of_producer(printed, 100_000).is_err());

        let printed = "start.time, end.time, data.consumed.in.MB, MB.sec, \
            data.consumed.in.nMsg, nMsg.sec, rebalance.time.ms, fetch.time.ms, \
            fetch.MB.sec, fetch.nMsg.sec\n\
            2026-01-02 10:00:00:000, 2026-01-02 10:00:04:000, 19.0735, 4.7, 200000, \
            50000.0, 3500, 500, 38.1, 400000.0\n";
        let rate = rate_of_consumer(printed, 200_000)?;
        assert_eq!(rate, Values::from([(Measure::Rate, 400_000.0)]));
        assert!(rate_of_consumer(printed, 200_001).is_err());
        Ok(())
    }
}
