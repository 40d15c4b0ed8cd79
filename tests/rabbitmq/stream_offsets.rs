//! A reader that is killed anywhere has done each sale once, if the offset is in the
//! transaction of the work.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lapin::{
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use tests::{Example, observe, random, wait::DEADLINE};
use tokio::time::{sleep, timeout};

use crate::{own_vhost, ran_twice};

const OFFSET_TRACKING: &str = env!("CARGO_BIN_EXE_rabbitmq_stream_offset_tracking");
const FILTERING: &str = env!("CARGO_BIN_EXE_rabbitmq_stream_filtering");
const SALES: i64 = 2000;

#[tokio::test]
async fn the_story_goes_on_where_it_was() -> Result<()> {
    ran_twice(OFFSET_TRACKING).await?;
    Ok(())
}

/// Reads all sales into a database while being killed, and returns their number and
/// amount as another program finds them there.
async fn totals_after_kills(words: &[&str]) -> Result<(i64, i64)> {
    let (_management, address) = own_vhost().await?;
    let variable = ("AMQP_URL", address.as_str());
    let count = SALES.to_string();
    let publisher = Example::start(OFFSET_TRACKING, &["publish", &count], variable)?;
    publisher.end().await?.succeeded()?;
    let folder = tempfile::tempdir()?;
    let file = folder
        .path()
        .join("sales.db")
        .to_string_lossy()
        .into_owned();
    let words = [&["consume", file.as_str()][..], words].concat();
    let mut random = random::seeded();
    for _kill in 0..8 {
        let mut reader = Example::start(OFFSET_TRACKING, &words, variable)?;
        reader.prints("added:").await?;
        sleep(Duration::from_millis(random.u64(0..80))).await;
        reader.kill().await?;
    }
    let mut reader = Example::start(OFFSET_TRACKING, &words, variable)?;
    // Maybe the last one was done before it was killed: one more tells.
    let publisher = Example::start(OFFSET_TRACKING, &["publish", "1"], variable)?;
    publisher.end().await?.succeeded()?;
    let more = format!("at offset {SALES}");
    reader.prints(&more).await?;
    reader.interrupt().await?;
    reader.end().await?.succeeded()?;
    let database = rusqlite::Connection::open(&file)?;
    let ask = "SELECT sales, amount FROM total";
    let totals =
        database.query_row(ask, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(totals)
}

#[tokio::test]
async fn killed_anywhere_each_sale_is_added_once() -> Result<()> {
    let (sales, amount) = totals_after_kills(&[]).await?;
    assert_eq!(sales, SALES + 1);
    assert_eq!(amount, SALES * (SALES + 1) / 2 + 1);
    Ok(())
}

/// The control: the offset beside the work, now and then.
#[tokio::test]
async fn control_with_an_offset_now_and_then_some_are_added_again() -> Result<()> {
    let (sales, _amount) = totals_after_kills(&["--periodic"]).await?;
    ensure!(sales > SALES + 1, "none of {sales} was added twice");
    // No more than a period for each kill.
    ensure!(sales <= SALES + 1 + 8 * 50, "{sales} were added");
    Ok(())
}

#[tokio::test]
async fn a_filter_leaves_out_chunks_and_the_reader_looks_again() -> Result<()> {
    let address = ran_twice(FILTERING).await?;
    // All is still there, in the order in which it was published.
    let (connection, channel) = observe::rabbitmq::connect(&address).await?;
    channel.basic_qos(100, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    let first = AMQPValue::LongString("first".into());
    arguments.insert("x-stream-offset".into(), first);
    let options = BasicConsumeOptions::default();
    let mut reader = channel
        .basic_consume("stream.regions".into(), "".into(), options, arguments)
        .await?;
    let mut regions = Vec::new();
    while regions.len() < 320 {
        let order = timeout(DEADLINE, reader.next()).await?;
        let order = order.context("the stream is gone")??;
        order.ack(BasicAckOptions::default()).await?;
        regions.push(String::from_utf8_lossy(&order.data).into_owned());
    }
    let mixed = ["eu", "us"].repeat(10);
    assert_eq!(regions[300..], mixed);
    assert_eq!(
        regions[..300].iter().filter(|one| *one == "us").count(),
        100
    );
    connection.close(200, "".into()).await?;
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_no_database_is_one_line() -> Result<()> {
    let (_management, address) = own_vhost().await?;
    let variable = ("AMQP_URL", address.as_str());
    let words = ["consume", "/nowhere/sales.db"];
    let ended = Example::start(OFFSET_TRACKING, &words, variable)?;
    ended
        .end()
        .await?
        .refused("cannot open /nowhere/sales.db")?;
    Ok(())
}
