//! Each order ends completed or compensated, whoever is killed, and the books
//! balance.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use lapin::options::BasicGetOptions;
use patterns::saga_orchestration::{
    Action, Command, Entry, Message, Outcome, Participant, Reply, Sagas, Service,
    State, order,
};
use rusqlite::Connection;
use tempfile::TempDir;
use tests::{Example, Supervised, observe, random, wait};
use tokio::{sync::Mutex, time::sleep};

use crate::common::{Pattern, nowhere, on_each, stop};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_saga_orchestration_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_saga_orchestration_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_saga_orchestration_nats"),
    topics: &[
        ("saga-orchestrator", "saga-orchestrator"),
        ("saga-payment", "saga-payment"),
        ("saga-stock", "saga-stock"),
        ("saga-shipping", "saga-shipping"),
    ],
    queues: &[
        "saga.orchestrator",
        "saga.payment",
        "saga.stock",
        "saga.shipping",
    ],
    streams: &["SAGA"],
};
const PARTITIONS: i32 = 4;
const INBOX: &str = "orchestrator";

/// Never reached in a test: who forgets a step has no deadline that mends it.
const NO_DEADLINE: &str = "3600";

/// Queues, topics and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn the_stories_end_completed_or_compensated() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// What has to happen to an order if everybody answers in time.
fn steps(number: u64) -> &'static [&'static str] {
    match number % 5 {
        2 => &[
            "placed",
            "pay: done",
            "reserve: out of stock",
            "refund: done",
        ],
        3 => &[
            "placed",
            "pay: done",
            "reserve: done",
            "ship: no carrier goes there",
            "release: done",
            "refund: done",
        ],
        0 => &["placed", "pay: the bank says no"],
        _ => &["placed", "pay: done", "reserve: done", "ship: done"],
    }
}

