//! Event replay: order events, and what two services make of them.

use std::{error, fmt, path::Path};

use rusqlite::{
    Connection, OptionalExtension as _, Transaction, TransactionBehavior, params,
};
use serde::{Deserialize, Serialize};

/// What has happened to an order. It has all that a reader needs: one that is
/// written in a year cannot ask what the shop knew today.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub order: String,
    pub customer: String,
    pub country: String,
    pub kind: Kind,
    /// In cents.
    pub total: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Placed,
    Paid,
    Cancelled,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Placed => "placed",
            Self::Paid => "paid",
            Self::Cancelled => "cancelled",
        })
    }
}

impl Event {
    /// The same each time the event is published.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}.{}", self.order, self.kind)
    }
}

/// The events of the example, from number 1 on: each order is placed and then paid;
/// every fifth one is cancelled. Each has a total of its own, so that no mistake makes
/// up for another one.
#[must_use]
pub fn event(number: u64) -> Event {
    let order = number.div_ceil(2);
    let kind = match (number % 2, order % 5) {
        (1, _) => Kind::Placed,
        (_, 0) => Kind::Cancelled,
        _ => Kind::Paid,
    };
    let countries = ["DE", "FR", "CN", "BR"].into_iter().cycle();
    let place = usize::try_from(order % 4).unwrap_or_default();
    Event {
        order: format!("order-{order}"),
        customer: format!("customer-{}", order % 10),
        country: countries.skip(place).take(1).collect(),
        kind,
        total: i64::try_from(1000 + order).unwrap_or(i64::MAX),
    }
}

/// Who reads the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Counts by country. It has no effect outside its table.
    Analytics,
    /// Sends a mail for each event, and counts the orders of each customer to do it.
    Mail,
}

impl Service {
    fn name(self) -> &'static str {
        match self {
            Self::Analytics => "analytics",
            Self::Mail => "mail",
        }
    }
}

/// What the log has of a partition now: from `first` to the one before `end`. A log
/// without partitions is partition 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub partition: i32,
    pub first: i64,
    pub end: i64,
}

/// Where a service is in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub partition: i32,
    /// The event to read next.
    pub next: i64,
    /// Events before this one had their effect earlier: nothing is sent for them.
    pub quiet: i64,
    /// Where the log ended when the service began to read. It is a number and not a
    /// switch: one reader goes over it.
    pub end: i64,
}

/// How many events are left to read before the seam.
#[must_use]
pub fn behind(places: &[Place]) -> i64 {
    places.iter().map(|it| (it.end - it.next).max(0)).sum()
}

/// How a service begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At its position, or with the first event.
    GoOn,
    /// With the first event and an empty table, and without the effects that it had.
    Anew,
}

/// What is taken care of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    Taken,
    /// A mistake, to see what it costs: effects are on during a replay.
    Loud,
    /// A mistake, to see what it costs: the position is written when the program ends,
    /// and not with the table.
    Late,
}

/// Why a service cannot read on.
#[derive(Debug)]
pub enum Refusal {
    /// The database cannot be read or written.
    Database(rusqlite::Error),
    /// Nobody knows for which events a mail was sent.
    NoPosition,
    /// The log no longer has the events before `first`, and the service needs them.
    Deleted { needed: i64, first: i64 },
    /// The position is behind the end of the log.
    AnotherLog { next: i64, end: i64 },
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Database(error) => error.fmt(formatter),
            Self::NoPosition => formatter.write_str(
                "it does not say for which events mails were sent; a replay needs \
                 the file of the service that sent them",
            ),
            Self::Deleted { needed, first } => write!(
                formatter,
                "events {needed} to {} are deleted, and it has not read them; begin \
                 with another file",
                first - 1
            ),
            Self::AnotherLog { next, end } => write!(
                formatter,
                "it has read up to {next}, and the log ends at {end}; it is of \
                 another log"
            ),
        }
    }
}

impl error::Error for Refusal {}

