//! Circuit breaker: when a payment gateway may be called, and the gateway itself.

use std::{
    fmt, io, mem,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

// ---- The breaker -----------------------------------------------------------

/// So many calls in a row have to fail before it opens.
pub const FAILURES: u32 = 3;
/// How long it stays open before the first probe. Short, so that you can watch it;
/// beside a real gateway some ten seconds.
pub const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Twice as long after each probe that fails, and not longer than this, unless the first
/// wait is.
pub const LONGEST_WAIT: Duration = Duration::from_secs(2);

// ANCHOR: breaker
/// Whether the gateway may be called. It knows no clock: whoever asks brings the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    /// How long it is open before the first probe.
    first_wait: Duration,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It may. So many of the last calls have failed, one after the other.
    Closed { failures: u32 },
    /// It may not, until then.
    Open { until: Instant, wait: Duration },
    /// One call is the probe, and decides.
    HalfOpen { wait: Duration },
}

impl Breaker {
    /// Closed, and nothing has failed.
    #[must_use]
    pub fn new(first_wait: Duration) -> Self {
        let state = State::Closed { failures: 0 };
        Self { first_wait, state }
    }

    /// After an answer, whatever it says: who refuses a card is there.
    #[must_use]
    pub fn succeeded(self) -> Self {
        Self::new(self.first_wait)
    }

    /// After a call that brought no answer.
    #[must_use]
    pub fn failed(self, now: Instant) -> Self {
        let open = |wait| State::Open {
            until: now + wait,
            wait,
        };
        let longest = LONGEST_WAIT.max(self.first_wait);
        let state = match self.state {
            State::Closed { failures } if failures + 1 < FAILURES => State::Closed {
                failures: failures + 1,
            },
            State::Closed { .. } => open(self.first_wait),
            State::HalfOpen { wait } => open(longest.min(wait * 2)),
            // A call that began before it opened. It is known already.
            State::Open { .. } => self.state,
        };
        Self { state, ..self }
    }

    /// At this time: what is open long enough is half-open.
    #[must_use]
    pub fn at(self, now: Instant) -> Self {
        match self.state {
            State::Open { until, wait } if until <= now => Self {
                state: State::HalfOpen { wait },
                ..self
            },
            _ => self,
        }
    }
}
// ANCHOR_END: breaker

impl Breaker {
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// When the probe is due, if it is open.
    #[must_use]
    pub fn probe_at(self) -> Option<Instant> {
        match self.state {
            State::Open { until, .. } => Some(until),
            State::Closed { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// Whether it is in another of its three states than this one. A failure more is
    /// none.
    #[must_use]
    pub fn turned(self, other: Self) -> bool {
        mem::discriminant(&self.state) != mem::discriminant(&other.state)
    }
}

impl fmt::Display for Breaker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state {
            State::Closed { .. } => formatter.write_str("closed"),
            State::Open { wait, .. } => {
                write!(formatter, "open, a probe in {} ms", wait.as_millis())
            }
            State::HalfOpen { .. } => formatter.write_str("half-open, one probe"),
        }
    }
}

// ---- Payments --------------------------------------------------------------

/// A card that has to be charged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payment {
    /// The gateway charges once for each id.
    pub id: String,
    pub customer: String,
    /// In cents.
    pub amount: i64,
}

/// Above it the gateway declines, in cents.
pub const LIMIT: i64 = 100_000;

/// The payments of the example: ten customers in turns, each payment of as many euros
/// as its number. From 1001 on the gateway declines.
#[must_use]
pub fn payment(number: u64) -> Payment {
    Payment {
        id: format!("payment-{number}"),
        customer: format!("customer-{}", number % 10),
        amount: i64::try_from(number)
            .unwrap_or(i64::MAX)
            .saturating_mul(100),
    }
}