/// A broker with nothing in it, and a folder for the databases.
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
            folder: tempfile::tempdir()?,
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.db"))
    }

    fn start(&self, words: &[&str]) -> Result<Supervised> {
        Supervised::start(self.binary, words, &[self.variable])
    }

    async fn orchestrator(&self, deadline: &str) -> Result<Supervised> {
        let file = self.file(INBOX);
        let file = file.to_string_lossy();
        let words = ["orchestrator", &file, "--deadline", deadline];
        let mut orchestrator = self.start(&words)?;
        orchestrator.prints("ready:").await?;
        Ok(orchestrator)
    }

    async fn service(&self, participant: Participant) -> Result<Supervised> {
        let file = self.file(participant.name());
        let words = ["service", participant.name(), &file.to_string_lossy()];
        let mut service = self.start(&words)?;
        service.prints("ready:").await?;
        Ok(service)
    }

    async fn services(&self) -> Result<Vec<Supervised>> {
        let mut services = Vec::new();
        for participant in Participant::ALL {
            services.push(self.service(participant).await?);
        }
        Ok(services)
    }

    async fn place(&self, first: u64, last: u64) -> Result<()> {
        let words = ["order", &first.to_string(), &last.to_string()];
        let placed = Example::start(self.binary, &words, self.variable)?;
        let placed = placed.end().await?.succeeded()?;
        ensure!(
            placed
                .stdout
                .contains(&format!("placed:    order-{last}\n"))
        );
        Ok(())
    }

    async fn place_by_hand(&self, number: u64) -> Result<()> {
        let order = order(number);
        let id = order.id.clone();
        let placed = Message::Placed(order).to_json();
        self.send(INBOX, &id, &placed).await
    }

    /// Behind the back of all programs.
    async fn send(&self, to: &str, key: &str, payload: &[u8]) -> Result<()> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let text = str::from_utf8(payload)?;
                let topic = format!("saga-{to}");
                observe::kafka::produce(address, &topic, key, text).await
            }
            Broker::RabbitMq => {
                let (connection, channel) =
                    observe::rabbitmq::connect(address).await?;
                let (options, properties) = Default::default();
                let queue = format!("saga.{to}");
                channel
                    .basic_publish(
                        "".into(),
                        queue.into(),
                        options,
                        payload,
                        properties,
                    )
                    .await?;
                connection.close(200, "".into()).await?;
                Ok(())
            }
            Broker::Nats => {
                let jetstream = observe::nats::jetstream(address).await?;
                let subject = format!("saga.{to}");
                let stored = jetstream.publish(subject, payload.to_vec().into());
                stored.await?.await?;
                Ok(())
            }
        }
    }

    async fn command(&self, action: Action, number: u64) -> Result<()> {
        let order = order(number);
        let command = Command::new(action, &order);
        let to = action.participant().name();
        self.send(to, &order.id, &serde_json::to_vec(&command)?)
            .await
    }

    async fn answer(&self, action: Action, number: u64) -> Result<()> {
        let order = order(number);
        let reply = Reply {
            id: Command::new(action, &order).id,
            action,
            order: order.id.clone(),
            outcome: Outcome::Done,
        };
        let payload = Message::Answered(reply).to_json();
        self.send(INBOX, &order.id, &payload).await
    }

    fn sagas(&self) -> Result<Sagas> {
        Ok(Sagas::open(&self.file(INBOX), Duration::ZERO)?)
    }

    fn history(&self, number: u64) -> Result<Vec<Entry>> {
        let id = order(number).id;
        let all = self.sagas()?.history()?.into_iter();
        Ok(all.filter(|entry| entry.order == id).collect())
    }

    fn books(&self, participant: Participant, number: u64) -> Result<Vec<i64>> {
        let file = self.file(participant.name());
        let service = Service::open(participant, &file)?;
        Ok(service.books(&order(number).id)?)
    }

    async fn until(&self, number: u64, what: &str) -> Result<()> {
        let id = order(number).id;
        wait::until(&format!("{id} {what}"), async || {
            let history = self.history(number)?;
            let found = history.iter().any(|entry| entry.what == what);
            ensure!(found, "{:?}: {history:?}", self.broker);
            Ok(())
        })
        .await
    }

    /// Waits until no order waits for anything, and no command waits to be sent.
    async fn until_all_have_ended(&self) -> Result<()> {
        wait::until("the end of all orders", async || {
            let sagas = self.sagas()?;
            let quiet = sagas.deadline()?.is_none() && sagas.waiting(1)?.is_empty();
            ensure!(quiet, "{:?}: {:#?}", self.broker, sagas.history()?);
            Ok(())
        })
        .await
    }

    /// Each order has gone its way, no step is missing and none too much, and in the
    /// books is what its end says.
    fn each_has_gone_its_way(
        &self,
        orders: impl IntoIterator<Item = u64>,
    ) -> Result<()> {
        for number in orders {
            let history = self.history(number)?;
            let lines = history.iter().map(|entry| entry.what.as_str());
            let lines: Vec<&str> =
                lines.filter(|it| !it.ends_with("ignored")).collect();
            assert_eq!(lines, steps(number), "{:?} {number}", self.broker);
            let end = history.last().and_then(|entry| entry.state);
            let good = number % 5 == 1 || number % 5 == 4;
            let expected = match good {
                true => State::Completed,
                false => State::Compensated,
            };
            assert_eq!(end, Some(expected), "{:?} {number}", self.broker);
            self.books_are_right(number, good)?;
        }
        Ok(())
    }

    fn books_are_right(&self, number: u64, completed: bool) -> Result<()> {
        for (participant, amount) in Participant::ALL.into_iter().zip([
            order(number).total,
            order(number).pieces,
            1,
        ]) {
            let books = self.books(participant, number)?;
            let right = if completed {
                books == [amount]
            } else {
                books.is_empty() || books == [amount, -amount]
            };
            ensure!(
                right,
                "{:?} {number} {participant:?} {books:?}",
                self.broker
            );
        }
        Ok(())
    }
}

/// On the three brokers at the same time.
async fn on_each_shop(test: impl AsyncFn(Shop) -> Result<()>) -> Result<()> {
    on_each(async |broker| test(Shop::open(broker).await?).await).await
}

