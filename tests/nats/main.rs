//! Tests of the NATS examples, by their binaries, against a real server.

mod absent;
mod pubsub;
mod request_reply;
mod throughput;

use anyhow::Result;
use lab::broker::Broker;
use tests::broker;

const PUBSUB: &str = env!("CARGO_BIN_EXE_nats_pubsub");
const REQUEST_REPLY: &str = env!("CARGO_BIN_EXE_nats_request_reply");

/// The shared server, with the variable in which an example finds its address.
async fn nats() -> Result<(&'static str, &'static str)> {
    Ok(("NATS_URL", broker::shared(Broker::Nats).await?))
}
