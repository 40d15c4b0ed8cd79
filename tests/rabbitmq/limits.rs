//! Queues with a limit of length: what is kept, what is refused, what is dead.

use anyhow::Result;
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use tests::observe;

use crate::ran_twice;

const MAX_LENGTH: &str = env!("CARGO_BIN_EXE_rabbitmq_max_length");

async fn texts(address: &str, queue: &str) -> Result<String> {
    let messages = observe::rabbitmq::drain(address, queue).await?;
    let texts: Vec<_> = messages.iter().map(|message| &message.data[..]).collect();
    Ok(String::from_utf8(texts.concat())?)
}

/// Seven messages of an observer, and what its own confirms say of them.
#[tokio::test]
async fn the_oldest_or_the_newest_have_no_room() -> Result<()> {
    let address = ran_twice(MAX_LENGTH).await?;
    for (queue, confirmed, kept, dead) in [
        ("length.drop-head", "yyyyyyy", "fg", ""),
        ("length.with-dead-letters", "yyyyyyy", "fg", "abcde"),
        ("length.reject-publish", "yynnnnn", "ab", ""),
        ("length.reject-publish-dlx", "yynnnnn", "ab", "cdefg"),
        // Seven bytes in all.
        ("length.20-bytes", "yyyyyyy", "abcdefg", ""),
    ] {
        let (connection, channel) = observe::rabbitmq::connect(&address).await?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut answers = String::new();
        for letter in ["a", "b", "c", "d", "e", "f", "g"] {
            let options = BasicPublishOptions::default();
            let properties = BasicProperties::default();
            let (exchange, body) = ("".into(), letter.as_bytes());
            let confirm = channel
                .basic_publish(exchange, queue.into(), options, body, properties)
                .await?
                .await?;
            answers.push(if confirm.is_ack() { 'y' } else { 'n' });
        }
        connection.close(200, "".into()).await?;
        assert_eq!(answers, confirmed, "{queue}");
        assert_eq!(texts(&address, queue).await?, kept, "{queue}");
        // Dead letters of a classic queue are not waited for by the confirm.
        let found = tests::wait::until("the dead letters", async || {
            let ready = observe::rabbitmq::ready(&address, "length.dead").await?;
            anyhow::ensure!(ready as usize == dead.len(), "{ready} are dead");
            texts(&address, "length.dead").await
        })
        .await?;
        assert_eq!(found, dead, "{queue}");
    }
    Ok(())
}
