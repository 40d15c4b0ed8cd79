//! Permissions: who may declare, publish and consume, and how a refusal arrives.
//!
//! Teaches: each user has three regular expressions in each vhost, for the names of
//! what it may configure, write to and read from. A refusal closes the channel, not
//! the connection. A forbidden publish without confirms looks as if all were well,
//! until the channel is used again.
//!
//! Run, with a RabbitMQ of its own, or as
//! rabbitmq-examples/config/rabbitmq_permissions.conf says:
//!
//! ```text
//! cargo lab run rabbitmq_permissions     # starts it, runs:
//! cargo run --bin rabbitmq_permissions
//! ```
//!
//! Expected output:
//!
//! ```text
//! owner: configure yes  write yes  read yes
//! till:  configure no   write yes  read no
//! books: configure no   write no   read yes
//! till:  the vhost / is refused (not granted access)
//! books: a forbidden publish without confirms is Ok(NotRequested)
//! books: a moment later the channel is closed, and nobody was told why
//! ```
//!
//! Left out on purpose: how the users are made, which is the configuration of the
//! server; and permissions by topic, which look at the routing key as well.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    ExchangeKind,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use tokio::time::{sleep, timeout};

const DEFAULT_URL: &str = "amqp://guest:guest@localhost:5672/%2f";
const VHOST: &str = "shop";
const USERS: [(&str, &str); 3] = [
    ("owner", "owner-password"),
    ("till", "till-password"),
    ("books", "books-password"),
];
/// What the till writes to, and the books read from.
const SALES: &str = "shop.sales";
const BOOKED: &str = "shop.booked";

/// How long the broker may take to answer before it counts as not there.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let uri = address()?;
    // With the user of the address, to be sure that somebody is there.
    let connection = connect(&uri).await?;
    connection.close(200, "done".into()).await?;

    for user in USERS {
        let connection = connect(&as_user(&uri, user, VHOST)).await?;
        let configure = may(declare(&connection).await)?;
        let write = may(publish(&connection).await)?;
        let read = may(read(&connection).await)?;
        let name = format!("{}:", user.0);
        println!(
            "{name:<6} configure {configure:<3}  write {write:<3}  read {read}"
        );
        connection.close(200, "done".into()).await?;
    }

    let [_owner, till, books] = USERS;
    match connect(&as_user(&uri, till, "/")).await {
        Err(error) if format!("{error:#}").contains("refused for user") => {
            println!("till:  the vhost / is refused (not granted access)");
        }
        other => bail!("the till gets into the vhost /: {other:?}"),
    }
    without_confirms(&connect(&as_user(&uri, books, VHOST)).await?).await
}

/// `yes`, or `no` if the permissions do not allow it.
fn may(result: Result<()>) -> Result<&'static str> {
    match result {
        Ok(()) => Ok("yes"),
        Err(error) if is_refusal(&error) => Ok("no"),
        Err(error) => Err(error),
    }
}

/// 403, an error of the channel: the connection stays.
fn is_refusal(error: &Error) -> bool {
    format!("{error:#}").contains("ACCESS_REFUSED")
}
// ANCHOR_END: story

// ANCHOR: verbs
/// Configure: to declare, to delete.
async fn declare(connection: &Connection) -> Result<()> {
    // A channel for each, as a refusal closes it.
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default();
    channel
        .exchange_declare(SALES.into(), ExchangeKind::Fanout, durable, none.clone())
        .await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    channel
        .queue_declare(BOOKED.into(), QueueDeclareOptions::durable(), arguments)
        .await?;
    // To bind is to write to the queue, and to read from the exchange.
    let bind = QueueBindOptions::default();
    channel
        .queue_bind(BOOKED.into(), SALES.into(), "".into(), bind, none)
        .await?;
    channel.close(200, "".into()).await?;
    Ok(())
}

/// Write: to publish to an exchange.
async fn publish(connection: &Connection) -> Result<()> {
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    let answer = sale(&channel).await?;
    ensure!(answer.is_ack(), "RabbitMQ did not store the sale");
    channel.close(200, "".into()).await?;
    Ok(())
}

/// Read: to take from a queue.
async fn read(connection: &Connection) -> Result<()> {
    let channel = connection.create_channel().await?;
    let options = BasicGetOptions { no_ack: true };
    channel.basic_get(BOOKED.into(), options).await?;
    channel.close(200, "".into()).await?;
    Ok(())
}
// ANCHOR_END: verbs

// ANCHOR: silent
async fn without_confirms(connection: &Connection) -> Result<()> {
    let channel = connection.create_channel().await?;
    let answer = sale(&channel).await?;
    println!("books: a forbidden publish without confirms is Ok({answer:?})");
    // The refusal is on its way meanwhile.
    let refused = async {
        while channel.status().connected() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    let refused = timeout(PATIENCE, refused).await;
    refused.context("it is not refused within 8 s")?;
    println!("books: a moment later the channel is closed, and nobody was told why");
    connection.close(200, "done".into()).await?;
    Ok(())
}
// ANCHOR_END: silent

async fn sale(channel: &Channel) -> Result<Confirmation> {
    let confirm = channel
        .basic_publish(
            SALES.into(),
            "".into(),
            BasicPublishOptions::default(),
            b"1 kettle",
            BasicProperties::default().with_delivery_mode(2),
        )
        .await?;
    let answer = timeout(PATIENCE, confirm)
        .await
        .context("RabbitMQ has not confirmed within 8 s; it may be blocked")??;
    Ok(answer)
}

fn as_user(uri: &AMQPUri, (name, password): (&str, &str), vhost: &str) -> AMQPUri {
    let mut uri = uri.clone();
    uri.authority.userinfo.username = name.to_owned();
    uri.authority.userinfo.password = password.to_owned();
    uri.vhost = vhost.to_owned();
    uri
}

fn address() -> Result<AMQPUri> {
    let url = env::var("AMQP_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    url.parse().map_err(|_reason| {
        // The reason would repeat the address, with the password in it.
        anyhow!("AMQP_URL is not an AMQP address; a right one: {DEFAULT_URL}")
    })
}

// ANCHOR: connect
async fn connect(uri: &AMQPUri) -> Result<Connection> {
    // Only user, host, port and vhost are shown, not the password.
    let place = format!(
        "{}:{}, vhost {:?}",
        uri.authority.host, uri.authority.port, uri.vhost
    );
    let user = &uri.authority.userinfo.username;
    timeout(
        PATIENCE,
        Connection::connect_uri(uri.clone(), ConnectionProperties::default()),
    )
    .await
    .map_err(|_elapsed| anyhow!("no answer from RabbitMQ at {place}"))?
    .map_err(|error| {
        if error.is_io_error() {
            anyhow!(
                "no RabbitMQ at {place} ({error}); start one: cargo lab up rabbitmq"
            )
        } else {
            anyhow!(
                "RabbitMQ at {place} refuses the user {user} ({error}); check user, \
                 password and vhost in AMQP_URL, and start one that knows the \
                 users: cargo lab run rabbitmq_permissions"
            )
        }
    })
}
// ANCHOR_END: connect
