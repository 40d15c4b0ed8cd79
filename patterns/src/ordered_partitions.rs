//! Ordered partitions: the states of an order, and the journal that sees which came
//! late.

use std::{path::Path, time::Duration};

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

/// The states of an order, one after the other.
pub const STATES: [&str; 5] = ["placed", "paid", "packed", "shipped", "delivered"];

/// How many partitions there are: as many changes may be worked on at the same time. To
/// change it is to move orders to other partitions, while their earlier changes wait
/// in the old ones: let the old ones run empty first.
pub const PARTITIONS: u32 = 4;

/// An order is in its next state. The order is the key: what has the same key stays in
/// its order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub order: String,
    /// 1 for the first state. No broker needs it; the journal does, to see what came
    /// late.
    pub step: u32,
    pub state: String,
}

impl Change {
    /// The changes of the example: five of `order-1`, then five of `order-2`, and so
    /// on. The first is number 1.
    #[must_use]
    pub fn numbered(number: u64) -> Self {
        let states = STATES.len() as u64;
        let index = number.saturating_sub(1);
        let (order, step) = (index / states + 1, index % states);
        let state = STATES.iter().zip(0..).find(|(_, at)| *at == step);
        Self {
            order: format!("order-{order}"),
            step: u32::try_from(step + 1).unwrap_or(u32::MAX),
            state: state.map_or("", |(state, _)| *state).to_owned(),
        }
    }

    /// A change needs an order and a step; what has none is none.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
        let change: Self = serde_json::from_slice(payload).ok()?;
        (!change.order.is_empty() && change.step > 0).then_some(change)
    }

    /// How long the work takes. For a new order somebody writes to the customer, which
    /// is slow: time enough for the next change to overtake, where it can.
    #[must_use]
    pub fn work(&self) -> Duration {
        Duration::from_millis(if self.step == 1 { 30 } else { 0 })
    }
}

/// How much a worker would like a partition; the partition goes to the one who likes it
/// most. No two of four workers like it alike, and any one, two or four of them get the
/// same number of partitions each.
#[must_use]
pub fn preference(worker: u32, partition: u32) -> u32 {
    (worker.saturating_sub(1) % PARTITIONS) ^ (partition % PARTITIONS)
}

/// What the journal made of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The order is in this state now.
    Changed(Change),
    /// It was written by an earlier delivery; nothing is changed.
    Known(Change),
    /// A later one of the same order is written already. The order has gone back in
    /// time, and this is what must not happen.
    Late(Change),
    /// Nobody can read it. It is kept, as it would block all orders of its partition.
    SetAside,
}

/// The changes in the order in which they were done, shared by all workers.
pub struct Journal {
    database: Connection,
}

impl Journal {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // Two workers may begin at the same moment.
        database.busy_timeout(Duration::from_secs(10))?;
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS changes (
                 position INTEGER PRIMARY KEY,
                 order_name TEXT NOT NULL,
                 step INTEGER NOT NULL,
                 state TEXT NOT NULL,
                 worker INTEGER NOT NULL,
                 late INTEGER NOT NULL,
                 UNIQUE (order_name, step)
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 payload BLOB PRIMARY KEY
             ) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: write
    /// Writes a change down, once for each step of an order, however often it comes,
    /// and tells whether a later one was there before.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed, and the message
    /// must not be acknowledged.
    pub fn write(
        &mut self,
        worker: u32,
        payload: &[u8],
    ) -> rusqlite::Result<Outcome> {
        let Some(change) = Change::read(payload) else {
            return self.set_aside(payload);
        };
        // It waits for other workers here, and not between the look and the write.
        let begin = TransactionBehavior::Immediate;
        let transaction = self.database.transaction_with_behavior(begin)?;
        let latest: Option<u32> = transaction
            .query_row(
                "SELECT max(step) FROM changes WHERE order_name = ?1",
                params![change.order],
                |row| row.get(0),
            )
            .optional()?
            .flatten();
        let late = latest.is_some_and(|latest| latest > change.step);
        let new = transaction.execute(
            "INSERT INTO changes (order_name, step, state, worker, late)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
            params![change.order, change.step, change.state, worker, late],
        )?;
        transaction.commit()?;
        Ok(match (new, late) {
            (0, _) => Outcome::Known(change),
            (_, true) => Outcome::Late(change),
            (_, false) => Outcome::Changed(change),
        })
    }
    // ANCHOR_END: write