/// The services stand still, and each of them goes on for one command. So each step
/// has a moment at which the orchestrator is killed.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_the_orchestrator_forgets_none_and_invents_none()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut orchestrator = shop.orchestrator(NO_DEADLINE).await?;
        let mut services = shop.services().await?;
        for service in &services {
            service.signal("STOP").await?;
        }
        // One of each kind.
        let orders = [1, 2, 3, 5];
        for number in orders {
            shop.place(number, number).await?;
            for (index, what) in steps(number).iter().enumerate() {
                let entries = wait::until(what, async || {
                    let entries = shop.history(number)?;
                    ensure!(entries.len() > index, "{:?} {entries:?}", shop.broker);
                    Ok(entries)
                })
                .await?;
                // Before it has sent the next command, or after it.
                orchestrator.kill().await?;
                let state = entries.last().and_then(|entry| entry.state);
                let Some(action) = state.and_then(State::action) else {
                    continue;
                };
                let service = &mut services[action.participant() as usize];
                service.signal("CONT").await?;
                let answered = format!("{}.{}", order(number).id, action.name());
                wait::until(&answered, async || {
                    service.look_after().await?;
                    let file = shop.file(action.participant().name());
                    let count = "SELECT count(*) FROM answers WHERE id = ?1";
                    let found: i64 = Connection::open(file)?.query_row(
                        count,
                        [&answered],
                        |row| row.get(0),
                    )?;
                    ensure!(found == 1, "not answered");
                    Ok(())
                })
                .await?;
                // Some time around its answer.
                service.signal("STOP").await?;
                orchestrator.prints("ready:").await?;
                service.signal("CONT").await?;
                shop.until(number, steps(number)[index + 1]).await?;
                service.signal("STOP").await?;
            }
        }
        for service in &services {
            service.signal("CONT").await?;
        }
        shop.until_all_have_ended().await?;
        shop.each_has_gone_its_way(orders)?;
        stop(services.into_iter().chain([orchestrator])).await
    })
    .await
}

/// Whoever it is: the orchestrator or a service, at any moment.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_each_order_goes_its_way() -> Result<()> {
    const ORDERS: u64 = 40;
    const KILLS: usize = 12;
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut random = random::seeded();
        let mut programs = shop.services().await?;
        programs.push(shop.orchestrator(NO_DEADLINE).await?);
        shop.place(1, ORDERS).await?;
        let lines = (1..=ORDERS).map(|it| steps(it).len()).sum::<usize>();
        for kill in 0..KILLS {
            wait::until("the orders to go on", async || {
                let found = shop.sagas()?.history()?.len();
                ensure!(found >= kill * lines / KILLS, "{found} lines");
                Ok(())
            })
            .await?;
            sleep(Duration::from_millis(random.u64(0..10))).await;
            // The orchestrator as often as all the others together.
            let at = random.usize(..6).min(3);
            programs[at].kill().await?;
        }
        shop.until_all_have_ended().await?;
        shop.each_has_gone_its_way(1..=ORDERS)?;
        // What was sent twice is answered by now, or will be when they start again.
        stop(programs).await
    })
    .await
}

/// They die at the transaction, and what they had is not acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_comes_again() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let variable = shop.variable;
        let file = shop.file(INBOX);
        let words = ["orchestrator", &file.to_string_lossy()];
        let words = [&words[..], &["--deadline", NO_DEADLINE]].concat();
        let mut orchestrator = Example::start(shop.binary, &words, variable)?;
        orchestrator.prints("ready:").await?;
        shop.place(1, 1).await?;
        shop.until(1, "placed").await?;

        let participant = Participant::Payment;
        let payment = shop.file(participant.name());
        Service::open(participant, &payment)?;
        let locks = [Connection::open(&file)?, Connection::open(&payment)?];
        for lock in &locks {
            lock.execute_batch("BEGIN IMMEDIATE")?;
        }
        shop.place(2, 2).await?;
        let words = ["service", "payment", &payment.to_string_lossy()];
        let service = Example::start(shop.binary, &words, variable)?;
        for (program, line) in [
            (orchestrator, "cannot write down what has come"),
            (service, "cannot do it, the command will come again"),
        ] {
            let ended = program.end().await?;
            let error = ended.one_line_error()?;
            ensure!(error.contains(line), "{:?}: {error}", shop.broker);
        }
        drop(locks);

        let services = shop.services().await?;
        let orchestrator = shop.orchestrator(NO_DEADLINE).await?;
        shop.until(2, "refund: done").await?;
        shop.until_all_have_ended().await?;
        shop.each_has_gone_its_way(1..=2)?;
        stop(services.into_iter().chain([orchestrator])).await
    })
    .await
}

