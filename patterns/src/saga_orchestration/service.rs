//! The tables of a service: what it has done for each order, and what it has
//! answered.

use std::{fmt, path::Path};

use rusqlite::{
    Connection, OptionalExtension as _, Transaction, TransactionBehavior, params,
};

use super::{Action, Command, Message, Order, Outcome, Participant, Reply};

/// An answer, as it is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The id of the order.
    pub key: String,
    pub payload: Vec<u8>,
    pub reply: Reply,
    /// Whether it was remembered, and nothing was done.
    pub again: bool,
}

impl fmt::Display for Answered {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match &self.reply.outcome {
            Outcome::Done => "done",
            Outcome::Refused(reason) => reason,
        };
        let again = if self.again {
            ", as answered before"
        } else {
            ""
        };
        let action = self.reply.action.name();
        write!(formatter, "{:<10} {action}: {outcome}{again}", self.key)
    }
}

/// The database of a service.
pub struct Service {
    database: Connection,
    participant: Participant,
}

/// What a service remembers of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Done,
    TakenBack,
}

impl Mark {
    fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::TakenBack => "taken back",
        }
    }
}

impl Service {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(participant: Participant, file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // FULL: what is committed outlives a power cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS answers (
                 id TEXT PRIMARY KEY,
                 reply BLOB NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS marks (
                 participant TEXT NOT NULL,
                 id TEXT NOT NULL,
                 mark TEXT NOT NULL,
                 PRIMARY KEY (participant, id)
             ) STRICT;
             CREATE TABLE IF NOT EXISTS books (
                 number INTEGER PRIMARY KEY,
                 participant TEXT NOT NULL,
                 id TEXT NOT NULL,
                 action TEXT NOT NULL,
                 amount INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 payload BLOB PRIMARY KEY
             ) STRICT;",
        )?;
        Ok(Self {
            database,
            participant,
        })
    }

    // ANCHOR: handle
    /// Does what a command says and remembers the answer, both or none. A command
    /// that comes again gets the same answer, and nothing is done. Returns nothing
    /// if nobody here can read it; then it is kept.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is done, and the command must
    /// not be acknowledged.
    pub fn handle(&mut self, payload: &[u8]) -> rusqlite::Result<Option<Answered>> {
        let participant = self.participant;
        let transaction = self
            .database
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let answered = match read(participant, payload) {
            Some(command) => Some(match remembered(&transaction, &command)? {
                Some(known) => known,
                None => answer(&transaction, &command)?,
            }),
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
        Ok(answered)
    }
    // ANCHOR_END: handle

    /// What stands in the books for all orders together: cents that are paid, pieces
    /// that are taken out of the stock, parcels.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn balance(&self) -> rusqlite::Result<i64> {
        let sum =
            "SELECT coalesce(sum(amount), 0) FROM books WHERE participant = ?1";
        let name = self.participant.name();
        self.database.query_row(sum, [name], |row| row.get(0))
    }

    /// What stands in the books for one order, in the order of time.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn books(&self, order: &str) -> rusqlite::Result<Vec<i64>> {
        let mut query = self.database.prepare(
            "SELECT amount FROM books WHERE participant = ?1 AND id = ?2
             ORDER BY number",
        )?;
        let name = self.participant.name();
        let rows = query.query_map([name, order], |row| row.get(0))?;
        rows.collect()
    }
}

fn remembered(
    transaction: &Transaction<'_>,
    command: &Command,
) -> rusqlite::Result<Option<Answered>> {
    let select = "SELECT reply FROM answers WHERE id = ?1";
    let row =
        transaction.query_row(select, [&command.id], |row| row.get::<_, Vec<u8>>(0));
    Ok(row.optional()?.and_then(|payload| {
        let Message::Answered(reply) = serde_json::from_slice(&payload).ok()? else {
            return None;
        };
        Some(Answered {
            key: command.order.id.clone(),
            payload,
            reply,
            again: true,
        })
    }))
}

