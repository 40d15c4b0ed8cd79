//! A service that is new has the whole history, once, and goes on with what is live; one
//! that is made anew sends no mail again. What they should have is counted here.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use patterns::event_replay::{Kind, event};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
};
use rusqlite::Connection;
use tempfile::TempDir;
use tests::{Example, observe, wait};
use tokio::sync::Mutex;

use crate::common::{Pattern, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_event_replay_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_event_replay_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_event_replay_nats"),
    topics: &[("order-events", "nobody"), ("order-events-story", "nobody")],
    queues: &["order.events", "order.events.story"],
    streams: &["ORDER_EVENTS", "ORDER_EVENTS_STORY"],
};

/// Topic and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// Placed, paid, cancelled, and the revenue, by country.
type Countries = BTreeMap<String, [i64; 4]>;

/// What analytics has to have of the events up to this one.
fn countries(last: u64) -> Countries {
    let mut countries = Countries::new();
    for event in (1..=last).map(event) {
        let [placed, paid, cancelled, revenue] =
            countries.entry(event.country).or_default();
        match event.kind {
            Kind::Placed => *placed += 1,
            Kind::Cancelled => *cancelled += 1,
            Kind::Paid => {
                *paid += 1;
                *revenue += event.total;
            }
        }
    }
    countries
}

/// The mails for the events up to this one, sorted: one for each.
fn mails(last: u64) -> Vec<String> {
    let mut orders = BTreeMap::<String, u64>::new();
    let mails = (1..=last).map(event).map(|event| {
        let orders = orders.entry(event.customer.clone()).or_default();
        if event.kind == Kind::Placed {
            *orders += 1;
        }
        format!(
            "to {}: {} is {}; {orders} from you so far",
            event.customer, event.order, event.kind
        )
    });
    let mut mails: Vec<_> = mails.collect();
    mails.sort();
    mails
}

/// A broker, and the file of the services.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
    folder: TempDir,
}

impl Shop {
    async fn open(broker: Broker) -> Result<Self> {
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable: PATTERN.fresh(broker).await?,
            folder: TempDir::new()?,
        })
    }

    fn start(&self, words: &[&str]) -> Result<Example> {
        Example::start(self.binary, words, self.variable)
    }

    async fn publish(&self, first: u64, last: u64) -> Result<()> {
        let words = ["publish", &first.to_string(), &last.to_string()];
        self.start(&words)?.end().await?.succeeded()?;
        Ok(())
    }

    fn file(&self, name: &str) -> Result<String> {
        let file = self.folder.path().join(name);
        Ok(file.to_str().context("a path")?.to_owned())
    }

    /// A service on this file. Returns how much it says is history.
    async fn serve(
        &self,
        service: &str,
        file: &str,
        flags: &[&str],
    ) -> Result<(Example, u64)> {
        let words = [&[service, file], flags].concat();
        let mut service = self.start(&words)?;
        let ready = service.prints("ready:").await?;
        let history = ready.split_whitespace().nth(1).context("a number")?;
        let history = history.parse()?;
        Ok((service, history))
    }

    /// Bytes that are no event.
    async fn noise(&self) -> Result<()> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let topic = "order-events";
                observe::kafka::produce(address, topic, "noise", "\u{1}").await?;
            }
            Broker::RabbitMq => {
                let (connection, channel) =
                    observe::rabbitmq::connect(address).await?;
                let (options, properties) = Default::default();
                let stream = "order.events";
                channel
                    .basic_publish(
                        "".into(),
                        stream.into(),
                        options,
                        b"\xff",
                        properties,
                    )
                    .await?;
                // Answered behind it.
                connection.close(200, "".into()).await?;
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let noise = b"\xff"[..].into();
                jetstream.publish("order.events", noise).await?.await?;
            }
        }
        Ok(())
    }
}

