//! The decisions of the patterns: data in, data out, no client in scope.
//!
//! What is written into a database together is here as well. What a broker does with
//! a decision is in `src/bin/<pattern>_<broker>.rs`.

pub mod backpressure;
pub mod bridge;
pub mod circuit_breaker;
pub mod claim_check;
pub mod content_based_router;
pub mod delayed_message;
pub mod event_replay;
pub mod graceful_shutdown;
pub mod idempotent_consumer;
pub mod ordered_partitions;
pub mod poison_message;
pub mod priority;
pub mod pubsub;
pub mod request_reply;
pub mod retry_dlq;
pub mod saga_orchestration;
pub mod scatter_gather;
pub mod splitter_aggregator;
pub mod task_queue;
pub mod trace_propagation;
pub mod transactional_outbox;
