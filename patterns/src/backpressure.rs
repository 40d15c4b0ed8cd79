//! Backpressure: what a worker may hold, and the printer that is slower than all others.

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use rusqlite::{Connection, params};

// ---- Labels ----------------------------------------------------------------

/// How large a label is, in bytes: it is a picture.
pub const LABEL: usize = 32 * 1024;

/// A label of the example: its name in the first line, and then the picture.
#[must_use]
pub fn label(number: u64) -> Vec<u8> {
    let mut label = format!("label-{number}\n").into_bytes();
    label.resize(LABEL, b'#');
    label
}

/// The name of a label.
#[must_use]
pub fn name(payload: &[u8]) -> String {
    let line = payload.split(|byte| *byte == b'\n').next();
    let line = line.unwrap_or_default();
    String::from_utf8_lossy(&line[..line.len().min(40)]).into_owned()
}

// ---- What a worker holds ---------------------------------------------------

/// So many labels a worker holds at most: taken from the broker, and not printed.
pub const HIGH: usize = 16;
/// With so few it takes again.
pub const LOW: usize = 8;

// ANCHOR: valve
/// What to do with the flow of labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Pause,
    Resume,
}

/// Open until [`HIGH`] are held, and then closed until no more than [`LOW`] are. One
/// mark would do for the memory; with two, it does not turn for each label.
#[derive(Debug, Default)]
pub struct Valve {
    closed: bool,
}

impl Valve {
    /// After a label has come or gone: what to do, if anything.
    pub fn turn(&mut self, held: usize) -> Option<Turn> {
        let turn = match self.closed {
            false if held >= HIGH => Turn::Pause,
            true if held <= LOW => Turn::Resume,
            _ => return None,
        };
        self.closed = turn == Turn::Pause;
        Some(turn)
    }

    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }
}
// ANCHOR_END: valve

/// Counts what a worker holds, in the task that takes and in the one that prints.
#[derive(Debug, Default)]
pub struct Held {
    taken: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Held {
    /// One more is taken. Returns how many are held then.
    pub fn take(&self) -> usize {
        let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.most.fetch_max(now, Ordering::Relaxed);
        now
    }

    /// One is printed, or given back. Returns how many are held then.
    pub fn release(&self) -> usize {
        self.now.fetch_sub(1, Ordering::Relaxed) - 1
    }

    /// How many were taken in all.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// The most that were held at the same time.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

// ---- The printer -----------------------------------------------------------

/// A label printer, and what it has printed: paper, so a label that it is given twice
/// is there twice.
pub struct Printer {
    paper: Connection,
}

impl Printer {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let paper = Connection::open(file)?;
        paper.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = NORMAL;
             CREATE TABLE IF NOT EXISTS printed (
                 number INTEGER PRIMARY KEY,
                 label TEXT NOT NULL
             ) STRICT;",
        )?;
        Ok(Self { paper })
    }

    /// Prints a label.
    ///
    /// # Errors
    ///
    /// If the database cannot be written.
    pub fn print(&self, label: &str) -> rusqlite::Result<()> {
        let insert = "INSERT INTO printed (label) VALUES (?1)";
        self.paper.execute(insert, params![label])?;
        Ok(())
    }

    /// The labels that are printed, in this order.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn printed(&self) -> rusqlite::Result<Vec<String>> {
        let list = "SELECT label FROM printed ORDER BY number";
        let mut list = self.paper.prepare(list)?;
        let rows = list.query_map([], |row| row.get(0))?;
        rows.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_closes_at_the_high_mark_and_opens_at_the_low_one() {
        let mut valve = Valve::default();
        let mut turns = Vec::new();
        for held in (1..=HIGH).chain((0..HIGH).rev()).chain(1..=HIGH) {
            if let Some(turn) = valve.turn(held) {
                turns.push((held, turn));
            }
        }
        assert_eq!(
            turns,
            [
                (HIGH, Turn::Pause),
                (LOW, Turn::Resume),
                (HIGH, Turn::Pause)
            ]
        );
        assert!(valve.is_closed());
    }

    #[test]
    fn between_the_marks_it_stays_as_it_is() {
        let mut valve = Valve::default();
        assert_eq!(valve.turn(HIGH - 1), None);
        assert!(!valve.is_closed());
        assert_eq!(valve.turn(HIGH), Some(Turn::Pause));
        assert_eq!(valve.turn(HIGH + 1), None);
        assert_eq!(valve.turn(LOW + 1), None);
        assert!(valve.is_closed());
    }

    #[test]
    fn the_most_is_remembered() {
        let held = Held::default();
        assert_eq!((held.take(), held.take()), (1, 2));
        assert_eq!(held.release(), 1);
        assert_eq!(held.take(), 2);
        assert_eq!((held.taken(), held.now(), held.most()), (3, 2, 2));
    }

    #[test]
    fn a_label_has_its_name_and_its_size() {
        assert_eq!(label(7).len(), LABEL);
        assert_eq!(name(&label(7)), "label-7");
        assert_eq!(name(b""), "");
        assert_eq!(name(&[b'#'; 100]).len(), 40);
    }

    #[test]
    fn what_is_printed_twice_is_there_twice() {
        let printer = Printer::open(Path::new(":memory:")).expect("paper");
        for label in ["label-1", "label-2", "label-1"] {
            printer.print(label).expect("a print");
        }
        let printed = printer.printed().expect("a list");
        assert_eq!(printed, ["label-1", "label-2", "label-1"]);
    }
}
