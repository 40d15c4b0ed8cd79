//! What a queue gives up is kept elsewhere with the reason, and without a place to
//! go it is gone.

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use lapin::{
    BasicProperties, Channel,
    message::BasicGetMessage,
    options::{
        BasicGetOptions, BasicNackOptions, BasicPublishOptions, BasicRejectOptions,
        ConfirmSelectOptions, QueueDeclareOptions,
    },
    types::FieldTable,
};
use tests::{Example, TestBroker, observe, wait};

use crate::ran_twice;

const DEAD_LETTER: &str = env!("CARGO_BIN_EXE_rabbitmq_dead_letter");
const DELIVERY_LIMIT: &str = env!("CARGO_BIN_EXE_rabbitmq_delivery_limit");
const TTL: &str = env!("CARGO_BIN_EXE_rabbitmq_ttl");

async fn publish(channel: &Channel, queue: &str, expiration: &str) -> Result<()> {
    let mut properties = BasicProperties::default();
    if !expiration.is_empty() {
        properties = properties.with_expiration(expiration.into());
    }
    let options = BasicPublishOptions::default();
    channel
        .basic_publish("".into(), queue.into(), options, b"observed", properties)
        .await?
        .await?;
    Ok(())
}

async fn get(channel: &Channel, queue: &str) -> Result<Option<BasicGetMessage>> {
    let options = BasicGetOptions::default();
    Ok(channel.basic_get(queue.into(), options).await?)
}

async fn rejected(message: &BasicGetMessage, requeue: bool) -> Result<()> {
    message.reject(BasicRejectOptions { requeue }).await?;
    Ok(())
}

/// The first entry of `x-death`: queue, reason and count.
fn death(letter: &BasicGetMessage) -> Option<(String, String, i64)> {
    let headers = letter.properties.headers().as_ref()?.inner();
    let deaths = headers.get("x-death")?.as_array()?;
    let death = deaths.as_slice().first()?.as_field_table()?.inner();
    let text = |name: &str| Some(death.get(name)?.as_long_string()?.to_string());
    let count = death.get("count")?.as_long_long_int()?;
    Some((text("queue")?, text("reason")?, count))
}

#[tokio::test]
async fn three_ways_to_die_and_their_reasons() -> Result<()> {
    let address = ran_twice(DEAD_LETTER).await?;
    let (queue, letters) = ("dead.shipments", "dead.letters.kept");
    assert_eq!(observe::rabbitmq::ready(&address, queue).await?, 0);
    assert_eq!(observe::rabbitmq::ready(&address, letters).await?, 0);

    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, queue, "").await?;
    rejected(&get(&channel, queue).await?.context("none")?, false).await?;
    publish(&channel, queue, "1").await?;
    wait::until("the expired", async || {
        let ready = observe::rabbitmq::ready(&address, letters).await?;
        ensure!(ready == 2, "{ready} letters");
        Ok(())
    })
    .await?;
    publish(&channel, queue, "").await?;
    publish(&channel, queue, "").await?;
    wait::until("the oldest", async || {
        let ready = observe::rabbitmq::ready(&address, letters).await?;
        ensure!(ready == 3, "{ready} letters");
        Ok(())
    })
    .await?;
    let letters = observe::rabbitmq::drain(&address, letters).await?;
    let deaths: Vec<_> = letters.iter().filter_map(death).collect();
    let died = |reason: &str| (queue.to_owned(), reason.to_owned(), 1);
    assert_eq!(deaths, ["rejected", "expired", "maxlen"].map(died));

    // The control: a queue that was told nothing.
    let plain = "control";
    let exclusive = QueueDeclareOptions::exclusive();
    let none = FieldTable::default();
    channel.queue_declare(plain.into(), exclusive, none).await?;
    publish(&channel, plain, "").await?;
    rejected(&get(&channel, plain).await?.context("none")?, false).await?;
    ensure!(get(&channel, plain).await?.is_none(), "it is still there");
    let kept = observe::rabbitmq::ready(&address, "dead.letters.kept").await?;
    assert_eq!(kept, 0, "it is nowhere");
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test]
async fn a_poison_message_is_given_up_where_rejections_count() -> Result<()> {
    let address = ran_twice(DELIVERY_LIMIT).await?;
    let (queue, dead) = ("limit.invoices", "limit.invoices.dead");
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, queue, "").await?;
    let mut deliveries = 0;
    while let Some(message) = get(&channel, queue).await? {
        deliveries += 1;
        rejected(&message, true).await?;
        ensure!(deliveries < 10, "it comes for ever");
    }
    assert_eq!(deliveries, 3);
    let letters = observe::rabbitmq::drain(&address, dead).await?;
    let deaths: Vec<_> = letters.iter().filter_map(death).collect();
    assert_eq!(deaths, [(queue.to_owned(), "delivery_limit".to_owned(), 1)]);

    // The controls: a nack does not count (since RabbitMQ 4.3), and a classic queue
    // does not count at all.
    publish(&channel, queue, "").await?;
    for _delivery in 0..10 {
        let message = get(&channel, queue).await?.context("given up")?;
        let requeue = BasicNackOptions {
            requeue: true,
            ..BasicNackOptions::default()
        };
        message.nack(requeue).await?;
    }
    let classic = "control";
    let exclusive = QueueDeclareOptions::exclusive();
    let none = FieldTable::default();
    channel
        .queue_declare(classic.into(), exclusive, none)
        .await?;
    publish(&channel, classic, "").await?;
    for _delivery in 0..30 {
        let message = get(&channel, classic).await?.context("given up")?;
        rejected(&message, true).await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test]
