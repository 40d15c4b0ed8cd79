//! A worker that is told to stop finishes what it has begun, and nothing comes twice.
//! What the mail server was handed is counted by the mail server.

use std::{collections::HashSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use lab::broker::Broker;
use patterns::graceful_shutdown::{Hold, MailServer, mail, send};
use tests::{Example, observe, wait};
use tokio::{sync::Mutex, time::timeout};

use crate::common::{Pattern, Place, nowhere, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_graceful_shutdown_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_graceful_shutdown_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_graceful_shutdown_nats"),
    topics: &[("mails-outgoing", "mail-workers")],
    queues: &["mails.outgoing"],
    streams: &["MAILS_OUTGOING"],
};

/// How many mails a worker sends at the same time.
const AT_ONCE: usize = 4;

const OUTGOING: Place = Place {
    topic: "mails-outgoing",
    partitions: 4,
    group: "mail-workers",
    queue: "mails.outgoing",
    stream: "MAILS_OUTGOING",
};

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker with so many mails in its queue, and a mail server.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
    server: MailServer,
    mails: u64,
}

impl Shop {
    async fn open(
        broker: Broker,
        mails: u64,
        takes: Duration,
        hold: Hold,
    ) -> Result<Self> {
        let binary = PATTERN.binary(broker);
        let variable = PATTERN.fresh(broker).await?;
        let words = ["producer", "1", &mails.to_string()];
        let producer = Example::start(binary, &words, variable)?;
        producer.end().await?.succeeded()?;
        let server = MailServer::start("127.0.0.1:0", takes, hold).await?;
        Ok(Self {
            broker,
            binary,
            variable,
            server,
            mails,
        })
    }

    async fn worker(&self, words: &[&str]) -> Result<Example> {
        let words = [&["worker"], words].concat();
        let server = ("MAIL_SERVER", self.server.address());
        let variables = [self.variable, server];
        let mut worker = Example::start_with(self.binary, &words, &variables)?;
        worker.prints("ready:").await?;
        Ok(worker)
    }

    /// Waits until the mail server was handed so many, the same twice or not.
    async fn came(&self, count: usize) -> Result<()> {
        let came = self.server.until(|mails| mails.len() >= count);
        let in_time = timeout(wait::DEADLINE, came).await;
        in_time.with_context(|| {
            format!("{:?}: {:?}", self.broker, self.server.mails())
        })??;
        Ok(())
    }

    /// Waits until the mail server was handed each, and the broker has nothing left.
    async fn all_came(&self) -> Result<()> {
        let all: Vec<String> = (1..=self.mails).map(mail).collect();
        let came = self
            .server
            .until(|mails| all.iter().all(|mail| mails.contains(mail)));
        let in_time = timeout(wait::DEADLINE, came).await;
        in_time.with_context(|| {
            format!("{:?}: {:?}", self.broker, self.server.mails())
        })??;
        Ok(())
    }

    /// The mails that were handed over more than once.
    fn twice(&self) -> HashSet<String> {
        let mut seen = HashSet::new();
        let mails = self.server.mails().into_iter();
        mails.filter(|mail| !seen.insert(mail.clone())).collect()
    }

    /// How many mails the broker still has, when nobody holds any.
    async fn left(&self) -> Result<u64> {
        let address = self.variable.1;
        if self.broker == Broker::Nats {
            let stream = observe::nats::jetstream(address).await?;
            let stream = stream.get_stream("MAILS_OUTGOING").await?;
            let consumer = stream.get_consumer("mail-worker").await;
            let mut consumer: PullConsumer =
                consumer.map_err(anyhow::Error::from_boxed)?;
            let known = consumer.info().await?;
            ensure!(known.num_ack_pending == 0, "{known:?}");
            ensure!(known.num_redelivered == 0, "{known:?}");
        }
        OUTGOING.left(self.broker, address).await
    }

    async fn has_left(&self, count: u64) -> Result<()> {
        wait::until("what is left", async || {
            let left = self.left().await?;
            ensure!(left == count, "{:?}: {left}, not {count}", self.broker);
            Ok(())
        })
        .await
    }

    /// Tells a worker to stop, and returns how many it says that it has sent.
    async fn stop(&self, worker: Example) -> Result<u64> {
        worker.terminate().await?;
        let ended = worker.end().await?.succeeded()?;
        let stopped = ended.stdout.lines().last().unwrap_or_default();
        let sent: u64 = stopped
            .strip_prefix("stopped: sent ")
            .and_then(|rest| rest.split([',', ';']).next())
            .with_context(|| ended.stdout.clone())?
            .parse()?;
        ensure!(stopped.ends_with("given back 0"), "{stopped}");
        // RabbitMQ says it also of what was on its way from the queue to the channel
        // when the consumer was cancelled, and no worker has seen that.
        ensure!(
            self.broker != Broker::Nats || stopped.contains(", 0 of them delivered"),
            "{stopped}"
        );
        Ok(sent)
    }
}

