//! The examples work together with another client: the official command line of
//! NATS is the other side here, on a server of these tests' own.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use tests::{Example, TestBroker, nats_cli::nats, wait};

const THROUGHPUT: &str = env!("CARGO_BIN_EXE_nats_throughput");
const SERVICE: &str = env!("CARGO_BIN_EXE_nats_service");
const PUBLISH: &str = env!("CARGO_BIN_EXE_nats_jetstream_publish");
const ORDERED: &str = env!("CARGO_BIN_EXE_nats_jetstream_ordered_consumer");
const WORKER_POOL: &str = env!("CARGO_BIN_EXE_nats_jetstream_worker_pool");
const KV: &str = env!("CARGO_BIN_EXE_nats_kv");
const KV_WATCH: &str = env!("CARGO_BIN_EXE_nats_kv_watch");
const OBJECT_STORE: &str = env!("CARGO_BIN_EXE_nats_object_store");
const PERMISSIONS: &str = env!("CARGO_BIN_EXE_nats_permissions");

async fn server() -> Result<(TestBroker, String)> {
    let server = TestBroker::start(Broker::Nats).await?;
    let address = server.address().to_owned();
    Ok((server, address))
}

#[tokio::test(flavor = "multi_thread")]
async fn core_a_subscriber_gets_what_the_command_line_publishes() -> Result<()> {
    let (_server, address) = server().await?;
    let url = ("NATS_URL", address.as_str());
    let mut subscriber = Example::start(THROUGHPUT, &["subscriber", "5"], url)?;
    // It prints nothing until it has all five; one that comes too early is lost,
    // so the command line goes on publishing.
    let mut published = 0;
    while published < 200 {
        let args = ["pub", "throughput.readings", "r", "--count", "5", "--quiet"];
        nats(&address, &args).await?;
        published += 5;
        let consumed = subscriber.prints("consumed: 5 messages of 1 B");
        let patience = std::time::Duration::from_millis(500);
        if let Ok(line) = tokio::time::timeout(patience, consumed).await {
            line?;
            return Ok(());
        }
    }
    anyhow::bail!("{published} messages are published, and 5 did not arrive")
}

