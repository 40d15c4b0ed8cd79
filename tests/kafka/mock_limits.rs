//! What the mock cluster does not play, as the table in the book says it: each line is a
//! test here, and one that fails is news for the table.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rdkafka::{
    ClientConfig, Message as _, Offset, Timestamp, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    mocking::MockCluster,
    producer::{
        DefaultProducerContext, FutureProducer, FutureRecord, Producer as _,
    },
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use tests::{observe, wait};
use tokio::task::spawn_blocking;

const TOPIC: &str = "limits.orders";
const PATIENCE: Duration = Duration::from_secs(5);

type Cluster = MockCluster<'static, DefaultProducerContext>;

fn cluster() -> Result<(Cluster, ClientConfig)> {
    let cluster = MockCluster::new(1)?;
    cluster.create_topic(TOPIC, 1, 1)?;
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", cluster.bootstrap_servers());
    Ok((cluster, config))
}

async fn send(producer: &FutureProducer, order: &str) -> Result<Timestamp> {
    let record = FutureRecord::to(TOPIC).key("order").payload(order);
    let delivery = producer.send(record, PATIENCE).await;
    Ok(delivery.map_err(|(error, _record)| error)?.timestamp)
}

/// The orders in the log, for a reader that wants none of an aborted transaction.
async fn stored(cluster: &Cluster) -> Result<Vec<String>> {
    let address = cluster.bootstrap_servers();
    let records = observe::kafka::read_all(&address, TOPIC, 1, "read_committed");
    let records = records.await?;
    Ok(records
        .iter()
        .map(|record| observe::kafka::text(record).1)
        .collect())
}

#[tokio::test]
async fn administration_is_not_answered() -> Result<()> {
    let (_cluster, config) = cluster()?;
    let admin: AdminClient<DefaultClientContext> = config.create()?;
    let topic = NewTopic::new("limits.new", 1, TopicReplication::Fixed(1));
    let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(1)));
    let error = admin.create_topics([&topic], &options).await;
    let error = error.err().context("it made a topic")?;
    let timed_out = KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut);
    assert_eq!(error, timed_out);
    Ok(())
}

#[tokio::test]
async fn an_aborted_record_is_seen_and_offsets_are_not_stored() -> Result<()> {
    let (cluster, mut config) = cluster()?;
    let consumer: BaseConsumer =
        config.clone().set("group.id", "limits").create()?;
    let producer: FutureProducer =
        config.set("transactional.id", "limits").create()?;
    let transactions = producer.clone();
    spawn_blocking(move || transactions.init_transactions(PATIENCE)).await??;

    producer.begin_transaction()?;
    send(&producer, "aborted").await?;
    let transactions = producer.clone();
    spawn_blocking(move || transactions.abort_transaction(PATIENCE)).await??;
    assert_eq!(stored(&cluster).await?, ["aborted"]);

    producer.begin_transaction()?;
    send(&producer, "committed").await?;
    let commit = move || {
        let mut position = TopicPartitionList::new();
        position.add_partition_offset(TOPIC, 0, Offset::Offset(1))?;
        let group = consumer.group_metadata();
        let group = group.ok_or(KafkaError::Canceled)?;
        producer.send_offsets_to_transaction(&position, &group, PATIENCE)?;
        producer.commit_transaction(PATIENCE)
    };
    spawn_blocking(commit).await??;
    let address = cluster.bootstrap_servers();
    let committed = observe::kafka::committed(&address, TOPIC, "limits").await?;
    assert_eq!(committed, None);
    Ok(())
}

#[tokio::test]
async fn two_of_one_transactional_id_both_live() -> Result<()> {
    let (cluster, mut config) = cluster()?;
    config.set("transactional.id", "limits");
    let (zombie, successor): (FutureProducer, FutureProducer) =
        (config.create()?, config.create()?);
    for producer in [&zombie, &successor] {
        let producer = producer.clone();
        spawn_blocking(move || producer.init_transactions(PATIENCE)).await??;
    }
    zombie.begin_transaction()?;
    send(&zombie, "of a zombie").await?;
    spawn_blocking(move || zombie.commit_transaction(PATIENCE)).await??;
    assert_eq!(stored(&cluster).await?, ["of a zombie"]);
    Ok(())
}