    /// Keeps what nobody can read where a person can look at it.
    fn set_aside(&mut self, payload: &[u8]) -> rusqlite::Result<Outcome> {
        self.database.execute(
            "INSERT INTO unreadable (payload) VALUES (?1) ON CONFLICT DO NOTHING",
            params![payload],
        )?;
        Ok(Outcome::SetAside)
    }

    /// A line for each order, with its states as they were written, and one for all.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn show(&self) -> rusqlite::Result<Vec<String>> {
        let mut query = self.database.prepare(
            "SELECT order_name, group_concat(state, ', ' ORDER BY position)
             FROM changes GROUP BY order_name ORDER BY length(order_name), order_name",
        )?;
        let mut lines: Vec<String> = query
            .query_map((), |row| {
                let (order, states): (String, String) = (row.get(0)?, row.get(1)?);
                Ok(format!("{:10} {states}", format!("{order}:")))
            })?
            .collect::<Result<_, _>>()?;
        let (changes, late): (i64, i64) = self.database.query_row(
            "SELECT count(*), coalesce(sum(late), 0) FROM changes",
            (),
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        lines.push(format!("done:      {changes} changes, {late} of them late"));
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        Journal::open(Path::new(":memory:")).expect("a database in memory")
    }

    fn write(journal: &mut Journal, number: u64) -> Outcome {
        let change = Change::numbered(number);
        let payload = serde_json::to_vec(&change).expect("a change");
        journal.write(1, &payload).expect("a write")
    }

    #[test]
    fn an_order_goes_through_its_states() {
        let states: Vec<_> = (6..=10).map(Change::numbered).collect();
        assert!(states.iter().all(|change| change.order == "order-2"));
        assert!(states.iter().map(|change| &change.state).eq(&STATES));
        assert!(states.iter().map(|change| change.step).eq(1..=5));
    }

    #[test]
    fn what_comes_again_is_known_and_what_was_overtaken_is_late() {
        let mut journal = journal();
        let change = Change::numbered;
        for (number, outcome) in [
            (1, Outcome::Changed(change(1))),
            (3, Outcome::Changed(change(3))),
            (1, Outcome::Known(change(1))),
            (2, Outcome::Late(change(2))),
            (2, Outcome::Known(change(2))),
            (7, Outcome::Changed(change(7))),
            (4, Outcome::Changed(change(4))),
        ] {
            assert_eq!(write(&mut journal, number), outcome);
        }
        assert_eq!(
            journal.show().expect("lines"),
            [
                "order-1:   placed, packed, paid, shipped",
                "order-2:   paid",
                "done:      5 changes, 1 of them late",
            ]
        );
    }

    #[test]
    fn what_nobody_can_read_is_kept() {
        let mut journal = journal();
        let stepless = br#"{"order":"order-1","step":0,"state":"placed"}"#;
        for payload in [&b"\xff"[..], stepless] {
            let outcome = journal.write(1, payload).expect("a write");
            assert_eq!(outcome, Outcome::SetAside);
        }
        let count = "SELECT count(*) FROM unreadable";
        let kept: i64 = journal
            .database
            .query_row(count, (), |row| row.get(0))
            .expect("a count");
        assert_eq!(kept, 2);
    }

    #[test]
    fn partitions_are_shared_out() {
        for (workers, most) in [(1, 4), (2, 2), (3, 2), (4, 1)] {
            let mut mine = vec![0; workers];
            for partition in 0..PARTITIONS {
                let who = (0..workers)
                    .max_by_key(|&at| {
                        preference(u32::try_from(at).expect("a few") + 1, partition)
                    })
                    .expect("somebody");
                mine[who] += 1;
            }
            assert_eq!(mine.iter().max(), Some(&most), "{mine:?}");
            assert!(mine.iter().all(|&count| count > 0), "{mine:?}");
        }
    }
}
