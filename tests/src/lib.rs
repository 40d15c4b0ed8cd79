//! What the tests of all crates share: brokers, the example as a process, and
//! observers that ask a broker behind the example's back.

pub mod broker;
pub mod cluster;
pub mod example;
mod files;
pub mod guarantees;
pub mod kafka;
pub mod nats;
pub mod nats_cli;
pub mod observe;
pub mod pika;
pub mod proxy;
pub mod rabbitmq;
pub mod random;
mod several;
pub mod supervised;
pub mod tls;
pub mod wait;

pub use broker::TestBroker;
pub use example::Example;
pub use proxy::Proxy;
pub use supervised::Supervised;