#[tokio::test]
async fn with_idempotence_an_injected_error_loses_a_record() -> Result<()> {
    for (idempotence, kept) in [("true", false), ("false", true)] {
        let (cluster, mut config) = cluster()?;
        // Several requests on their way at the same time.
        config
            .set("enable.idempotence", idempotence)
            .set("linger.ms", "0")
            .set("batch.num.messages", "1");
        cluster.broker_round_trip_time(1, Duration::from_millis(50))?;
        let producer: FutureProducer = config.create()?;
        send(&producer, "first").await?;
        let passing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
        cluster.request_errors(RDKafkaApiKey::Produce, &[passing]);
        let mut deliveries = Vec::new();
        for order in ["a", "b", "c", "d"] {
            let record = FutureRecord::to(TOPIC).key("order").payload(order);
            let queued = producer.send_result(record);
            deliveries.push(queued.map_err(|(error, _record)| error)?);
        }
        for delivery in deliveries {
            delivery.await?.map_err(|(error, _record)| error)?;
        }
        let stored = stored(&cluster).await?;
        assert_eq!(stored.contains(&"a".to_owned()), kept, "{stored:?}");
    }
    Ok(())
}

#[tokio::test]
async fn every_time_is_at_the_end() -> Result<()> {
    let (_cluster, mut config) = cluster()?;
    let producer: FutureProducer = config.create()?;
    // What a delivery says of its time is made up.
    assert_eq!(
        send(&producer, "a lamp").await?,
        Timestamp::LogAppendTime(1234)
    );
    let consumer: BaseConsumer = config.set("group.id", "limits").create()?;
    let mut moment = TopicPartitionList::new();
    moment.add_partition_offset(TOPIC, 0, Offset::Offset(0))?;
    let places =
        spawn_blocking(move || consumer.offsets_for_times(moment, PATIENCE))
            .await??;
    let place = places.find_partition(TOPIC, 0).context("no answer")?;
    assert_eq!(place.offset(), Offset::End);
    Ok(())
}

#[tokio::test]
async fn groups_cannot_be_listed() -> Result<()> {
    let (_cluster, config) = cluster()?;
    let client: BaseConsumer = config.create()?;
    let list = move || client.fetch_group_list(None, PATIENCE).map(drop);
    let error = spawn_blocking(list).await?.err().context("a list")?;
    assert_eq!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::UnsupportedFeature)
    );
    Ok(())
}

#[tokio::test]
async fn nobody_can_log_in() -> Result<()> {
    let (_cluster, mut config) = cluster()?;
    let ask = async |config: &ClientConfig| -> Result<_> {
        let client: BaseConsumer = config.create()?;
        let ask = move || client.fetch_metadata(Some(TOPIC), PATIENCE).map(drop);
        Ok(spawn_blocking(ask).await?)
    };
    // The control.
    ask(&config).await??;
    config
        .set("security.protocol", "SASL_PLAINTEXT")
        .set("sasl.mechanism", "PLAIN")
        .set("sasl.username", "shop")
        .set("sasl.password", "secret");
    let error = ask(&config).await?.err().context("it let the shop in")?;
    assert_eq!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::BrokerTransportFailure)
    );
    Ok(())
}

/// What it does play of groups: two members share, and commits are kept.
#[tokio::test]
async fn a_group_reads_and_commits() -> Result<()> {
    let (cluster, mut config) = cluster()?;
    let producer: FutureProducer = config.create()?;
    send(&producer, "a lamp").await?;
    let consumer: BaseConsumer = config
        .set("group.id", "limits")
        .set("auto.offset.reset", "earliest")
        .create()?;
    consumer.subscribe(&[TOPIC])?;
    let read = move || {
        // Also `None` when the group hands out its partitions.
        let mut polls = (0..10).filter_map(|_poll| consumer.poll(PATIENCE));
        let record = polls.next().context("no record")??;
        ensure!(record.payload() == Some(&b"a lamp"[..]));
        consumer.commit_message(&record, CommitMode::Sync)?;
        Ok(())
    };
    spawn_blocking(read).await??;
    let address = cluster.bootstrap_servers();
    wait::until("the commit", async || {
        let committed = observe::kafka::committed(&address, TOPIC, "limits").await?;
        ensure!(committed == Some(1), "{committed:?}");
        Ok(())
    })
    .await
}