async fn a_limit_on_the_message_waits_for_its_turn() -> Result<()> {
    let address = ran_twice(TTL).await?;
    let [by_message, by_queue] = ["ttl.offers.by-message", "ttl.offers.by-queue"];
    for queue in [by_message, by_queue] {
        assert_eq!(observe::rabbitmq::ready(&address, queue).await?, 0);
    }
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    publish(&channel, by_message, "").await?;
    publish(&channel, by_message, "1").await?;
    publish(&channel, by_queue, "60000").await?;
    // The shorter limit holds, so this one goes; then the other was over long ago.
    wait::until("the end of the one with a limit on the queue", async || {
        let ready = observe::rabbitmq::ready(&address, by_queue).await?;
        ensure!(ready == 0, "{ready} are there");
        Ok(())
    })
    .await?;
    assert_eq!(observe::rabbitmq::ready(&address, by_message).await?, 2);
    ensure!(
        get(&channel, by_message).await?.is_some(),
        "the first is gone"
    );
    ensure!(
        get(&channel, by_message).await?.is_none(),
        "the second came"
    );
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_least_once_a_dead_letter_waits_for_a_queue() -> Result<()> {
    let rabbitmq = TestBroker::start(Broker::RabbitMq).await?;
    // How often it tries again; three minutes by default.
    let sooner = "application:set_env(rabbit, \
                  dead_letter_worker_publisher_confirm_timeout, 1000).";
    rabbitmq.rabbitmqctl(&["eval", sooner]).await?;
    let address = rabbitmq.address();
    let example = env!("CARGO_BIN_EXE_rabbitmq_dead_letter_at_least_once");
    for words in [&[][..], &["60"]] {
        let ended = Example::start(example, words, ("AMQP_URL", address))?;
        let ended = ended.end().await?.succeeded()?;
        match words {
            [] => ended.printed_what_its_header_says()?,
            _ => ensure!(
                ended.stdout.ends_with("arrived:  invoice-1\n"),
                "{}",
                ended.stdout
            ),
        }
    }
    // Of the careful queue; that of the other one is nowhere.
    let left = observe::rabbitmq::drain(address, "atleast.letters").await?;
    assert_eq!(left.len(), 0);
    Ok(())
}
