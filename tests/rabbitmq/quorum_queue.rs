//! What is confirmed outlives a killed server, and a queue that would not is refused.

use anyhow::{Result, ensure};
use lab::broker::Broker;
use tests::{Example, TestBroker, observe, wait};

use crate::{own_vhost, ran_twice};

const QUORUM_QUEUE: &str = env!("CARGO_BIN_EXE_rabbitmq_quorum_queue");
const QUEUE: &str = "quorum.payments";

#[tokio::test]
async fn the_story_makes_one_queue_and_no_other() -> Result<()> {
    let address = ran_twice(QUORUM_QUEUE).await?;
    assert_eq!(observe::rabbitmq::ready(&address, QUEUE).await?, 10);
    let (management, _) = own_vhost().await?;
    let queue = management.queue(&address, QUEUE).await?;
    assert_eq!(queue["type"], "quorum");
    assert_eq!(management.queue_names(&address).await?, [QUEUE]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_has_every_confirmed_payment() -> Result<()> {
    let mut rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    let address = rabbitmq.address().to_owned();
    observe::rabbitmq::settled_queue(&address, QUEUE).await?;
    let variable = ("AMQP_URL", address.as_str());
    for kill in 1..=2 {
        let words = ["publish", "1000"];
        let ended = Example::start(QUORUM_QUEUE, &words, variable)?;
        ended.end().await?.succeeded()?;
        rabbitmq.kill().await?;
        rabbitmq.restart().await?;
        // RabbitMQ brings this number up to date now and then; right after a start
        // it may be 0.
        wait::until("the payments to be counted", async || {
            let ready = observe::rabbitmq::ready(&address, QUEUE).await?;
            ensure!(ready == kill * 1000, "{ready} are there");
            Ok(())
        })
        .await?;
        let ended = Example::start(QUORUM_QUEUE, &["count"], variable)?;
        let ended = ended.end().await?.succeeded()?;
        let expected = format!("counted:    {} payments\n", kill * 1000);
        assert_eq!(ended.stdout, expected);
    }
    Ok(())
}

#[tokio::test]
async fn a_queue_that_is_not_there_is_one_line() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let variable = ("AMQP_URL", address.as_str());
    let ended = Example::start(QUORUM_QUEUE, &["count"], variable)?;
    let ended = ended.end().await?;
    ended.refused("there is no queue quorum.payments")?;
    let ended = Example::start(QUORUM_QUEUE, &["publish"], variable)?;
    let ended = ended.end().await?;
    ensure!(ended.status.code() == Some(2), "{}", ended.status);
    Ok(())
}