fn select<T: rusqlite::types::FromSql>(file: &str, query: &str) -> Result<Vec<T>> {
    let database = Connection::open(Path::new(file))?;
    let mut query = database.prepare(query)?;
    let rows = query.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn number(file: &str, query: &str) -> Result<u64> {
    let number: Vec<i64> = select(file, query)?;
    Ok(number.first().copied().unwrap_or(0).try_into()?)
}

fn counted(file: &str) -> Result<Countries> {
    let database = Connection::open(Path::new(file))?;
    let ask = "SELECT country, placed, paid, cancelled, revenue FROM countries";
    let mut query = database.prepare(ask)?;
    let rows = query.query_map([], |row| {
        let numbers = [row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?];
        Ok((row.get(0)?, numbers))
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// How many events are in the table of analytics.
fn events(file: &str) -> Result<u64> {
    let ask = "SELECT coalesce(sum(placed + paid + cancelled), 0) FROM countries";
    number(file, ask)
}

fn mailed(file: &str) -> Result<Vec<String>> {
    let mut mails: Vec<String> = select(file, "SELECT mail FROM mails")?;
    mails.sort();
    Ok(mails)
}

/// Waits until the table has these events and no other.
async fn until_counted(file: &str, last: u64) -> Result<()> {
    let expected = countries(last);
    wait::until("the whole table", async || {
        let found = events(file)?;
        ensure!(found >= last, "{found} of {last}");
        Ok(())
    })
    .await?;
    assert_eq!(counted(file)?, expected);
    Ok(())
}

/// Waits until there is a mail for each of these events, and one only.
async fn until_mailed(file: &str, last: u64) -> Result<()> {
    let count = usize::try_from(last)?;
    wait::until("a mail for each event", async || {
        let found = number(file, "SELECT count(*) FROM mails")?;
        ensure!(found >= last, "{found} of {last}");
        Ok(())
    })
    .await?;
    let mailed = mailed(file)?;
    assert_eq!(mailed.len(), count);
    ensure!(mailed == mails(last), "other mails than there should be");
    Ok(())
}

/// Ctrl-C, status 0, nothing on stderr. Returns what it has said.
async fn stop(service: Example) -> Result<String> {
    service.interrupt().await?;
    let said = service.end().await?.succeeded()?.stdout;
    ensure!(said.ends_with("stopped\n"), "{said}");
    Ok(said)
}

#[tokio::test]
async fn the_stories_replay_without_a_repeat_and_without_a_mail() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// A publisher is at work while both services read the history.
#[tokio::test]
async fn a_new_service_has_all_events_and_no_gap_or_repeat_at_the_seam() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 1000).await?;
        let file = shop.file("shop.db")?;
        let other = shop.file("mail.db")?;
        let publisher = shop.start(&["publish", "1001", "2000"])?;
        let (mut analytics, history) = shop.serve("analytics", &file, &[]).await?;
        let (mail, _history) = shop.serve("mail", &other, &[]).await?;
        publisher.end().await?.succeeded()?;
        ensure!(history >= 1000, "{history}");
        analytics
            .prints(&format!("caught up: {history} events"))
            .await?;
        // Live, without a doubt.
        shop.publish(2001, 2010).await?;
        until_counted(&file, 2010).await?;
        until_mailed(&other, 2010).await?;

        let said = stop(analytics).await?;
        assert_eq!(said.matches("caught up:").count(), 1);
        let live = said.matches("live:").count();
        assert_eq!(live as u64, 2010 - history);
        stop(mail).await?;
        Ok(())
    })
    .await
}

/// Kills a service in the middle of what it reads, as `in_the_middle` finds it. Where
/// the kill comes too late, it is tried again from the beginning.
async fn kill_in_the_middle(
    shop: &Shop,
    begin: &[&str],
    in_the_middle: impl Fn() -> Result<bool>,
) -> Result<()> {
    for _attempt in 0..20 {
        let mut service = shop.start(begin)?;
        service.prints("read:").await?;
        service.kill().await?;
        if in_the_middle()? {
            return Ok(());
        }
        if let ["analytics", file, ..] = begin {
            std::fs::remove_file(file)?;
        }
    }
    bail!("it was too late each time")
}

