//! The tables of the aggregator: each order with the answers that it has, and what
//! has to be sent.

use std::{fmt, path::Path, time::Duration};

use rusqlite::{
    Connection, OptionalExtension as _, Transaction, TransactionBehavior, params,
};

use super::{
    Answer, End, Gathering, Label, News, Report, Rule, Verdict, Word, json,
};

/// So long after it was sent, in milliseconds, the reminder of an order that is still
/// open is sent once more. It is not lost, unless somebody empties the queue.
const REMIND_AGAIN: i64 = 60_000;

/// How many orders are reminded of in one transaction.
const BATCH: u32 = 100;

/// What the aggregator made of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It is in the tables, or was before.
    Noted(Entry),
    /// Nothing is changed: the message cannot be read or contradicts what is known.
    /// With the reason, for people.
    SetAside(String),
}

/// A line about an order, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub order: String,
    /// What has happened.
    pub what: String,
    /// How far the order is after it.
    pub state: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { order, what, state } = self;
        write!(formatter, "{order:<10} {what:<26} {state}")
    }
}

/// Where a message in the outbox goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// To whoever wants to know what became of the order.
    Results,
    /// To the aggregator itself: a reminder.
    Answers,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Results => "results",
            Self::Answers => "answers",
        }
    }
}

/// A message in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    /// Its place, which is the order of the transactions.
    pub position: i64,
    pub to: Place,
    pub label: Label,
    pub payload: Vec<u8>,
}

/// The database of the aggregator.
pub struct Orders {
    database: Connection,
    rule: Rule,
}