/// The broker refuses the commands for payments, until it is asked for the way back.
async fn refuse_commands(shop: &Shop, refuse: bool) -> Result<()> {
    let address = shop.variable.1;
    match shop.broker {
        Broker::Kafka => {
            let topic = "saga-payment";
            observe::kafka::forget(address, topic, topic).await?;
            if refuse {
                let settings = [("max.message.bytes", "10")];
                observe::kafka::create_topic_with(
                    address, topic, PARTITIONS, &settings,
                )
                .await?;
            }
            Ok(())
        }
        // The orchestrator makes a new one when it starts.
        Broker::RabbitMq => {
            observe::rabbitmq::delete_queues(address, &["saga.payment"]).await
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let mut config =
                jetstream.get_stream("SAGA").await?.get_info().await?.config;
            let order = Message::Placed(order(1)).to_json().len();
            config.max_message_size =
                if refuse { i32::try_from(order)? } else { -1 };
            jetstream.update_stream(config).await?;
            Ok(())
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_the_broker_does_not_store_stays_in_the_outbox() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        if shop.broker == Broker::Kafka {
            refuse_commands(&shop, true).await?;
        }
        let file = shop.file(INBOX);
        let words = ["orchestrator", &file.to_string_lossy()];
        let mut orchestrator = Example::start(shop.binary, &words, shop.variable)?;
        orchestrator.prints("ready:").await?;
        if shop.broker != Broker::Kafka {
            refuse_commands(&shop, true).await?;
        }
        shop.place_by_hand(1).await?;
        let ended = orchestrator.end().await?;
        let error = ended.one_line_error()?;
        ensure!(error.contains("did not store"), "{error}");
        assert_eq!(shop.sagas()?.waiting(9)?.len(), 1);

        refuse_commands(&shop, false).await?;
        let orchestrator = shop.orchestrator(NO_DEADLINE).await?;
        let services = shop.services().await?;
        shop.until(1, "ship: done").await?;
        shop.each_has_gone_its_way([1])?;
        stop(services.into_iter().chain([orchestrator])).await
    })
    .await
}

/// Counted by RabbitMQ, and by default deleted after the twentieth.
#[tokio::test]
async fn a_message_outlives_however_many_programs_it_finds_dead() -> Result<()> {
    let _turn = TURN.lock().await;
    let shop = Shop::open(Broker::RabbitMq).await?;
    shop.place(1, 1).await?;
    for _time in 0..30 {
        let (connection, channel) =
            observe::rabbitmq::connect(shop.variable.1).await?;
        wait::until("the order", async || {
            let options = BasicGetOptions::default();
            let queue = "saga.orchestrator".into();
            channel.basic_get(queue, options).await?.context("gone")
        })
        .await?;
        // As a kill does, without an acknowledgement.
        connection.close(200, "".into()).await?;
    }
    Ok(())
}

