//! Publish and subscribe: what is told, and to whom.

use serde::{Deserialize, Serialize};

/// The services that want to hear of each order. The publisher knows none of them.
pub const SERVICES: [&str; 3] = ["billing", "stock", "mail"];

/// What all services are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderPlaced {
    pub order: String,
    /// In cents.
    pub total: u64,
}

/// The events of the example.
#[must_use]
pub fn event(number: u64) -> OrderPlaced {
    OrderPlaced {
        order: format!("order-{number}"),
        total: number,
    }
}

/// What a service reads, if it can.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    Order(String),
    /// Nobody will ever be able to read it. A service says so and goes on: the other
    /// services have copies of their own, and the topic or stream keeps it.
    Noise,
}

/// Reads an event. Fields that it does not know are no harm: the publisher may be
/// newer.
#[must_use]
pub fn heard(payload: &[u8]) -> Heard {
    match serde_json::from_slice::<OrderPlaced>(payload) {
        Ok(event) => Heard::Order(event.order),
        Err(_) => Heard::Noise,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_heard() {
        let payload = serde_json::to_vec(&event(7)).expect("JSON");
        assert_eq!(heard(&payload), Heard::Order("order-7".to_owned()));
        let newer = br#"{"order":"order-7","total":7,"currency":"EUR"}"#;
        assert_eq!(heard(newer), Heard::Order("order-7".to_owned()));
    }

    #[test]
    fn noise_is_noise() {
        for payload in [&b"\xff"[..], b"", b"{}", br#"{"order":7,"total":7}"#] {
            assert_eq!(heard(payload), Heard::Noise, "{payload:?}");
        }
    }
}
