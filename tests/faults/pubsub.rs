//! A service hears of each order, whatever dies; one that listens to core NATS does
//! not. The observer counts what the service has said that it heard.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    guarantees::{Cell, Claim, Counts, Fault},
};
use tests::{Supervised, observe};

use crate::driver::{
    CHUNK, Published, Scene, TIMES, finish, publish, queue_length, reordered, tell,
};

fn binary(broker: Broker) -> &'static str {
    match broker {
        Broker::Kafka => env!("CARGO_BIN_EXE_pubsub_kafka"),
        Broker::RabbitMq => env!("CARGO_BIN_EXE_pubsub_rabbitmq"),
        Broker::Nats => env!("CARGO_BIN_EXE_pubsub_nats"),
    }
}

/// How many events the service has not acknowledged.
async fn left(scene: &Scene) -> Result<u64> {
    let address = scene.broker.address();
    match scene.name {
        Broker::Kafka => {
            let (topic, group) = ("orders-events", "orders-events-mail");
            let lag = observe::kafka::lag(address, topic, 1, group).await?;
            Ok(u64::try_from(lag)?)
        }
        Broker::RabbitMq => queue_length(&scene.broker, "orders.events.mail").await,
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let stream = jetstream.get_stream("ORDERS_EVENTS").await?;
            let info = stream.consumer_info("mail").await?;
            Ok(info.num_pending + info.num_ack_pending as u64)
        }
    }
}

async fn under(broker: Broker, fault: Fault, claim: Claim) -> Result<()> {
    let mut scene = Scene::prepare(broker, fault).await?;
    let words = match claim {
        Claim::Control => &["subscribe", "mail", "--core"][..],
        _ => &["subscribe", "mail"],
    };
    let (variable, through) = scene.worker();
    let mut mail =
        Supervised::start(binary(broker), words, &[(variable, &through)])?;
    mail.prints("ready:").await?;
    scene.settle().await;

    let mut sum = Published::default();
    for round in 0..TIMES {
        let (first, last) = (round * CHUNK + 1, (round + 1) * CHUNK);
        let publisher =
            publish(binary(broker).to_owned(), scene.direct(), first, last);
        let publishing = tokio::spawn(publisher);
        scene.strike(&mut mail, "heard:").await?;
        let published = publishing.await??;
        sum.attempted += published.attempted;
        sum.acknowledged += published.acknowledged;
        println!("pubsub {broker:?} {} {}/{TIMES}", fault.name(), round + 1);
    }
    if claim != Claim::Control {
        finish(&mut mail, async || left(&scene).await).await?;
    }
    let (printed, _errors) = mail.stop().await?;

    let heard: Vec<u64> = printed
        .lines()
        .filter_map(|line| line.strip_prefix("heard:     order-"))
        .map(|number| number.parse().context("a number"))
        .collect::<Result<_>>()?;
    let different: HashSet<u64> = heard.iter().copied().collect();
    let lost = (1..=TIMES * CHUNK).filter(|number| !different.contains(number));
    tell(&Cell {
        pattern: "pubsub".to_owned(),
        variant: match claim {
            Claim::Control => "subscribe --core".to_owned(),
            _ => String::new(),
        },
        broker,
        fault,
        times: TIMES,
        claim,
        counts: Counts {
            attempted: sum.attempted,
            acknowledged: sum.acknowledged,
            received: different.len() as u64,
            lost: lost.count() as u64,
            repeated: Some((heard.len() - different.len()) as u64),
            doubled: 0,
            reordered: reordered(heard.iter().map(|number| ("mail", *number))),
        },
    })
}

macro_rules! cells {
    ($($name:ident: $broker:ident, $fault:ident, $claim:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() -> Result<()> {
                under(Broker::$broker, Fault::$fault, Claim::$claim).await
            }
        )*
    };
}

cells! {
    kafka_service_killed: Kafka, WorkerKilled, AtLeastOnce;
    kafka_broker_killed: Kafka, BrokerKilled, AtLeastOnce;
    rabbitmq_service_killed: RabbitMq, WorkerKilled, AtLeastOnce;
    rabbitmq_broker_killed: RabbitMq, BrokerKilled, AtLeastOnce;
    nats_service_killed: Nats, WorkerKilled, AtLeastOnce;
    nats_broker_killed: Nats, BrokerKilled, AtLeastOnce;
    nats_control: Nats, WorkerKilled, Control;
}
