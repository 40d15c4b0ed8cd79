//! Tests of the NATS examples, by their binaries, against a real server.

mod absent;
mod accounts;
mod auth_callout;
mod cli;
mod cluster_failover;
mod concurrent;
mod drain;
mod jetstream_acks;
mod jetstream_atomic_batch;
mod jetstream_consumer_limits;
mod jetstream_dead_letter;
mod jetstream_dedup;
mod jetstream_durability;
mod jetstream_inspect;
mod jetstream_limits;
mod jetstream_mirror_source;
mod jetstream_optimistic;
mod jetstream_ordered_consumer;
mod jetstream_priority_groups;
mod jetstream_publish;
mod jetstream_pull_consumer;
mod jetstream_push_consumer;
mod jetstream_retention;
mod jetstream_time;
mod jetstream_transform_republish;
mod jetstream_worker_pool;
mod jwt;
mod kv;
mod kv_cas;
mod kv_lease;
mod kv_watch;
mod leafnode;
mod nkey;
mod object_store;
mod observe;
mod payloads;
mod permissions;
mod pubsub;
mod queue_groups;
mod reconnect;
mod request_errors;
mod request_many;
mod request_reply;
mod servers;
mod service;
mod slow_consumer;
mod subjects;
mod test_server;
mod throughput;
mod tls;

use anyhow::Result;
use lab::broker::Broker;
use tests::broker;

const PUBSUB: &str = env!("CARGO_BIN_EXE_nats_pubsub");
const REQUEST_REPLY: &str = env!("CARGO_BIN_EXE_nats_request_reply");

/// The shared server, with the variable in which an example finds its address.
async fn nats() -> Result<(&'static str, &'static str)> {
    Ok(("NATS_URL", broker::shared(Broker::Nats).await?))
}