fn answer(
    transaction: &Transaction<'_>,
    command: &Command,
) -> rusqlite::Result<Answered> {
    let (action, order) = (command.action, &command.order);
    // With the name of the service, for those who give two of them one file.
    let name = action.participant().name();
    let select = "SELECT mark FROM marks WHERE participant = ?1 AND id = ?2";
    let mark: Option<String> = transaction
        .query_row(select, [name, &order.id], |row| row.get(0))
        .optional()?;
    let mark = mark.map(|mark| match mark.as_str() {
        "done" => Mark::Done,
        _ => Mark::TakenBack,
    });
    let (outcome, effect, mark) = decide(action, mark, refusal(action, order));
    if let Some(effect) = effect {
        transaction.execute(
            "INSERT INTO books (participant, id, action, amount)
             VALUES (?1, ?2, ?3, ?4)",
            params![name, order.id, action.name(), effect.amount(action, order)],
        )?;
    }
    if let Some(mark) = mark {
        transaction.execute(
            "INSERT INTO marks (participant, id, mark) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET mark = excluded.mark",
            params![name, order.id, mark.name()],
        )?;
    }
    let reply = Reply {
        id: command.id.clone(),
        action,
        order: order.id.clone(),
        outcome,
    };
    let payload = Message::Answered(reply.clone()).to_json();
    transaction.execute(
        "INSERT INTO answers (id, reply) VALUES (?1, ?2)",
        params![command.id, payload],
    )?;
    Ok(Answered {
        key: order.id.clone(),
        payload,
        reply,
        again: false,
    })
}

/// What is written into the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Take,
    GiveBack,
}

impl Effect {
    fn amount(self, action: Action, order: &Order) -> i64 {
        let amount = match action.participant() {
            Participant::Payment => order.total,
            Participant::Stock => order.pieces,
            Participant::Shipping => 1,
        };
        match self {
            Self::Take => amount,
            Self::GiveBack => -amount,
        }
    }
}

// ANCHOR: decide
/// The answer, what is written into the books, and what is remembered of the order.
fn decide(
    action: Action,
    mark: Option<Mark>,
    refusal: Option<&str>,
) -> (Outcome, Option<Effect>, Option<Mark>) {
    let refused = |reason: &str| Outcome::Refused(reason.to_owned());
    match (action.takes_back(), mark) {
        (false, None) => match refusal {
            None => (Outcome::Done, Some(Effect::Take), Some(Mark::Done)),
            Some(reason) => (refused(reason), None, None),
        },
        (false, Some(Mark::Done)) => (Outcome::Done, None, mark),
        // Overtaken by what takes it back. To do it now would be for ever.
        (false, Some(Mark::TakenBack)) => (refused("taken back before"), None, mark),
        (true, Some(Mark::Done)) => {
            (Outcome::Done, Some(Effect::GiveBack), Some(Mark::TakenBack))
        }
        // There is nothing to take back, yet. What may still come will find the
        // mark.
        (true, None | Some(Mark::TakenBack)) => {
            (Outcome::Done, None, Some(Mark::TakenBack))
        }
    }
}
// ANCHOR_END: decide

/// Why a service cannot do it.
fn refusal(action: Action, order: &Order) -> Option<&'static str> {
    match action {
        Action::Pay if order.total > 1_000_000 => Some("the bank says no"),
        Action::Reserve if order.item == "teapot" => Some("out of stock"),
        Action::Ship if order.country == "Atlantis" => Some("no carrier goes there"),
        _ => None,
    }
}

/// A command for this service, and about something.
fn read(participant: Participant, payload: &[u8]) -> Option<Command> {
    let command: Command = serde_json::from_slice(payload).ok()?;
    let order = &command.order;
    let sound = !command.id.is_empty()
        && !order.id.is_empty()
        && order.total > 0
        && order.pieces > 0;
    (sound && command.action.participant() == participant).then_some(command)
}

#[cfg(test)]
mod tests {
    use super::{super::order, *};

    fn payment() -> Service {
        Service::open(Participant::Payment, Path::new(":memory:"))
            .expect("a database in memory")
    }