impl Orders {
    /// Opens the database, and makes it where there is none. `:memory:` is one that
    /// is gone with the program.
    ///
    /// # Errors
    ///
    /// If the file is no such database or cannot be written.
    pub fn open(file: &Path, rule: Rule) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        // WAL: others look at it meanwhile. FULL: what is committed outlives a power
        // cut as well.
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS orders (
                 id TEXT PRIMARY KEY,
                 total INTEGER NOT NULL,
                 until INTEGER NOT NULL,
                 remind INTEGER,
                 heard INTEGER NOT NULL,
                 end TEXT
             ) STRICT;
             CREATE INDEX IF NOT EXISTS orders_by_remind ON orders (remind)
                 WHERE remind IS NOT NULL;
             CREATE TABLE IF NOT EXISTS lines (
                 id TEXT NOT NULL,
                 line INTEGER NOT NULL,
                 answer TEXT NOT NULL,
                 PRIMARY KEY (id, line)
             ) STRICT;
             CREATE TABLE IF NOT EXISTS outbox (
                 position INTEGER PRIMARY KEY AUTOINCREMENT,
                 place TEXT NOT NULL,
                 id TEXT NOT NULL,
                 payload BLOB NOT NULL
             ) STRICT;",
        )?;
        Ok(Self { database, rule })
    }

    // ANCHOR: take
    /// Takes what has come. That a line has its answer, that the order has ended, and
    /// the result that has to be sent are written together, wherever the program
    /// ends. What is known already changes nothing.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed, and the message
    /// must not be acknowledged.
    pub fn take(
        &mut self,
        label: Result<Label, String>,
        payload: &[u8],
    ) -> rusqlite::Result<Taken> {
        let read = label.and_then(|label| {
            let news = News::read(&label, payload)?;
            Ok((label, news))
        });
        let (label, news) = match read {
            Ok(read) => read,
            Err(reason) => return Ok(Taken::SetAside(reason)),
        };
        let rule = self.rule;
        // One that may write from its beginning on: one that reads first and then
        // writes is refused if another program has written in between.
        let transaction = self
            .database
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (mut gathering, new) = match gathering(&transaction, &label.order)? {
            Some(known) => (known, false),
            None if news == News::Over => return Ok(unknown(label)),
            None => {
                open(&transaction, &label)?;
                (Gathering::new(label.total), true)
            }
        };
        let verdict = gathering.verdict(&label, news, rule);
        if let Verdict::Count | Verdict::Close(_) = verdict
            && let News::Line(line, answer) = news
        {
            count(&transaction, &label.order, line, answer)?;
            gathering.lines.insert(line, answer);
            gathering.heard += 1;
        }
        if let Verdict::Close(end) = verdict {
            gathering.end = Some(end);
            close(&transaction, &gathering.report(&label.order), end)?;
        }
        transaction.commit()?;
        Ok(said(&label, news, &verdict, new, &gathering))
    }
    // ANCHOR_END: take

    // ANCHOR: remind
    /// Puts a reminder into the outbox for each order whose deadline has passed. It
    /// goes through the queue of the answers, behind all that are there: what the
    /// broker had at the deadline is in time, however far behind this program is.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then nothing is changed.
    pub fn remind(&mut self, now: i64) -> rusqlite::Result<()> {
        let transaction = self
            .database
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        for id in late(&transaction, now)? {
            transaction.execute(
                "INSERT INTO outbox (place, id, payload) VALUES (?1, ?2, ?3)",
                params![Place::Answers.name(), id, Word::Over.to_json()],
            )?;
            transaction.execute(
                "UPDATE orders SET remind = ?1 WHERE id = ?2",
                params![now.saturating_add(REMIND_AGAIN), id],
            )?;
        }
        transaction.commit()
    }
    // ANCHOR_END: remind

    /// How long it is from this moment to the next deadline; for ever if no order is
    /// open.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn wait(&self, now: i64) -> rusqlite::Result<Duration> {
        let first = "SELECT min(remind) FROM orders WHERE remind IS NOT NULL";
        let first: Option<i64> =
            self.database.query_row(first, (), |row| row.get(0))?;
        Ok(first.map_or(Duration::MAX, |first| {
            let milliseconds = first.saturating_sub(now);
            Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))
        }))
    }

    /// What has to be sent, the oldest first.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn waiting(&self, limit: u32) -> rusqlite::Result<Vec<Post>> {
        let mut query = self.database.prepare_cached(
            "SELECT position, place, id, total, until, payload
             FROM outbox JOIN orders USING (id) ORDER BY position LIMIT ?1",
        )?;
        let rows = query.query_map([limit], |row| {
            let to = match row.get::<_, String>(1)?.as_str() {
                "results" => Place::Results,
                _ => Place::Answers,
            };
            Ok(Post {
                position: row.get(0)?,
                to,
                label: Label {
                    order: row.get(2)?,
                    line: None,
                    total: row.get(3)?,
                    until: row.get(4)?,
                },
                payload: row.get(5)?,
            })
        })?;
        rows.collect()
    }

    /// After the broker has said that it has the message, and not before.
    ///
    /// # Errors
    ///
    /// If the database cannot be written. Then the message is sent again.
    pub fn cross_off(&mut self, post: &Post) -> rusqlite::Result<()> {
        let delete = "DELETE FROM outbox WHERE position = ?1";
        self.database.execute(delete, [post.position])?;
        Ok(())
    }

    /// All orders, as they were opened.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn all(&self) -> rusqlite::Result<Vec<Report>> {
        let mut query = self
            .database
            .prepare("SELECT id FROM orders ORDER BY rowid")?;
        let ids = query.query_map((), |row| row.get(0))?;
        let ids: Vec<String> = ids.collect::<Result<_, _>>()?;
        let report = |id: &String| {
            let gathering = gathering(&self.database, id)?;
            Ok(gathering.map(|gathering| gathering.report(id)))
        };
        ids.iter().filter_map(|id| report(id).transpose()).collect()
    }
}

fn gathering(
    database: &Connection,
    order: &str,
) -> rusqlite::Result<Option<Gathering>> {
    let select = "SELECT total, heard, end FROM orders WHERE id = ?1";
    let row = database.query_row(select, [order], |row| {
        let end: Option<String> = row.get(2)?;
        Ok(Gathering {
            total: row.get(0)?,
            heard: row.get(1)?,
            end: end.map(|end| match end.as_str() {
                "complete" => End::Complete,
                _ => End::Timeout,
            }),
            ..Gathering::new(0)
        })
    });
    let Some(mut gathering) = row.optional()? else {
        return Ok(None);
    };
    let mut query =
        database.prepare_cached("SELECT line, answer FROM lines WHERE id = ?1")?;
    let lines = query.query_map([order], |row| {
        let answer = match row.get::<_, String>(1)?.as_str() {
            "reserved" => Answer::Reserved,
            _ => Answer::SoldOut,
        };
        Ok((row.get(0)?, answer))
    })?;
    gathering.lines = lines.collect::<Result<_, _>>()?;
    Ok(Some(gathering))
}

