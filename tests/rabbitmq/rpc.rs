//! Each asker gets the answer to its own question, once, or knows that none came.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    BasicProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tests::{Example, observe, wait, wait::DEADLINE};
use tokio::time::timeout;

use crate::own_vhost;

const RPC: &str = env!("CARGO_BIN_EXE_rabbitmq_rpc");
const DIRECT_REPLY_TO: &str = env!("CARGO_BIN_EXE_rabbitmq_direct_reply_to");
const REQUESTS: &str = "rpc.quotes";

fn start(words: &[&str], address: &str) -> Result<Example> {
    Example::start(RPC, words, ("AMQP_URL", address))
}

#[tokio::test]
async fn the_story_leaves_no_request_and_no_reply_queue() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = start(&[], &address)?.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    assert_eq!(management.queue_names(&address).await?, [REQUESTS]);
    Ok(())
}

/// An observer asks two hundred times at once, and the servers share the work.
#[tokio::test]
async fn two_hundred_questions_get_their_own_answers() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let mut servers = Vec::new();
    for _server in 0..2 {
        let mut server = start(&["server"], &address)?;
        server.prints("ready:").await?;
        servers.push(server);
    }
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    let exclusive = QueueDeclareOptions::exclusive();
    let none = FieldTable::default;
    channel
        .queue_declare("answers".into(), exclusive, none())
        .await?;
    let no_ack = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let consumer =
        channel.basic_consume("answers".into(), "".into(), no_ack, none());
    let mut answers = consumer.await?;
    for number in 0..200 {
        let sku = format!("sku-{}", number % 3 + 1);
        let properties = BasicProperties::default()
            .with_reply_to("answers".into())
            .with_correlation_id(number.to_string().into());
        let options = BasicPublishOptions::default();
        channel
            .basic_publish(
                "".into(),
                REQUESTS.into(),
                options,
                sku.as_bytes(),
                properties,
            )
            .await?;
    }
    let mut quotes = BTreeMap::new();
    while quotes.len() < 200 {
        let answer = timeout(DEADLINE, answers.next())
            .await?
            .context("ended")??;
        let id = answer
            .properties
            .correlation_id()
            .clone()
            .context("no id")?;
        let quote = String::from_utf8(answer.data.clone())?;
        let twice = quotes.insert(id.as_str().parse::<usize>()?, quote);
        ensure!(twice.is_none(), "{id} is answered twice");
    }
    for (number, quote) in quotes {
        let expected = ["9.90", "4.50", "unknown article"][number % 3];
        assert_eq!(quote, expected, "of question {number}");
    }
    // Nobody asked for an answer to this, and no server ends by it.
    let options = BasicPublishOptions::default();
    let properties = BasicProperties::default();
    channel
        .basic_publish("".into(), REQUESTS.into(), options, b"sku-1", properties)
        .await?;
    wait::until("an empty queue", async || {
        let ready = observe::rabbitmq::ready(&address, REQUESTS).await?;
        ensure!(ready == 0, "{ready} requests");
        Ok(())
    })
    .await?;
    for server in servers {
        server.terminate().await?;
        server.end().await?.succeeded()?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}

/// A server that answers to nobody, twice and too late: the client takes what is
/// its own.
#[tokio::test]
async fn strange_second_and_late_answers_are_ignored() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let durable = QueueDeclareOptions::durable();
    channel
        .queue_declare(REQUESTS.into(), durable, arguments)
        .await?;
    let options = BasicConsumeOptions::default();
    let none = FieldTable::default();
    let consumer = channel.basic_consume(REQUESTS.into(), "".into(), options, none);
    let mut requests = consumer.await?;

    let client = start(&["client"], &address)?;
    let answering = async {
        for number in 0..3 {
            let request = timeout(DEADLINE, requests.next()).await?;
            let request = request.context("ended")??;
            let asker = request.properties.reply_to().clone().context("nobody")?;
            let id = request
                .properties
                .correlation_id()
                .clone()
                .context("no id")?;
            let mine = format!("answer-{number}");
            for (id, text) in [
                ("nobody", "wrong"),
                (id.as_str(), &mine),
                (id.as_str(), "again"),
            ] {
                let properties =
                    BasicProperties::default().with_correlation_id(id.into());
                let options = BasicPublishOptions::default();
                channel
                    .basic_publish(
                        "".into(),
                        asker.clone(),
                        options,
                        text.as_bytes(),
                        properties,
                    )
                    .await?;
            }
            // And one without any id.
            let options = BasicPublishOptions::default();
            let properties = BasicProperties::default();
            channel
                .basic_publish("".into(), asker, options, b"none", properties)
                .await?;
            request.ack(BasicAckOptions::default()).await?;
        }
        anyhow::Ok(())
    };
    answering.await?;
    let ended = client.end().await?.succeeded()?;
    assert_eq!(
        ended.stdout,
        "sku-1: answer-0\nsku-2: answer-1\nsku-9: answer-2\n"
    );
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test]
async fn without_a_server_the_client_says_so_and_its_request_ends() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let ended = start(&["client"], &address)?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(
        line.contains("start a server: rabbitmq_rpc server"),
        "{line}"
    );
    ended.printed_what_the_book_shows("alone")?;
    wait::until("the end of the request", async || {
        let ready = observe::rabbitmq::ready(&address, REQUESTS).await?;
        ensure!(ready == 0, "{ready} requests");
        Ok(())
    })
    .await
}

/// With the queue, the server has lost its work: not 0, and not silence.
#[tokio::test]
async fn a_server_whose_queue_is_deleted_says_so() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let mut server = start(&["server"], &address)?;
    server.prints("ready:").await?;
    observe::rabbitmq::delete_queues(&address, &[REQUESTS]).await?;
    let ended = server.end().await?;
    assert_eq!(ended.status.code(), Some(1));
    let said = "error: RabbitMQ has taken the queue rpc.quotes away\n";
    assert_eq!(ended.stderr, said);
    Ok(())
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let ended = start(&["nobody"], "amqp://x")?.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    ensure!(ended.stderr.starts_with("usage: rabbitmq_rpc"));
    Ok(())
}

#[tokio::test]
async fn direct_reply_to_declares_no_queue() -> Result<()> {
    let (management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(DIRECT_REPLY_TO, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
    }
    assert_eq!(management.queue_names(&address).await?, ["direct.quotes"]);
    Ok(())
}
