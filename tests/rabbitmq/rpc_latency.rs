//! What is measured is the responder's time, of each question, from when it was due.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_lite::{StreamExt as _, future::poll_once};
use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use tests::{Example, observe, wait::DEADLINE};
use tokio::time::{sleep, timeout};

use crate::own_vhost;

const LATENCY: &str = env!("CARGO_BIN_EXE_rabbitmq_rpc_latency");
const QUESTIONS: &str = "latency.quotes";

fn start(words: &[&str], address: &str) -> Result<Example> {
    Example::start(LATENCY, words, ("AMQP_URL", address))
}

/// The number after this text, up to the next blank.
fn number_after(text: &str, output: &str) -> Result<f64> {
    let (_, rest) = output.split_once(text).context(text.to_owned())?;
    let word = rest.split_whitespace().next().unwrap_or_default();
    Ok(word.parse()?)
}

#[tokio::test]
async fn the_story_leaves_the_queue_of_the_questions_alone() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = start(&[], &address)?.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    assert_eq!(management.queue_names(&address).await?, [QUESTIONS]);
    Ok(())
}

#[tokio::test]
async fn two_programs_ask_and_answer_both_ways() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let mut responder = start(&["responder"], &address)?;
    responder.prints("ready:").await?;
    for way in ["direct", "queue"] {
        let asked = start(&[way, "50"], &address)?.end().await?.succeeded()?;
        let begin = "answered: 50 requests of 100 B in ";
        ensure!(asked.stdout.starts_with(begin), "{}", asked.stdout);
        ensure!(asked.stdout.ends_with(&format!(", {way}\n")));
    }
    responder.interrupt().await?;
    let ended = responder.end().await?.succeeded()?;
    ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    Ok(())
}

/// An observer stands in as responder: it counts the questions, its own delay is in
/// the result, and what answers another question is not taken for an answer.
#[tokio::test]
async fn the_delay_of_each_answer_is_measured_from_its_due_time() -> Result<()> {
    for (way, reply_to) in
        [("direct", "amq.rabbitmq.reply-to."), ("queue", "amq.gen-")]
    {
        let (_management, address) = own_vhost().await?;
        let (connection, channel) = observe::rabbitmq::connect(&address).await?;
        let mut arguments = FieldTable::default();
        let classic = AMQPValue::LongString("classic".into());
        arguments.insert("x-queue-type".into(), classic);
        let durable = QueueDeclareOptions::durable();
        channel
            .queue_declare(QUESTIONS.into(), durable, arguments)
            .await?;
        let no_ack = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let none = FieldTable::default();
        let consumer =
            channel.basic_consume(QUESTIONS.into(), "".into(), no_ack, none);
        let mut questions = consumer.await?;

        let asking = start(&[way, "20", "1000"], &address)?;
        for number in 0..20 {
            let question = timeout(DEADLINE, questions.next()).await?;
            let question = question.context("ended")??;
            assert_eq!(question.data.len(), 100);
            let asker = question.properties.reply_to().clone().context("nobody")?;
            ensure!(asker.as_str().starts_with(reply_to), "{asker}");
            let answer = async |id: String| {
                let properties =
                    BasicProperties::default().with_correlation_id(id.into());
                let (queue, options) =
                    (asker.clone(), BasicPublishOptions::default());
                channel
                    .basic_publish("".into(), queue, options, b"", properties)
                    .await
            };
            // Late, as it were; and then what the example must see.
            answer((number - 1).to_string()).await?;
            sleep(Duration::from_millis(5)).await;
            answer(number.to_string()).await?;
        }
        let asked = asking.end().await?.succeeded()?;
        let begin = "answered: 20 requests of 100 B in ";
        ensure!(asked.stdout.starts_with(begin), "{}", asked.stdout);
        // All are due within 20 ms and answered in 100: the later ones waited.
        let p50 = number_after("(p50 ", &asked.stdout)?;
        ensure!(p50 > 20_000.0, "{}", asked.stdout);
        ensure!(
            number_after(" B in ", &asked.stdout)? >= 0.1,
            "{}",
            asked.stdout
        );
        ensure!(poll_once(questions.next()).await.is_none(), "one too many");
        connection.close(200, "".into()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn without_a_responder_one_line_says_how_to_start_one() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let mut responder = start(&["responder"], &address)?;
    responder.prints("ready:").await?;
    responder.interrupt().await?;
    responder.end().await?.succeeded()?;
    // The queue is there still, and an empty vhost has none.
    let (_management, empty) = own_vhost().await?;
    for (way, address) in
        [("direct", &address), ("queue", &address), ("queue", &empty)]
    {
        let ended = start(&[way, "1"], address)?.end().await?;
        let line = ended.one_line_error()?;
        ensure!(
            line.contains("start one: rabbitmq_rpc_latency responder"),
            "{line}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_responder_whose_queue_is_deleted_says_so() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let mut responder = start(&["responder"], &address)?;
    responder.prints("ready:").await?;
    observe::rabbitmq::delete_queues(&address, &[QUESTIONS]).await?;
    let ended = responder.end().await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.contains("ended the consumer of latency.quotes"),
        "{line}"
    );
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_status_2() -> Result<()> {
    let wrong: [&[&str]; 4] = [
        &["asker"],
        &["direct"],
        &["direct", "0"],
        &["queue", "10", "fast"],
    ];
    for words in wrong {
        let ended = start(words, "amqp://x")?.end().await?;
        assert_eq!(ended.status.code(), Some(2), "{words:?}");
        ensure!(ended.stderr.starts_with("usage: rabbitmq_rpc_latency"));
    }
    Ok(())
}
