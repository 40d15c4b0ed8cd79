//! Retry and dead letters: how long to wait, when to give up, what is kept of it, and
//! a carrier that is out of order now and then.

use std::{
    fmt,
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

// ---- What is to be done ----------------------------------------------------

/// A parcel, for which the shop books a carrier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parcel {
    /// Made where the parcel is packed. The carrier books each once, by its id.
    pub id: String,
    pub town: String,
}

/// Where the parcels of the example go, one after the other.
const TOWNS: [&str; 5] = ["Lyon", "Ghent", "Atlantis", "Turin", "Oslo"];

/// The town in which the carrier has no depot, until somebody opens one.
pub const ATLANTIS: &str = "Atlantis";

/// The parcels of the example.
#[must_use]
pub fn parcel(number: u64) -> Parcel {
    let town = number.wrapping_sub(1) % TOWNS.len() as u64;
    Parcel {
        id: format!("parcel-{number}"),
        town: TOWNS[town as usize].to_owned(),
    }
}

impl Parcel {
    /// Reads a parcel.
    ///
    /// # Errors
    ///
    /// If the bytes are none, which no retry mends.
    pub fn read(payload: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(payload).map_err(|error| {
            Failure::new(Kind::Permanent, &format!("no parcel: {error}"))
        })
    }
}

/// What to call a message in the output: by its id, or by its length if it is no
/// parcel.
#[must_use]
pub fn name(payload: &[u8]) -> String {
    let parcel = Parcel::read(payload);
    parcel.map_or_else(|_| format!("{} bytes", payload.len()), |parcel| parcel.id)
}

/// What the clock of this machine shows, in milliseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    milliseconds(now.unwrap_or_default())
}

/// A span in milliseconds.
#[must_use]
pub fn milliseconds(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

// ---- When it fails ---------------------------------------------------------

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The carrier is out of order now, and may not be later.
    Transient,
    /// The same attempt fails for ever, until a person changes something.
    Permanent,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Transient => "transient",
            Self::Permanent => "permanent",
        })
    }
}

impl FromStr for Kind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "transient" => Ok(Self::Transient),
            "permanent" => Ok(Self::Permanent),
            _ => Err(()),
        }
    }
}

/// Why a parcel is not booked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: Kind,
    /// One line, so that it can stand in a header of any broker.
    pub error: String,
}

impl Failure {
    /// Makes one line of the text.
    #[must_use]
    pub fn new(kind: Kind, error: &str) -> Self {
        let words: Vec<&str> = error.split_whitespace().collect();
        let error = words.join(" ");
        Self { kind, error }
    }
}

// ANCHOR: verdict
/// How long a parcel waits after its first failure, its second, and so on. All of it
/// together has to be longer than the outages that nobody should have to care about.
pub const DELAYS: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
];

/// What becomes of a parcel that has failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is tried again after this one of [`DELAYS`].
    Again(usize),
    /// It is kept for a person.
    Dead,
}

/// Decides after each failure. `attempt` is that of the failure, the first is 1.
#[must_use]
pub fn verdict(attempt: u32, kind: Kind) -> Verdict {
    let rung = attempt.saturating_sub(1) as usize;
    match kind {
        Kind::Transient if rung < DELAYS.len() => Verdict::Again(rung),
        Kind::Transient | Kind::Permanent => Verdict::Dead,
    }
}
// ANCHOR_END: verdict

impl Verdict {
    /// What the output says of it.
    #[must_use]
    pub fn words(&self, at_once: bool) -> String {
        match self {
            Self::Again(_) if at_once => "again at once".to_owned(),
            Self::Again(rung) => {
                format!("again in {} ms", DELAYS[*rung].as_millis())
            }
            Self::Dead => "to the dead letters".to_owned(),
        }
    }
}

// ANCHOR: past
/// What is known of a parcel that has failed. It travels beside the bytes, in headers:
/// those are as they came, whatever is in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// How many have failed.
    pub attempts: u32,
    /// That of the last error, as the error itself.
    pub kind: Kind,
    pub error: String,
    /// Where the parcel was first, in the words of its broker.
    pub origin: String,
    /// In milliseconds since 1970.
    pub first_failure: i64,
}
// ANCHOR_END: past

