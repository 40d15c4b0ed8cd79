//! Observers: what a broker holds, asked through a client of the test's own.

pub mod kafka;
pub mod nats;
pub mod rabbitmq;
