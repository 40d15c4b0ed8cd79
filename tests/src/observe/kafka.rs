//! A second Kafka client, with a group of its own or none.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::task::spawn_blocking;

use crate::wait;

const PATIENCE: Duration = Duration::from_secs(10);

fn config(address: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address);
    config
}

fn admin(address: &str) -> Result<AdminClient<DefaultClientContext>> {
    Ok(config(address).create()?)
}

/// Waits until Kafka answers, and gives it the topic in which groups keep their
/// offsets: left to the first consumer of a new broker, that costs 3 s.
///
/// # Errors
///
/// If it does not answer in time.
pub async fn ready(address: &str) -> Result<()> {
    let client = admin(address)?;
    let (client, metadata) = spawn_blocking(move || {
        let metadata = client.inner().fetch_metadata(None, PATIENCE);
        (client, metadata)
    })
    .await?;
    ensure!(!metadata?.brokers().is_empty(), "no broker in the cluster");
    let offsets = NewTopic::new("__consumer_offsets", 4, TopicReplication::Fixed(1))
        .set("cleanup.policy", "compact");
    // It may be there: then it needs no making.
    client
        .create_topics([&offsets], &AdminOptions::new())
        .await?;
    Ok(())
}

/// Deletes a topic and a group, and returns when they are gone; where they are
/// not there, they count as deleted.
///
/// # Errors
///
/// If they are still there after a minute.
pub async fn forget(address: &str, topic: &str, group: &str) -> Result<()> {
    let client = admin(address)?;
    let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
    client.delete_topics(&[topic], &options).await?;
    client.delete_groups(&[group], &options).await?;
    wait::until("the topic to be gone", async || {
        let found = topics(address).await?;
        ensure!(!found.contains(&topic.to_owned()), "there are {found:?}");
        Ok(())
    })
    .await
}

/// The names of all topics. Asked without a name, so that none is created.
///
/// # Errors
///
/// If no broker answers.
pub async fn topics(address: &str) -> Result<Vec<String>> {
    let client = admin(address)?;
    let metadata =
        spawn_blocking(move || client.inner().fetch_metadata(None, PATIENCE))
            .await??;
    let topics = metadata.topics().iter();
    Ok(topics.map(|topic| topic.name().to_owned()).collect())
}

/// Creates a topic with one partition.
///
/// # Errors
///
/// If it is there already.
pub async fn create_topic(address: &str, topic: &str) -> Result<()> {
    let topic = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
    for result in admin(address)?
        .create_topics([&topic], &AdminOptions::new())
        .await?
    {
        result.map_err(|(name, code)| anyhow::anyhow!("{name}: {code}"))?;
    }
    Ok(())
}

/// Writes a record and waits for its delivery.
///
/// # Errors
///
/// If it is not delivered.
pub async fn produce(
    address: &str,
    topic: &str,
    key: &str,
    payload: &str,
) -> Result<()> {
    let producer: FutureProducer = config(address).create()?;
    let record = FutureRecord::to(topic).key(key).payload(payload);
    producer
        .send(record, PATIENCE)
        .await
        .map_err(|(error, _record)| error)?;
    Ok(())
}

/// All records of partition 0, from its beginning to its end at this moment.
///
/// # Errors
///
/// If there is no such topic, or no broker.
pub async fn records(address: &str, topic: &str) -> Result<Vec<OwnedMessage>> {
    // librdkafka wants a group even of a consumer that joins none.
    let consumer: BaseConsumer = config(address)
        .set("group.id", "observer")
        .set("enable.auto.commit", "false")
        .create()?;
    let topic = topic.to_owned();
    spawn_blocking(move || {
        let (first, end) = consumer.fetch_watermarks(&topic, 0, PATIENCE)?;
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset(&topic, 0, Offset::Beginning)?;
        consumer.assign(&assignment)?;
        let mut records = Vec::new();
        while (records.len() as i64) < end - first {
            let record =
                consumer.poll(PATIENCE).context("a record is missing")??;
            records.push(record.detach());
        }
        Ok(records)
    })
    .await?
}

/// The offset of partition 0 from which a group would go on, if it has
/// committed one.
///
/// # Errors
///
/// If no broker answers.
pub async fn committed(
    address: &str,
    topic: &str,
    group: &str,
) -> Result<Option<i64>> {
    // Asks as the group, without joining it.
    let client: BaseConsumer = config(address).set("group.id", group).create()?;
    let mut partition = TopicPartitionList::new();
    partition.add_partition(topic, 0);
    let offsets =
        spawn_blocking(move || client.committed_offsets(partition, PATIENCE))
            .await??;
    match offsets.elements()[..] {
        [ref only] => Ok(only.offset().to_raw().filter(|offset| *offset >= 0)),
        _ => anyhow::bail!("asked for one partition, got {offsets:?}"),
    }
}

/// Key and payload of a record, as text.
pub fn text(record: &OwnedMessage) -> (String, String) {
    let text = |bytes: Option<&[u8]>| {
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    };
    (text(record.key()), text(record.payload()))
}