#[tokio::test]
async fn the_stories_send_each_mail_once() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// Workers are replaced while there is work: the old one is told to stop, and the new
/// one starts while the old one still finishes.
#[tokio::test]
async fn a_rolling_deploy_sends_each_mail_once_and_gives_none_back() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let takes = Duration::from_millis(10);
        let shop = Shop::open(broker, 200, takes, Hold::Nobody).await?;
        let mut sent = 0;
        for round in 1..=4 {
            let worker = shop.worker(&[]).await?;
            shop.came(round * 30).await?;
            sent += shop.stop(worker).await?;
            // What it has acknowledged, the broker knows, and nothing else.
            shop.has_left(shop.mails - sent).await?;
        }
        let mut old = shop.worker(&[]).await?;
        shop.came(150).await?;
        shop.server.hold(Hold::Everybody);
        old.terminate().await?;
        old.prints("stop:").await?;
        let new = shop.worker(&[]).await?;
        shop.server.hold(Hold::Nobody);
        let old = old.end().await?.succeeded()?;
        ensure!(old.stdout.ends_with("given back 0\n"), "{}", old.stdout);
        shop.all_came().await?;
        shop.stop(new).await?;
        assert_eq!(shop.twice(), HashSet::new(), "{broker:?}");
        shop.has_left(0).await?;
        Ok(())
    })
    .await
}

/// Eight are delivered and four of them begun. Kafka and NATS hand out none that is
/// not begun.
#[tokio::test]
async fn what_rabbitmq_has_delivered_and_nobody_begun_is_finished() -> Result<()> {
    let _turn = TURN.lock().await;
    let rabbitmq = Broker::RabbitMq;
    let shop = Shop::open(rabbitmq, 12, Duration::ZERO, Hold::Everybody).await?;
    let mut worker = shop.worker(&[]).await?;
    shop.came(AT_ONCE).await?;
    shop.has_left(4).await?;
    worker.terminate().await?;
    worker.prints("stop:    4 being sent").await?;
    shop.server.hold(Hold::Nobody);
    let ended = worker.end().await?.succeeded()?;
    let stopped = ended.stdout.lines().last();
    let expected = "stopped: sent 8, 0 of them delivered before; given back 0";
    assert_eq!(stopped, Some(expected));
    shop.has_left(4).await?;
    let next = shop.worker(&[]).await?;
    shop.all_came().await?;
    assert_eq!(shop.stop(next).await?, 4);
    assert_eq!(shop.twice(), HashSet::new());
    shop.has_left(0).await
}

/// Ends a worker in the middle of four mails: the next one hands over exactly these
/// four again.
async fn ended_in_the_middle(
    broker: Broker,
    words: &[&str],
    end: impl AsyncFnOnce(Example) -> Result<()>,
) -> Result<()> {
    let shop = Shop::open(broker, 12, Duration::ZERO, Hold::Everybody).await?;
    let worker = shop.worker(words).await?;
    shop.came(AT_ONCE).await?;
    let in_the_middle: HashSet<String> = shop.server.mails().into_iter().collect();
    assert_eq!(in_the_middle.len(), AT_ONCE);
    end(worker).await?;
    shop.server.hold(Hold::Nobody);
    let next = shop.worker(&[]).await?;
    shop.all_came().await?;
    shop.came(12 + AT_ONCE).await?;
    next.terminate().await?;
    let next = next.end().await?.succeeded()?;
    ensure!(
        broker == Broker::Kafka || !next.stdout.contains(" 0 of them delivered"),
        "{}",
        next.stdout
    );
    assert_eq!(shop.twice(), in_the_middle, "{broker:?}");
    shop.has_left(0).await?;
    Ok(())
}

/// The control: nobody is told anything.
#[tokio::test]
async fn control_a_killed_workers_mails_are_sent_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        ended_in_the_middle(broker, &[], async |worker| worker.kill().await).await
    })
    .await
}

/// The control: told to stop, it stops.
#[tokio::test]
async fn control_without_draining_sigterm_sends_mails_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        ended_in_the_middle(broker, &["--no-drain"], async |worker| {
            worker.terminate().await?;
            let ended = worker.end().await?.succeeded()?;
            if broker == Broker::RabbitMq {
                ended.printed_what_the_book_shows("no-drain")?;
            }
            ensure!(
                ended.stdout.contains("in the middle of 4"),
                "{}",
                ended.stdout
            );
            Ok(())
        })
        .await
    })
    .await
}

#[tokio::test]
async fn a_second_signal_ends_the_worker_at_once() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        ended_in_the_middle(broker, &[], async |mut worker| {
            worker.terminate().await?;
            worker.prints("stop:").await?;
            worker.terminate().await?;
            let ended = worker.end().await?;
            assert_eq!(ended.status.code(), Some(130));
            ensure!(!ended.stdout.contains("stopped"), "{}", ended.stdout);
            Ok(())
        })
        .await
    })
    .await
}

