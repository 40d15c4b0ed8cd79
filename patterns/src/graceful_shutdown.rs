//! Graceful shutdown: what may be committed while several mails are on their way, and
//! the mail server that they go to.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::sleep,
};

/// The mails of the example.
#[must_use]
pub fn mail(number: u64) -> String {
    format!("mail-{number}")
}

/// What a message holds, as the one line that the mail server gets: whatever is in it,
/// it does not end the line.
#[must_use]
pub fn line(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).escape_debug().to_string()
}

// ---- What is done, and up to where -----------------------------------------

// ANCHOR: progress
/// Up to where each partition is done. A commit of Kafka says "all before this one",
/// so with several mails at a time it has to stop at the first that is not sent, also
/// when those behind it are.
#[derive(Debug, Default)]
pub struct Progress {
    partitions: HashMap<i32, Partition>,
}

#[derive(Debug, Default)]
struct Partition {
    /// Begun and not done.
    open: BTreeSet<i64>,
    /// The highest that was begun.
    last: i64,
}

impl Progress {
    /// A mail is being sent.
    pub fn begin(&mut self, partition: i32, offset: i64) {
        let partition = self.partitions.entry(partition).or_default();
        partition.open.insert(offset);
        partition.last = offset;
    }

    /// A mail is sent. Returns the offset of the last mail before the first that is
    /// not; there may be none yet, and then it is that of a mail before all of these,
    /// which changes nothing.
    pub fn done(&mut self, partition: i32, offset: i64) -> i64 {
        let partition = self.partitions.entry(partition).or_default();
        partition.open.remove(&offset);
        let first_open = partition.open.first();
        first_open.map_or(partition.last, |first| first - 1)
    }
}
// ANCHOR_END: progress

// ---- The mail server -------------------------------------------------------

// ANCHOR: send
/// Hands a mail to the mail server and waits for its answer. Who is stopped in
/// between does not know whether it will be delivered.
///
/// # Errors
///
/// If the server is not there, or ends the connection without an answer.
pub async fn send(server: &str, mail: &str) -> io::Result<()> {
    let mut connection = BufReader::new(TcpStream::connect(server).await?);
    connection.write_all(format!("{mail}\n").as_bytes()).await?;
    let mut answer = String::new();
    connection.read_line(&mut answer).await?;
    if answer == SENT {
        Ok(())
    } else {
        Err(io::Error::other(format!("it does not take it: {answer:?}")))
    }
}
// ANCHOR_END: send

const SENT: &str = "250 sent\n";

/// Whom the mail server lets wait for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    Everybody,
    /// This mail only.
    One(String),
    Nobody,
}

/// A mail server: no more of it than the example needs. It delivers what it is
/// handed, however often, as mail servers do.
pub struct MailServer {
    address: String,
    mails: watch::Receiver<Vec<String>>,
    hold: watch::Sender<Hold>,
}

impl MailServer {
    /// Listens at this address, of which the port may be 0, and answers each mail
    /// after so long a time, unless it is held.
    ///
    /// # Errors
    ///
    /// If nobody can listen there.
    pub async fn start(
        address: &str,
        takes: Duration,
        hold: Hold,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?.to_string();
        let (mails_in, mails) = watch::channel(Vec::new());
        let (hold, held) = watch::channel(hold);
        tokio::spawn(async move {
            while let Ok((connection, _peer)) = listener.accept().await {
                let (mails, held) = (mails_in.clone(), held.clone());
                tokio::spawn(async move {
                    // A client that has gone away is none of its concern.
                    let _result = serve(connection, takes, &mails, held).await;
                });
            }
        });
        Ok(Self {
            address,
            mails,
            hold,
        })
    }

    /// Where it listens, as `host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whom to let wait from now on.
    pub fn hold(&self, hold: Hold) {
        self.hold.send_replace(hold);
    }

    /// All mails so far, in the order in which they came.
    #[must_use]
    pub fn mails(&self) -> Vec<String> {
        self.mails.borrow().clone()
    }

    /// Waits until what came so far is enough.
    ///
    /// # Errors
    ///
    /// If the server has ended.
    pub async fn until(
        &self,
        mut enough: impl FnMut(&[String]) -> bool,
    ) -> io::Result<()> {
        let mut mails = self.mails.clone();
        let came = mails.wait_for(|mails| enough(mails)).await;
        came.map(|_mails| ()).map_err(io::Error::other)
    }
}

async fn serve(
    connection: TcpStream,
    takes: Duration,
    mails: &watch::Sender<Vec<String>>,
    mut held: watch::Receiver<Hold>,
) -> io::Result<()> {
    let mut connection = BufReader::new(connection);
    let mut mail = String::new();
    connection.read_line(&mut mail).await?;
    let mail = mail.trim_end().to_owned();
    mails.send_modify(|mails| mails.push(mail.clone()));
    let answered = |hold: &Hold| match hold {
        Hold::Everybody => false,
        Hold::One(one) => *one != mail,
        Hold::Nobody => true,
    };
    held.wait_for(answered).await.map_err(io::Error::other)?;
    sleep(takes).await;
    connection.write_all(SENT.as_bytes()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_committed_beyond_the_first_that_is_open() {
        let mut progress = Progress::default();
        for offset in 5..9 {
            progress.begin(0, offset);
        }
        progress.begin(1, 70);
        assert_eq!(progress.done(0, 7), 4, "5 and 6 are open");
        assert_eq!(progress.done(0, 5), 5, "6 is open");
        assert_eq!(progress.done(0, 6), 7, "8 is open");
        assert_eq!(progress.done(0, 8), 8);
        assert_eq!(progress.done(1, 70), 70, "a partition of its own");
    }

    #[test]
    fn a_mail_is_one_line_whatever_is_in_it() {
        assert_eq!(line(b"mail-7"), "mail-7");
        assert_eq!(line(b"mail-7\r\n250 sent\n\xff").lines().count(), 1);
    }

    #[tokio::test]
    async fn a_mail_that_is_held_has_come_and_has_no_answer() {
        let hold = Hold::One("mail-1".to_owned());
        let server = MailServer::start("127.0.0.1:0", Duration::ZERO, hold);
        let server = server.await.expect("a free port");
        let address = server.address().to_owned();
        let held = tokio::spawn(async move { send(&address, "mail-1").await });
        send(server.address(), "mail-2").await.expect("an answer");
        let both = server.until(|mails| mails.len() == 2).await;
        both.expect("both have come");
        assert!(!held.is_finished());
        server.hold(Hold::Nobody);
        held.await.expect("no panic").expect("an answer");
    }
}
