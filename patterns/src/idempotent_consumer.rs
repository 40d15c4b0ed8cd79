//! Idempotent consumer: what a payment is, and the ledger that charges each once.

use std::path::Path;

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

/// A payment that a customer owes. Its id travels beside it, in the place that the
/// broker has for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payment {
    pub account: String,
    /// In cents.
    pub amount: i64,
}

/// The id of a payment: that of the business, made where the payment is made. A
/// delivery tag, an offset or a sequence number is new when the payment is sent
/// again, and then says nothing.
#[must_use]
pub fn id(number: u64) -> String {
    format!("payment-{number}")
}

/// The payments of the example: ten accounts in turns, each payment of as many cents
/// as its number, so that the sum tells what is missing and what is there twice.
#[must_use]
pub fn payment(number: u64) -> Payment {
    Payment {
        account: format!("account-{}", number % 10),
        amount: i64::try_from(number).unwrap_or(i64::MAX),
    }
}

/// What the ledger made of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The account is charged.
    Charged,
    /// It was charged by an earlier delivery; nothing is changed.
    Known,
    /// Nobody can read it. It is kept, and no account is charged.
    SetAside,
}

/// What the accounts were charged with, and by which payments.
pub struct Ledger {
    database: Connection,
}

impl Ledger {
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
             CREATE TABLE IF NOT EXISTS inbox (id TEXT PRIMARY KEY) STRICT;
             CREATE TABLE IF NOT EXISTS charges (
                 number INTEGER PRIMARY KEY,
                 id TEXT NOT NULL,
                 account TEXT NOT NULL,
                 amount INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS unreadable (
                 payload BLOB PRIMARY KEY
             ) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: charge
    /// Charges the account, once for each id, however often the message comes.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed, and the message
    /// must not be acknowledged.
    pub fn charge(&mut self, id: &str, payload: &[u8]) -> rusqlite::Result<Outcome> {
        let Some(payment) = read(id, payload) else {
            return self.set_aside(payload);
        };
        // One transaction: the id is in the inbox if and only if the account is
        // charged, wherever the program ends.
        let transaction = self.database.transaction()?;
        let new = transaction.execute(
            "INSERT INTO inbox (id) VALUES (?1) ON CONFLICT DO NOTHING",
            params![id],
        )?;
        if new == 0 {
            return Ok(Outcome::Known);
        }
        add(&transaction, id, &payment)?;
        transaction.commit()?;
        Ok(Outcome::Charged)
    }
    // ANCHOR_END: charge

    // ANCHOR: careless
    /// The mistake: charges with each delivery.
    ///
    /// # Errors
    ///
    /// If the database cannot be written.
    pub fn charge_each_time(
        &mut self,
        id: &str,
        payload: &[u8],
    ) -> rusqlite::Result<Outcome> {
        let Some(payment) = read(id, payload) else {
            return self.set_aside(payload);
        };
        add(&self.database, id, &payment)?;
        Ok(Outcome::Charged)
    }
    // ANCHOR_END: careless

    /// Keeps what nobody can read where a person can look at it.
    fn set_aside(&mut self, payload: &[u8]) -> rusqlite::Result<Outcome> {
        self.database.execute(
            "INSERT INTO unreadable (payload) VALUES (?1) ON CONFLICT DO NOTHING",
            params![payload],
        )?;
        Ok(Outcome::SetAside)
    }

    /// What all accounts together are charged with, in cents.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn total(&self) -> rusqlite::Result<i64> {
        let sum = "SELECT coalesce(sum(amount), 0) FROM charges";
        self.database.query_row(sum, [], |row| row.get(0))
    }
}

/// A payment needs an id and an amount that is one.
fn read(id: &str, payload: &[u8]) -> Option<Payment> {
    let payment: Payment = serde_json::from_slice(payload).ok()?;
    (!id.is_empty() && payment.amount > 0).then_some(payment)
}

fn add(database: &Connection, id: &str, payment: &Payment) -> rusqlite::Result<()> {
    database.execute(
        "INSERT INTO charges (id, account, amount) VALUES (?1, ?2, ?3)",
        params![id, payment.account, payment.amount],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::open(Path::new(":memory:")).expect("a database in memory")
    }

    fn payload(number: u64) -> Vec<u8> {
        serde_json::to_vec(&payment(number)).expect("a payment")
    }

    #[test]
    fn three_deliveries_charge_once() {
        let mut ledger = ledger();
        let mut outcomes = Vec::new();
        for _delivery in 0..3 {
            outcomes.push(ledger.charge("payment-7", &payload(7)).expect("a write"));
        }
        assert_eq!(outcomes, [Outcome::Charged, Outcome::Known, Outcome::Known]);
        assert_eq!(ledger.total().expect("a sum"), 7);
    }

    #[test]
    fn without_the_inbox_each_delivery_charges() {
        let mut ledger = ledger();
        for _delivery in 0..3 {
            let outcome = ledger.charge_each_time("payment-7", &payload(7));
            assert_eq!(outcome.expect("a write"), Outcome::Charged);
        }
        assert_eq!(ledger.total().expect("a sum"), 21);
    }

    #[test]
    fn what_nobody_can_read_is_kept_and_charges_nobody() {
        let mut ledger = ledger();
        let nameless = ("", payload(7));
        let free = (
            "payment-8",
            br#"{"account":"account-8","amount":0}"#.to_vec(),
        );
        let noise = ("payment-9", b"\xff".to_vec());
        for (id, payload) in [nameless, free, noise] {
            let outcome = ledger.charge(id, &payload).expect("a write");
            assert_eq!(outcome, Outcome::SetAside, "{id:?}");
        }
        let count = "SELECT count(*) FROM unreadable";
        let kept: i64 = ledger
            .database
            .query_row(count, [], |row| row.get(0))
            .expect("a count");
        assert_eq!((kept, ledger.total().expect("a sum")), (3, 0));
    }
}
