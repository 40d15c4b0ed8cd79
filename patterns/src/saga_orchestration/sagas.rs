//! The tables of the orchestrator: each order with its state, its history, and the
//! commands that have to be sent.

use std::{fmt, path::Path, str::FromStr, time::Duration};

use rusqlite::{
    Connection, OptionalExtension as _, Transaction, TransactionBehavior, params,
    types::Type,
};

use super::{Command, Event, Message, Order, Outcome, Participant, State, next};

/// A line of the history of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub order: String,
    /// What has happened.
    pub what: String,
    /// The state after it; none for an order that nobody has placed here.
    pub state: Option<State>,
}

impl fmt::Display for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.map_or("unknown", State::name);
        let Self { order, what, .. } = self;
        write!(formatter, "{order:<10} {what:<32} {state}")
    }
}

/// A command in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Its place, which is the order of the transactions.
    pub position: i64,
    pub to: Participant,
    /// The id of the order. Commands with the same key stay in their order.
    pub key: String,
    pub payload: Vec<u8>,
}

/// The database of the orchestrator.
pub struct Sagas {
    database: Connection,
    /// How long it waits for an answer.
    limit: Duration,
}

/// A saga as its row has it.
struct Saga {
    order: Order,
    state: State,
    /// How often the command of this state was sent once more.
    repeats: u32,
}

