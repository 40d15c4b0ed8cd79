//! Priority: express before standard, and standard before it is forgotten.

use std::{fmt, ops::RangeInclusive, path::Path};

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

// ---- Orders and their lanes ------------------------------------------------

/// An order, as the shop writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: String,
    /// What the customer has chosen, in the words of the checkout.
    pub service: String,
}

impl Order {
    /// Reads an order.
    ///
    /// # Errors
    ///
    /// If the bytes are none.
    pub fn read(payload: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(payload)
    }

    /// # Errors
    ///
    /// If it cannot be written as JSON.
    pub fn write(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

// ANCHOR: lane
/// Where an order waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    Express,
    Standard,
}

impl Lane {
    /// An order of a service that nobody knows here is a paid order all the same, so
    /// it has a lane. Not the quick one: whoever mistypes would overtake the others.
    #[must_use]
    pub fn of(service: &str) -> Self {
        match service {
            "express" => Self::Express,
            _standard_or_unknown => Self::Standard,
        }
    }
}
// ANCHOR_END: lane

/// Whether a service is one that [`Lane::of`] knows.
#[must_use]
pub fn is_known(service: &str) -> bool {
    matches!(service, "express" | "standard")
}

// ---- Whose turn it is ------------------------------------------------------

/// So many express orders in a row, at most, while a standard one waits.
pub const IN_A_ROW: u32 = 3;

/// How a worker chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Weighted,
    /// Express whenever there is one. Right if there are few of them; otherwise it is
    /// the mistake, to see what it costs.
    Strict,
}

// ANCHOR: turns
/// Chooses between two lanes, order by order.
#[derive(Debug)]
pub struct Turns {
    rule: Rule,
    /// So many express orders since the last standard one. They count also while no
    /// standard order is seen: it may be on its way.
    in_a_row: u32,
}

impl Turns {
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        Self { rule, in_a_row: 0 }
    }

    /// Whose turn it is, given in which of the lanes an order waits. An empty lane
    /// costs the other one nothing.
    pub fn next(&mut self, express: bool, standard: bool) -> Option<Lane> {
        let lane = match (express, standard) {
            (false, false) => return None,
            (true, false) => Lane::Express,
            (false, true) => Lane::Standard,
            (true, true) => match self.rule {
                Rule::Weighted if self.in_a_row >= IN_A_ROW => Lane::Standard,
                Rule::Weighted | Rule::Strict => Lane::Express,
            },
        };
        self.in_a_row = match lane {
            Lane::Express => self.in_a_row.saturating_add(1),
            Lane::Standard => 0,
        };
        Some(lane)
    }
}
// ANCHOR_END: turns

// ---- Placing orders --------------------------------------------------------

/// The orders of one call of `place`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    pub numbers: RangeInclusive<u64>,
    pub service: String,
}

impl Placement {
    #[must_use]
    pub fn new(numbers: RangeInclusive<u64>, service: &str) -> Self {
        let service = service.to_owned();
        Self { numbers, service }
    }

    /// Reads the words behind `place`, if they are right.
    #[must_use]
    pub fn parse(first: &str, last: &str, service: &str) -> Option<Self> {
        let numbers = first.parse().ok()?..=last.parse().ok()?;
        let letters = |it: char| it.is_ascii_lowercase() || it == '-';
        let is_word = service.starts_with(|it: char| it.is_ascii_lowercase())
            && service.len() <= 40
            && service.chars().all(letters);
        (is_word && !numbers.is_empty()).then(|| Self::new(numbers, service))
    }

    pub fn orders(&self) -> impl Iterator<Item = Order> {
        self.numbers.clone().map(|number| Order {
            id: format!("order-{number}"),
            service: self.service.clone(),
        })
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.numbers.start(), self.numbers.end());
        write!(formatter, "order-{first} to order-{last}, {}", self.service)?;
        if !is_known(&self.service) {
            formatter.write_str(", which nobody knows here: treated as standard")?;
        }
        Ok(())
    }
}

// ---- The dispatch desk -----------------------------------------------------

/// What has been shipped, in this order: parcels, so an order that is shipped twice is
/// there twice.
pub struct Desk {
    book: Connection,
}