    fn told(service: &mut Service, action: Action, number: u64) -> Answered {
        let command = Command::new(action, &order(number));
        let payload = serde_json::to_vec(&command).expect("JSON");
        let answered = service.handle(&payload).expect("a write");
        answered.expect("an answer")
    }

    fn books(service: &Service) -> Vec<i64> {
        service.books("order-1").expect("a list")
    }

    #[test]
    fn told_twice_it_answers_twice_and_pays_once() {
        let mut payment = payment();
        let first = told(&mut payment, Action::Pay, 1);
        assert_eq!((first.again, &first.reply.outcome), (false, &Outcome::Done));
        let second = told(&mut payment, Action::Pay, 1);
        assert_eq!((second.again, &second.payload), (true, &first.payload));
        assert_eq!(books(&payment), [2_500]);
        for again in [false, true] {
            assert_eq!(told(&mut payment, Action::Refund, 1).again, again);
        }
        assert_eq!(books(&payment), [2_500, -2_500]);
        // Late and for the third time: the answer of the first time, and no payment.
        assert_eq!(told(&mut payment, Action::Pay, 1).payload, first.payload);
        assert_eq!(books(&payment), [2_500, -2_500]);
        assert_eq!(payment.balance().expect("a sum"), 0);
    }

    #[test]
    fn a_payment_that_its_refund_has_overtaken_is_not_made() {
        let mut payment = payment();
        assert_eq!(
            told(&mut payment, Action::Refund, 1).reply.outcome,
            Outcome::Done
        );
        let late = told(&mut payment, Action::Pay, 1).reply.outcome;
        assert!(matches!(late, Outcome::Refused(_)), "{late:?}");
        assert_eq!(books(&payment), [0; 0]);
    }

    #[test]
    fn what_was_refused_leaves_nothing_to_take_back() {
        let mut payment = payment();
        let refused = told(&mut payment, Action::Pay, 5).reply.outcome;
        assert!(matches!(refused, Outcome::Refused(_)), "{refused:?}");
        told(&mut payment, Action::Refund, 5);
        assert_eq!(payment.balance().expect("a sum"), 0);
    }

    #[test]
    fn what_cannot_have_its_answer_is_not_done() {
        let mut payment = payment();
        payment
            .database
            .execute_batch(
                "CREATE TRIGGER full BEFORE INSERT ON answers
                 BEGIN SELECT RAISE(ABORT, 'the disk is full'); END;",
            )
            .expect("a trigger");
        let command = Command::new(Action::Pay, &order(1));
        let payload = serde_json::to_vec(&command).expect("JSON");
        payment
            .handle(&payload)
            .expect_err("no place for an answer");
        assert_eq!(books(&payment), [0; 0]);
    }

    #[test]
    fn two_services_with_one_file_do_not_mix() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("services.db");
        let services = [Participant::Payment, Participant::Stock];
        let [mut payment, mut stock] =
            services.map(|it| Service::open(it, &file).expect("a database"));
        told(&mut payment, Action::Pay, 1);
        told(&mut stock, Action::Reserve, 1);
        told(&mut payment, Action::Refund, 1);
        assert_eq!(books(&payment), [2_500, -2_500]);
        assert_eq!(books(&stock), [2]);
        assert_eq!(stock.balance().expect("a sum"), 2);
    }

    #[test]
    fn what_is_not_for_this_service_is_kept_and_not_answered() {
        let mut payment = payment();
        let mut free = order(1);
        free.total = 0;
        let foreign = Command::new(Action::Ship, &order(1));
        for payload in [
            b"\xff".to_vec(),
            serde_json::to_vec(&foreign).expect("JSON"),
            serde_json::to_vec(&Command::new(Action::Pay, &free)).expect("JSON"),
        ] {
            assert_eq!(payment.handle(&payload).expect("a write"), None);
        }
        let count = "SELECT count(*) FROM unreadable";
        let kept: i64 = payment
            .database
            .query_row(count, (), |row| row.get(0))
            .expect("a count");
        assert_eq!((kept, payment.balance().expect("a sum")), (3, 0));
    }
}