impl Past {
    /// As it is after one more failure. `origin` and `now` count for the first only.
    #[must_use]
    pub fn after(
        earlier: Option<Self>,
        failure: Failure,
        origin: String,
        now: i64,
    ) -> Self {
        let Failure { kind, error } = failure;
        match earlier {
            Some(earlier) => Self {
                attempts: earlier.attempts.saturating_add(1),
                kind,
                error,
                ..earlier
            },
            None => Self {
                attempts: 1,
                kind,
                error,
                origin,
                first_failure: now,
            },
        }
    }

    /// The headers in which it travels. What is redriven leaves without them, and
    /// begins anew.
    #[must_use]
    pub fn headers(&self) -> [(&'static str, String); 5] {
        [
            ("attempts", self.attempts.to_string()),
            ("error-kind", self.kind.to_string()),
            ("error", self.error.clone()),
            ("origin", self.origin.clone()),
            ("first-failure", self.first_failure.to_string()),
        ]
    }

    /// Whether a header is one of ours.
    #[must_use]
    pub fn owns(header: &str) -> bool {
        const OURS: [&str; 5] =
            ["attempts", "error-kind", "error", "origin", "first-failure"];
        OURS.contains(&header)
    }

    /// Reads the headers; nothing for a message that has not failed.
    #[must_use]
    pub fn read(header: impl Fn(&str) -> Option<String>) -> Option<Self> {
        Some(Self {
            attempts: header("attempts")?.parse().ok()?,
            kind: header("error-kind")?.parse().ok()?,
            error: header("error")?,
            origin: header("origin")?,
            first_failure: header("first-failure")?.parse().ok()?,
        })
    }

    /// The time of the first failure, for people.
    fn since(&self) -> String {
        let nanoseconds = i128::from(self.first_failure) * 1_000_000;
        OffsetDateTime::from_unix_timestamp_nanos(nanoseconds)
            .ok()
            .and_then(|time| time.format(&Rfc3339).ok())
            .unwrap_or_else(|| format!("{} ms", self.first_failure))
    }
}

impl fmt::Display for Past {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            attempts,
            kind,
            error,
            origin,
            ..
        } = self;
        let since = self.since();
        writeln!(
            formatter,
            "attempt {attempts} was the last, {kind}: {error}"
        )?;
        write!(formatter, "          from {origin}, first failed {since}")
    }
}

// ---- The carrier -----------------------------------------------------------

/// The answer of the carrier, when it is not a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Booked,
    /// It was booked by an earlier request; nothing is changed.
    Known,
}

/// A request, as the carrier has noted it down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub parcel: String,
    /// When it came, in milliseconds since 1970.
    pub at: i64,
    pub booked: bool,
}

/// The service of the carrier, played by a file: what it has booked, and what is wrong
/// with it at present. It stands for another company's server, so nothing in it is
/// written together with anything of ours.
pub struct Carrier {
    database: Connection,
}

impl Carrier {
    /// Opens the file, and makes it where there is none. `:memory:` is one that is
    /// gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             CREATE TABLE IF NOT EXISTS bookings (parcel TEXT PRIMARY KEY) STRICT;
             CREATE TABLE IF NOT EXISTS requests (
                 number INTEGER PRIMARY KEY,
                 parcel TEXT NOT NULL,
                 at INTEGER NOT NULL,
                 booked INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS failing (
                 town TEXT PRIMARY KEY,
                 times INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS outage (
                 lasts INTEGER NOT NULL,
                 until INTEGER
             ) STRICT;
             CREATE TABLE IF NOT EXISTS opened (town TEXT PRIMARY KEY) STRICT;",
        )?;
        Ok(Self { database })
    }

