//! The best of those that answer in time is taken, and nobody is waited for any longer.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::broker::Broker;
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tests::{Example, example::Ended, observe, wait};
use tokio::sync::Mutex;

use crate::common::{self, Pattern};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_scatter_gather_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_scatter_gather_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_scatter_gather_nats"),
    topics: &[
        ("shipping-questions", "carrier-swift"),
        ("shipping-offers", "shipping-askers"),
    ],
    // A carrier's is gone with it.
    queues: &[],
    streams: &[],
};

/// Exchange, topics and subject belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker, and what is started there.
#[derive(Clone, Copy)]
struct Place {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
}

impl Place {
    async fn open(broker: Broker) -> Result<Self> {
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable: PATTERN.fresh(broker).await?,
        })
    }

    fn start(self, words: &[&str]) -> Result<Example> {
        Example::start(self.binary, words, self.variable)
    }

    /// Starts these carriers, and returns when each can be asked.
    async fn carriers<const N: usize>(
        self,
        each: [&[&str]; N],
    ) -> Result<Vec<Example>> {
        let mut carriers = Vec::new();
        for words in each {
            carriers.push(self.start(&[&["carrier"], words].concat())?);
        }
        for carrier in &mut carriers {
            carrier.prints("ready:").await?;
        }
        Ok(carriers)
    }

    async fn ask(self, words: &[&str]) -> Result<Ended> {
        let asker = self.start(&[&["ask"], words].concat())?;
        asker.end().await?.succeeded()
    }
}

/// Ctrl-C ends each of them cleanly.
async fn stop(carriers: Vec<Example>) -> Result<()> {
    for carrier in &carriers {
        carrier.interrupt().await?;
    }
    for carrier in carriers {
        let said = carrier.end().await?.succeeded()?.stdout;
        ensure!(said.ends_with("stopped\n"), "{said}");
    }
    Ok(())
}

/// On the three brokers at the same time.
async fn on_each(test: impl AsyncFn(Place) -> Result<()>) -> Result<()> {
    common::on_each(async |broker| test(Place::open(broker).await?).await).await
}

/// A late answer to the first question comes while the second one waits.
#[tokio::test]
async fn the_stories_take_the_cheapest_in_time_and_no_late_one() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// Who waits for all gets the cheapest, who takes the first does not.
#[tokio::test]
async fn control_the_first_offer_is_not_the_cheapest() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        let carriers = place
            .carriers([
                &["swift", "790"],
                &["snail", "390", "--slow"],
                &["owl", "500", "--slow"],
            ])
            .await?;
        let said = place.ask(&["2", "30000"]).await?.stdout;
        let all = "asked:    2 kg, within 30000 ms\n\
                   answered: 3 of 3, before the deadline: owl 1000, snail 780, \
                   swift 1580\n\
                   taken:    snail for 780 cents\n";
        assert_eq!(said, all);
        let ended = place.ask(&["2", "30000", "--first"]).await?;
        let first = "asked:    2 kg, within 30000 ms\n\
                     answered: 1 of 3, the first offer is enough: swift 1580\n\
                     taken:    swift for 1580 cents\n";
        assert_eq!(ended.stdout, first);
        if place.broker == Broker::Nats {
            ended.printed_what_the_book_shows("first")?;
        }
        stop(carriers).await
    })
    .await
}

/// And rubbish is an answer and no offer, though it would be the cheapest.
#[tokio::test]
async fn who_answers_twice_counts_once() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        let carriers = place
            .carriers([&["swift", "790", "--twice"], &["nope", "5", "--garbled"]])
            .await?;
        let said = place.ask(&["2", "3000"]).await?.stdout;
        ensure!(said.contains("passed:   swift, a second time\n"), "{said}");
        let end = "answered: 2 of 3, by the deadline: nope no, swift 1580\n\
                   taken:    swift for 1580 cents\n";
        ensure!(said.ends_with(end), "{said}");
        stop(carriers).await
    })
    .await
}

/// Kafka keeps the question, and a carrier that comes later knows that it is too late.
#[tokio::test]
async fn with_nobody_there_it_says_so() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        if place.broker == Broker::Kafka {
            let said = place.ask(&["2", "2000"]).await?.stdout;
            let end = "answered: 0 of 3, by the deadline\nnone:     no offer\n";
            ensure!(said.ends_with(end), "{said}");
            let mut carriers = place.carriers([&["swift", "790"]]).await?;
            let late = "skipped:  nobody waits any more";
            carriers[0].prints(late).await?;
            return stop(carriers).await;
        }
        // A carrier that another test has killed may be there for a moment.
        wait::until("nobody to be there", async || {
            let started = Instant::now();
            let said = place.ask(&["2", "20000"]).await?.stdout;
            let end = "answered: 0 of 3, nobody listens\nnone:     no offer\n";
            ensure!(said.ends_with(end), "{said}");
            ensure!(started.elapsed() < Duration::from_secs(15), "not at once");
            Ok(())
        })
        .await
    })
    .await
}

