//! A record that the producer reports as delivered is in the topic.

use anyhow::Result;
use tests::{Example, observe};

use crate::{FIRST_STEPS, GROUP, PRODUCER, TOPIC, kafka};

#[tokio::test]
async fn what_is_reported_as_delivered_is_in_the_topic() -> Result<()> {
    let _turn = FIRST_STEPS.lock().await;
    let kafka = kafka().await?;
    observe::kafka::forget(kafka.1, TOPIC, GROUP).await?;

    for run in 0..2 {
        let ended = Example::start(PRODUCER, &[], kafka)?.end().await?;
        let ended = ended.succeeded()?;
        ended.printed_what_its_header_says()?;
        let offset = format!("(partition 0, offset {run})");
        assert!(ended.stdout.contains(&offset), "{}", ended.stdout);
    }

    let records = observe::kafka::records(kafka.1, TOPIC).await?;
    let record = ("key1".to_owned(), "Hello, Kafka!".to_owned());
    let texts: Vec<_> = records.iter().map(observe::kafka::text).collect();
    assert_eq!(texts, [record.clone(), record]);
    Ok(())
}
