//! The promises of the patterns under faults: a thousand messages and ten faults for
//! each line of the book's table of guarantees.
//!
//! `cargo lab test faults` shows the counts as they come. With `LAB_RECORD=1` they are
//! written below docs/guarantees, from which `cargo lab index` makes the table. Each
//! random choice is made from the seed that is printed; `FAULT_SEED` sets it.

mod bridge;
mod driver;
mod idempotent_consumer;
mod ordered_partitions;
mod pubsub;
mod retry_dlq;
mod saga_orchestration;
mod task_queue;
mod transactional_outbox;