impl From<rusqlite::Error> for Refusal {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

// ANCHOR: place
/// Where to begin in a partition, given where the service was.
///
/// # Errors
///
/// If there would be a gap, or if it is not the same log.
fn place(known: Option<Place>, held: Held, start: Start) -> Result<Place, Refusal> {
    let Held {
        partition,
        first,
        end,
    } = held;
    let Some(Place { next, quiet, .. }) = known else {
        // A new service, or a new partition: no event has had its effect.
        let (next, quiet) = (first, first);
        return Ok(Place {
            partition,
            next,
            quiet,
            end,
        });
    };
    // Killed in a replay, it is still quiet as far as it was before.
    let reached = next.max(quiet);
    if reached > end {
        return Err(Refusal::AnotherLog { next: reached, end });
    }
    let (needed, next, quiet) = match start {
        Start::GoOn => (next, next, quiet),
        Start::Anew => (reached, first, reached),
    };
    if needed < first {
        return Err(Refusal::Deleted { needed, first });
    }
    Ok(Place {
        partition,
        next,
        quiet,
        end,
    })
}
// ANCHOR_END: place

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub payload: Vec<u8>,
}

/// What became of a batch, as lines to print.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Of events before the seam.
    pub history: Vec<String>,
    /// Of events after it.
    pub live: Vec<String>,
    /// How many messages nobody can read. They are kept in a table.
    pub aside: usize,
}

/// What analytics knows of a country.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Country {
    pub country: String,
    pub placed: i64,
    pub paid: i64,
    pub cancelled: i64,
    /// Of the paid orders, in cents.
    pub revenue: i64,
}

impl fmt::Display for Country {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            country,
            placed,
            paid,
            cancelled,
            revenue,
        } = self;
        let open = placed - paid - cancelled;
        write!(
            formatter,
            "{country} {revenue} cents, {paid} paid, {cancelled} cancelled, {open} open"
        )
    }
}

/// The tables of a service, and how far they are.
pub struct Tables {
    database: Connection,
    service: Service,
}

