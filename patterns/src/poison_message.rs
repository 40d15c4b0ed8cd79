//! Poison message: what an order is, and what becomes of one that cannot be done.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An order, as the shop writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: String,
    pub quantity: u32,
}

/// How many workers an order may kill before it is set aside.
pub const ATTEMPTS: u32 = 3;

/// Bytes that no decoder turns into an order: not JSON, and not text either.
pub const NOISE: &[u8] = b"\xff\xfe two cups";

/// The line of the example: the second message cannot be decoded, and the fourth
/// one kills whoever works on it.
///
/// # Errors
///
/// If an order cannot be written as JSON.
pub fn line() -> serde_json::Result<Vec<Vec<u8>>> {
    let order = |number: u32, quantity| {
        let id = format!("order-{number}");
        serde_json::to_vec(&Order { id, quantity })
    };
    Ok(vec![
        order(1, 2)?,
        NOISE.to_vec(),
        order(2, 1)?,
        order(3, 0)?,
        order(4, 5)?,
    ])
}

/// The bug that nobody has found yet: a quantity of 0 ends the process, as a fault in
/// a C library does, or the kernel when memory is short.
#[must_use]
pub fn kills(order: &Order) -> bool {
    order.quantity == 0
}

/// Why a message is set aside.
#[derive(Debug, PartialEq, Eq)]
pub enum Reason {
    /// Trying again changes nothing.
    NoOrder(String),
    /// So many workers began it, and none of them has come back.
    Killed(u32),
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoOrder(error) => write!(formatter, "no order: {error}"),
            Self::Killed(workers) => write!(formatter, "killed {workers} workers"),
        }
    }
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Work(Order),
    SetAside(Reason),
}

// ANCHOR: verdict
/// Decides before the work: after it, there may be nobody left to decide. `attempt`
/// is 1 for a message that comes for the first time.
#[must_use]
pub fn verdict(payload: &[u8], attempt: u32) -> Verdict {
    match decode(payload) {
        Err(error) => Verdict::SetAside(Reason::NoOrder(error.to_string())),
        Ok(_) if attempt > ATTEMPTS => {
            Verdict::SetAside(Reason::Killed(attempt - 1))
        }
        Ok(order) => Verdict::Work(order),
    }
}
// ANCHOR_END: verdict

/// Reads an order.
///
/// # Errors
///
/// If the bytes are none.
pub fn decode(payload: &[u8]) -> serde_json::Result<Order> {
    serde_json::from_slice(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killer() -> Vec<u8> {
        line().expect("orders").swap_remove(3)
    }

    #[test]
    fn noise_is_set_aside_at_once() {
        let verdict = verdict(NOISE, 1);
        assert!(
            matches!(verdict, Verdict::SetAside(Reason::NoOrder(_))),
            "{verdict:?}"
        );
    }

    #[test]
    fn an_order_is_begun_three_times_and_not_a_fourth() {
        for attempt in 1..=3 {
            let verdict = verdict(&killer(), attempt);
            assert!(matches!(verdict, Verdict::Work(_)), "{verdict:?}");
        }
        let fourth = verdict(&killer(), 4);
        assert_eq!(fourth, Verdict::SetAside(Reason::Killed(3)));
    }

    #[test]
    fn one_message_of_the_line_is_noise_and_one_kills() {
        let line = line().expect("orders");
        let orders: Vec<_> = line.iter().flat_map(|it| decode(it)).collect();
        let killers = orders.iter().filter(|order| kills(order)).count();
        assert_eq!((orders.len(), killers), (4, 1));
    }
}
