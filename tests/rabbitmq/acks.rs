//! What is acknowledged is gone, what is given back is there, for another client to
//! see.

use anyhow::{Context as _, Result, ensure};
use lapin::{
    BasicProperties,
    options::{BasicGetOptions, BasicNackOptions, BasicPublishOptions},
};
use tests::{Example, observe};

use crate::own_vhost;

const ACKS: &str = env!("CARGO_BIN_EXE_rabbitmq_acks");
const QUEUE: &str = "acks.returns";

#[tokio::test]
async fn each_word_has_the_end_that_it_says() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    for _run in 0..2 {
        let ended = Example::start(ACKS, &[], ("AMQP_URL", &address))?;
        let ended = ended.end().await?.succeeded()?;
        ended.printed_what_its_header_says()?;
        assert_eq!(observe::rabbitmq::ready(&address, QUEUE).await?, 0);
    }
    // The control: a nack that asks for it gives the message back, so the default
    // is what deletes.
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    for (requeue, left) in [(true, 1), (false, 0)] {
        observe::rabbitmq::drain(&address, QUEUE).await?;
        let options = BasicPublishOptions::default();
        let none = BasicProperties::default();
        channel
            .basic_publish("".into(), QUEUE.into(), options, b"return", none)
            .await?
            .await?;
        let message = tests::wait::until("the message", async || {
            let options = BasicGetOptions::default();
            let message = channel.basic_get(QUEUE.into(), options).await?;
            message.context("none")
        });
        let message = message.await?;
        let options = BasicNackOptions {
            requeue,
            ..BasicNackOptions::default()
        };
        message.nack(options).await?;
        tests::wait::until("the end of the nack", async || {
            let ready = observe::rabbitmq::ready(&address, QUEUE).await?;
            ensure!(ready == left, "{ready} are there");
            Ok(())
        })
        .await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}