#[tokio::test]
async fn killed_in_a_replay_it_goes_on_without_a_gap_and_without_a_repeat()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 3000).await?;
        let file = shop.file("shop.db")?;
        let middle = || Ok((500..3000).contains(&events(&file)?));
        kill_in_the_middle(&shop, &["analytics", &file], middle).await?;
        let before = events(&file)?;
        let (mut analytics, history) = shop.serve("analytics", &file, &[]).await?;
        assert_eq!(history, 3000 - before);
        analytics.prints("caught up:").await?;
        until_counted(&file, 3000).await?;
        shop.publish(3001, 3004).await?;
        until_counted(&file, 3004).await?;
        stop(analytics).await?;
        Ok(())
    })
    .await
}

/// The control: the same kill, and the position is not where the table is.
#[tokio::test]
async fn control_a_position_apart_from_the_table_counts_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 3000).await?;
        let file = shop.file("shop.db")?;
        let careless = ["analytics", &file, "--careless"];
        let middle = || Ok((500..3000).contains(&events(&file)?));
        kill_in_the_middle(&shop, &careless, middle).await?;
        let before = events(&file)?;
        let flags = ["--careless"];
        let (mut analytics, history) =
            shop.serve("analytics", &file, &flags).await?;
        assert_eq!(history, 3000);
        analytics.prints("caught up:").await?;
        assert_eq!(events(&file)?, 3000 + before);
        ensure!(counted(&file)? != countries(3000), "nothing is twice");
        stop(analytics).await?;
        Ok(())
    })
    .await
}

/// A replay that is killed, with events between that nobody has had a mail for.
#[tokio::test]
async fn a_replay_sends_no_mail_again_and_none_too_few() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 2000).await?;
        let file = shop.file("shop.db")?;
        let (mail, _history) = shop.serve("mail", &file, &[]).await?;
        until_mailed(&file, 2000).await?;
        stop(mail).await?;
        // The service is down.
        shop.publish(2001, 2010).await?;

        let orders = "SELECT coalesce(sum(orders), 0) FROM customers";
        let middle = || {
            let orders = number(&file, orders)?;
            ensure!(orders >= 250, "the table is not made anew: {orders}");
            Ok(orders < 1000)
        };
        kill_in_the_middle(&shop, &["mail", &file, "--replay"], middle).await?;
        assert_eq!(mailed(&file)?.len(), 2000);
        // Without the word: what was begun as a replay goes on as one.
        let (mut mail, _history) = shop.serve("mail", &file, &[]).await?;
        mail.prints("caught up:").await?;
        until_mailed(&file, 2010).await?;
        assert_eq!(number(&file, orders)?, 1005);
        shop.publish(2011, 2020).await?;
        until_mailed(&file, 2020).await?;
        let said = stop(mail).await?;
        assert_eq!(said.matches("mail:").count(), 20);
        Ok(())
    })
    .await
}

/// The control: the same replay with effects.
#[tokio::test]
async fn control_a_careless_replay_sends_each_mail_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 4).await?;
        let file = shop.file("shop.db")?;
        let (mail, _history) = shop.serve("mail", &file, &[]).await?;
        until_mailed(&file, 4).await?;
        stop(mail).await?;
        let careless = ["--replay", "--careless"];
        let (mut mail, _history) = shop.serve("mail", &file, &careless).await?;
        mail.prints("caught up: 4 events").await?;
        mail.interrupt().await?;
        let ended = mail.end().await?.succeeded()?;
        if broker == Broker::RabbitMq {
            ended.printed_what_the_book_shows("careless")?;
        }
        let mut twice = [mails(4), mails(4)].concat();
        twice.sort();
        assert_eq!(mailed(&file)?, twice);
        Ok(())
    })
    .await
}

/// The server has forgotten the reader, as after a restart.
#[tokio::test]
async fn on_nats_a_forgotten_reader_is_made_again_where_the_table_is() -> Result<()>
{
    let _turn = TURN.lock().await;
    let shop = Shop::open(Broker::Nats).await?;
    shop.publish(1, 20).await?;
    let file = shop.file("shop.db")?;
    let (analytics, _history) = shop.serve("analytics", &file, &[]).await?;
    until_counted(&file, 20).await?;
    let jetstream = observe::nats::jetstream(shop.variable.1).await?;
    let stream = jetstream.get_stream("ORDER_EVENTS").await?;
    let mut names = stream.consumer_names();
    let name = names.next().await.context("a consumer")??;
    stream.delete_consumer(&name).await?;
    shop.publish(21, 30).await?;
    until_counted(&file, 30).await?;
    analytics.interrupt().await?;
    let ended = analytics.end().await?;
    ensure!(ended.status.success(), "{}", ended.stderr);
    let lost = "lost NATS, still trying (";
    ensure!(ended.stderr.starts_with(lost), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1);
    Ok(())
}

