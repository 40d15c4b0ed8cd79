//! Batches make requests few, and what is compressed small; the readings stay the same.

use anyhow::{Context as _, Result, ensure};
use rdkafka::Message as _;
use tests::{Example, observe};

use crate::{kafka, ran_twice};

const BATCHING: &str = env!("CARGO_BIN_EXE_kafka_producer_batching");
const TOPIC: &str = "batching.readings";

/// Records in a request, and bytes each, of the line that begins so.
fn figures(stdout: &str, way: &str) -> Result<(u64, u64)> {
    let mut lines = stdout.lines();
    let rest = lines
        .find_map(|line| line.strip_prefix(&format!("{way:<22}")))
        .with_context(|| format!("no line of {way}"))?;
    let numbers = rest.split_whitespace().filter_map(|word| word.parse().ok());
    match numbers.collect::<Vec<_>>()[..] {
        [records, bytes] => Ok((records, bytes)),
        _ => anyhow::bail!("no figures in {rest}"),
    }
}

#[tokio::test]
async fn a_batch_is_few_requests_and_gets_small() -> Result<()> {
    let kafka = kafka().await?;
    ran_twice(BATCHING, &[TOPIC]).await?;
    let ended = Example::start(BATCHING, &[], kafka)?.end().await?;
    let ended = ended.succeeded()?;
    let of = |way| figures(&ended.stdout, way);

    let (one, plain) = of("one by one")?;
    assert_eq!(one, 1);
    let (linger, batched) = of("linger 100 ms")?;
    ensure!(linger >= 20, "{linger} in a request");
    ensure!(batched < plain, "{batched} bytes instead of {plain}");
    // Alone, a reading does not get small.
    let (_, alone) = of("one by one, gzip")?;
    ensure!(alone * 10 > plain * 9, "{alone} bytes instead of {plain}");
    for codec in ["gzip", "snappy", "lz4"] {
        let way = format!("linger 100 ms, {codec}");
        let (_, small) = figures(&ended.stdout, &way)?;
        ensure!(small * 2 < batched, "{codec}: {small} bytes of {batched}");
    }

    // Three runs of seven ways.
    let records = observe::kafka::records(kafka.1, TOPIC).await?;
    assert_eq!(records.len(), 3 * 7 * 1000);
    let first: Vec<_> = records[..1000].iter().map(|it| it.payload()).collect();
    for way in records.chunks(1000) {
        ensure!(way.iter().map(|it| it.payload()).eq(first.iter().copied()));
    }
    Ok(())
}
