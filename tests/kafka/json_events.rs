//! What is not known is kept, byte for byte, and stops nobody.

use anyhow::Result;
use rdkafka::Message as _;
use tests::observe;

use crate::ran_twice;

const JSON_EVENTS: &str = env!("CARGO_BIN_EXE_kafka_json_events");
const TOPIC: &str = "json.orders";
const KEPT: &str = "json.orders.kept";

#[tokio::test]
async fn unknown_kinds_and_broken_bytes_are_kept_as_they_are() -> Result<()> {
    let address = ran_twice(JSON_EVENTS, &[TOPIC, KEPT]).await?;
    let kept = observe::kafka::records(address, KEPT).await?;
    let kept: Vec<_> = kept.iter().map(|record| record.payload()).collect();
    let unknown = br#"{"type":"GiftWrapped","order":"order-1","paper":"red"}"#;
    let once = [Some(&unknown[..]), Some(&b"\xff{not JSON"[..])];
    assert_eq!(kept, once.repeat(2));
    // What is known is written as the other side expects it.
    let records = observe::kafka::records(address, TOPIC).await?;
    let written = observe::kafka::text(&records[1]).1;
    let expected = r#"{"type":"OrderPlaced","order":"order-2","item":"1 lamp","coupon":"SPRING"}"#;
    assert_eq!(written, expected);
    Ok(())
}