impl Tables {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path, service: Service) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // FULL: what is committed outlives a power cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS positions (
                 service TEXT NOT NULL,
                 partition INTEGER NOT NULL,
                 next INTEGER NOT NULL,
                 quiet INTEGER NOT NULL,
                 PRIMARY KEY (service, partition)
             ) STRICT;
             CREATE TABLE IF NOT EXISTS countries (
                 country TEXT PRIMARY KEY,
                 placed INTEGER NOT NULL,
                 paid INTEGER NOT NULL,
                 cancelled INTEGER NOT NULL,
                 revenue INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS customers (
                 customer TEXT PRIMARY KEY,
                 orders INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS mails (
                 number INTEGER PRIMARY KEY,
                 mail TEXT NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 service TEXT NOT NULL,
                 partition INTEGER NOT NULL,
                 offset INTEGER NOT NULL,
                 payload BLOB NOT NULL,
                 PRIMARY KEY (service, partition, offset)
             ) STRICT;",
        )?;
        Ok(Self { database, service })
    }

    /// How far the service has read, in the partition in which it is farthest.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn reached(&self) -> rusqlite::Result<Option<i64>> {
        let ask = "SELECT max(max(next, quiet)) FROM positions WHERE service = ?";
        let service = self.service.name();
        self.database.query_row(ask, [service], |row| row.get(0))
    }

    // ANCHOR: begin
    /// Where to begin in each partition. It is written down before the first event is
    /// read: a replay that is killed goes on as a replay.
    ///
    /// # Errors
    ///
    /// If the service cannot read on. Then nothing is changed.
    pub fn begin(
        &mut self,
        held: &[Held],
        start: Start,
    ) -> Result<Vec<Place>, Refusal> {
        let service = self.service;
        if start == Start::Anew && self.reached()?.is_none() {
            return Err(Refusal::NoPosition);
        }
        let transaction = immediate(&mut self.database)?;
        let mut places = Vec::new();
        for held in held {
            let known = read_place(&transaction, service, held.partition)?;
            let place = place(known, *held, start)?;
            transaction.execute(
                "REPLACE INTO positions (service, partition, next, quiet)
                 VALUES (?, ?, ?, ?)",
                params![service.name(), place.partition, place.next, place.quiet],
            )?;
            places.push(place);
        }
        if start == Start::Anew {
            // The table is made again. The mails are not: they were sent.
            let table = match service {
                Service::Analytics => "DELETE FROM countries",
                Service::Mail => "DELETE FROM customers",
            };
            transaction.execute(table, [])?;
        }
        transaction.commit()?;
        Ok(places)
    }
    // ANCHOR_END: begin

    // ANCHOR: apply
    /// Brings events into the table, each once, and notes in `places` how far it is.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed.
    pub fn apply(
        &mut self,
        batch: &[Record],
        places: &mut [Place],
        care: Care,
    ) -> rusqlite::Result<Applied> {
        let service = self.service;
        let mut applied = Applied::default();
        // One transaction: the table and the position, wherever the program ends.
        let transaction = immediate(&mut self.database)?;
        for record in batch {
            let Record {
                partition, offset, ..
            } = *record;
            let place = read_place(&transaction, service, partition)?;
            let place = place.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
            if offset < place.next {
                // It is in the table. A client that connects again may go back.
                continue;
            }
            // Before the position at which the replay began, nothing is sent.
            let quiet = offset < place.quiet && care != Care::Loud;
            let line = match serde_json::from_slice(&record.payload) {
                Ok(event) => service.take(&transaction, &event, quiet)?,
                Err(_no_event) => {
                    service.set_aside(&transaction, record)?;
                    applied.aside += 1;
                    None
                }
            };
            if care != Care::Late {
                write_next(&transaction, service, partition, offset + 1)?;
            }
            let end = places.iter().find(|it| it.partition == partition);
            match end.is_some_and(|place| offset < place.end) {
                true if service == Service::Analytics => {}
                true => applied.history.extend(line),
                false => applied.live.extend(line),
            }
        }
        transaction.commit()?;
        for place in places {
            let mine = batch.iter().filter(|it| it.partition == place.partition);
            let next = mine.map(|record| record.offset + 1).max();
            place.next = place.next.max(next.unwrap_or(place.next));
        }
        Ok(applied)
    }
    // ANCHOR_END: apply

    /// The second half of [`Care::Late`].
    ///
    /// # Errors
    ///
    /// If the database cannot be written.
    pub fn write_late(&mut self, places: &[Place]) -> rusqlite::Result<()> {
        let service = self.service;
        let transaction = immediate(&mut self.database)?;
        for place in places {
            write_next(&transaction, service, place.partition, place.next)?;
        }
        transaction.commit()
    }

    /// What analytics knows, by country.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn countries(&self) -> rusqlite::Result<Vec<Country>> {
        let ask = "SELECT country, placed, paid, cancelled, revenue FROM countries
                   ORDER BY country";
        let mut query = self.database.prepare(ask)?;
        let rows = query.query_map([], |row| {
            Ok(Country {
                country: row.get(0)?,
                placed: row.get(1)?,
                paid: row.get(2)?,
                cancelled: row.get(3)?,
                revenue: row.get(4)?,
            })
        })?;
        rows.collect()
    }

    /// The mails that were sent, in their order.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn mails(&self) -> rusqlite::Result<Vec<String>> {
        let ask = "SELECT mail FROM mails ORDER BY number";
        let mut query = self.database.prepare(ask)?;
        let rows = query.query_map([], |row| row.get(0))?;
        rows.collect()
    }
}

impl Service {
    /// Takes an event into the table, and returns what there is to say of it.
    fn take(
        self,
        transaction: &Transaction<'_>,
        event: &Event,
        quiet: bool,
    ) -> rusqlite::Result<Option<String>> {
        match self {
            Self::Analytics => {
                count(transaction, event)?;
                Ok(Some(format!("live:      {} {}", event.order, event.kind)))
            }
            Self::Mail => {
                let mail = remember(transaction, event)?;
                if quiet {
                    return Ok(None);
                }
                send(transaction, &mail)?;
                Ok(Some(format!("mail:      {mail}")))
            }
        }
    }

    /// Keeps what nobody can read: it will be in the log for each replay to come.
    fn set_aside(
        self,
        transaction: &Transaction<'_>,
        record: &Record,
    ) -> rusqlite::Result<()> {
        let Record {
            partition,
            offset,
            payload,
        } = record;
        transaction.execute(
            "REPLACE INTO unreadable (service, partition, offset, payload)
             VALUES (?, ?, ?, ?)",
            params![self.name(), partition, offset, payload],
        )?;
        Ok(())
    }
}