#[tokio::test]
async fn what_the_deadline_cuts_off_is_given_back() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker, 1, Duration::ZERO, Hold::Everybody).await?;
        let worker = shop.worker(&["--deadline", "1"]).await?;
        shop.came(1).await?;
        worker.terminate().await?;
        let ended = worker.end().await?;
        ensure!(ended.status.success(), "{}", ended.status);
        if broker == Broker::RabbitMq {
            ended.printed_what_the_book_shows("deadline")?;
        }
        assert_eq!(ended.stderr, "given back: mail-1\n");
        // NATS offers it at once, and counts it as delivered until then.
        if broker != Broker::Nats {
            shop.has_left(1).await?;
        }

        shop.server.hold(Hold::Nobody);
        let next = shop.worker(&[]).await?;
        shop.came(2).await?;
        next.terminate().await?;
        let next = next.end().await?.succeeded()?;
        ensure!(next.stdout.contains("stopped: sent 1"), "{}", next.stdout);
        shop.has_left(0).await?;
        Ok(())
    })
    .await
}

/// The others are done, and only Kafka cannot be told so: what is behind the one in
/// its partition comes again with it.
#[tokio::test]
async fn behind_what_is_given_back_kafka_gives_back_all() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let hangs = Hold::One(mail(1));
        let shop = Shop::open(broker, 12, Duration::ZERO, hangs).await?;
        let worker = shop.worker(&["--deadline", "5"]).await?;
        shop.all_came().await?;
        worker.terminate().await?;
        let ended = worker.end().await?;
        ensure!(ended.status.success(), "{}", ended.status);
        assert_eq!(ended.stderr, "given back: mail-1\n");
        ensure!(ended.stdout.contains("sent 11"), "{}", ended.stdout);

        shop.server.hold(Hold::Nobody);
        let next = shop.worker(&[]).await?;
        // Twelve mails in turns for four partitions.
        let again: HashSet<String> = match broker {
            Broker::Kafka => [1, 5, 9].map(mail).into(),
            Broker::RabbitMq | Broker::Nats => [mail(1)].into(),
        };
        shop.came(12 + again.len()).await?;
        next.terminate().await?;
        next.end().await?.succeeded()?;
        assert_eq!(shop.twice(), again, "{broker:?}");
        shop.has_left(0).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn without_a_mail_server_it_gives_back_and_says_so() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker, 3, Duration::ZERO, Hold::Nobody).await?;
        let variables = [shop.variable, ("MAIL_SERVER", "localhost:1")];
        let worker = Example::start_with(shop.binary, &["worker"], &variables)?;
        let ended = worker.end().await?;
        assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
        let last = ended.stderr.lines().last().unwrap_or_default();
        ensure!(
            last.starts_with("error: cannot send by the mail server localhost:1"),
            "{last}"
        );
        ensure!(
            ended.stderr.contains("given back: mail-"),
            "{}",
            ended.stderr
        );
        let next = shop.worker(&[]).await?;
        shop.all_came().await?;
        next.terminate().await?;
        next.end().await?.succeeded()?;
        assert_eq!(shop.twice(), HashSet::new(), "{broker:?}");
        shop.has_left(0).await?;
        Ok(())
    })
    .await
}

/// The one of the programs, for trying it by hand.
#[tokio::test]
async fn the_mail_server_says_what_it_was_handed_before() -> Result<()> {
    for (broker, binary) in PATTERN.binaries() {
        let variables = [
            (broker.address_var(), nowhere(broker)),
            ("MAIL_SERVER", "127.0.0.1:0"),
        ];
        let mut server = Example::start_with(binary, &["mail-server"], &variables)?;
        let ready = server.prints("ready:   mail server at ").await?;
        let address = ready.trim_start_matches("ready:   mail server at ");
        let address = address.trim_end_matches(", Ctrl-C to stop").to_owned();
        for mail in ["mail-1", "mail-2", "mail-1"] {
            send(&address, mail).await?;
        }
        server
            .prints("mail:    mail-1, not for the first time")
            .await?;
        let taken = [("MAIL_SERVER", address.as_str())];
        let second = Example::start_with(binary, &["mail-server"], &taken)?;
        let second = second.end().await?;
        let line = second.one_line_error()?;
        ensure!(line.contains("cannot listen at"), "{line}");
        server.interrupt().await?;
        let lines = server.end().await?.succeeded()?.stdout;
        let expected = "mail:    mail-1\nmail:    mail-2\n\
                        mail:    mail-1, not for the first time\nstopped\n";
        ensure!(lines.ends_with(expected), "{lines}");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 5] = [
        &["producer", "5", "3"],
        &["producer", "1"],
        &["producer", "1", "many"],
        &["worker", "--deadline", "soon"],
        &["worker", "--no-drain", "--deadline"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
