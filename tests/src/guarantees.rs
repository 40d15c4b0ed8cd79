//! Lines of the book's table of guarantees, as the tests count them.

use std::env;

use anyhow::Result;
use lab::{
    broker::Broker,
    guarantees::{Cell, Claim, Counts, Fault},
    workspace,
};

use crate::example::RECORD;

/// Says what was counted, and writes it down or looks whether it is.
///
/// # Errors
///
/// If the counts do not keep the claim, or no such line is recorded.
pub fn tell(cell: &Cell) -> Result<()> {
    let counts = cell.counts;
    println!(
        "{} {} {} x {}: attempted {}, acknowledged {}, received {}, lost {}, \
         delivered again {:?}, effects again {}, out of order {:?}",
        cell.example(),
        cell.variant,
        cell.fault.name(),
        cell.times,
        counts.attempted,
        counts.acknowledged,
        counts.received,
        counts.lost,
        counts.repeated,
        counts.doubled,
        counts.reordered,
    );
    cell.holds()?;
    if env::var_os(RECORD).is_some() {
        cell.record(workspace::root())
    } else {
        cell.is_recorded(workspace::root())
    }
}

/// The same of an example whose leader was killed once. It is named without the broker
/// in front, and with the words that made it careless, if any did.
///
/// # Errors
///
/// As [`tell`].
pub fn tell_of_killed_leader(
    broker: Broker,
    (pattern, variant): (&str, &str),
    claim: Claim,
    counts: Counts,
) -> Result<()> {
    tell(&Cell {
        pattern: pattern.to_owned(),
        variant: variant.to_owned(),
        broker,
        fault: Fault::LeaderKilled,
        times: 1,
        claim,
        counts,
    })
}
