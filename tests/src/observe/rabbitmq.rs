//! A second connection to RabbitMQ, and its management API.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use data_encoding::BASE64;
use lapin::{
    Channel, Connection, ConnectionProperties,
    message::BasicGetMessage,
    options::{
        BasicAckOptions, BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
    uri::AMQPUri,
};
use serde_json::{Value, json};
use tokio::{task::spawn_blocking, time::sleep};
use ureq::Agent;

/// After this time a kill no longer takes a new quorum queue's messages with it.
///
/// RabbitMQ 4.3.6 writes the name of a new quorum queue to its disk with a delay.
/// Killed less than a second after the declaration, it knows the queue but not the
/// messages in it, confirmed or not (24 runs of 24, and its log says "Starting
/// member as a new one"); killed two seconds after it, it has lost none. No client
/// can ask whether it is written, so waiting is a part of the fault: the queue is
/// not brand new.
pub const QUEUE_IS_WRITTEN: Duration = Duration::from_secs(3);

/// Connects, and gives a channel with its connection.
///
/// # Errors
///
/// If no broker answers.
pub async fn connect(address: &str) -> Result<(Connection, Channel)> {
    let connection =
        Connection::connect(address, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

/// Declares a quorum queue and waits for [`QUEUE_IS_WRITTEN`].
///
/// # Errors
///
/// If no broker answers, or the queue is there with other arguments.
pub async fn settled_queue(address: &str, queue: &str) -> Result<()> {
    let (connection, channel) = connect(address).await?;
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    channel
        .queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments)
        .await?;
    connection.close(200, "".into()).await?;
    sleep(QUEUE_IS_WRITTEN).await;
    Ok(())
}

/// Deletes queues with all that is in them; those that are not there count as
/// deleted.
///
/// # Errors
///
/// If no broker answers.
pub async fn delete_queues(address: &str, queues: &[&str]) -> Result<()> {
    let (connection, channel) = connect(address).await?;
    for queue in queues {
        channel
            .queue_delete((*queue).into(), QueueDeleteOptions::default())
            .await?;
    }
    connection.close(200, "".into()).await?;
    Ok(())
}

/// How many messages lie in a queue, ready to be delivered; those that are with
/// a consumer do not count.
///
/// # Errors
///
/// If there is no such queue.
pub async fn ready(address: &str, queue: &str) -> Result<u32> {
    let (connection, channel) = connect(address).await?;
    let declared = channel
        .queue_declare(
            queue.into(),
            QueueDeclareOptions::default().passive(),
            FieldTable::default(),
        )
        .await
        .with_context(|| format!("the queue {queue}"))?;
    let count = declared.message_count();
    connection.close(200, "".into()).await?;
    Ok(count)
}

/// Takes all messages out of a queue.
///
/// # Errors
///
/// If there is no such queue.
pub async fn drain(address: &str, queue: &str) -> Result<Vec<BasicGetMessage>> {
    let (connection, channel) = connect(address).await?;
    let mut messages = Vec::new();
    while let Some(message) = channel
        .basic_get(queue.into(), BasicGetOptions::default())
        .await?
    {
        message.ack(BasicAckOptions::default()).await?;
        messages.push(message);
    }
    connection.close(200, "".into()).await?;
    Ok(messages)
}

/// RabbitMQ's management API, as the user `guest`.
///
/// It knows what AMQP does not tell: what is with consumers, who is connected,
/// and it can close a connection from the broker's side. Its counts are up to
/// five seconds old (`collect_statistics_interval`), so poll them.
///
/// All its answers are described at `/api/index.html` of each RabbitMQ.
#[derive(Clone, Debug)]
pub struct Management {
    url: String,
    agent: Agent,
}

impl Management {
    /// The API at this URL, such as `http://localhost:15672`.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            agent: Agent::new_with_defaults(),
        }
    }

    /// Asks for what a path stands for, such as `queues/%2f/orders`. What stands
    /// for a name in it is escaped with [`escaped`].
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer, or not with 200.
    pub async fn get(&self, path: &str) -> Result<Value> {
        let request = self.agent.get(self.place(path));
        let request = request.header("Authorization", authorization());
        let answer =
            spawn_blocking(move || request.call()?.into_body().read_json::<Value>());
        answer.await?.with_context(|| format!("GET {path}"))
    }

    /// Makes or changes something: a user, a vhost, a policy.
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer, or refuses it.
    pub async fn put(&self, path: &str, body: Value) -> Result<()> {
        let request = self.agent.put(self.place(path));
        let request = request.header("Authorization", authorization());
        let answer = spawn_blocking(move || request.send_json(body));
        answer.await?.with_context(|| format!("PUT {path}"))?;
        Ok(())
    }

    /// Deletes something; a connection is closed by it.
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer, or refuses it.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let request = self.agent.delete(self.place(path));
        let request = request.header("Authorization", authorization());
        let answer = spawn_blocking(move || request.call());
        answer.await?.with_context(|| format!("DELETE {path}"))?;
        Ok(())
    }

    /// Makes a vhost of the test's own and returns the address that leads into it:
    /// what lies in other vhosts of the same broker cannot be seen from there.
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer.
    pub async fn own_vhost(&self, address: &str) -> Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let name = format!("test-{now}-{count}");
        self.put(&format!("vhosts/{name}"), json!({})).await?;
        let rights = json!({ "configure": ".*", "write": ".*", "read": ".*" });
        self.put(&format!("permissions/{name}/guest"), rights)
            .await?;
        let (server, _vhost) = address
            .rsplit_once('/')
            .context("an AMQP address ends with its vhost")?;
        Ok(format!("{server}/{name}"))
    }

    /// A queue, with the counts `messages_ready`, `messages_unacknowledged` and
    /// `consumers`, in the vhost of this address.
    ///
    /// # Errors
    ///
    /// If there is no such queue.
    pub async fn queue(&self, address: &str, queue: &str) -> Result<Value> {
        let vhost = escaped(&vhost(address)?);
        self.get(&format!("queues/{vhost}/{}", escaped(queue)))
            .await
    }

    /// The names of all queues in the vhost of this address, in their order.
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer.
    pub async fn queue_names(&self, address: &str) -> Result<Vec<String>> {
        let path = format!("queues/{}", escaped(&vhost(address)?));
        let queues = self.get(&path).await?;
        let queues = queues.as_array().context("a list")?;
        let name = |queue: &Value| queue["name"].as_str().map(str::to_owned);
        let mut names: Vec<String> = queues.iter().filter_map(name).collect();
        names.sort();
        Ok(names)
    }

    /// Closes all connections into the vhost of this address from the broker's
    /// side, and says how many there were.
    ///
    /// # Errors
    ///
    /// If RabbitMQ does not answer.
    pub async fn close_connections(&self, address: &str) -> Result<usize> {
        let path = format!("vhosts/{}/connections", escaped(&vhost(address)?));
        let connections = self.get(&path).await?;
        let connections = connections.as_array().context("a list")?;
        for connection in connections {
            let name = connection["name"].as_str().context("a name")?;
            self.delete(&format!("connections/{}", escaped(name)))
                .await?;
        }
        Ok(connections.len())
    }

    fn place(&self, path: &str) -> String {
        format!("{}/api/{path}", self.url)
    }
}

/// A name as a part of a path of the [`Management`] API.
pub fn escaped(name: &str) -> String {
    name.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-._".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing into a String cannot fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
        escaped
    })
}

fn vhost(address: &str) -> Result<String> {
    let uri: AMQPUri = address.parse().map_err(anyhow::Error::msg)?;
    Ok(uri.vhost)
}

fn authorization() -> String {
    format!("Basic {}", BASE64.encode(b"guest:guest"))
}