/// The deadline passes while nobody serves payments, and the orchestrator is killed
/// meanwhile. Then the payment is made after all.
#[tokio::test(flavor = "multi_thread")]
async fn a_payment_that_comes_too_late_is_refunded_once() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut orchestrator = shop.orchestrator("3").await?;
        shop.place(1, 1).await?;
        shop.until(1, "placed").await?;
        let deadline = shop.sagas()?.deadline()?;
        orchestrator
            .dead_while(async {
                assert_eq!(shop.sagas()?.deadline()?, deadline);
                Ok(())
            })
            .await?;
        shop.until(1, "pay: no answer in time").await?;
        shop.until(1, "refund: no answer, sent once more").await?;
        let mut payment = shop.service(Participant::Payment).await?;
        payment.prints("pay: done").await?;
        payment.prints("refund: done").await?;
        payment.prints("refund: done, as answered before").await?;
        shop.until(1, "pay: done, ignored").await?;
        // The answer to the second refund changes nothing.
        shop.until(1, "refund: done, ignored").await?;
        let history = shop.history(1)?;
        let end = history.last().and_then(|entry| entry.state);
        assert_eq!(end, Some(State::Compensated), "{history:#?}");
        let books = shop.books(Participant::Payment, 1)?;
        assert_eq!(books, [2_500, -2_500]);
        stop([payment, orchestrator]).await
    })
    .await
}

/// Sent behind the back of those who have sent it before.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_twice_or_out_of_turn_changes_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let mut orchestrator = shop.orchestrator(NO_DEADLINE).await?;
        let payment = shop.service(Participant::Payment).await?;
        // Twice in the middle: the stock is not there yet.
        shop.place(1, 1).await?;
        shop.until(1, "pay: done").await?;
        shop.place(1, 1).await?;
        shop.until(1, "placed once more, ignored").await?;
        shop.answer(Action::Pay, 1).await?;
        shop.until(1, "pay: done, ignored").await?;
        shop.answer(Action::Refund, 1).await?;
        shop.until(1, "refund: done, ignored").await?;

        let mut programs = vec![payment];
        programs.push(shop.service(Participant::Stock).await?);
        programs.push(shop.service(Participant::Shipping).await?);
        shop.place(2, 3).await?;
        shop.until(2, "refund: done").await?;
        shop.until(3, "refund: done").await?;
        shop.until(1, "ship: done").await?;

        // Once more, each command that there was, and a refund that was not.
        for action in [Action::Pay, Action::Reserve, Action::Ship] {
            shop.command(action, 1).await?;
        }
        for action in Action::ALL {
            if action != Action::Cancel {
                shop.command(action, 3).await?;
            }
        }
        for ignored in ["ship: done, ignored", "reserve: done, ignored"] {
            shop.until(1, ignored).await?;
        }
        for ignored in ["release: done, ignored", "refund: done, ignored"] {
            shop.until(3, ignored).await?;
        }
        // A refund that has overtaken its payment, of an order that nobody knows
        // here.
        shop.command(Action::Refund, 9).await?;
        orchestrator.prints("refund: done").await?;
        shop.command(Action::Pay, 9).await?;
        let line = "order-9    pay: taken back before           unknown";
        orchestrator.prints(line).await?;
        assert_eq!(shop.books(Participant::Payment, 9)?, [0; 0]);
        shop.each_has_gone_its_way(1..=3)?;
        stop(programs.into_iter().chain([orchestrator])).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_read_is_kept_and_keeps_nobody() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let orchestrator = shop.orchestrator(NO_DEADLINE).await?;
        let services = shop.services().await?;
        shop.send(INBOX, "noise", b"\x01").await?;
        shop.send("payment", "noise", b"\x01").await?;
        shop.place(1, 1).await?;
        shop.until(1, "ship: done").await?;
        for name in [INBOX, "payment"] {
            wait::until("what nobody can read", async || {
                let select = "SELECT payload FROM unreadable";
                let kept: Vec<u8> = Connection::open(shop.file(name))?.query_row(
                    select,
                    (),
                    |row| row.get(0),
                )?;
                ensure!(kept == b"\x01", "{kept:?}");
                Ok(())
            })
            .await?;
        }
        stop(services.into_iter().chain([orchestrator])).await
    })
    .await
}

