//! Tests of the patterns, by their binaries, against real brokers.

mod backpressure;
mod bridge;
mod circuit_breaker;
mod claim_check;
mod common;
mod content_based_router;
mod delayed_message;
mod event_replay;
mod graceful_shutdown;
mod idempotent_consumer;
mod ordered_partitions;
mod poison_message;
mod priority;
mod pubsub;
mod request_reply;
mod retry_dlq;
mod saga_orchestration;
mod scatter_gather;
mod splitter_aggregator;
mod task_queue;
mod task_queue_kafka;
mod task_queue_nats;
mod task_queue_rabbitmq;
mod trace_propagation;
mod transactional_outbox;