impl Desk {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let book = Connection::open(file)?;
        book.execute_batch(
            "PRAGMA busy_timeout = 5000;
             PRAGMA journal_mode = WAL;
             PRAGMA synchronous = NORMAL;
             CREATE TABLE IF NOT EXISTS shipped (
                 number INTEGER PRIMARY KEY,
                 id TEXT NOT NULL,
                 service TEXT NOT NULL
             ) STRICT;",
        )?;
        Ok(Self { book })
    }

    /// Ships an order.
    ///
    /// # Errors
    ///
    /// If the database cannot be written.
    pub fn ship(&self, order: &Order) -> rusqlite::Result<()> {
        let insert = "INSERT INTO shipped (id, service) VALUES (?1, ?2)";
        self.book
            .execute(insert, params![order.id, order.service])?;
        Ok(())
    }

    /// The orders that are shipped, in this order.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn shipped(&self) -> rusqlite::Result<Vec<Order>> {
        let list = "SELECT id, service FROM shipped ORDER BY number";
        let mut list = self.book.prepare(list)?;
        let rows = list.query_map([], |row| {
            let (id, service) = (row.get(0)?, row.get(1)?);
            Ok(Order { id, service })
        })?;
        rows.collect()
    }

    /// How many are shipped.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn count(&self) -> rusqlite::Result<u32> {
        let count = "SELECT count(*) FROM shipped";
        self.book.query_row(count, [], |row| row.get(0))
    }
}

// ---- What came of it -------------------------------------------------------

/// How long both kinds of orders have waited that were all there at the beginning.
/// Counted in orders and not in seconds: a quicker worker changes nothing in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Report {
    all: usize,
    /// So many orders were shipped when 99 of 100 express orders were.
    express: usize,
    /// The same of the standard orders.
    standard: usize,
    /// The most orders in a row without a standard one, while one waited.
    in_a_row: usize,
}

impl Report {
    #[must_use]
    pub fn of(shipped: &[Order]) -> Self {
        let standard = |order: &&Order| Lane::of(&order.service) == Lane::Standard;
        let places = |lane| {
            let places = (1..).zip(shipped);
            let of_lane = places.filter(|(_, it)| Lane::of(&it.service) == lane);
            of_lane.map(|(place, _)| place).collect::<Vec<_>>()
        };
        let end = shipped.iter().rposition(|it| standard(&it)).unwrap_or(0);
        let before = &shipped[..end];
        let rows = before.split(|it| standard(&it)).map(<[Order]>::len);
        Self {
            all: shipped.len(),
            express: p99(&places(Lane::Express)),
            standard: p99(&places(Lane::Standard)),
            in_a_row: rows.max().unwrap_or(0),
        }
    }

    /// What to think of it. With room on both sides: a worker may find a lane empty
    /// for a moment, because the next order is still on its way.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        if self.express * 2 > self.standard {
            "express waits as long as all others"
        } else if self.in_a_row > 3 * IN_A_ROW as usize {
            "express goes first, and standard stands still"
        } else {
            "express goes first, and standard goes on"
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { all, express, .. } = self;
        write!(
            formatter,
            "express shipped among the first {express} of {all}, "
        )?;
        let in_a_row = self.in_a_row;
        write!(formatter, "{in_a_row} in a row while standard waits")
    }
}

