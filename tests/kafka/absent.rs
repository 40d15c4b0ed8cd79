//! Without a broker, or with a wrong address: one line that helps, soon.

use std::path::Path;

use anyhow::Result;
use lab::{private, workspace};
use tests::{
    Example,
    example::{
        fail_with_one_line, fail_with_one_line_each, siblings, without_address,
    },
};

use crate::{MOCK_CLUSTER, PRODUCER};

/// Every Kafka example but the one that is its own cluster.
fn clients() -> Result<Vec<String>> {
    let mut clients = siblings(PRODUCER)?;
    clients.retain(|binary| binary != MOCK_CLUSTER);
    Ok(clients)
}

/// What an example needs, as its files tell.
#[derive(Default)]
struct Needs {
    /// A Kafka of its own, and not the one that `cargo lab up` starts.
    own_kafka: bool,
    feature: bool,
}

fn needs(binary: &str) -> Result<Needs> {
    let name = Path::new(binary).file_stem().unwrap_or_default();
    let sources = workspace::sources_in(workspace::root())?;
    let Some(source) = sources.iter().find(|source| *source.name == *name) else {
        return Ok(Needs::default());
    };
    let header = lab::header::parse(&workspace::read(&source.path)?)?;
    Ok(Needs {
        own_kafka: private::config(source).is_some(),
        feature: header.features().is_some(),
    })
}

#[tokio::test]
async fn only_these_examples_read_no_address() -> Result<()> {
    let names = without_address(PRODUCER)?;
    let names: Vec<_> = names
        .iter()
        .filter_map(|path| Path::new(path).file_stem())
        .collect();
    assert_eq!(names, ["kafka_producer_errors"]);
    Ok(())
}

#[tokio::test]
async fn no_kafka_is_one_line_with_the_way_out() -> Result<()> {
    let nowhere = ("KAFKA_BROKERS", "localhost:1");
    let (mut plain, mut own, mut not_built) = (Vec::new(), Vec::new(), Vec::new());
    for client in clients()? {
        match needs(&client)? {
            Needs { feature: true, .. } if !cfg!(feature = "tls") => {
                not_built.push(client);
            }
            Needs {
                own_kafka: true, ..
            } => own.push(client),
            _ => plain.push(client),
        }
    }
    // Without files, which some would want to see first.
    let empty = ["KAFKA_CA", "KAFKA_CERT", "KAFKA_KEY"].map(|name| (name, ""));
    let variables = [&[nowhere][..], &empty].concat();
    let absent = "no Kafka at localhost:1";
    let up = [absent, "cargo lab up kafka"];
    let run = [absent, "cargo lab run kafka_"];
    let build = ["built without TLS", "--features tls"];
    tokio::try_join!(
        fail_with_one_line(&plain, nowhere, &up),
        fail_with_one_line_each(&own, &variables, &run),
        fail_with_one_line_each(&not_built, &variables, &build),
    )?;

    let producer = Example::start(PRODUCER, &[], nowhere)?;
    producer.end().await?.printed_what_the_book_shows("absent")
}

#[tokio::test]
async fn a_broken_address_is_named_with_a_right_one() -> Result<()> {
    for broken in ["", "localhost", "kafka://localhost:9092", "localhost:many"] {
        let parts = ["KAFKA_BROKERS", "localhost:9092"];
        fail_with_one_line(&clients()?, ("KAFKA_BROKERS", broken), &parts).await?;
    }
    Ok(())
}
