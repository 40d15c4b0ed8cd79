//! However messages are acknowledged, none is left and none is taken too many.

use anyhow::{Result, ensure};
use tests::{Example, observe, wait};

use crate::{own_vhost, ran_twice};

const THROUGHPUT: &str = env!("CARGO_BIN_EXE_rabbitmq_consumer_throughput");
const QUEUE: &str = "throughput.readings";

#[tokio::test]
async fn all_three_ways_acknowledge_what_they_count() -> Result<()> {
    let address = ran_twice(THROUGHPUT).await?;
    assert_eq!(observe::rabbitmq::ready(&address, QUEUE).await?, 0);
    let (_management, address) = own_vhost().await?;
    for way in ["each", "joined", "multiple"] {
        for words in [&["producer", "300", "16"][..], &[way, "200"]] {
            let ended = Example::start(THROUGHPUT, words, ("AMQP_URL", &address))?;
            ended.end().await?.succeeded()?;
        }
        // A hundred are left. What was on its way comes back a moment later.
        wait::until("a hundred", async || {
            let ready = observe::rabbitmq::ready(&address, QUEUE).await?;
            ensure!(ready == 100, "{ready} are ready");
            Ok(())
        })
        .await?;
        let left = observe::rabbitmq::drain(&address, QUEUE).await?;
        ensure!(left.len() == 100, "{way}: {} are left", left.len());
    }
    let ended = Example::start(THROUGHPUT, &["all", "1"], ("AMQP_URL", &address))?;
    assert_eq!(ended.end().await?.status.code(), Some(2));
    Ok(())
}