/// By the first message about it, whichever that is. Its deadline is a row and not a
/// timer.
fn open(transaction: &Transaction<'_>, label: &Label) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO orders (id, total, until, remind, heard)
         VALUES (?1, ?2, ?3, ?3, 0)",
        params![label.order, label.total, label.until],
    )?;
    Ok(())
}

fn count(
    transaction: &Transaction<'_>,
    order: &str,
    line: u32,
    answer: Answer,
) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO lines (id, line, answer) VALUES (?1, ?2, ?3)
         ON CONFLICT DO NOTHING",
        params![order, line, answer.to_string()],
    )?;
    transaction
        .execute("UPDATE orders SET heard = heard + 1 WHERE id = ?1", [order])?;
    Ok(())
}

// ANCHOR: close
/// The end of an order and its result, which is sent afterwards.
fn close(
    transaction: &Transaction<'_>,
    report: &Report,
    end: End,
) -> rusqlite::Result<()> {
    let name = match end {
        End::Complete => "complete",
        End::Timeout => "timeout",
    };
    transaction.execute(
        "UPDATE orders SET end = ?1, remind = NULL WHERE id = ?2",
        params![name, report.order],
    )?;
    transaction.execute(
        "INSERT INTO outbox (place, id, payload) VALUES (?1, ?2, ?3)",
        params![Place::Results.name(), report.order, json(report)],
    )?;
    Ok(())
}
// ANCHOR_END: close

fn late(transaction: &Transaction<'_>, now: i64) -> rusqlite::Result<Vec<String>> {
    let mut query = transaction.prepare_cached(
        "SELECT id FROM orders WHERE remind <= ?1 ORDER BY remind LIMIT ?2",
    )?;
    let rows = query.query_map(params![now, BATCH], |row| row.get(0))?;
    rows.collect()
}

/// A reminder of an order that is in no table.
fn unknown(label: Label) -> Taken {
    Taken::Noted(Entry {
        order: label.order,
        what: "deadline".to_owned(),
        state: "unknown".to_owned(),
    })
}