impl Sagas {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program. The limit is how long an answer may take.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path, limit: Duration) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // WAL: others look at it meanwhile. FULL: what is committed outlives a power
        // cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS sagas (
                 id TEXT PRIMARY KEY,
                 data TEXT NOT NULL,
                 state TEXT NOT NULL,
                 deadline INTEGER,
                 repeats INTEGER NOT NULL
             ) STRICT;
             CREATE INDEX IF NOT EXISTS sagas_by_deadline ON sagas (deadline)
                 WHERE deadline IS NOT NULL;
             CREATE TABLE IF NOT EXISTS history (
                 number INTEGER PRIMARY KEY AUTOINCREMENT,
                 id TEXT NOT NULL,
                 what TEXT NOT NULL,
                 state TEXT NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS outbox (
                 position INTEGER PRIMARY KEY AUTOINCREMENT,
                 participant TEXT NOT NULL,
                 key TEXT NOT NULL,
                 payload BLOB NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 payload BLOB PRIMARY KEY
             ) STRICT;",
        )?;
        Ok(Self { database, limit })
    }

    // ANCHOR: take
    /// Takes what has come: a new order, or an answer. What it says, the state after
    /// it and the next command are written together, wherever the program ends.
    /// Returns nothing if nobody can read it; then it is kept.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed, and the message
    /// must not be acknowledged.
    pub fn take(
        &mut self,
        payload: &[u8],
        now: i64,
    ) -> rusqlite::Result<Option<Entry>> {
        let limit = self.limit;
        let transaction = self.begin()?;
        let entry = match read(payload) {
            Some(Message::Placed(order)) => match saga(&transaction, &order.id)? {
                None => {
                    let what = "placed".to_owned();
                    let to = State::Paying;
                    Some(enter(&transaction, &order, what, to, now, (limit, 0))?)
                }
                Some(known) => {
                    let what = "placed once more, ignored".to_owned();
                    Some(note(&transaction, &order.id, what, known.state)?)
                }
            },
            Some(Message::Answered(reply)) => {
                let action = reply.action;
                let (event, said) = match reply.outcome {
                    Outcome::Done => (Event::Done(action), "done".to_owned()),
                    Outcome::Refused(reason) => (Event::Refused(action), reason),
                };
                let what = format!("{}: {said}", action.name());
                Some(match saga(&transaction, &reply.order)? {
                    None => Entry {
                        order: reply.order,
                        what,
                        state: None,
                    },
                    Some(saga) => match next(saga.state, event) {
                        Some(to) => {
                            let order = &saga.order;
                            enter(&transaction, order, what, to, now, (limit, 0))?
                        }
                        None => {
                            let what = format!("{what}, ignored");
                            note(&transaction, &reply.order, what, saga.state)?
                        }
                    },
                })
            }
            None => {
                transaction.execute(
                    "INSERT INTO unreadable (payload) VALUES (?1)
                     ON CONFLICT DO NOTHING",
                    params![payload],
                )?;
                None
            }
        };
        transaction.commit()?;
        Ok(entry)
    }
    // ANCHOR_END: take

    // ANCHOR: overdue
    /// Moves the orders whose deadline has passed: to the way back, and there, to
    /// ask once more.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed.
    pub fn overdue(&mut self, now: i64) -> rusqlite::Result<Vec<Entry>> {
        let limit = self.limit;
        let transaction = self.begin()?;
        let mut entries = Vec::new();
        for id in late(&transaction, now)? {
            let Some(saga) = saga(&transaction, &id)? else {
                continue;
            };
            let (Some(action), Some(to)) =
                (saga.state.action(), next(saga.state, Event::Silence))
            else {
                continue;
            };
            let again = saga.state == to;
            let then = if again {
                ", sent once more"
            } else {
                " in time"
            };
            let what = format!("{}: no answer{then}", action.name());
            let repeats = if again { saga.repeats + 1 } else { 0 };
            let order = &saga.order;
            let wait = (limit, repeats);
            entries.push(enter(&transaction, order, what, to, now, wait)?);
        }
        transaction.commit()?;
        Ok(entries)
    }
    // ANCHOR_END: overdue

    /// A transaction that may write from its beginning on: one that reads first and
    /// then writes is refused if another program has written in between.
    fn begin(&mut self) -> rusqlite::Result<Transaction<'_>> {
        self.database
            .transaction_with_behavior(TransactionBehavior::Immediate)
    }

    /// The next deadline, in milliseconds since 1970, if any order waits.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn deadline(&self) -> rusqlite::Result<Option<i64>> {
        let first = "SELECT min(deadline) FROM sagas WHERE deadline IS NOT NULL";
        self.database.query_row(first, (), |row| row.get(0))
    }

    /// How long it is from this moment to the next deadline; for ever if no order
    /// waits.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn wait(&self, now: i64) -> rusqlite::Result<Duration> {
        Ok(self.deadline()?.map_or(Duration::MAX, |deadline| {
            let milliseconds = deadline.saturating_sub(now);
            Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
        }))
    }

    // ANCHOR: outbox
    /// The commands that have to be sent, the oldest first.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn waiting(&self, limit: u32) -> rusqlite::Result<Vec<Sent>> {
        let mut query = self.database.prepare_cached(
            "SELECT position, participant, key, payload FROM outbox
             ORDER BY position LIMIT ?1",
        )?;
        let rows = query.query_map(params![limit], |row| {
            Ok(Sent {
                position: row.get(0)?,
                to: parsed(1, &row.get::<_, String>(1)?)?,
                key: row.get(2)?,
                payload: row.get(3)?,
            })
        })?;
        rows.collect()
    }

    /// After the broker has said that it has the command, and not before.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then the command is sent again.
    pub fn cross_off(&mut self, command: &Sent) -> rusqlite::Result<()> {
        let delete = "DELETE FROM outbox WHERE position = ?1";
        self.database.execute(delete, params![command.position])?;
        Ok(())
    }
    // ANCHOR_END: outbox

    /// The history of all orders, one order after the other, as they were placed.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn history(&self) -> rusqlite::Result<Vec<Entry>> {
        let mut query = self.database.prepare(
            "SELECT id, what, state FROM history
             ORDER BY min(number) OVER (PARTITION BY id), number",
        )?;
        let rows = query.query_map((), |row| {
            Ok(Entry {
                order: row.get(0)?,
                what: row.get(1)?,
                state: Some(parsed(2, &row.get::<_, String>(2)?)?),
            })
        })?;
        rows.collect()
    }
}

