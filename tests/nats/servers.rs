//! Servers with configurations of their own, as other tests use them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::{ConnectOptions, jetstream};
use futures_lite::StreamExt as _;
use tests::{
    nats::{Server, Servers},
    observe, wait,
};
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_find_each_other_and_their_files() -> Result<()> {
    let [hub, shop, link] = Servers::ports()?;
    let hub = Server {
        name: "hub",
        config: format!("include files/link.conf\nleafnodes {{ port: {link} }}"),
        port: hub,
    };
    let remote = format!("nats://clerk:secret@127.0.0.1:{link}");
    let shop = Server {
        name: "shop",
        config: format!("leafnodes {{ remotes: [{{ url: \"{remote}\" }}] }}"),
        port: shop,
    };
    let included = b"authorization { user: clerk, password: secret }".to_vec();
    let files = [("files/link.conf".to_owned(), included)];
    let servers = Servers::start(&[hub, shop], &files).await?;

    // The included file is in force, so this client is refused without it.
    let url = servers.url("hub")?;
    assert!(async_nats::connect(&url).await.is_err());
    let clerk =
        ConnectOptions::with_user_and_password("clerk".into(), "secret".into())
            .connect(&url)
            .await?;
    let mut seen = observe::nats::subscribe(&clerk, "sales").await?;

    let shop = observe::nats::connect(&servers.url("shop")?).await?;
    let sold = wait::until("the link of the leaf node", async || {
        shop.publish("sales", "one".into()).await?;
        observe::nats::round_trip(&shop).await?;
        let patience = Duration::from_millis(50);
        timeout(patience, seen.next()).await?.context("ended")
    });
    assert_eq!(&sold.await?.payload[..], b"one");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_with_its_data_and_a_new_config() -> Result<()> {
    let [port] = Servers::ports()?;
    let config = "jetstream: enabled".to_owned();
    let name = "store";
    let server = Server { name, config, port };
    let mut servers = Servers::start(&[server], &[]).await?;
    let url = servers.url(name)?;
    let stream = jetstream::stream::Config {
        name: "SERVERS".into(),
        subjects: vec!["servers.kept".into()],
        ..Default::default()
    };
    let jetstream = observe::nats::jetstream(&url).await?;
    jetstream.create_stream(stream).await?;
    jetstream.publish("servers.kept", "1".into()).await?.await?;

    servers.kill(name).await?;
    assert!(async_nats::connect(&url).await.is_err());
    assert!(servers.kill(name).await.is_err(), "it was killed before");
    let changed = b"jetstream: enabled\nserver_name: renamed";
    servers.write("store.conf", changed).await?;
    servers.restart(name).await?;
    assert!(servers.restart(name).await.is_err(), "it runs already");

    let client = observe::nats::connect(&url).await?;
    assert_eq!(client.server_info().server_name, "renamed");
    let mut kept = jetstream::new(client).get_stream("SERVERS").await?;
    assert_eq!(kept.info().await?.state.messages, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_reaches_the_server() -> Result<()> {
    let [port] = Servers::ports()?;
    let (name, config) = ("reloaded", String::new());
    let server = Server { name, config, port };
    let servers = Servers::start(&[server], &[]).await?;
    let locked = b"authorization { token: secret }";
    servers.write("reloaded.conf", locked).await?;
    servers.signal(name, "HUP").await?;
    wait::until("the new configuration", async || {
        let log = servers.log(name).await?;
        ensure!(log.contains("Reloaded server configuration"), "{log}");
        Ok(())
    })
    .await?;
    assert!(async_nats::connect(servers.url(name)?).await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_configuration_fails_with_the_servers_own_words() -> Result<()> {
    let [port] = Servers::ports()?;
    let (name, config) = ("broken", "authorization { user: }".to_owned());
    let started = Servers::start(&[Server { name, config, port }], &[]).await;
    let error = started.map(|_| ()).map_err(|error| format!("{error:#}"));
    let error = error.err().context("it started")?;
    ensure!(error.starts_with("the server broken: "), "{error}");
    ensure!(error.contains("ended while starting"), "{error}");
    ensure!(error.contains("broken.conf:1:"), "{error}");
    Ok(())
}

/// Dropped servers leave nobody who listens.
#[tokio::test(flavor = "multi_thread")]
async fn servers_end_with_their_test() -> Result<()> {
    let [port] = Servers::ports()?;
    let (name, config) = ("gone", String::new());
    let servers = Servers::start(&[Server { name, config, port }], &[]).await?;
    let url = servers.url(name)?;
    observe::nats::connect(&url).await?;
    drop(servers);
    assert!(async_nats::connect(&url).await.is_err());
    Ok(())
}