/// Reads a payment.
///
/// # Errors
///
/// If the bytes are none, or its id cannot be told to the gateway.
pub fn decode(payload: &[u8]) -> Result<Payment, String> {
    let payment: Payment =
        serde_json::from_slice(payload).map_err(|error| error.to_string())?;
    let id = &payment.id;
    if id.is_empty() || id.len() > 100 || !id.chars().all(|it| it.is_ascii_graphic())
    {
        return Err("its id is no word".to_owned());
    }
    Ok(payment)
}

// ---- The call --------------------------------------------------------------

/// How long a call may take. Without a limit a gateway that hangs would hold the
/// worker, and no breaker would ever hear of a failure.
pub const CALL: Duration = Duration::from_secs(1);

/// What the gateway says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Charged,
    /// An earlier call with this id has charged the card.
    Known,
    /// To ask again would change nothing.
    Declined,
}

impl fmt::Display for Answer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Charged => "charged",
            Self::Known => "charged before",
            Self::Declined => "declined",
        })
    }
}

/// Why there is no answer. It is about the gateway, and not about the payment.
#[derive(Debug)]
pub enum Outage {
    /// Nobody there, or gone in the middle.
    Lost(io::ErrorKind),
    /// Nothing within [`CALL`]. The card may be charged all the same.
    Silent,
    /// It says itself that it cannot.
    Says(String),
}

impl fmt::Display for Outage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(kind) => write!(formatter, "{kind}"),
            Self::Silent => write!(formatter, "no answer within {CALL:?}"),
            Self::Says(line) => write!(formatter, "{}", line.escape_debug()),
        }
    }
}

// ANCHOR: charge
/// Has the gateway at this address charge a card.
///
/// # Errors
///
/// If there is no answer that is about the payment.
pub async fn charge(gateway: &str, payment: &Payment) -> Result<Answer, Outage> {
    let call = async {
        let mut connection = BufReader::new(TcpStream::connect(gateway).await?);
        let line = format!("charge {} {}\n", payment.id, payment.amount);
        connection.write_all(line.as_bytes()).await?;
        let mut answer = String::new();
        connection.take(LINE).read_line(&mut answer).await?;
        Ok(answer)
    };
    let answer: io::Result<String> =
        timeout(CALL, call).await.map_err(|_| Outage::Silent)?;
    let answer = answer.map_err(|error| Outage::Lost(error.kind()))?;
    match answer.trim_end() {
        "" => Err(Outage::Lost(io::ErrorKind::UnexpectedEof)),
        CHARGED => Ok(Answer::Charged),
        KNOWN => Ok(Answer::Known),
        DECLINED => Ok(Answer::Declined),
        other => Err(Outage::Says(other.to_owned())),
    }
}
// ANCHOR_END: charge

const CHARGED: &str = "200 charged";
const KNOWN: &str = "200 known";
const DECLINED: &str = "402 declined";
const DOWN: &str = "503 out of order";
const WRONG: &str = "400 charge <id> <cents>";
/// No line is longer, in bytes.
const LINE: u64 = 200;

// ---- The gateway -----------------------------------------------------------

/// What the gateway was asked and whom it has charged. It outlives the gateway.
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
        database.execute_batch(
            "PRAGMA journal_mode = WAL;
             PRAGMA synchronous = NORMAL;
             CREATE TABLE IF NOT EXISTS charges (
                 payment TEXT PRIMARY KEY,
                 amount INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE IF NOT EXISTS calls (
                 number INTEGER PRIMARY KEY,
                 payment TEXT NOT NULL,
                 answer TEXT NOT NULL
             ) STRICT;",
        )?;
        Ok(Self { database })
    }

    // ANCHOR: ledger
    /// Charges once for each id, and notes the call with its answer, both or none.
    fn call(
        &mut self,
        payment: &str,
        amount: i64,
        down: bool,
    ) -> rusqlite::Result<&'static str> {
        let transaction = self.database.transaction()?;
        let answer = if down {
            DOWN
        } else if amount > LIMIT {
            DECLINED
        } else {
            let new = transaction.execute(
                "INSERT INTO charges (payment, amount) VALUES (?1, ?2)
                 ON CONFLICT DO NOTHING",
                params![payment, amount],
            )?;
            if new == 1 { CHARGED } else { KNOWN }
        };
        transaction.execute(
            "INSERT INTO calls (payment, answer) VALUES (?1, ?2)",
            params![payment, answer],
        )?;
        transaction.commit()?;
        Ok(answer)
    }
    // ANCHOR_END: ledger

    /// How often the gateway was called.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn calls(&self) -> rusqlite::Result<u32> {
        let count = "SELECT count(*) FROM calls";
        self.database.query_row(count, [], |row| row.get(0))
    }

    /// The payments for which a card was charged, in this order; one that was charged
    /// twice would be there twice.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn charged(&self) -> rusqlite::Result<Vec<String>> {
        let list = "SELECT payment FROM calls WHERE answer = ?1 ORDER BY number";
        let mut list = self.database.prepare(list)?;
        let rows = list.query_map(params![CHARGED], |row| row.get(0))?;
        rows.collect()
    }
}