/// How many commands wait for the stock.
async fn for_the_stock(shop: &Shop) -> Result<usize> {
    let address = shop.variable.1;
    Ok(match shop.broker {
        Broker::Kafka => {
            let (topic, isolation) = ("saga-stock", "read_committed");
            let all =
                observe::kafka::read_all(address, topic, PARTITIONS, isolation);
            all.await?.len()
        }
        Broker::RabbitMq => {
            observe::rabbitmq::ready(address, "saga.stock").await? as usize
        }
        Broker::Nats => {
            let jetstream = observe::nats::jetstream(address).await?;
            let stream = jetstream.get_stream("SAGA").await?;
            let stock = "saga.stock";
            usize::from(stream.get_last_raw_message_by_subject(stock).await.is_ok())
        }
    })
}

/// The control: the table dies with the orchestrator. The money is taken, and no one
/// knows what for.
#[tokio::test(flavor = "multi_thread")]
async fn control_an_orchestrator_with_its_table_in_memory_forgets_an_order()
-> Result<()> {
    let _turn = TURN.lock().await;
    on_each_shop(async |shop| {
        let words = ["orchestrator", "--in-memory", "--deadline", NO_DEADLINE];
        let start = || Example::start(shop.binary, &words, shop.variable);
        let mut first = start()?;
        first.prints("ready:").await?;
        let mut programs = vec![shop.service(Participant::Payment).await?];
        shop.place(1, 1).await?;
        first.prints("order-1    pay: done").await?;
        wait::until("a command for the stock", async || {
            ensure!(for_the_stock(&shop).await? == 1, "there is none");
            Ok(())
        })
        .await?;
        first.kill().await?;

        let mut second = start()?;
        second.prints("ready:").await?;
        programs.push(shop.service(Participant::Stock).await?);
        programs.push(shop.service(Participant::Shipping).await?);
        let line = "order-1    reserve: done                    unknown";
        second.prints(line).await?;
        // It goes on with others.
        shop.place(4, 4).await?;
        second.prints("order-4    ship: done").await?;
        second.interrupt().await?;
        let second = second.end().await?.succeeded()?;

        assert_eq!(shop.books(Participant::Payment, 1)?, [2_500]);
        assert_eq!(shop.books(Participant::Stock, 1)?, [2]);
        assert_eq!(shop.books(Participant::Shipping, 1)?, [0; 0]);
        shop.books_are_right(4, true)?;
        stop(programs).await?;
        if shop.broker == Broker::RabbitMq {
            second.printed_what_the_book_shows("in-memory")?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 8] = [
        &["order", "5", "3"],
        &["orchestrator"],
        &["orchestrator", "x.db", "--deadline", "soon"],
        &["orchestrator", "x.db", "--deadline", "0"],
        &["service", "bank", "x.db"],
        &["order", "many"],
        &["show"],
        &["x"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("some.db");
    std::fs::write(&file, "this is no database, but a text about one")?;
    let file = file.to_string_lossy();
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let words: [(&[&str], &str); 4] = [
            (&["orchestrator", &file], "cannot use"),
            (&["service", "stock", &file], "cannot use"),
            (&["show", &file], "cannot use"),
            (&["show", "no.db"], "there is no file no.db"),
        ];
        for (words, says) in words {
            let ended = Example::start(binary, words, variable)?.end().await?;
            ended.refused(says)?;
        }
    }
    Ok(())
}

/// No broker is needed to look.
#[tokio::test]
async fn the_history_is_shown_one_order_after_the_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("saga.db");
    let mut sagas = Sagas::open(&file, Duration::ZERO)?;
    for number in [2, 1] {
        sagas.take(&Message::Placed(order(number)).to_json(), 0)?;
    }
    sagas.overdue(0)?;
    for (broker, binary) in PATTERN.binaries() {
        let variable = (broker.address_var(), nowhere(broker));
        let words = ["show", &file.to_string_lossy()];
        let ended = Example::start(binary, &words, variable)?.end().await?;
        let lines = "\
            order-2    placed                           paying\n\
            order-2    pay: no answer in time           refunding\n\
            order-1    placed                           paying\n\
            order-1    pay: no answer in time           refunding\n";
        assert_eq!(ended.succeeded()?.stdout, lines);
    }
    Ok(())
}