#[tokio::test(flavor = "multi_thread")]
async fn services_the_command_line_asks_finds_and_counts() -> Result<()> {
    let (_server, address) = server().await?;
    let url = ("NATS_URL", address.as_str());
    let mut instance = Example::start(SERVICE, &["instance"], url)?;
    instance.prints("ready:").await?;

    let answer = ["request", "shop.stock.check", "sku-1", "--raw"];
    let answer = nats(&address, &answer).await?;
    assert_eq!(answer.trim(), "12 in stock");
    let refused = ["request", "shop.stock.check", "sku-9"];
    let refused = nats(&address, &refused).await?;
    // It shows a refusal's headers on a terminal only; that it was counted as an
    // error, the statistics below tell.
    ensure!(!refused.contains("in stock"), "{refused}");

    let info = nats(&address, &["micro", "info", "shop-stock"]).await?;
    ensure!(info.contains("shop.stock.check"), "{info}");
    let stats = nats(&address, &["micro", "stats", "shop-stock", "--json"]).await?;
    let stats: serde_json::Value = serde_json::from_str(&stats)?;
    let stats = stats.get(0).unwrap_or(&stats);
    let endpoint = &stats["endpoints"][0];
    assert_eq!(endpoint["num_requests"], 2, "{stats}");
    assert_eq!(endpoint["num_errors"], 1, "{stats}");
    instance.terminate().await?;
    instance.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn jetstream_each_reads_what_the_other_has_stored() -> Result<()> {
    let (_server, address) = server().await?;
    let url = ("NATS_URL", address.as_str());
    let ended = Example::start(PUBLISH, &[], url)?.end().await?;
    ended.succeeded()?;
    let stored = nats(&address, &["stream", "get", "ORDERS_PLACED", "2"]).await?;
    ensure!(stored.contains("order-2"), "{stored}");

    let mut reader = Example::start(ORDERED, &["reader"], url)?;
    reader.prints("reading stock.movements").await?;
    let publish = ["pub", "stock.movements", "7", "--jetstream"];
    nats(&address, &publish).await?;
    reader.prints("stock after sequence 1: 7").await?;
    reader.terminate().await?;
    reader.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_the_command_line_takes_an_order_of_the_pool() -> Result<()> {
    let (_server, address) = server().await?;
    let url = ("NATS_URL", address.as_str());
    // A worker makes the consumer; stopped, it leaves the orders to others.
    let mut worker = Example::start(WORKER_POOL, &["worker"], url)?;
    wait::until("the consumer", async || {
        nats(&address, &["consumer", "info", "PACKING", "packers"]).await?;
        Ok(())
    })
    .await?;
    worker.terminate().await?;
    worker.prints("stopped").await?;
    let producer = Example::start(WORKER_POOL, &["producer"], url)?;
    producer.end().await?.succeeded()?;

    let next = ["consumer", "next", "PACKING", "packers", "--ack", "--raw"];
    let order = nats(&address, &next).await?;
    assert_eq!(order.trim(), "order-1");
    let info = ["consumer", "info", "PACKING", "packers", "--json"];
    let info: serde_json::Value =
        serde_json::from_str(&nats(&address, &info).await?)?;
    assert_eq!(info["num_pending"], 11, "{info}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn key_value_and_objects_each_reads_what_the_other_has_put() -> Result<()> {
    let (_server, address) = server().await?;
    let url = ("NATS_URL", address.as_str());
    Example::start(KV, &[], url)?.end().await?.succeeded()?;
    let history = nats(&address, &["kv", "history", "shop_prices", "tea"]).await?;
    ensure!(history.contains("3.40"), "{history}");

    let mut watcher = Example::start(KV_WATCH, &["watcher"], url)?;
    watcher.prints("watching shop_flags").await?;
    let put = ["kv", "put", "shop_flags", "from-the-command-line", "on"];
    nats(&address, &put).await?;
    watcher.prints("from-the-command-line = on").await?;
    watcher.terminate().await?;
    watcher.end().await?.succeeded()?;

    let stored = Example::start(OBJECT_STORE, &["put"], url)?;
    stored.end().await?.succeeded()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("invoice.pdf");
    let path = file.to_string_lossy();
    let name = "invoices/2026-11.pdf";
    let get = ["object", "get", "shop_invoices", name, "--output", &path];
    nats(
        &address,
        &[&get[..], &["--no-progress", "--force"]].concat(),
    )
    .await?;
    assert_eq!(fs::metadata(&file)?.len(), 3_000_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn security_the_command_line_is_bound_by_the_same_users() -> Result<()> {
    use tests::nats::{Server, Servers};

    let config = include_str!("../../nats-examples/config/nats_permissions.conf");
    let [port] = Servers::ports()?;
    let server = Server {
        name: "shop",
        config: config.to_owned(),
        port,
    };
    let servers = Servers::start(&[server], &[]).await?;
    let url = servers.url("shop")?;
    let admin = ["--user", "admin", "--password", "admin-password"];
    let watch = ["sub", "permissions.orders.new", "--count", "1", "--raw"];
    let watching = {
        let (url, args) = (url.clone(), [&admin[..], &watch[..]].concat());
        tokio::spawn(async move { nats(&url, &args).await })
    };
    // Again until the command line has subscribed and seen one.
    let mut runs = 0;
    while !watching.is_finished() && runs < 20 {
        let example = Example::start(PERMISSIONS, &[], ("NATS_URL", &url))?;
        example.end().await?.succeeded()?;
        runs += 1;
    }
    assert_eq!(watching.await??.trim(), "1 kettle");

    let wrong = ["--user", "clerk", "--password", "guessed", "pub", "x", "y"];
    let refused = nats(&url, &wrong).await;
    let refused = refused
        .err()
        .context("a wrong password got in")?
        .to_string();
    ensure!(refused.contains("Authorization Violation"), "{refused}");
    Ok(())
}