/// A payment gateway: no more of it than the example needs.
pub struct Gateway {
    address: String,
    calls: watch::Receiver<Vec<String>>,
}

impl Gateway {
    /// Listens at this address, of which the port may be 0. The calls whose numbers
    /// are in `down`, counted from 0, it answers with 503.
    ///
    /// # Errors
    ///
    /// If nobody can listen there.
    pub async fn start(
        address: &str,
        ledger: Ledger,
        down: Range<u64>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?.to_string();
        let (told, calls) = watch::channel(Vec::new());
        let desk = Arc::new(Desk {
            ledger: Mutex::new((ledger, 0)),
            down,
            told,
        });
        tokio::spawn(async move {
            while let Ok((connection, _peer)) = listener.accept().await {
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    // A caller that has gone away is none of its concern.
                    let _result = desk.serve(connection).await;
                });
            }
        });
        Ok(Self { address, calls })
    }

    /// Where it listens, as `host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The calls so far, each as a line.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    /// Waits until there were so many calls.
    ///
    /// # Errors
    ///
    /// If the gateway has ended.
    pub async fn until(&self, count: usize) -> io::Result<()> {
        let mut calls = self.calls.clone();
        let came = calls.wait_for(|calls| calls.len() >= count).await;
        came.map(|_calls| ()).map_err(io::Error::other)
    }
}

struct Desk {
    /// With the number of the next call.
    ledger: Mutex<(Ledger, u64)>,
    down: Range<u64>,
    told: watch::Sender<Vec<String>>,
}

impl Desk {
    async fn serve(&self, connection: TcpStream) -> io::Result<()> {
        let mut connection = BufReader::new(connection);
        let mut line = String::new();
        (&mut connection).take(LINE).read_line(&mut line).await?;
        if line.is_empty() {
            // Opened and closed, and nothing asked.
            return Ok(());
        }
        let answer = self.answer(&line)?;
        connection.write_all(format!("{answer}\n").as_bytes()).await
    }

