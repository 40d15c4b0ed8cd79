//! Delayed message: when a reminder is due, and the tables that know of it.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};

/// Asks a customer for the money of an invoice, when it is due and not before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reminder {
    pub invoice: String,
    /// In milliseconds since 1970, UTC. A point in time and not a span: it means the
    /// same wherever the message lies, and however long it has been there.
    pub due: i64,
}

/// The invoices of the example.
#[must_use]
pub fn invoice(number: u64) -> String {
    format!("invoice-{number}")
}

/// What the clock of this machine shows, in milliseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    i64::try_from(now).unwrap_or(i64::MAX)
}

impl Reminder {
    /// A reminder that is due so long after this moment.
    #[must_use]
    pub fn after(number: u64, now: i64, delay: Duration) -> Self {
        let delay = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
        Self {
            invoice: invoice(number),
            due: now.saturating_add(delay),
        }
    }

    /// What a message says, if it is a reminder.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
        let reminder: Self = serde_json::from_slice(payload).ok()?;
        (!reminder.invoice.is_empty()).then_some(reminder)
    }

    /// How long it has to wait yet; nothing if it is due.
    #[must_use]
    pub fn wait(&self, now: i64) -> Duration {
        let milliseconds = self.due.saturating_sub(now);
        Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
    }
}

/// What became of a message about a plan.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// It is in the table; an earlier plan for the same invoice is replaced.
    Planned,
    /// It is no longer in the table, if it ever was.
    Cancelled,
    /// Nobody can read it. It is kept, and nothing is planned.
    SetAside,
}

/// The reminders that are to come, by the time at which they are due, for a broker
/// that cannot wait by itself. Beside them, how far the log of plans was read.
pub struct Timetable {
    database: Connection,
}

impl Timetable {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // FULL: what is committed outlives a power cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS reminders (
                 invoice TEXT PRIMARY KEY,
                 due INTEGER NOT NULL
             ) STRICT;
             CREATE INDEX IF NOT EXISTS by_due ON reminders (due);
             CREATE TABLE IF NOT EXISTS positions (
                 partition INTEGER PRIMARY KEY,
                 next INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 payload BLOB PRIMARY KEY
             ) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: enter
    /// Enters what a record says: a plan, or without a payload the end of one.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed, and the record is
    /// to be read again.
    pub fn enter(
        &mut self,
        (partition, offset): (i32, i64),
        invoice: &str,
        payload: Option<&[u8]>,
    ) -> rusqlite::Result<Entry> {
        // One transaction: a record counts as read if and only if the table shows it,
        // wherever the program ends.
        let transaction = self.database.transaction()?;
        let entry = match payload.map(|payload| (payload, Reminder::read(payload))) {
            None => {
                let delete = "DELETE FROM reminders WHERE invoice = ?1";
                transaction.execute(delete, params![invoice])?;
                Entry::Cancelled
            }
            // A plan that is cancelled by another key could never be cancelled.
            Some((_, Some(reminder))) if reminder.invoice == invoice => {
                transaction.execute(
                    "INSERT INTO reminders (invoice, due) VALUES (?1, ?2)
                     ON CONFLICT DO UPDATE SET due = excluded.due",
                    params![reminder.invoice, reminder.due],
                )?;
                Entry::Planned
            }
            Some((payload, _)) => {
                transaction.execute(
                    "INSERT INTO unreadable (payload) VALUES (?1)
                     ON CONFLICT DO NOTHING",
                    params![payload],
                )?;
                Entry::SetAside
            }
        };
        transaction.execute(
            "INSERT INTO positions (partition, next) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET next = excluded.next",
            params![partition, offset + 1],
        )?;
        transaction.commit()?;
        Ok(entry)
    }
    // ANCHOR_END: enter

    /// From where to read on in a partition, if anything of it was ever read.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn position(&self, partition: i32) -> rusqlite::Result<Option<i64>> {
        let next = "SELECT next FROM positions WHERE partition = ?1";
        let row = self.database.query_row(next, [partition], |row| row.get(0));
        row.optional()
    }

    /// The reminder that is due first, whenever that is.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn first(&self) -> rusqlite::Result<Option<Reminder>> {
        Ok(self.due(i64::MAX, 1)?.pop())
    }

    // ANCHOR: due
    /// The reminders that are due at this moment, the earliest first.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn due(&self, now: i64, limit: u32) -> rusqlite::Result<Vec<Reminder>> {
        let mut query = self.database.prepare_cached(
            "SELECT invoice, due FROM reminders WHERE due <= ?1
             ORDER BY due, invoice LIMIT ?2",
        )?;
        let rows = query.query_map(params![now, limit], |row| {
            Ok(Reminder {
                invoice: row.get(0)?,
                due: row.get(1)?,
            })
        })?;
        rows.collect()
    }

    /// After the broker has said that it has the reminder, and not before.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then the reminder is published again.
    pub fn cross_off(&mut self, reminder: &Reminder) -> rusqlite::Result<()> {
        let delete = "DELETE FROM reminders WHERE invoice = ?1 AND due = ?2";
        self.database
            .execute(delete, params![reminder.invoice, reminder.due])?;
        Ok(())
    }
    // ANCHOR_END: due
}

/// The invoices that are paid, to be asked when a reminder is due: the only way to
/// cancel where a message cannot be taken out of its queue.
pub struct Payments {
    database: Connection,
}

