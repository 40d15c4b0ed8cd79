//! A second NATS connection.

use anyhow::Result;
use async_nats::{Client, ConnectOptions};

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