    fn answer(&self, line: &str) -> io::Result<&'static str> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["charge", payment, amount] = words[..] else {
            return Ok(WRONG);
        };
        let Ok(amount) = amount.parse() else {
            return Ok(WRONG);
        };
        // What a panic elsewhere has left of the ledger is still in its file.
        let mut desk = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let (ledger, number) = &mut *desk;
        let down = self.down.contains(number);
        *number += 1;
        let answer = ledger
            .call(payment, amount, down)
            .map_err(io::Error::other)?;
        self.told
            .send_modify(|calls| calls.push(format!("{payment}, {answer}")));
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(breaker: Breaker, times: u32, now: Instant) -> Breaker {
        (0..times).fold(breaker, |breaker, _time| breaker.failed(now))
    }

    fn wait(breaker: Breaker, now: Instant) -> Duration {
        breaker.probe_at().expect("it is open") - now
    }

    fn closed() -> Breaker {
        Breaker::new(FIRST_WAIT)
    }

    #[test]
    fn it_opens_after_three_failures_in_a_row() {
        let now = Instant::now();
        let two = failed(closed(), 2, now);
        // An answer in between, and it counts anew.
        let four = failed(two.succeeded(), 2, now);
        assert!(!closed().turned(four), "{four}");
        let open = four.failed(now);
        assert!(open.is_open() && open.turned(four), "{open}");
        assert_eq!(wait(open, now), FIRST_WAIT);
    }

    #[test]
    fn it_is_half_open_when_the_time_has_come_and_not_before() {
        let now = Instant::now();
        let open = failed(closed(), 3, now);
        let early = now + FIRST_WAIT - Duration::from_nanos(1);
        assert_eq!(open.at(early), open);
        let half = open.at(now + FIRST_WAIT);
        assert!(half.turned(open) && half.turned(closed()), "{half}");
        assert_eq!(half.probe_at(), None);
        assert_eq!(half.succeeded(), closed());
        assert_eq!(closed().at(now), closed());
    }

    #[test]
    fn one_failed_probe_opens_it_for_twice_as_long_up_to_a_limit() {
        let mut now = Instant::now();
        let mut breaker = failed(closed(), 3, now);
        let mut waits = Vec::new();
        for _probe in 0..4 {
            now += wait(breaker, now);
            breaker = breaker.at(now).failed(now);
            waits.push(wait(breaker, now).as_millis());
        }
        assert_eq!(waits, [1000, 2000, 2000, 2000]);
        // After an answer it begins with the first wait.
        let closed = breaker.at(now + LONGEST_WAIT).succeeded();
        assert_eq!(wait(failed(closed, 3, now), now), FIRST_WAIT);
    }

    #[test]
    fn a_long_first_wait_is_the_limit_itself() {
        let now = Instant::now();
        let first = LONGEST_WAIT * 5;
        let open = failed(Breaker::new(first), 3, now);
        assert_eq!(wait(open, now), first);
        let later = now + first;
        assert_eq!(wait(open.at(later).failed(later), later), first);
    }

    #[test]
    fn a_failure_that_comes_late_does_not_keep_it_open_for_longer() {
        let now = Instant::now();
        let open = failed(closed(), 3, now);
        assert_eq!(open.failed(now + FIRST_WAIT / 2), open);
    }

    #[test]
    fn an_id_that_would_end_the_line_is_none() {
        let json = |id| {
            let id = String::from(id);
            serde_json::to_vec(&Payment { id, ..payment(7) }).expect("JSON")
        };
        assert_eq!(decode(&json("payment-7")), Ok(payment(7)));
        for id in ["", "payment 7", "payment-7\ncharge payment-8"] {
            assert!(decode(&json(id)).is_err(), "{id:?}");
        }
    }

    #[tokio::test]
    async fn the_gateway_charges_once_and_counts_each_call() {
        let ledger = Ledger::open(Path::new(":memory:")).expect("a ledger");
        let gateway = Gateway::start("127.0.0.1:0", ledger, 1..2).await;
        let gateway = gateway.expect("a free port");
        let mut answers = Vec::new();
        for number in [1, 1, 1, 1001] {
            let answer = charge(gateway.address(), &payment(number)).await;
            answers.push(answer.map_err(|outage| outage.to_string()));
        }
        assert_eq!(
            answers,
            [
                Ok(Answer::Charged),
                Err(DOWN.to_owned()),
                Ok(Answer::Known),
                Ok(Answer::Declined)
            ]
        );
        assert_eq!(gateway.calls().len(), 4);
    }

    #[tokio::test]
    async fn a_gateway_that_hangs_and_one_that_ends_the_call_are_outages() {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let silent = charge(&address, &payment(1)).await;
        assert!(matches!(silent, Err(Outage::Silent)), "{silent:?}");
        drop(listener);
        let refused = charge(&address, &payment(1)).await;
        assert!(matches!(refused, Err(Outage::Lost(_))), "{refused:?}");
    }
}