impl Payments {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS paid (invoice TEXT PRIMARY KEY) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: paid
    /// From now on, nobody is reminded of this invoice.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then it does not count as paid.
    pub fn pay(&mut self, invoice: &str) -> rusqlite::Result<()> {
        self.database.execute(
            "INSERT INTO paid (invoice) VALUES (?1) ON CONFLICT DO NOTHING",
            params![invoice],
        )?;
        Ok(())
    }

    /// Whether somebody has said so, in whatever process.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn is_paid(&self, invoice: &str) -> rusqlite::Result<bool> {
        let found = "SELECT EXISTS (SELECT 1 FROM paid WHERE invoice = ?1)";
        self.database.query_row(found, [invoice], |row| row.get(0))
    }
    // ANCHOR_END: paid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timetable() -> Timetable {
        Timetable::open(Path::new(":memory:")).expect("a database in memory")
    }

    fn plan(timetable: &mut Timetable, offset: i64, number: u64, due: i64) -> Entry {
        let reminder = Reminder::after(number, due, Duration::ZERO);
        let payload = serde_json::to_vec(&reminder).expect("JSON");
        timetable
            .enter((0, offset), &reminder.invoice, Some(&payload))
            .expect("a write")
    }

    fn invoices(reminders: &[Reminder]) -> Vec<&str> {
        let invoices = reminders.iter().map(|reminder| reminder.invoice.as_str());
        invoices.collect()
    }

    #[test]
    fn a_reminder_waits_until_the_millisecond_of_its_time() {
        let reminder = Reminder::after(7, 1_000, Duration::from_secs(2));
        assert_eq!(reminder.due, 3_000);
        assert_eq!(reminder.wait(2_999), Duration::from_millis(1));
        assert_eq!(reminder.wait(3_000), Duration::ZERO);
        assert_eq!(reminder.wait(9_000), Duration::ZERO);
        let far = Reminder::after(7, 1_000, Duration::MAX);
        assert_eq!(far.due, i64::MAX);
    }

    #[test]
    fn what_is_due_comes_by_its_time_and_not_before() {
        let mut timetable = timetable();
        for (offset, (number, due)) in
            [(1, 300), (2, 100), (3, 200)].into_iter().enumerate()
        {
            let offset = i64::try_from(offset).expect("a small number");
            assert_eq!(plan(&mut timetable, offset, number, due), Entry::Planned);
        }
        assert_eq!(timetable.due(99, 9).expect("a list"), []);
        let due = timetable.due(200, 9).expect("a list");
        assert_eq!(invoices(&due), ["invoice-2", "invoice-3"]);
        for reminder in &due {
            timetable.cross_off(reminder).expect("a write");
        }
        let first = timetable.first().expect("a look");
        assert_eq!(first.map(|first| first.due), Some(300));
        assert_eq!(timetable.position(0).expect("a look"), Some(3));
        assert_eq!(timetable.position(1).expect("a look"), None);
    }

    #[test]
    fn cancelled_it_is_gone_and_planned_again_it_has_moved() {
        let mut timetable = timetable();
        plan(&mut timetable, 0, 1, 100);
        plan(&mut timetable, 1, 2, 100);
        let entry = timetable.enter((0, 2), "invoice-1", None);
        assert_eq!(entry.expect("a write"), Entry::Cancelled);
        let old = timetable.due(100, 9).expect("a list");
        plan(&mut timetable, 3, 2, 500);
        assert_eq!(timetable.due(100, 9).expect("a list"), []);
        // To cross off what has moved meanwhile takes away nothing.
        assert_eq!(invoices(&old), ["invoice-2"]);
        timetable.cross_off(&old[0]).expect("a write");
        assert_eq!(timetable.due(500, 9).expect("a list").len(), 1);
        // To cancel what is not there is no error.
        let entry = timetable.enter((0, 4), "invoice-9", None);
        assert_eq!(entry.expect("a write"), Entry::Cancelled);
    }

    #[test]
    fn what_nobody_can_read_is_kept_and_passed() {
        let mut timetable = timetable();
        let other = br#"{"invoice":"invoice-2","due":1}"#;
        for (offset, payload) in [&b"\xff"[..], &b"{}"[..], &other[..]]
            .into_iter()
            .enumerate()
        {
            let offset = i64::try_from(offset).expect("a small number");
            let entry = timetable.enter((3, offset), "invoice-1", Some(payload));
            assert_eq!(entry.expect("a write"), Entry::SetAside);
        }
        assert_eq!(timetable.first().expect("a look"), None);
        assert_eq!(timetable.position(3).expect("a look"), Some(3));
        let count = "SELECT count(*) FROM unreadable";
        let kept: i64 = timetable
            .database
            .query_row(count, [], |row| row.get(0))
            .expect("a count");
        assert_eq!(kept, 3);
    }

    #[test]
    fn paid_stays_paid() {
        let mut payments =
            Payments::open(Path::new(":memory:")).expect("a database in memory");
        assert!(!payments.is_paid("invoice-1").expect("a look"));
        for _time in 0..2 {
            payments.pay("invoice-1").expect("a write");
            assert!(payments.is_paid("invoice-1").expect("a look"));
        }
        assert!(!payments.is_paid("invoice-2").expect("a look"));
    }
}
