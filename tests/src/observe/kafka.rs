//! A second Kafka client, with a group of its own or none.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use tokio::task::spawn_blocking;

use crate::wait;

const PATIENCE: Duration = Duration::from_secs(10);

/// What each client of ours begins with.
pub fn config(address: &str) -> ClientConfig {
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

/// Deletes a topic and a group, and returns when the topic is gone; where they are not
/// there, they count as deleted. A group with members stays, a static one's until its
/// session is over; Kafka forgets its offsets of the topic.
///
/// # Errors
///
/// If the topic is still there after a minute.
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

/// How many partitions a topic has, if there is one.
///
/// # Errors
///
/// If no broker answers.
pub async fn partitions(address: &str, topic: &str) -> Result<Option<usize>> {
    let client = admin(address)?;
    let metadata =
        spawn_blocking(move || client.inner().fetch_metadata(None, PATIENCE))
            .await??;
    let mut topics = metadata.topics().iter();
    let found = topics.find(|found| found.name() == topic);
    Ok(found.map(|found| found.partitions().len()))
}

/// How many members a group has now; 0 also if there is no such group.
///
/// # Errors
///
/// If no broker answers.
pub async fn members(address: &str, group: &str) -> Result<usize> {
    let client = admin(address)?;
    let name = group.to_owned();
    // The list itself stays in the thread that has it.
    let count = move || {
        let groups = client.inner().fetch_group_list(Some(&name), PATIENCE)?;
        let mut groups = groups.groups().iter();
        let found = groups.find(|found| found.name() == name);
        Ok(found.map_or(0, |found| found.members().len()))
    };
    spawn_blocking(count).await?
}

/// Creates a topic with one partition.
///
/// # Errors
///
/// If it is there already.
pub async fn create_topic(address: &str, topic: &str) -> Result<()> {
    create_topic_with(address, topic, 1, &[]).await
}

/// Creates a topic with so many partitions and these settings.
///
/// # Errors
///
/// If it is there already, or a setting is unknown.
pub async fn create_topic_with(
    address: &str,
    topic: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> Result<()> {
    let topic = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    let topic = settings
        .iter()
        .fold(topic, |topic, (name, value)| topic.set(name, value));
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

/// Writes a record without a key into this partition, and waits for its delivery. Its
/// time is in milliseconds since 1970; without one it is now.
///
/// # Errors
///
/// If it is not delivered.
pub async fn produce_to(
    address: &str,
    topic: &str,
    partition: i32,
    payload: &str,
    time: Option<i64>,
) -> Result<()> {
    let producer: FutureProducer = config(address).create()?;
    let mut record = FutureRecord::<(), _>::to(topic)
        .partition(partition)
        .payload(payload);
    record.timestamp = time;
    let delivery = producer.send(record, PATIENCE).await;
    delivery.map_err(|(error, _record)| error)?;
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

/// All records of these partitions, up to their ends at this moment, of a reader
/// with this isolation level: `read_committed` or `read_uncommitted`. The order
/// within a partition is that of the log.
///
/// # Errors
///
/// If there is no such topic, or no broker.
pub async fn read_all(
    address: &str,
    topic: &str,
    partitions: i32,
    isolation: &str,
) -> Result<Vec<OwnedMessage>> {
    let reader: BaseConsumer = config(address)
        .set("group.id", "observer")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .create()?;
    let mut everything = TopicPartitionList::new();
    for partition in 0..partitions {
        everything.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    reader.assign(&everything)?;
    spawn_blocking(move || {
        let mut records = Vec::new();
        // The high watermark does not tell the end: it counts what ends a
        // transaction, and nobody gets to see that.
        let mut ends = 0;
        while ends < partitions {
            match reader.poll(PATIENCE).context("no record and no end")? {
                Ok(record) => records.push(record.detach()),
                Err(KafkaError::PartitionEOF(_)) => ends += 1,
                Err(error) => return Err(error.into()),
            }
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
    let (next, _note) = commit(address, topic, group).await?;
    Ok(next)
}

/// The note that came with that commit; empty if there was none.
///
/// # Errors
///
/// If no broker answers.
pub async fn committed_note(
    address: &str,
    topic: &str,
    group: &str,
) -> Result<String> {
    let (_next, note) = commit(address, topic, group).await?;
    Ok(note)
}

/// The last commit of a group for partition 0.
async fn commit(
    address: &str,
    topic: &str,
    group: &str,
) -> Result<(Option<i64>, String)> {
    // Asks as the group, without joining it.
    let client: BaseConsumer = config(address).set("group.id", group).create()?;
    let mut partition = TopicPartitionList::new();
    partition.add_partition(topic, 0);
    let offsets =
        spawn_blocking(move || client.committed_offsets(partition, PATIENCE))
            .await??;
    match offsets.elements()[..] {
        [ref only] => {
            let next = only.offset().to_raw().filter(|offset| *offset >= 0);
            Ok((next, only.metadata().to_owned()))
        }
        _ => anyhow::bail!("asked for one partition, got {offsets:?}"),
    }
}

/// How many records of these partitions a group has not committed; where it has
/// committed nothing, all of them.
///
/// # Errors
///
/// If there is no such topic, or no broker.
pub async fn lag(
    address: &str,
    topic: &str,
    partitions: i32,
    group: &str,
) -> Result<i64> {
    let client: BaseConsumer = config(address).set("group.id", group).create()?;
    let mut asked = TopicPartitionList::new();
    asked.add_partition_range(topic, 0, partitions - 1);
    let topic = topic.to_owned();
    spawn_blocking(move || {
        let mut lag = 0;
        for element in client.committed_offsets(asked, PATIENCE)?.elements() {
            let partition = element.partition();
            let (first, end) =
                client.fetch_watermarks(&topic, partition, PATIENCE)?;
            lag += match element.offset() {
                Offset::Offset(next) => end - next,
                _nothing => end - first,
            };
        }
        Ok(lag)
    })
    .await?
}

/// Key and payload of a record, as text.
pub fn text(record: &OwnedMessage) -> (String, String) {
    let text = |bytes: Option<&[u8]>| {
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    };
    (text(record.key()), text(record.payload()))
}

/// Fails unless so many brokers are known.
///
/// # Errors
///
/// If there are fewer, or none answers.
pub async fn brokers(address: &str, count: usize) -> Result<()> {
    let client = admin(address)?;
    let metadata =
        spawn_blocking(move || client.inner().fetch_metadata(None, PATIENCE))
            .await??;
    let known = metadata.brokers().len();
    ensure!(known == count, "{known} brokers");
    Ok(())
}

/// How many replicas of the topic's first partition are in sync.
///
/// # Errors
///
/// If no broker answers, or there is no such topic.
pub async fn in_sync(address: &str, topic: &str) -> Result<usize> {
    let client = admin(address)?;
    let name = topic.to_owned();
    let ask = move || client.inner().fetch_metadata(Some(&name), PATIENCE);
    let metadata = spawn_blocking(ask).await??;
    let topic = metadata.topics().first().context("no topic")?;
    let partition = topic.partitions().first().context("no partition")?;
    Ok(partition.isr().len())
}