// ANCHOR: enter
/// The state with its deadline, the command that belongs to it, and a line of
/// history.
fn enter(
    transaction: &Transaction<'_>,
    order: &Order,
    what: String,
    to: State,
    now: i64,
    (limit, repeats): (Duration, u32),
) -> rusqlite::Result<Entry> {
    let action = to.action();
    // Asked again at ever longer intervals, up to 64 times the limit.
    let wait = limit.saturating_mul(1 << repeats.min(6)).as_millis();
    let deadline = now.saturating_add(i64::try_from(wait).unwrap_or(i64::MAX));
    transaction.execute(
        "INSERT INTO sagas (id, data, state, deadline, repeats)
         VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT DO UPDATE SET state = excluded.state,
             deadline = excluded.deadline, repeats = excluded.repeats",
        params![
            order.id,
            json(order),
            to.name(),
            // At its end it waits for nothing.
            action.map(|_waits| deadline),
            repeats
        ],
    )?;
    if let Some(action) = action {
        transaction.execute(
            "INSERT INTO outbox (participant, key, payload) VALUES (?1, ?2, ?3)",
            params![
                action.participant().name(),
                order.id,
                json(&Command::new(action, order)).into_bytes()
            ],
        )?;
    }
    note(transaction, &order.id, what, to)
}
// ANCHOR_END: enter

fn note(
    transaction: &Transaction<'_>,
    order: &str,
    what: String,
    state: State,
) -> rusqlite::Result<Entry> {
    transaction.execute(
        "INSERT INTO history (id, what, state) VALUES (?1, ?2, ?3)",
        params![order, what, state.name()],
    )?;
    Ok(Entry {
        order: order.to_owned(),
        what,
        state: Some(state),
    })
}

fn saga(
    transaction: &Transaction<'_>,
    order: &str,
) -> rusqlite::Result<Option<Saga>> {
    let select = "SELECT data, state, repeats FROM sagas WHERE id = ?1";
    let row = transaction.query_row(select, [order], |row| {
        let order = serde_json::from_str(&row.get::<_, String>(0)?);
        Ok(Saga {
            order: order.map_err(|error| unexpected(0, error))?,
            state: parsed(1, &row.get::<_, String>(1)?)?,
            repeats: row.get(2)?,
        })
    });
    row.optional()
}

fn late(transaction: &Transaction<'_>, now: i64) -> rusqlite::Result<Vec<String>> {
    let mut query = transaction.prepare_cached(
        "SELECT id FROM sagas WHERE deadline <= ?1 ORDER BY deadline LIMIT 100",
    )?;
    let rows = query.query_map([now], |row| row.get(0))?;
    rows.collect()
}

/// An order needs a name and something to pay and to ship.
fn read(payload: &[u8]) -> Option<Message> {
    let message = serde_json::from_slice(payload).ok()?;
    if let Message::Placed(order) = &message
        && (order.id.is_empty() || order.total <= 0 || order.pieces <= 0)
    {
        return None;
    }
    Some(message)
}

fn json(value: &impl serde::Serialize) -> String {
    // Texts and numbers are always JSON.
    serde_json::to_string(value).unwrap_or_default()
}

/// A name that this program has written.
fn parsed<T: FromStr>(column: usize, name: &str) -> rusqlite::Result<T> {
    let message = format!("{name:?} is not known here");
    name.parse()
        .map_err(|_| unexpected(column, std::io::Error::other(message)))
}