    /// Asks the carrier to fetch a parcel. Asked once more with the same id, it books
    /// nothing: that is what makes it harmless to ask again.
    ///
    /// # Errors
    ///
    /// If the file cannot be used. Then it is not known what the carrier thinks, and
    /// the parcel must not be acknowledged.
    pub fn book(
        &mut self,
        parcel: &Parcel,
        now: i64,
    ) -> rusqlite::Result<Result<Answer, Failure>> {
        let transaction = self
            .database
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let answer = match trouble(&transaction, &parcel.town, now)? {
            Some(failure) => Err(failure),
            None => {
                let insert = "INSERT INTO bookings (parcel) VALUES (?1)
                              ON CONFLICT DO NOTHING";
                match transaction.execute(insert, params![parcel.id])? {
                    0 => Ok(Answer::Known),
                    _new => Ok(Answer::Booked),
                }
            }
        };
        transaction.execute(
            "INSERT INTO requests (parcel, at, booked) VALUES (?1, ?2, ?3)",
            params![parcel.id, now, answer == Ok(Answer::Booked)],
        )?;
        transaction.commit()?;
        Ok(answer)
    }

    /// From now on, so many requests for this town fail.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn fail(&self, town: &str, times: u32) -> rusqlite::Result<()> {
        self.database.execute(
            "INSERT INTO failing (town, times) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET times = excluded.times",
            params![town, times],
        )?;
        Ok(())
    }

    /// The next request finds the carrier out of order, and so does each one for this
    /// long after it.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn go_down(&self, lasts: Duration) -> rusqlite::Result<()> {
        self.database.execute("DELETE FROM outage", [])?;
        let insert = "INSERT INTO outage (lasts) VALUES (?1)";
        self.database
            .execute(insert, params![milliseconds(lasts)])?;
        Ok(())
    }

    /// Ends all that is wrong, and opens a depot in the town that had none.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn mend(&self) -> rusqlite::Result<()> {
        self.database
            .execute_batch("DELETE FROM failing; DELETE FROM outage;")?;
        self.database.execute(
            "INSERT INTO opened (town) VALUES (?1) ON CONFLICT DO NOTHING",
            params![ATLANTIS],
        )?;
        Ok(())
    }

    /// All requests, in the order in which they came.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn requests(&self) -> rusqlite::Result<Vec<Request>> {
        let select = "SELECT parcel, at, booked FROM requests ORDER BY number";
        let mut query = self.database.prepare_cached(select)?;
        let rows = query.query_map([], |row| {
            Ok(Request {
                parcel: row.get(0)?,
                at: row.get(1)?,
                booked: row.get(2)?,
            })
        })?;
        rows.collect()
    }
}