/// Adds, so an event that comes twice is counted twice, unless somebody sees to it.
fn count(transaction: &Transaction<'_>, event: &Event) -> rusqlite::Result<()> {
    let (placed, paid, cancelled, revenue) = match event.kind {
        Kind::Placed => (1, 0, 0, 0),
        Kind::Paid => (0, 1, 0, event.total),
        Kind::Cancelled => (0, 0, 1, 0),
    };
    let add = "INSERT INTO countries VALUES (?1, ?2, ?3, ?4, ?5)
               ON CONFLICT DO UPDATE SET
                   placed = placed + ?2,
                   paid = paid + ?3,
                   cancelled = cancelled + ?4,
                   revenue = revenue + ?5";
    transaction.prepare_cached(add)?.execute(params![
        event.country,
        placed,
        paid,
        cancelled,
        revenue
    ])?;
    Ok(())
}

/// Counts the orders of the customer, and writes the mail that needs the count.
fn remember(
    transaction: &Transaction<'_>,
    event: &Event,
) -> rusqlite::Result<String> {
    let placed = i64::from(event.kind == Kind::Placed);
    let add = "INSERT INTO customers (customer, orders) VALUES (?1, ?2)
               ON CONFLICT DO UPDATE SET orders = orders + ?2
               RETURNING orders";
    let orders: i64 = transaction
        .prepare_cached(add)?
        .query_row(params![event.customer, placed], |row| row.get(0))?;
    Ok(format!(
        "to {}: {} is {}; {orders} from you so far",
        event.customer, event.order, event.kind
    ))
}

/// Into the table of mails to be sent, in the same transaction; a mail server has no
/// part in that, so who sends them looks there.
fn send(transaction: &Transaction<'_>, mail: &str) -> rusqlite::Result<()> {
    let insert = "INSERT INTO mails (mail) VALUES (?)";
    transaction.prepare_cached(insert)?.execute([mail])?;
    Ok(())
}

/// Takes the right to write at once: what is read in it is not changed by another
/// program on the same file.
fn immediate(database: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    database.transaction_with_behavior(TransactionBehavior::Immediate)
}

fn read_place(
    transaction: &Transaction<'_>,
    service: Service,
    partition: i32,
) -> rusqlite::Result<Option<Place>> {
    let ask =
        "SELECT next, quiet FROM positions WHERE service = ? AND partition = ?";
    transaction
        .prepare_cached(ask)?
        .query_row(params![service.name(), partition], |row| {
            Ok(Place {
                partition,
                next: row.get(0)?,
                quiet: row.get(1)?,
                end: 0,
            })
        })
        .optional()
}

fn write_next(
    transaction: &Transaction<'_>,
    service: Service,
    partition: i32,
    next: i64,
) -> rusqlite::Result<()> {
    let update = "UPDATE positions SET next = ? WHERE service = ? AND partition = ?";
    transaction.prepare_cached(update)?.execute(params![
        next,
        service.name(),
        partition
    ])?;
    Ok(())
}

/// What a reader says of its way to the seam, and over it.
#[derive(Debug)]
pub struct Progress {
    history: i64,
    /// How many of these are told of.
    told: i64,
    caught_up: bool,
}

impl Progress {
    /// After so many events there is a line.
    pub const STEP: i64 = 500;

    #[must_use]
    pub fn new(places: &[Place]) -> Self {
        Self {
            history: behind(places),
            told: 0,
            caught_up: false,
        }
    }

    /// How many events are history.
    #[must_use]
    pub fn history(&self) -> i64 {
        self.history
    }

