//! What the tests of all crates share: brokers, the example as a process, and
//! observers that ask a broker behind the example's back.

pub mod broker;
pub mod example;
pub mod nats;
pub mod nats_cli;
pub mod observe;
pub mod proxy;
pub mod wait;

pub use broker::TestBroker;
pub use example::Example;
pub use proxy::Proxy;
