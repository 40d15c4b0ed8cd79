//! Without a server, or with a wrong address: one line that helps, soon.

use anyhow::Result;
use tests::{
    Example,
    example::{fail_with_one_line, siblings, without_address},
};
use tokio::net::TcpListener;

use crate::PUBSUB;

/// What every NATS example says.
async fn one_line(url: &str, parts: &[&str]) -> Result<()> {
    fail_with_one_line(&siblings(PUBSUB)?, ("NATS_URL", url), parts).await
}

#[tokio::test]
async fn no_server_is_one_line_with_the_way_out() -> Result<()> {
    let parts = ["no NATS server at localhost:1", "cargo lab up nats"];
    one_line("nats://app:secret@localhost:1", &parts).await?;
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let pubsub = Example::start(PUBSUB, &[], nowhere)?;
    pubsub.end().await?.printed_what_the_book_shows("absent")
}

#[tokio::test]
async fn something_that_never_answers_is_given_up() -> Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let place = format!("127.0.0.1:{}", silent.local_addr()?.port());
    one_line(&format!("nats://{place}"), &["no NATS server at", &place]).await
}

#[tokio::test]
async fn a_broken_address_is_named_with_a_right_one() -> Result<()> {
    for url in [
        "",
        "http://app:secret@localhost",
        "nats://app:secret@x:many",
    ] {
        one_line(url, &["NATS_URL", "nats://localhost:4222"]).await?;
    }
    Ok(())
}

/// The examples that are not tried above, because they start their own server.
#[tokio::test]
async fn only_these_examples_read_no_address() -> Result<()> {
    let names: Vec<_> = without_address(PUBSUB)?
        .iter()
        .filter_map(|path| path.rsplit(['/', '\\']).next().map(str::to_owned))
        .collect();
    let suffix = std::env::consts::EXE_SUFFIX;
    assert_eq!(names, [format!("nats_test_server{suffix}")]);
    Ok(())
}
