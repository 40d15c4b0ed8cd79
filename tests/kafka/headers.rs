//! Headers arrive as they were sent: in their order, twice, empty, and null.

use anyhow::{Context as _, Result};
use rdkafka::{Message as _, message::Headers as _};
use tests::observe;

use crate::ran_twice;

const HEADERS: &str = env!("CARGO_BIN_EXE_kafka_headers");
const TOPIC: &str = "headers.orders";

#[tokio::test]
async fn another_client_sees_the_same_list() -> Result<()> {
    let address = ran_twice(HEADERS, &[TOPIC]).await?;
    let records = observe::kafka::records(address, TOPIC).await?;
    assert_eq!(records.len(), 2);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let expected: [(&str, Option<&[u8]>); 6] = [
        ("event-type", Some(b"OrderPlaced")),
        ("traceparent", Some(trace.as_bytes())),
        ("attempt", Some(b"1")),
        ("attempt", Some(b"2")),
        ("coupon", Some(b"")),
        ("gift", None),
    ];
    for record in &records {
        let headers = record.headers().context("no headers")?;
        let seen: Vec<_> = headers.iter().map(|one| (one.key, one.value)).collect();
        assert_eq!(seen, expected);
        // What is in the headers is not in the payload.
        assert_eq!(record.payload(), Some(&b"1 kettle"[..]));
    }
    Ok(())
}