/// What keeps the carrier from taking a parcel to this town, if anything does.
fn trouble(
    database: &Connection,
    town: &str,
    now: i64,
) -> rusqlite::Result<Option<Failure>> {
    // An outage begins with the first request that meets it.
    database.execute(
        "UPDATE outage SET until = ?1 + lasts WHERE until IS NULL",
        params![now],
    )?;
    let outage = "SELECT EXISTS (SELECT 1 FROM outage WHERE until > ?1)";
    if database.query_row(outage, [now], |row| row.get(0))? {
        return Ok(Some(Failure::new(
            Kind::Transient,
            "the carrier is out of order",
        )));
    }
    let take = "UPDATE failing SET times = times - 1 WHERE town = ?1 AND times > 0";
    if database.execute(take, params![town])? > 0 {
        let error = format!("{town} does not answer");
        return Ok(Some(Failure::new(Kind::Transient, &error)));
    }
    let opened = "SELECT 1 FROM opened WHERE town = ?1";
    let opened = database
        .query_row(opened, [town], |_row| Ok(()))
        .optional()?;
    if town == ATLANTIS && opened.is_none() {
        let error = format!("no depot in {town}");
        return Ok(Some(Failure::new(Kind::Permanent, &error)));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn carrier() -> Carrier {
        Carrier::open(Path::new(":memory:")).expect("a database in memory")
    }

    fn ask(
        carrier: &mut Carrier,
        number: u64,
        now: i64,
    ) -> Result<Answer, Option<Kind>> {
        let answer = carrier.book(&parcel(number), now).expect("a write");
        answer.map_err(|failure| Some(failure.kind))
    }

    const TRANSIENT: Result<Answer, Option<Kind>> = Err(Some(Kind::Transient));
    const PERMANENT: Result<Answer, Option<Kind>> = Err(Some(Kind::Permanent));

    #[test]
    fn the_waits_grow_and_end() {
        let verdicts = (1..=5).map(|attempt| verdict(attempt, Kind::Transient));
        let verdicts: Vec<_> = verdicts.collect();
        let again = Verdict::Again;
        let dead = || Verdict::Dead;
        assert_eq!(verdicts, [again(0), again(1), again(2), dead(), dead()]);
        assert!(DELAYS.is_sorted_by(|one, next| one < next));
    }

    #[test]
    fn what_no_retry_mends_is_not_tried_again() {
        assert_eq!(verdict(1, Kind::Permanent), Verdict::Dead);
        let failure = Parcel::read(b"\xff\xfe").expect_err("no parcel");
        assert_eq!(failure.kind, Kind::Permanent);
    }

    #[test]
    fn an_error_is_one_line() {
        let failure = Failure::new(Kind::Transient, " down:\r\nby\tnight ");
        assert_eq!(failure.error, "down: by night");
    }

    #[test]
    fn the_past_keeps_the_first_and_the_last() {
        let failure = |kind, error| Failure::new(kind, error);
        let first = failure(Kind::Transient, "busy");
        let first = Past::after(None, first, "line 7".to_owned(), 1000);
        let last = failure(Kind::Permanent, "no depot");
        let last = Past::after(Some(first), last, "wait 3".to_owned(), 2000);
        let expected = Past {
            attempts: 2,
            kind: Kind::Permanent,
            error: "no depot".to_owned(),
            origin: "line 7".to_owned(),
            first_failure: 1000,
        };
        assert_eq!(last, expected);
        let headers = HashMap::from(last.headers());
        assert_eq!(
            Past::read(|name| headers.get(name).cloned()),
            Some(expected)
        );
        assert!(headers.keys().all(|name| Past::owns(name)));
        assert_eq!(Past::read(|_name| None), None);
        assert!(last.to_string().contains("1970-01-01T00:00:01Z"), "{last}");
    }

    #[test]
    fn a_parcel_is_booked_once() {
        let mut carrier = carrier();
        assert_eq!(ask(&mut carrier, 1, 10), Ok(Answer::Booked));
        assert_eq!(ask(&mut carrier, 1, 20), Ok(Answer::Known));
        let requests = carrier.requests().expect("a list");
        let booked: Vec<_> = requests.iter().map(|it| (it.at, it.booked)).collect();
        assert_eq!(booked, [(10, true), (20, false)]);
    }

    #[test]
    fn a_town_fails_so_often_and_no_other_does() {
        let mut carrier = carrier();
        carrier.fail("Ghent", 2).expect("a write");
        assert_eq!(ask(&mut carrier, 2, 0), TRANSIENT);
        assert_eq!(ask(&mut carrier, 1, 0), Ok(Answer::Booked));
        assert_eq!(ask(&mut carrier, 2, 0), TRANSIENT);
        assert_eq!(ask(&mut carrier, 2, 0), Ok(Answer::Booked));
    }

    #[test]
    fn an_outage_begins_with_the_request_that_meets_it() {
        let mut carrier = carrier();
        carrier.go_down(Duration::from_secs(2)).expect("a write");
        assert_eq!(ask(&mut carrier, 1, 5000), TRANSIENT);
        assert_eq!(ask(&mut carrier, 1, 6999), TRANSIENT);
        assert_eq!(ask(&mut carrier, 1, 7000), Ok(Answer::Booked));
    }

    #[test]
    fn atlantis_has_no_depot_until_it_is_mended() {
        let mut carrier = carrier();
        carrier.fail("Turin", 9).expect("a write");
        carrier.go_down(Duration::ZERO).expect("a write");
        assert_eq!(ask(&mut carrier, 3, 0), PERMANENT);
        assert_eq!(ask(&mut carrier, 4, 0), TRANSIENT);
        carrier.mend().expect("a write");
        assert_eq!(ask(&mut carrier, 3, 0), Ok(Answer::Booked));
        assert_eq!(ask(&mut carrier, 4, 0), Ok(Answer::Booked));
    }
}