/// One is killed and one frozen while they work on it. The asker ends at its deadline
/// with what it has.
#[tokio::test]
async fn carriers_that_die_in_the_middle_cost_the_deadline_at_most() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        let mut carriers = place
            .carriers([
                &["slug", "390", "--slow"],
                &["sloth", "290", "--slow"],
                &["swift", "790"],
            ])
            .await?;
        let started = Instant::now();
        let asker = place.start(&["ask", "2", "4000"])?;
        for carrier in &mut carriers {
            carrier.prints("asked:    2 kg").await?;
        }
        let frozen = carriers.remove(1);
        frozen.signal("STOP").await?;
        carriers.remove(0).kill().await?;
        let said = asker.end().await?.succeeded()?.stdout;
        let took = started.elapsed();
        let end = "answered: 1 of 3, by the deadline: swift 1580\n\
                   taken:    swift for 1580 cents\n";
        ensure!(said.ends_with(end), "{said}");
        ensure!(took < Duration::from_secs(15), "{took:?}");

        // All are gone, and one that hangs is there: not even NATS can tell.
        stop(carriers).await?;
        let said = place.ask(&["2", "2000"]).await?.stdout;
        let end = "answered: 0 of 3, by the deadline\nnone:     no offer\n";
        ensure!(said.ends_with(end), "{said}");
        frozen.kill().await
    })
    .await
}

/// Six askers at the same time, each with a weight of its own: the prices tell whose
/// answers they are. On Kafka they share four partitions.
#[tokio::test]
async fn each_asker_gets_the_answers_to_its_own_question() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        let carriers = place
            .carriers([&["swift", "790"], &["van", "650"], &["bike", "700"]])
            .await?;
        let mut askers = Vec::new();
        for weight in 1..=6 {
            let asker = place.start(&["ask", &weight.to_string(), "30000"])?;
            askers.push((weight, asker));
        }
        for (weight, asker) in askers {
            let said = asker.end().await?.succeeded()?.stdout;
            let end = format!(
                "answered: 3 of 3, before the deadline: bike {}, swift {}, van {}\n\
                 taken:    van for {} cents\n",
                700 * weight,
                790 * weight,
                650 * weight,
                650 * weight
            );
            ensure!(said.ends_with(&end), "{said}");
        }
        stop(carriers).await
    })
    .await
}

/// What is no question gets a "no", and what has no way back gets nothing.
async fn send_rubbish(place: Place, way_back: bool) -> Result<()> {
    let address = place.variable.1;
    match place.broker {
        Broker::Kafka => {
            let producer: FutureProducer = ClientConfig::new()
                .set("bootstrap.servers", address)
                .create()?;
            let header = |key, value| Header {
                key,
                value: Some(value),
            };
            let partition = if way_back { "0" } else { "-1" };
            let headers = OwnedHeaders::new()
                .insert(header("reply-partition", partition))
                .insert(header("correlation-id", "one"));
            let record: FutureRecord<'_, (), _> =
                FutureRecord::to("shipping-questions")
                    .headers(headers)
                    .payload("rubbish");
            let sent = producer.send(record, Duration::from_secs(10)).await;
            sent.map_err(|(error, _record)| error)?;
        }
        Broker::RabbitMq => {
            let (connection, channel) = observe::rabbitmq::connect(address).await?;
            let confirms = ConfirmSelectOptions::default();
            channel.confirm_select(confirms).await?;
            let mut properties =
                BasicProperties::default().with_correlation_id("one".into());
            if way_back {
                properties = properties.with_reply_to("nobody".into());
            }
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(
                    "shipping.offers".into(),
                    "".into(),
                    options,
                    b"rubbish",
                    properties,
                )
                .await?
                .await?;
            connection.close(200, "".into()).await?;
        }
        Broker::Nats => {
            let client = observe::nats::connect(address).await?;
            if way_back {
                let reply = client.request("shipping.offers", "rubbish".into());
                let reply = reply.await?.payload;
                let refused = reply.starts_with(br#"{"Refused":"not a question"#);
                ensure!(refused, "{reply:?}");
            } else {
                client.publish("shipping.offers", "rubbish".into()).await?;
                client.flush().await?;
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn rubbish_ends_no_carrier() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |place| {
        let mut carriers = place.carriers([&["swift", "790"]]).await?;
        send_rubbish(place, false).await?;
        let skipped = "skipped:  nobody wants an answer";
        carriers[0].prints(skipped).await?;
        send_rubbish(place, true).await?;
        carriers[0].prints("answered: 7 bytes").await?;
        let said = place.ask(&["1", "30000", "--first"]).await?.stdout;
        ensure!(said.ends_with("taken:    swift for 790 cents\n"), "{said}");
        stop(carriers).await
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 8] = [
        &["carrier"],
        &["carrier", "swift"],
        &["carrier", "swift", "cheap"],
        &["carrier", "swift", "790", "--fast"],
        &["ask"],
        &["ask", "0"],
        &["ask", "2", "0"],
        &["ask", "--first"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
