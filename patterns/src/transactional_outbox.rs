//! Transactional outbox: an order and the event about it, written together.

use std::path::Path;

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

/// What other services are told when an order is placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderPlaced {
    pub order: String,
    pub customer: String,
    /// In cents.
    pub total: i64,
}

/// The orders of the example: ten customers in turns.
#[must_use]
pub fn order(number: u64) -> OrderPlaced {
    OrderPlaced {
        order: format!("order-{number}"),
        customer: format!("customer-{}", number % 10),
        total: i64::try_from(number).unwrap_or(i64::MAX),
    }
}

/// An event that has to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its place in the outbox, which is the order of the transactions.
    pub position: i64,
    /// The same each time it is published, so that a reader can tell.
    pub id: String,
    /// Events with the same key stay in their order.
    pub key: String,
    pub payload: Vec<u8>,
}

impl Event {
    /// The event about an order, before the outbox has given it a place.
    #[must_use]
    pub fn about(order: &OrderPlaced) -> Self {
        Self {
            position: 0,
            id: format!("{}.placed", order.order),
            key: order.customer.clone(),
            // A struct of texts and a number is always JSON.
            payload: serde_json::to_vec(order).unwrap_or_default(),
        }
    }
}

/// The database of the shop.
pub struct Shop {
    database: Connection,
}

impl Shop {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // WAL: the relay reads while orders are written. FULL: what is committed
        // outlives a power cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS orders (
                 id TEXT PRIMARY KEY,
                 customer TEXT NOT NULL,
                 total INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS outbox (
                 position INTEGER PRIMARY KEY AUTOINCREMENT,
                 id TEXT NOT NULL UNIQUE,
                 key TEXT NOT NULL,
                 payload BLOB NOT NULL
             ) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: place
    /// Writes the order and the event about it, both or none. An order that is there
    /// already is left alone, and so is its event.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed.
    pub fn place(&mut self, order: &OrderPlaced) -> rusqlite::Result<()> {
        let transaction = self.database.transaction()?;
        let new = insert(&transaction, order)?;
        if new {
            let event = Event::about(order);
            transaction.execute(
                "INSERT INTO outbox (id, key, payload) VALUES (?1, ?2, ?3)",
                params![event.id, event.key, event.payload],
            )?;
        }
        transaction.commit()
    }
    // ANCHOR_END: place

    /// The first half of the mistake: the order alone. Whoever calls this publishes
    /// the event afterwards, if he lives so long.
    ///
    /// # Errors
    ///
    /// If the database cannot be written.
    pub fn place_without_event(
        &mut self,
        order: &OrderPlaced,
    ) -> rusqlite::Result<()> {
        insert(&self.database, order).map(drop)
    }

    // ANCHOR: relay
    /// The events that have to be published, the oldest first.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn waiting(&self, limit: usize) -> rusqlite::Result<Vec<Event>> {
        let mut query = self.database.prepare_cached(
            "SELECT position, id, key, payload FROM outbox ORDER BY position LIMIT ?1",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = query.query_map(params![limit], |row| {
            Ok(Event {
                position: row.get(0)?,
                id: row.get(1)?,
                key: row.get(2)?,
                payload: row.get(3)?,
            })
        })?;
        rows.collect()
    }

    /// After the broker has said that it has the event, and not before.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then the event is published again.
    pub fn cross_off(&mut self, event: &Event) -> rusqlite::Result<()> {
        let delete = "DELETE FROM outbox WHERE position = ?1";
        self.database.execute(delete, params![event.position])?;
        Ok(())
    }
    // ANCHOR_END: relay
}

/// Whether the order is new.
fn insert(database: &Connection, order: &OrderPlaced) -> rusqlite::Result<bool> {
    let rows = database.execute(
        "INSERT INTO orders (id, customer, total) VALUES (?1, ?2, ?3)
         ON CONFLICT DO NOTHING",
        params![order.order, order.customer, order.total],
    )?;
    Ok(rows == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shop() -> Shop {
        Shop::open(Path::new(":memory:")).expect("a database in memory")
    }

    fn ids(shop: &Shop) -> Vec<String> {
        let waiting = shop.waiting(10).expect("a list");
        waiting.into_iter().map(|event| event.id).collect()
    }

    #[test]
    fn an_order_comes_with_one_event_in_its_order() {
        let mut shop = shop();
        for number in [2, 1, 2, 3] {
            shop.place(&order(number)).expect("a write");
        }
        assert_eq!(
            ids(&shop),
            ["order-2.placed", "order-1.placed", "order-3.placed"]
        );
        let first = shop.waiting(1).expect("a list").remove(0);
        let told: OrderPlaced =
            serde_json::from_slice(&first.payload).expect("JSON");
        assert_eq!(told, order(2));

        shop.cross_off(&first).expect("a write");
        assert_eq!(ids(&shop), ["order-1.placed", "order-3.placed"]);
        // Crossed off is not forgotten: placed again, it is not told again.
        shop.place(&order(2)).expect("a write");
        assert_eq!(ids(&shop), ["order-1.placed", "order-3.placed"]);
    }

    #[test]
    fn what_cannot_have_its_event_is_not_placed() {
        let mut shop = shop();
        let taken = "INSERT INTO outbox (id, key, payload) VALUES (?1, '', x'')";
        shop.database
            .execute(taken, ["order-7.placed"])
            .expect("a write");
        shop.place(&order(7))
            .expect_err("its event is there already");
        let count = "SELECT count(*) FROM orders";
        let orders: i64 = shop
            .database
            .query_row(count, [], |row| row.get(0))
            .expect("a count");
        assert_eq!(orders, 0);
    }
}
