//! What is denied does not arrive, and the connection hears of it as an event.

use anyhow::{Context as _, Result, ensure};
use async_nats::{Client, ConnectOptions};
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{
    Example, broker,
    nats::{Server, Servers},
    observe,
};

const PERMISSIONS: &str = env!("CARGO_BIN_EXE_nats_permissions");
const PRIVATE_INBOX: &str = env!("CARGO_BIN_EXE_nats_private_inbox");

/// The configurations that a reader starts a server with.
const USERS: &str = include_str!("../../nats-examples/config/nats_permissions.conf");
const TENANTS: &str =
    include_str!("../../nats-examples/config/nats_private_inbox.conf");

async fn server(config: &str) -> Result<Servers> {
    let [port] = Servers::ports()?;
    let config = config.to_owned();
    let name = "shop";
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

/// An observer who may see everything gets what was allowed and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_denied_message_does_not_arrive_and_the_denial_is_an_event() -> Result<()>
{
    let servers = server(USERS).await?;
    let admin = user(&servers, "admin").await?;
    let mut seen = observe::nats::subscribe(&admin, "permissions.>").await?;

    let url = servers.url("shop")?;
    let ended = Example::start(PERMISSIONS, &[], ("NATS_URL", &url))?
        .end()
        .await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    // A last message that is allowed: this connection has then everything.
    admin.publish("permissions.last", "".into()).await?;
    let mut subjects = Vec::new();
    while let Some(message) = seen.next().await {
        match message.subject.as_str() {
            "permissions.last" => break,
            subject => subjects.push(subject.to_owned()),
        }
    }
    subjects.dedup();
    let allowed = ["permissions.orders.new", "permissions.stock.check"];
    assert_eq!(subjects, allowed);
    Ok(())
}

/// The control: the same message does arrive from a user who may send it.
#[tokio::test(flavor = "multi_thread")]
async fn control_who_may_publish_a_refund_reaches_the_observer() -> Result<()> {
    let servers = server(USERS).await?;
    let admin = user(&servers, "admin").await?;
    let mut seen = observe::nats::subscribe(&admin, "permissions.>").await?;
    let refund = "permissions.billing.refund";
    admin.publish(refund, "all of it".into()).await?;
    observe::nats::round_trip(&admin).await?;
    let message = poll_once(seen.next()).await.flatten();
    assert_eq!(message.context("nothing came")?.subject.as_str(), refund);
    Ok(())
}

/// The server that everybody has knows none of these users and allows all.
#[tokio::test]
async fn a_server_without_the_users_is_one_line_with_the_way_out() -> Result<()> {
    let url = broker::shared(lab::broker::Broker::Nats).await?;
    for (example, config) in [
        (PERMISSIONS, "nats_permissions.conf"),
        (PRIVATE_INBOX, "nats_private_inbox.conf"),
    ] {
        let ended = Example::start(example, &[], ("NATS_URL", url))?
            .end()
            .await?;
        let line = ended.one_line_error()?;
        ensure!(line.contains("denied nothing"), "{line}");
        ensure!(line.contains(config), "{line}");
        if example == PERMISSIONS {
            ended.printed_what_the_book_shows("open")?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_inbox_is_read_by_its_owner_alone() -> Result<()> {
    let servers = server(TENANTS).await?;
    // Blue listens where it may not; what it is to hear of red comes after.
    let blue = user(&servers, "blue").await?;
    let mut stolen = blue.subscribe("_INBOX_red.>").await?;
    // And bob, who may read every usual inbox, is the control.
    let bob = user(&servers, "bob").await?;
    let mut overheard = bob.subscribe("_INBOX.>").await?;

    let url = servers.url("shop")?;
    let ended = Example::start(PRIVATE_INBOX, &[], ("NATS_URL", &url))?
        .end()
        .await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    // The example has ended, so the server has handed out all of its replies.
    let heard = overheard.next().await.context("the subscription ended")?;
    ensure!(heard.payload.starts_with(b"7 left, "), "{heard:?}");
    let nothing = poll_once(stolen.next()).await;
    ensure!(nothing.is_none(), "blue reads {nothing:?}");
    Ok(())
}