fn said(
    label: &Label,
    news: News,
    verdict: &Verdict,
    new: bool,
    gathering: &Gathering,
) -> Taken {
    let what = match news {
        News::Opened => "opened".to_owned(),
        News::Line(line, answer) => format!("line {line}: {answer}"),
        News::Over => "deadline".to_owned(),
    };
    let then = match verdict {
        Verdict::Contradiction(reason) => return Taken::SetAside(reason.clone()),
        Verdict::Again if !new => ", again",
        Verdict::Late => ", too late",
        Verdict::Again | Verdict::Count | Verdict::Close(_) => "",
    };
    let report = gathering.report(&label.order);
    let state = match (gathering.end, verdict) {
        (_, Verdict::Close(_)) => report.to_string(),
        (Some(_), _) => report.end().to_owned(),
        (None, _) => format!("{} of {}", gathering.heard, gathering.total),
    };
    Taken::Noted(Entry {
        order: label.order.clone(),
        what: format!("{what}{then}"),
        state,
    })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{basket, split, work},
        *,
    };

    const UNTIL: i64 = 1_000;

    fn orders(rule: Rule) -> Orders {
        Orders::open(Path::new(":memory:"), rule).expect("a database in memory")
    }

    /// What is said of an order if all goes well: that it is opened, and an answer
    /// for each line.
    fn messages(number: u64) -> Vec<(Label, Vec<u8>)> {
        let split = split(&json(&basket(number, UNTIL))).expect("an order");
        let answered = split.lines.into_iter().map(|(label, payload)| {
            let (label, answer) = work(Ok(label), &payload).expect("a line");
            (label, Word::Answered(answer).to_json())
        });
        [split.opened].into_iter().chain(answered).collect()
    }

    fn take(orders: &mut Orders, message: &(Label, Vec<u8>)) -> String {
        let (label, payload) = message.clone();
        let taken = orders.take(Ok(label), &payload).expect("a write");
        match taken {
            Taken::Noted(entry) => format!("{}; {}", entry.what, entry.state),
            Taken::SetAside(reason) => format!("aside: {reason}"),
        }
    }

    /// Takes the reminders out of the outbox and back into the table.
    fn remind(orders: &mut Orders, now: i64) -> Vec<String> {
        orders.remind(now).expect("a write");
        let mut said = Vec::new();
        for post in orders.waiting(100).expect("a list") {
            if post.to == Place::Answers {
                orders.cross_off(&post).expect("a write");
                said.push(take(orders, &(post.label, post.payload)));
            }
        }
        said
    }

    fn results(orders: &Orders) -> Vec<Report> {
        let waiting = orders.waiting(100).expect("a list").into_iter();
        let results = waiting.filter(|post| post.to == Place::Results);
        let read = |it: Post| serde_json::from_slice(&it.payload).expect("JSON");
        results.map(read).collect()
    }

    #[test]
    fn the_last_line_comes_with_one_result_and_a_repeated_one_with_none() {
        let mut orders = orders(Rule::EachLineAnswered);
        let [opened, one, two, three] = &messages(1)[..] else {
            panic!("an order of three lines");
        };
        for (message, line) in [
            (opened, "opened; 0 of 3"),
            (three, "line 3: reserved; 1 of 3"),
            (three, "line 3: reserved, again; 1 of 3"),
            (one, "line 1: reserved; 2 of 3"),
            (opened, "opened, again; 2 of 3"),
            (two, "line 2: reserved; complete, reserved: 1 2 3"),
            (two, "line 2: reserved, again; complete"),
            (one, "line 1: reserved, again; complete"),
        ] {
            assert_eq!(take(&mut orders, message), line);
        }
        let results = results(&orders);
        assert_eq!(results.len(), 1);
        assert_eq!(results, orders.all().expect("a list"));
        assert_eq!(orders.wait(0).expect("a look"), Duration::MAX);
        assert_eq!(remind(&mut orders, i64::MAX), [""; 0]);
    }

    #[test]
    fn the_first_that_is_heard_opens_an_order_whichever_it_is() {
        let mut orders = orders(Rule::EachLineAnswered);
        let messages = messages(3);
        let said = take(&mut orders, &messages[2]);
        assert_eq!(said, "line 2: sold out; 1 of 4");
        let wait = orders.wait(UNTIL - 30).expect("a look");
        assert_eq!(wait, Duration::from_millis(30));
        assert_eq!(take(&mut orders, &messages[0]), "opened, again; 1 of 4");
    }

    #[test]
    fn the_deadline_makes_one_result_that_names_what_is_missing() {
        let mut orders = orders(Rule::EachLineAnswered);
        let messages = messages(3);
        for message in &messages[..3] {
            take(&mut orders, message);
        }
        assert_eq!(remind(&mut orders, UNTIL - 1), [""; 0]);
        let end = "deadline; timeout, reserved: 1, sold out: 2, missing: 3 4";
        assert_eq!(remind(&mut orders, UNTIL), [end]);
        assert_eq!(remind(&mut orders, i64::MAX), [""; 0]);
        let late = take(&mut orders, &messages[3]);
        assert_eq!(late, "line 3: reserved, too late; timeout");
        let late = take(&mut orders, &messages[4]);
        assert_eq!(late, "line 4: reserved, too late; timeout");
        let results = results(&orders);
        assert_eq!(results.len(), 1);
        assert_eq!(results[0].missing, [3, 4]);
        assert_eq!(results, orders.all().expect("a list"));
    }

    /// What is in the queue ahead of it is in time.
    #[test]
    fn a_reminder_ends_nothing_before_it_comes_and_is_not_sent_at_each_look() {
        let mut orders = orders(Rule::EachLineAnswered);
        let messages = messages(2);
        take(&mut orders, &messages[0]);
        take(&mut orders, &messages[1]);
        for now in [UNTIL, UNTIL + REMIND_AGAIN - 1] {
            orders.remind(now).expect("a write");
            assert_eq!(orders.waiting(100).expect("a list").len(), 1);
        }
        orders.remind(UNTIL + REMIND_AGAIN).expect("a write");
        let reminders = orders.waiting(100).expect("a list");
        assert_eq!(reminders.len(), 2);
        let said = take(&mut orders, &messages[2]);
        assert_eq!(said, "line 2: reserved; complete, reserved: 1 2");
        for post in reminders {
            let over = (post.label, post.payload);
            assert_eq!(take(&mut orders, &over), "deadline, again; complete");
        }
        assert_eq!(results(&orders).len(), 1);
    }

    #[test]
    fn what_contradicts_or_cannot_be_read_changes_nothing() {
        let mut orders = orders(Rule::EachLineAnswered);
        let messages = messages(1);
        take(&mut orders, &messages[0]);
        let mut other = messages[1].clone();
        other.0.total = 4;
        let said = take(&mut orders, &other);
        assert_eq!(said, "aside: 4 lines, and before it was 3");
        let noise = (messages[1].0.clone(), b"\xff".to_vec());
        let said = take(&mut orders, &noise);
        assert!(said.starts_with("aside: not an answer"), "{said}");
        let wrong = Err("line 4 of 3".to_owned());
        let taken = orders.take(wrong, &messages[1].1).expect("a write");
        assert_eq!(taken, Taken::SetAside("line 4 of 3".to_owned()));
        let over = (messages[0].0.clone(), Word::Over.to_json());
        let unknown = Label {
            order: "order-9".to_owned(),
            ..over.0
        };
        let said = take(&mut orders, &(unknown, over.1));
        assert_eq!(said, "deadline; unknown");
        let all = orders.all().expect("a list");
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].to_string(), "open, missing: 1 2 3");
    }

    #[test]
    fn what_cannot_have_its_result_is_not_counted() {
        let mut orders = orders(Rule::EachLineAnswered);
        let messages = messages(2);
        take(&mut orders, &messages[0]);
        take(&mut orders, &messages[1]);
        let outbox = "ALTER TABLE outbox RENAME TO away";
        orders.database.execute_batch(outbox).expect("a write");
        let (label, payload) = messages[2].clone();
        orders
            .take(Ok(label), &payload)
            .expect_err("there is no outbox");
        let all = orders.all().expect("a list");
        assert_eq!(all[0].to_string(), "open, reserved: 1, missing: 2");
        let outbox = "ALTER TABLE away RENAME TO outbox";
        orders.database.execute_batch(outbox).expect("a write");
        let said = take(&mut orders, &messages[2]);
        assert_eq!(said, "line 2: reserved; complete, reserved: 1 2");
    }

    #[test]
    fn who_counts_answers_calls_an_order_complete_that_is_not() {
        let mut orders = orders(Rule::EnoughAnswers);
        let messages = messages(2);
        take(&mut orders, &messages[0]);
        take(&mut orders, &messages[1]);
        let said = take(&mut orders, &messages[1]);
        assert_eq!(said, "line 1: reserved; complete, reserved: 1, missing: 2");
    }

    #[test]
    fn state_and_deadline_are_in_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("orders.db");
        let rule = Rule::EachLineAnswered;
        let messages = messages(1);
        let mut first = Orders::open(&file, rule).expect("a database");
        take(&mut first, &messages[0]);
        take(&mut first, &messages[2]);
        drop(first);
        let mut second = Orders::open(&file, rule).expect("a database");
        let wait = second.wait(UNTIL - 7).expect("a look");
        assert_eq!(wait, Duration::from_millis(7));
        let end = "deadline; timeout, reserved: 2, missing: 1 3";
        assert_eq!(remind(&mut second, UNTIL), [end]);
        drop(second);
        let third = Orders::open(&file, rule).expect("a database");
        assert_eq!(results(&third).len(), 1);
    }
}