/// The smallest of these, which are in order, that 99 of 100 do not exceed.
fn p99(ordered: &[usize]) -> usize {
    let rank = (ordered.len() * 99).div_ceil(100);
    let index = rank.checked_sub(1);
    index.map_or(0, |index| ordered[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The turns of a worker with these backlogs, as letters.
    fn play(rule: Rule, mut express: u32, mut standard: u32) -> String {
        let mut turns = Turns::new(rule);
        let mut played = String::new();
        while let Some(lane) = turns.next(express > 0, standard > 0) {
            let (waiting, letter) = match lane {
                Lane::Express => (&mut express, 'E'),
                Lane::Standard => (&mut standard, 's'),
            };
            *waiting = waiting.checked_sub(1).expect("a lane that is not empty");
            played.push(letter);
        }
        played
    }

    #[test]
    fn three_express_orders_and_then_a_standard_one() {
        assert_eq!(play(Rule::Weighted, 7, 4), "EEEsEEEsEss");
        assert_eq!(play(Rule::Weighted, 2, 3), "EEsss");
    }

    #[test]
    fn an_empty_lane_costs_the_other_nothing() {
        assert_eq!(play(Rule::Weighted, 5, 0), "EEEEE");
        assert_eq!(play(Rule::Weighted, 0, 5), "sssss");
        assert_eq!(play(Rule::Weighted, 0, 0), "");
    }

    #[test]
    fn strictly_standard_waits_for_the_last_express_order() {
        assert_eq!(play(Rule::Strict, 7, 2), "EEEEEEEss");
    }

    #[test]
    fn a_standard_order_that_comes_late_does_not_wait_for_three_more() {
        let mut turns = Turns::new(Rule::Weighted);
        for _alone in 0..100 {
            assert_eq!(turns.next(true, false), Some(Lane::Express));
        }
        assert_eq!(turns.next(true, true), Some(Lane::Standard));
        assert_eq!(turns.next(true, true), Some(Lane::Express));
    }

    /// Whatever comes when: only a lane in which an order waits, always one if any
    /// does, and never a fourth express order while a standard one waits.
    #[test]
    fn it_holds_for_any_sequence_of_arrivals() {
        let mut random = fastrand::Rng::with_seed(168);
        let mut turns = Turns::new(Rule::Weighted);
        let (mut express, mut standard, mut in_a_row) = (0, 0, 0);
        let (mut seen_express, mut seen_standard) = (0, 0);
        for _step in 0..100_000 {
            express += random.u32(0..=1);
            standard += random.u32(0..=1);
            match turns.next(express > 0, standard > 0) {
                None => assert_eq!((express, standard), (0, 0)),
                Some(Lane::Express) => {
                    assert!(express > 0);
                    in_a_row = if standard > 0 { in_a_row + 1 } else { 0 };
                    assert!(in_a_row <= IN_A_ROW);
                    express -= 1;
                    seen_express += 1;
                }
                Some(Lane::Standard) => {
                    assert!(standard > 0);
                    in_a_row = 0;
                    standard -= 1;
                    seen_standard += 1;
                }
            }
        }
        assert!(seen_express > 10_000 && seen_standard > 10_000);
    }

    #[test]
    fn what_nobody_knows_is_standard() {
        assert_eq!(Lane::of("express"), Lane::Express);
        for service in ["standard", "overnight", "Express", ""] {
            assert_eq!(Lane::of(service), Lane::Standard, "{service}");
        }
        let placement = Placement::new(7..=9, "overnight");
        assert_eq!(
            placement.to_string(),
            "order-7 to order-9, overnight, which nobody knows here: treated as \
             standard"
        );
    }

    #[test]
    fn nonsense_is_no_placement() {
        let right = Placement::new(1..=3, "express");
        assert_eq!(Placement::parse("1", "3", "express"), Some(right.clone()));
        assert_eq!(right.to_string(), "order-1 to order-3, express");
        let ids: Vec<String> = right.orders().map(|order| order.id).collect();
        assert_eq!(ids, ["order-1", "order-2", "order-3"]);
        for (first, last, service) in [
            ("3", "1", "express"),
            ("one", "3", "express"),
            ("1", "-3", "express"),
            ("1", "3", "--one-lane"),
            ("1", "3", "very express"),
            ("1", "3", ""),
        ] {
            assert_eq!(Placement::parse(first, last, service), None);
        }
    }

    #[test]
    fn an_order_is_written_and_read_and_rubbish_is_none() {
        let order = Placement::new(1..=1, "express").orders().next();
        let order = order.expect("one");
        let bytes = order.write().expect("JSON");
        assert_eq!(Order::read(&bytes).expect("an order"), order);
        for rubbish in [b"\xff".as_slice(), b"", b"{}", br#"{"id":"order-1"}"#] {
            assert!(Order::read(rubbish).is_err(), "{rubbish:?}");
        }
    }

    #[test]
    fn what_is_shipped_twice_is_there_twice() {
        let desk = Desk::open(Path::new(":memory:")).expect("a book");
        let orders: Vec<Order> = Placement::new(1..=2, "express").orders().collect();
        for order in [&orders[0], &orders[1], &orders[0]] {
            desk.ship(order).expect("a parcel");
        }
        let shipped = desk.shipped().expect("a list");
        assert_eq!(desk.count().expect("a number"), 3);
        assert_eq!(shipped[..2], orders);
        assert_eq!(shipped[2], orders[0]);
    }

    fn report(letters: &str) -> Report {
        let orders: Vec<Order> = letters
            .chars()
            .map(|letter| Order {
                id: String::new(),
                service: if letter == 'E' { "express" } else { "standard" }.into(),
            })
            .collect();
        Report::of(&orders)
    }

    #[test]
    fn the_report_counts_orders() {
        let it = report("EEEsEEsssEE");
        let expected = Report {
            all: 11,
            express: 11,
            standard: 9,
            // The last two are after the last standard order: nobody waits.
            in_a_row: 3,
        };
        assert_eq!(it, expected);
        assert_eq!(
            it.to_string(),
            "express shipped among the first 11 of 11, 3 in a row while standard \
             waits"
        );
        assert_eq!(p99(&(1..=100).collect::<Vec<_>>()), 99);
        assert_eq!(p99(&(1..=200).collect::<Vec<_>>()), 198);
        assert_eq!(p99(&[]), 0);
    }

    #[test]
    fn the_verdict_tells_the_three_ways_apart() {
        let (express, standard) = (20, 60);
        let weighted = play(Rule::Weighted, express, standard);
        let strict = play(Rule::Strict, express, standard);
        let one_lane = "s".repeat(60) + &"E".repeat(20);
        let verdicts = [weighted, one_lane, strict].map(|it| report(&it).verdict());
        assert_eq!(
            verdicts,
            [
                "express goes first, and standard goes on",
                "express waits as long as all others",
                "express goes first, and standard stands still",
            ]
        );
    }
}
