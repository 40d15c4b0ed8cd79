//! One bad order does not stop the line, and its bytes are kept.

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use patterns::poison_message::{NOISE, line};
use rdkafka::{Message as _, message::Headers as _};
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::common::Pattern;

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_poison_message_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_poison_message_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_poison_message_nats"),
    topics: &[("line-orders", "packer"), ("line-aside", "nobody")],
    queues: &["line.orders", "line.aside", "line.classic"],
    streams: &["LINE", "LINE_ASIDE"],
};

/// Queues, topics and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_set_two_messages_aside() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// How many messages of the line are not done, as the broker has it.
async fn left(broker: Broker, address: &str, queue: &str) -> Result<u64> {
    Ok(match broker {
        Broker::Kafka => {
            let done = observe::kafka::committed(address, "line-orders", "packer");
            5 - u64::try_from(done.await?.unwrap_or(0))?
        }
        Broker::RabbitMq => {
            u64::from(observe::rabbitmq::ready(address, queue).await?)
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("LINE").await?;
            stream.info().await?.state.messages
        }
    })
}

/// The bytes that are set aside, each with what is known of its origin.
async fn aside(broker: Broker, address: &str) -> Result<Vec<(Vec<u8>, String)>> {
    Ok(match broker {
        Broker::Kafka => observe::kafka::records(address, "line-aside")
            .await?
            .iter()
            .map(|it| {
                let payload = it.payload().unwrap_or_default().to_vec();
                let headers = it.headers().into_iter().flat_map(|all| all.iter());
                let values = headers.filter_map(|header| header.value);
                let values = values.map(String::from_utf8_lossy);
                (payload, values.collect::<Vec<_>>().join(" "))
            })
            .collect(),
        Broker::RabbitMq => {
            // It moves them by itself, some time after it gave them up.
            wait::until("two messages aside", async || {
                let kept = observe::rabbitmq::ready(address, "line.aside").await?;
                ensure!(kept == 2, "{kept} are there");
                Ok(())
            })
            .await?;
            observe::rabbitmq::drain(address, "line.aside")
                .await?
                .iter()
                .map(|it| {
                    let headers = it.properties.headers().clone();
                    let headers = headers.unwrap_or_default();
                    let queue = headers.inner().get("x-first-death-queue");
                    let queue = queue.and_then(|queue| queue.as_long_string());
                    let queue = queue.map(ToString::to_string);
                    (it.data.clone(), queue.unwrap_or_default())
                })
                .collect()
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut stream = jetstream.get_stream("LINE_ASIDE").await?;
            let last = stream.info().await?.state.last_sequence;
            let mut all = Vec::new();
            for sequence in 1..=last {
                let it = stream.get_raw_message(sequence).await?;
                all.push((it.payload.to_vec(), format!("{:?}", it.headers)));
            }
            all
        }
    })
}

/// The worker is started again whenever it dies, until nothing is left.
#[tokio::test]
async fn the_line_goes_on_and_the_bytes_of_both_are_kept() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let sent = Example::start(binary, &["producer"], variable)?;
        sent.end().await?.succeeded()?;
        let mut said = String::new();
        for attempt in 1..=3 {
            let dead = Example::start(binary, &["worker"], variable)?.end().await?;
            // A signal, and not a status: nothing of it has run to its end.
            assert_eq!(dead.status.code(), None, "{}", dead.stderr);
            let last = format!("start: order-3, attempt {attempt}, and");
            ensure!(dead.stdout.contains(&last), "{broker:?}: {}", dead.stdout);
            said.push_str(&dead.stdout);
        }
        let mut worker = Example::start(binary, &["worker"], variable)?;
        worker.prints("done:  order-4").await?;
        wait::until("an empty line", async || {
            let left = left(broker, variable.1, "line.orders").await?;
            ensure!(left == 0, "{broker:?}: {left} are left");
            Ok(())
        })
        .await?;
        worker.interrupt().await?;
        let ended = worker.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        said.push_str(&ended.stdout);
        for order in ["order-1", "order-2", "order-4"] {
            let done = said.matches(&format!("done:  {order}\n")).count();
            assert_eq!(done, 1, "{broker:?}: {order}\n{said}");
        }

        let kept = aside(broker, variable.1).await?;
        let killer = line()?.swap_remove(3);
        let bytes: Vec<_> = kept.iter().map(|(bytes, _)| bytes.clone()).collect();
        assert_eq!(bytes, [NOISE.to_vec(), killer], "{broker:?}");
        let origin = match broker {
            Broker::Kafka => "line-orders",
            Broker::RabbitMq => "line.orders",
            Broker::Nats => "LINE",
        };
        for (_bytes, headers) in &kept {
            ensure!(headers.contains(origin), "{broker:?}: {headers}");
        }
    }
    Ok(())
}

/// Decides nothing at the first bad message, and stands before it each time.
#[tokio::test]
async fn control_the_careless_worker_never_gets_past_it() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let variable = PATTERN.fresh(broker).await?;
        let words: &[&str] = match broker {
            Broker::RabbitMq => &["producer", "--careless"],
            Broker::Kafka | Broker::Nats => &["producer"],
        };
        let sent = Example::start(binary, words, variable)?;
        sent.end().await?.succeeded()?;
        let careless = ["worker", "--careless"];
        for start in 0..5 {
            let ended = Example::start(binary, &careless, variable)?.end().await?;
            let line = ended.one_line_error()?;
            ensure!(line.contains("cannot decode an order"), "{line}");
            if start > 0 {
                ensure!(!ended.stdout.contains("done:"), "{}", ended.stdout);
            } else if broker == Broker::RabbitMq {
                ended.printed_what_the_book_shows("careless")?;
            }
        }
        // All but order-1, which was ahead of it.
        wait::until("four that are left", async || {
            let left = left(broker, variable.1, "line.classic").await?;
            ensure!(left == 4, "{broker:?}: {left} are left");
            Ok(())
        })
        .await
        .context("the careless worker")?;
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 2] = [&["consumer"], &["worker", "--careful"]];
    PATTERN.says_what_is_wrong(&wrong).await
}