/// It is in the log for each replay to come, so it must not end one.
#[tokio::test]
async fn what_is_no_event_is_kept_and_passed_over() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.publish(1, 2).await?;
        shop.noise().await?;
        shop.publish(3, 6).await?;
        let file = shop.file("shop.db")?;
        let (analytics, _history) = shop.serve("analytics", &file, &[]).await?;
        until_counted(&file, 6).await?;
        let kept = "SELECT count(*) FROM unreadable";
        wait::until("the noise", async || {
            ensure!(number(&file, kept)? == 1, "it is not there");
            Ok(())
        })
        .await?;
        analytics.interrupt().await?;
        let ended = analytics.end().await?;
        ensure!(ended.status.success(), "{}", ended.stderr);
        assert_eq!(ended.stderr, "set aside: 1 that nobody can read\n");
        let shown = shop.start(&["show", &file])?.end().await?.succeeded()?;
        let last = "country:   FR 1001 cents, 1 paid, 0 cancelled, 0 open\n\
                    mails:     0\n";
        ensure!(shown.stdout.ends_with(last), "{}", shown.stdout);
        Ok(())
    })
    .await
}

/// Deletes what the log has, as retention does.
async fn delete_all(broker: Broker, address: &str) -> Result<()> {
    match broker {
        Broker::Kafka => {
            let mut config = ClientConfig::new();
            config.set("bootstrap.servers", address);
            let admin: AdminClient<DefaultClientContext> = config.create()?;
            let mut all = TopicPartitionList::new();
            for partition in 0..3 {
                let end = Offset::End;
                all.add_partition_offset("order-events", partition, end)?;
            }
            let options = AdminOptions::new();
            for it in admin.delete_records(&all, &options).await?.elements() {
                it.error()?;
            }
        }
        // Deletes whole segments, and never the last one.
        Broker::RabbitMq => {}
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            jetstream.get_stream("ORDER_EVENTS").await?.purge().await?;
        }
    }
    Ok(())
}

/// Rather than a table that looks whole and is not.
#[tokio::test]
async fn a_gap_another_log_and_a_lost_file_are_refused() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let refused = async |words: &[&str], reason: &str| {
            let ended = shop.start(words)?.end().await?;
            ended.refused(reason)?;
            anyhow::Ok(())
        };
        shop.publish(1, 40).await?;
        let file = shop.file("shop.db")?;
        let lost = shop.file("lost.db")?;
        let unknown = "does not say for which events mails were sent";
        refused(&["mail", &lost, "--replay"], unknown).await?;

        let (analytics, _history) = shop.serve("analytics", &file, &[]).await?;
        until_counted(&file, 40).await?;
        stop(analytics).await?;
        if broker != Broker::RabbitMq {
            // All that it has read: no gap.
            delete_all(broker, shop.variable.1).await?;
            let (mut analytics, history) =
                shop.serve("analytics", &file, &[]).await?;
            assert_eq!(history, 0);
            analytics.prints("caught up: 0 events").await?;
            stop(analytics).await?;
            shop.publish(41, 80).await?;
            delete_all(broker, shop.variable.1).await?;
            refused(&["analytics", &file], "are deleted, and it has not").await?;
        }
        PATTERN.fresh(broker).await?;
        shop.publish(1, 1).await?;
        refused(&["analytics", &file], "it is of another log").await
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 7] = [
        &["publish", "5", "3"],
        &["publish", "1"],
        &["publish", "0", "9"],
        &["analytics"],
        &["analytics", "shop.db", "--replay"],
        &["mail", "shop.db", "--careless"],
        &["show"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