    /// The lines to print after a batch.
    pub fn lines(&mut self, applied: Applied, places: &[Place]) -> Vec<String> {
        let mut lines = applied.history;
        let history = self.history;
        let read = history - behind(places);
        if read / Self::STEP > self.told / Self::STEP {
            lines.push(format!("read:      {read} of {history}"));
        }
        self.told = read;
        if read == history && !self.caught_up {
            self.caught_up = true;
            lines.push(format!("caught up: {history} events"));
        }
        lines.extend(applied.live);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELD: Held = Held {
        partition: 0,
        first: 0,
        end: 8,
    };

    fn tables(service: Service) -> Tables {
        Tables::open(Path::new(":memory:"), service).expect("a database in memory")
    }

    fn records(offsets: std::ops::Range<i64>) -> Vec<Record> {
        let record = |offset: i64| Record {
            partition: 0,
            offset,
            payload: serde_json::to_vec(&event(offset.unsigned_abs() + 1))
                .expect("JSON"),
        };
        offsets.map(record).collect()
    }

    fn events(tables: &Tables) -> i64 {
        let countries = tables.countries().expect("a list");
        let events = countries
            .iter()
            .map(|it| it.placed + it.paid + it.cancelled);
        events.sum()
    }

    #[test]
    fn what_comes_again_is_counted_once_and_carelessly_twice() {
        for (care, expected) in [(Care::Taken, 8), (Care::Late, 13)] {
            let mut tables = tables(Service::Analytics);
            let mut places = tables.begin(&[HELD], Start::GoOn).expect("places");
            let all = tables.apply(&records(0..5), &mut places, care);
            all.expect("a write");
            // Killed here. The next one begins where the database says.
            let mut places = tables.begin(&[HELD], Start::GoOn).expect("places");
            let next = if care == Care::Taken { 5 } else { 0 };
            assert_eq!(places[0].next, next, "{care:?}");
            let all = tables.apply(&records(0..8), &mut places, care);
            all.expect("a write");
            assert_eq!(events(&tables), expected, "{care:?}");
            assert_eq!(behind(&places), 0);
        }
    }

    #[test]
    fn a_replay_mails_what_was_not_mailed_and_knows_the_rest() {
        for (care, expected) in [(Care::Taken, 8), (Care::Loud, 14)] {
            let mut tables = tables(Service::Mail);
            let mut places = tables.begin(&[HELD], Start::GoOn).expect("places");
            let sent = tables.apply(&records(0..6), &mut places, care);
            assert_eq!(sent.expect("a write").history.len(), 6);
            // Killed twice in the replay, and told to begin anew both times.
            for read in [3, 2, 8] {
                let places = tables.begin(&[HELD], Start::Anew);
                let mut places = places.expect("places");
                assert_eq!((places[0].next, places[0].quiet), (0, 6));
                let care = if read == 8 { care } else { Care::Taken };
                let sent = tables.apply(&records(0..read), &mut places, care);
                sent.expect("a write");
            }
            let mails = tables.mails().expect("a list");
            assert_eq!(mails.len(), expected, "{care:?}");
            let last = mails.last().map(String::as_str);
            let text = "to customer-4: order-4 is paid; 1 from you so far";
            assert_eq!(last, Some(text));
        }
    }

    #[test]
    fn a_gap_is_refused_and_so_is_another_log() {
        let known = Some(Place {
            partition: 0,
            next: 5,
            quiet: 0,
            end: 0,
        });
        let held = |first, end| Held { first, end, ..HELD };
        for start in [Start::GoOn, Start::Anew] {
            let shorter = place(known, held(0, 4), start);
            assert!(
                matches!(shorter, Err(Refusal::AnotherLog { next: 5, end: 4 })),
                "{shorter:?}"
            );
            let cut = place(known, held(6, 9), start);
            assert!(
                matches!(
                    cut,
                    Err(Refusal::Deleted {
                        needed: 5,
                        first: 6
                    })
                ),
                "{cut:?}"
            );
            place(known, held(5, 5), start).expect("all is read");
        }
        let new = place(None, held(6, 9), Start::GoOn).expect("no gap");
        assert_eq!((new.next, new.quiet, new.end), (6, 6, 9));
    }

    #[test]
    fn nobody_knows_what_a_lost_file_has_sent() {
        let mut tables = tables(Service::Mail);
        let refused = tables.begin(&[HELD], Start::Anew);
        assert!(matches!(refused, Err(Refusal::NoPosition)), "{refused:?}");
    }

    #[test]
    fn the_seam_is_told_once_between_history_and_live() {
        let mut tables = tables(Service::Analytics);
        let mut places = tables.begin(&[HELD], Start::GoOn).expect("places");
        let mut progress = Progress::new(&places);
        let mut lines = Vec::new();
        for part in [0..3, 3..9, 9..10] {
            let applied = tables.apply(&records(part), &mut places, Care::Taken);
            lines.extend(progress.lines(applied.expect("a write"), &places));
        }
        let expected = [
            "caught up: 8 events",
            "live:      order-5 placed",
            "live:      order-5 cancelled",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn noise_is_kept_and_passed_over() {
        let mut tables = tables(Service::Analytics);
        let mut places = tables.begin(&[HELD], Start::GoOn).expect("places");
        let mut batch = records(0..3);
        batch[1].payload = b"\xff".to_vec();
        let applied = tables.apply(&batch, &mut places, Care::Taken);
        assert_eq!(applied.expect("a write").aside, 1);
        assert_eq!((events(&tables), places[0].next), (2, 3));
    }
}
