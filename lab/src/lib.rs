//! What `cargo lab` and the tests share: where examples and brokers come from.
//!
//! `native`, `docker` and `images` find or start real brokers, `workspace` and
//! `header` read the examples. The commands themselves are in `commands`, under
//! `main.rs`.

pub mod book;
pub mod broker;
pub mod cleanup;
pub mod compose;
pub mod digest;
pub mod docker;
pub mod features;
pub mod guarantees;
pub mod header;
pub mod images;
pub mod job;
pub mod kafka_settings;
pub mod markdown;
pub mod native;
pub mod packages;
pub mod private;
pub mod probe;
pub mod progress;
pub mod rabbitmq_settings;
pub mod services;
pub mod shell;
pub mod svg;
pub mod tools;
pub mod trouble;
pub mod up;
pub mod workspace;