fn unexpected(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Action, Reply, order},
        *,
    };

    const LIMIT: Duration = Duration::from_millis(100);

    fn sagas() -> Sagas {
        Sagas::open(Path::new(":memory:"), LIMIT).expect("a database in memory")
    }

    fn placed(sagas: &mut Sagas, number: u64, now: i64) -> Entry {
        let placed = Message::Placed(order(number)).to_json();
        let entry = sagas.take(&placed, now).expect("a write");
        entry.expect("an order")
    }

    fn done(sagas: &mut Sagas, action: Action, number: u64) -> Entry {
        let reply = Reply {
            id: Command::new(action, &order(number)).id,
            action,
            order: order(number).id,
            outcome: Outcome::Done,
        };
        let answered = Message::Answered(reply).to_json();
        let entry = sagas.take(&answered, 0).expect("a write");
        entry.expect("an answer")
    }

    fn waiting(sagas: &Sagas) -> Vec<Command> {
        let waiting = sagas.waiting(100).expect("a list").into_iter();
        let read = |it: Sent| serde_json::from_slice(&it.payload).expect("JSON");
        waiting.map(read).collect()
    }

    #[test]
    fn a_step_comes_with_one_command_and_a_repeated_answer_with_none() {
        let mut sagas = sagas();
        let entry = placed(&mut sagas, 1, 0);
        assert_eq!(entry.state, Some(State::Paying));
        assert_eq!(waiting(&sagas), [Command::new(Action::Pay, &order(1))]);
        for state in ["reserving", "reserving"] {
            let entry = done(&mut sagas, Action::Pay, 1);
            assert_eq!(entry.state.map(State::name), Some(state));
            assert_eq!(waiting(&sagas).len(), 2);
        }
        placed(&mut sagas, 1, 0);
        let first = sagas.waiting(1).expect("a list").remove(0);
        assert_eq!(first.to, Participant::Payment);
        sagas.cross_off(&first).expect("a write");
        assert_eq!(waiting(&sagas), [Command::new(Action::Reserve, &order(1))]);
    }

    #[test]
    fn what_takes_back_is_sent_again_at_longer_and_longer_intervals() {
        let mut sagas = sagas();
        placed(&mut sagas, 1, 1_000);
        assert_eq!(sagas.overdue(1_099).expect("a write"), []);
        let mut now = 1_000;
        for wait in [100, 100, 200, 400, 800, 1_600, 3_200, 6_400, 6_400] {
            assert_eq!(sagas.deadline().expect("a look"), Some(now + wait));
            now += wait;
            assert_eq!(sagas.overdue(now).expect("a write").len(), 1);
        }
        let actions = waiting(&sagas).into_iter().map(|it| it.action.name());
        let actions: Vec<_> = actions.collect();
        assert_eq!(actions[..2], ["pay", "refund"]);
        assert!(actions[2..].iter().all(|action| *action == "refund"));
        done(&mut sagas, Action::Refund, 1);
        assert_eq!(sagas.wait(now).expect("a look"), Duration::MAX);
    }

    #[test]
    fn an_answer_about_an_order_that_nobody_placed_is_no_order() {
        let mut sagas = sagas();
        assert_eq!(done(&mut sagas, Action::Pay, 7).state, None);
        assert_eq!(waiting(&sagas), []);
        assert_eq!(sagas.history().expect("a list"), []);
    }

    #[test]
    fn what_nobody_can_read_is_kept() {
        let mut sagas = sagas();
        let mut nameless = order(1);
        nameless.id.clear();
        for payload in [b"\xff".to_vec(), Message::Placed(nameless).to_json()] {
            assert_eq!(sagas.take(&payload, 0).expect("a write"), None);
        }
        let count = "SELECT count(*) FROM unreadable";
        let kept: i64 = sagas
            .database
            .query_row(count, (), |row| row.get(0))
            .expect("a count");
        assert_eq!(kept, 2);
    }

    #[test]
    fn what_cannot_have_its_command_is_not_written() {
        let mut sagas = sagas();
        placed(&mut sagas, 1, 0);
        sagas
            .database
            .execute_batch("DROP TABLE outbox")
            .expect("a write");
        let placed = Message::Placed(order(2)).to_json();
        sagas.take(&placed, 0).expect_err("there is no outbox");
        let history = sagas.history().expect("a list");
        assert_eq!(history.len(), 1, "{history:?}");
        assert_eq!(sagas.overdue(0).expect("a look"), []);
    }
}
