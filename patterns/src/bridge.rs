//! Bridge: what is the same on both sides, and when a message must not go on.

use serde::{Deserialize, Serialize};

/// An order that a partner has sent. Its id and the partner travel beside it, in the
/// places that each broker has for them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartnerOrder {
    pub partner: String,
    /// In pieces.
    pub quantity: u64,
}

/// The id of an order, the same on each broker.
#[must_use]
pub fn id(number: u64) -> String {
    format!("order-{number}")
}

/// The orders of the example: ten partners in turns.
#[must_use]
pub fn order(number: u64) -> PartnerOrder {
    PartnerOrder {
        partner: format!("partner-{}", number % 10),
        quantity: number,
    }
}

/// The header that counts the bridges that a message has crossed, as text: Kafka's
/// headers are bytes, those of NATS are texts, and RabbitMQ's have types.
pub const HOPS: &str = "hops";

/// The most bridges that a message crosses. The three of this example are a circle.
pub const MOST_HOPS: u32 = 2;

/// What a bridge does with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Publish it on the other side, with this number of hops.
    Forward(u32),
    /// It has been around. Acknowledge it, or it would go round for ever.
    Stop,
}

// ANCHOR: verdict
/// Decides by the header [`HOPS`]. A message without one has crossed no bridge, and one
/// that holds no number is as good as one that has crossed them all: a loop is worse
/// than a message that ends here.
#[must_use]
pub fn verdict(hops: Option<&str>) -> Verdict {
    match hops.map_or(Ok(0), str::parse) {
        Ok(hops) if hops < MOST_HOPS => Verdict::Forward(hops + 1),
        _ => Verdict::Stop,
    }
}
// ANCHOR_END: verdict

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_crosses_two_bridges_and_no_third() {
        assert_eq!(verdict(None), Verdict::Forward(1));
        assert_eq!(verdict(Some("1")), Verdict::Forward(2));
        assert_eq!(verdict(Some("2")), Verdict::Stop);
    }

    #[test]
    fn what_is_no_number_goes_no_further() {
        for hops in ["", "-1", "many", "4294967296"] {
            assert_eq!(verdict(Some(hops)), Verdict::Stop, "{hops:?}");
        }
    }
}
