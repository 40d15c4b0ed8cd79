//! What is exported and imported goes over, and nothing else does.

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, ConnectOptions};
use futures_lite::{StreamExt as _, future::poll_once};
use lab::broker::Broker;
use tests::{
    Example, broker,
    nats::{Server, Servers},
    observe,
};

const ACCOUNTS: &str = env!("CARGO_BIN_EXE_nats_accounts");

/// The configuration that a reader starts a server with.
const CONFIG: &str = include_str!("../../nats-examples/config/nats_accounts.conf");

async fn server() -> Result<Servers> {
    let [port] = Servers::ports()?;
    let (name, config) = ("shop", CONFIG.to_owned());
    Servers::start(&[Server { name, config, port }], &[]).await
}

async fn user(servers: &Servers, name: &str) -> Result<Client> {
    let password = format!("{name}-password");
    Ok(
        ConnectOptions::with_user_and_password(name.into(), password)
            .connect(servers.url("shop")?)
            .await?,
    )
}

/// An observer in each account: what ORDERS says, and what SHIPPING hears.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_exported_and_imported_goes_over() -> Result<()> {
    let servers = server().await?;
    let shipping = user(&servers, "shipping").await?;
    let mut heard = observe::nats::subscribe(&shipping, "accounts.>").await?;
    let mut news = observe::nats::subscribe(&shipping, "ext.accounts.>").await?;
    // The control: here the internal message is seen.
    let orders = user(&servers, "orders").await?;
    let internal = "accounts.internal";
    let mut said = observe::nats::subscribe(&orders, internal).await?;

    let url = servers.url("shop")?;
    let ended = Example::start(ACCOUNTS, &[], ("NATS_URL", &url))?;
    ended
        .end()
        .await?
        .succeeded()?
        .printed_what_its_header_says()?;

    observe::nats::round_trip(&orders).await?;
    let message = poll_once(said.next()).await.flatten();
    assert_eq!(
        &message.context("nothing said")?.payload[..],
        b"margin 40 %"
    );
    observe::nats::round_trip(&shipping).await?;
    let message = poll_once(news.next()).await.flatten();
    assert_eq!(&message.context("no news")?.payload[..], b"kettle");
    let message = poll_once(heard.next()).await.flatten();
    assert_eq!(&message.context("nothing own")?.payload[..], b"parcel");
    let more = poll_once(heard.next()).await;
    ensure!(more.is_none(), "SHIPPING hears of ORDERS: {more:?}");
    Ok(())
}

/// The server that everybody has puts all users into one account.
#[tokio::test]
async fn a_server_without_the_accounts_is_one_line_with_the_way_out() -> Result<()> {
    let url = broker::shared(Broker::Nats).await?;
    let ended = Example::start(ACCOUNTS, &[], ("NATS_URL", url))?;
    let ended = ended.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("nats_accounts.conf"), "{line}");
    ended.printed_what_the_book_shows("open")
}
