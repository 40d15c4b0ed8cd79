//! A second NATS connection.

use anyhow::{Result, bail};
use async_nats::{
    Client, ConnectOptions, Message, RequestErrorKind, Subscriber,
    jetstream::{self, ErrorCode, context::DeleteStreamErrorKind},
};

use crate::wait;

/// Connects, without waiting for a server that is not there.
///
/// # Errors
///
/// If no server answers.
pub async fn connect(address: &str) -> Result<Client> {
    Ok(ConnectOptions::new()
        .name("observer")
        .connect(address)
        .await?)
}

/// Subscribes, and returns when the server knows of it.
///
/// # Errors
///
/// If the server does not answer.
pub async fn subscribe(
    client: &Client,
    subject: &'static str,
) -> Result<Subscriber> {
    let subscriber = client.subscribe(subject).await?;
    round_trip(client).await?;
    Ok(subscriber)
}

/// Returns when the server has dealt with all that this connection has sent and
/// has delivered what it had for it. A flush only writes to the socket.
///
/// # Errors
///
/// If the server does not answer.
pub async fn round_trip(client: &Client) -> Result<()> {
    // The server answers in order, and answers this at once.
    match client.request("observer.nobody.listens", "".into()).await {
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_answer) => bail!("somebody listens on observer.nobody.listens"),
    }
}

/// Asks, and asks again while the server knows of nobody who answers. An example
/// says that it is ready when its subscription is written to the socket, and the
/// server reads its sockets in any order.
///
/// # Errors
///
/// If the server still knows of nobody after [`wait::DEADLINE`], or no answer
/// comes.
pub async fn request(
    client: &Client,
    subject: &'static str,
    payload: &'static str,
) -> Result<Message> {
    wait::until("a responder", async || {
        match client.request(subject, payload.into()).await {
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                Err(error.into())
            }
            answer => Ok(answer),
        }
    })
    .await?
    .map_err(Into::into)
}

/// JetStream through a connection of its own.
///
/// # Errors
///
/// If no server answers.
pub async fn jetstream(address: &str) -> Result<jetstream::Context> {
    Ok(jetstream::new(connect(address).await?))
}

/// Deletes a stream with its messages and consumers; where there is none, it
/// counts as deleted.
///
/// # Errors
///
/// If no server answers, or it refuses.
pub async fn forget_stream(address: &str, stream: &str) -> Result<()> {
    let jetstream = jetstream(address).await?;
    match jetstream.delete_stream(stream).await {
        Ok(_deleted) => Ok(()),
        Err(error) => match error.kind() {
            DeleteStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                Ok(())
            }
            _ => Err(error.into()),
        },
    }
}
