//! What fails is tried again later and holds up nobody; what is given up is kept, and
//! goes back once the carrier is mended. When a parcel was tried, and whether it was
//! booked, the carrier tells.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::broker::Broker;
use lapin::{BasicProperties, options::BasicPublishOptions};
use patterns::retry_dlq::{Carrier, DELAYS, milliseconds, parcel};
use rdkafka::{Message as _, message::Headers as _};
use tempfile::TempDir;
use tests::{
    Example,
    example::Ended,
    observe::{kafka, nats, rabbitmq},
    wait,
};
use tokio::sync::Mutex;

use crate::common::{Pattern, Place, on_each};

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_retry_dlq_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_retry_dlq_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_retry_dlq_nats"),
    topics: &[
        ("parcels-booking", "parcels-worker"),
        ("parcels-wait-500", "nobody"),
        ("parcels-wait-1000", "nobody"),
        ("parcels-wait-2000", "nobody"),
        ("parcels-dead", "parcels-redrive"),
    ],
    queues: &[
        "parcels.booking",
        "parcels.wait-500",
        "parcels.wait-1000",
        "parcels.wait-2000",
        "parcels.dead",
    ],
    streams: &["PARCELS", "PARCELS_DEAD", "KV_PARCELS_FAILURES"],
};

const DEAD: Place = Place {
    topic: "parcels-dead",
    partitions: 1,
    group: "parcels-redrive",
    queue: "parcels.dead",
    stream: "PARCELS_DEAD",
};

/// Bytes that are no parcel, with a line break that would end a header.
const NOISE: &str = "two boxes,\r\nto Ghent";

/// Queues, topics and streams belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

/// A broker without parcels, and a carrier that has booked none.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: (&'static str, &'static str),
    /// Gone with the test.
    _folder: TempDir,
    file: String,
    carrier: Carrier,
}

struct Letter {
    payload: Vec<u8>,
    headers: HashMap<String, String>,
}

impl Shop {
    async fn open(broker: Broker) -> Result<Self> {
        let folder = TempDir::new()?;
        let file = folder.path().join("carrier.db");
        Ok(Self {
            broker,
            binary: PATTERN.binary(broker),
            variable: PATTERN.fresh(broker).await?,
            carrier: Carrier::open(&file)?,
            file: file.to_string_lossy().into_owned(),
            _folder: folder,
        })
    }

    /// A part of the program that ends by itself.
    async fn run(&self, words: &[&str]) -> Result<Ended> {
        let part = Example::start(self.binary, words, self.variable)?;
        part.end().await?.succeeded()
    }

    async fn send(&self, first: u64, last: u64) -> Result<()> {
        let (first, last) = (first.to_string(), last.to_string());
        self.run(&["producer", &first, &last]).await?;
        Ok(())
    }

    async fn send_noise(&self) -> Result<()> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                kafka::produce(address, "parcels-booking", "noise", NOISE).await?;
            }
            Broker::RabbitMq => {
                let (connection, channel) = rabbitmq::connect(address).await?;
                channel
                    .basic_publish(
                        "".into(),
                        "parcels.booking".into(),
                        BasicPublishOptions::default(),
                        NOISE.as_bytes(),
                        BasicProperties::default(),
                    )
                    .await?
                    .await?;
                connection.close(200, "".into()).await?;
            }
            Broker::Nats => {
                let jetstream = nats::jetstream(address).await?;
                jetstream
                    .publish("parcels.booking", NOISE.into())
                    .await?
                    .await?;
            }
        }
        Ok(())
    }

    async fn worker(&self, words: &[&str]) -> Result<Example> {
        let words = [&["worker", &self.file], words].concat();
        let mut worker = Example::start(self.binary, &words, self.variable)?;
        worker.prints("ready:").await?;
        Ok(worker)
    }

    /// When the carrier was asked about a parcel, in milliseconds since 1970.
    fn asked(&self, parcel: &str) -> Result<Vec<i64>> {
        let mut requests = self.carrier.requests()?;
        requests.retain(|request| request.parcel == parcel);
        Ok(requests.iter().map(|request| request.at).collect())
    }

    /// When a parcel was booked, each time that it was.
    fn booked(&self, parcel: &str) -> Result<Vec<i64>> {
        let mut requests = self.carrier.requests()?;
        requests.retain(|request| request.parcel == parcel && request.booked);
        Ok(requests.iter().map(|request| request.at).collect())
    }

    /// Waits until each of these is booked and nothing is left to do, and looks whether
    /// any was booked twice.
    async fn books(&self, parcels: &[u64]) -> Result<()> {
        let names = parcels.iter().map(|number| format!("parcel-{number}"));
        let names: Vec<String> = names.collect();
        wait::until("all bookings", async || {
            for name in &names {
                ensure!(!self.booked(name)?.is_empty(), "{name} is not booked");
            }
            let left = self.left().await?;
            ensure!(left == 0, "{left} are left");
            Ok(())
        })
        .await?;
        let requests = self.carrier.requests()?;
        let booked = requests.iter().filter(|request| request.booked).count();
        ensure!(booked == names.len(), "{requests:?}");
        Ok(())
    }

    /// How many parcels are to be booked yet, now or later.
    async fn left(&self) -> Result<u64> {
        let address = self.variable.1;
        let (group, mut left) = ("parcels-worker", 0);
        match self.broker {
            Broker::Kafka => {
                for (topic, _group) in &PATTERN.topics[..4] {
                    let lag = kafka::lag(address, topic, 1, group).await?;
                    left += u64::try_from(lag)?;
                }
            }
            Broker::RabbitMq => {
                for queue in &PATTERN.queues[..4] {
                    left += u64::from(rabbitmq::ready(address, queue).await?);
                }
            }
            Broker::Nats => left = self.stream("PARCELS").await?,
        }
        Ok(left)
    }

    async fn dead(&self) -> Result<u64> {
        DEAD.left(self.broker, self.variable.1).await
    }

    async fn stream(&self, name: &str) -> Result<u64> {
        let jetstream = nats::jetstream(self.variable.1).await?;
        let stream = jetstream.get_stream(name).await?;
        Ok(stream.get_info().await?.state.messages)
    }

    async fn has_dead(&self, count: u64) -> Result<()> {
        wait::until("the dead letters", async || {
            let dead = self.dead().await?;
            ensure!(dead == count, "{dead}, not {count}");
            Ok(())
        })
        .await
    }

    /// The dead letters, in their order. RabbitMQ gives them away.
    async fn letters(&self) -> Result<Vec<Letter>> {
        let address = self.variable.1;
        Ok(match self.broker {
            Broker::Kafka => {
                let letters = kafka::records(address, "parcels-dead").await?;
                let letter = |it: &rdkafka::message::OwnedMessage| {
                    let headers = it.headers().into_iter().flat_map(|it| it.iter());
                    let header = |it: rdkafka::message::Header<'_, &[u8]>| {
                        let value = it.value.unwrap_or_default();
                        let value = String::from_utf8_lossy(value);
                        (it.key.to_owned(), value.into_owned())
                    };
                    Letter {
                        payload: it.payload().unwrap_or_default().to_vec(),
                        headers: headers.map(header).collect(),
                    }
                };
                letters.iter().map(letter).collect()
            }
            Broker::RabbitMq => {
                let letters = rabbitmq::drain(address, "parcels.dead").await?;
                let letter = |it: lapin::message::BasicGetMessage| {
                    let headers = it.properties.headers().clone();
                    let headers = headers.unwrap_or_default();
                    let headers =
                        headers.inner().iter().filter_map(|(key, value)| {
                            let value = value.as_long_string()?;
                            Some((key.to_string(), value.to_string()))
                        });
                    Letter {
                        payload: it.data.clone(),
                        headers: headers.collect(),
                    }
                };
                letters.into_iter().map(letter).collect()
            }
            Broker::Nats => {
                let jetstream = nats::jetstream(address).await?;
                let stream = jetstream.get_stream("PARCELS_DEAD").await?;
                let mut letters = Vec::new();
                for sequence in 1..=stream.get_info().await?.state.last_sequence {
                    let it = stream.get_raw_message(sequence).await?;
                    let headers = it.headers.iter().map(|(key, values)| {
                        let value = values.last().map(ToString::to_string);
                        (key.to_string(), value.unwrap_or_default())
                    });
                    letters.push(Letter {
                        payload: it.payload.to_vec(),
                        headers: headers.collect(),
                    });
                }
                letters
            }
        })
    }

    fn dead_place(&self) -> &'static str {
        match self.broker {
            Broker::Kafka => "parcels-dead",
            Broker::RabbitMq => "parcels.dead",
            Broker::Nats => "PARCELS_DEAD",
        }
    }

    /// What the origin of a message says that was the so-manyth of a new line.
    fn origin(&self, number: u64) -> String {
        match self.broker {
            Broker::Kafka => format!("parcels-booking 0 {}", number - 1),
            Broker::RabbitMq => "parcels.booking".to_owned(),
            Broker::Nats => format!("PARCELS {number}"),
        }
    }
}

/// Ctrl-C, with a clean end. Returns all that it has said.
async fn stop(worker: Example) -> Result<String> {
    worker.interrupt().await?;
    let ended = worker.end().await?.succeeded()?;
    ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    Ok(ended.stdout)
}

#[tokio::test]
async fn the_stories_book_each_parcel_once() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

#[tokio::test]
async fn failures_wait_longer_each_time_hold_up_nobody_and_are_kept() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.carrier.fail("Ghent", 2)?; // parcel-2
        shop.carrier.fail("Turin", 1000)?; // parcel-4
        shop.send(1, 5).await?; // parcel-3 goes to Atlantis
        shop.send_noise().await?;
        let worker = shop.worker(&[]).await?;
        shop.has_dead(3).await?;
        shop.books(&[1, 2, 5]).await?;
        stop(worker).await?;

        for (parcel, attempts) in [("parcel-2", 3), ("parcel-4", 4)] {
            let asked = shop.asked(parcel)?;
            assert_eq!(asked.len(), attempts, "{parcel}");
            for (pair, delay) in asked.windows(2).zip(DELAYS) {
                let gap = pair[1] - pair[0];
                ensure!(gap >= milliseconds(delay), "{parcel}: {asked:?}");
            }
        }
        assert_eq!(shop.asked("parcel-3")?.len(), 1);
        // While one of them waited, those behind it were booked.
        let turin = shop.asked("parcel-4")?;
        let oslo = shop.booked("parcel-5")?;
        ensure!(
            oslo[0] > turin[0] && oslo[0] < turin[3],
            "{oslo:?} {turin:?}"
        );

        let letters = shop.letters().await?;
        let of = |payload: &[u8]| {
            let letter = letters.iter().find(|it| it.payload == payload);
            letter.context("a dead letter with these bytes")
        };
        let atlantis = of(&serde_json::to_vec(&parcel(3))?)?;
        is(
            atlantis,
            "1",
            "permanent",
            "no depot in Atlantis",
            &shop.origin(3),
        );
        let dead = of(&serde_json::to_vec(&parcel(4))?)?;
        is(
            dead,
            "4",
            "transient",
            "Turin does not answer",
            &shop.origin(4),
        );
        let first: i64 = dead.headers["first-failure"].parse()?;
        ensure!(turin[0] <= first && first < turin[1], "{first} {turin:?}");
        let noise = of(NOISE.as_bytes())?;
        let error = "no parcel: expected ident at line 1 column 2";
        is(noise, "1", "permanent", error, &shop.origin(6));
        Ok(())
    })
    .await
}

fn is(letter: &Letter, attempts: &str, kind: &str, error: &str, origin: &str) {
    let header = |key| letter.headers.get(key).map_or("", String::as_str);
    assert_eq!(header("attempts"), attempts);
    assert_eq!(header("error-kind"), kind);
    assert_eq!(header("error"), error);
    assert_eq!(header("origin"), origin);
}

/// Once on its way to the next attempt, and once on its way to the dead letters.
#[tokio::test]
async fn a_worker_killed_after_a_failure_loses_nothing() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.carrier.fail("Ghent", 1)?;
        shop.send(2, 2).await?;
        let mut first = shop.worker(&["--slow"]).await?;
        first.prints("failed:   parcel-2, attempt 1,").await?;
        first.prints("pause:").await?;
        first.kill().await?;
        shop.send(3, 3).await?;
        let mut second = shop.worker(&["--slow"]).await?;
        second.prints("failed:   parcel-3, attempt 1,").await?;
        second.prints("pause:").await?;
        second.kill().await?;

        let third = shop.worker(&[]).await?;
        shop.has_dead(1).await?;
        shop.books(&[2]).await?;
        stop(third).await?;
        let letters = shop.letters().await?;
        let bytes: Vec<_> = letters.iter().map(|it| &it.payload).collect();
        assert_eq!(bytes, [&serde_json::to_vec(&parcel(3))?]);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_redrive_empties_the_dead_letters_once_the_carrier_is_mended() -> Result<()>
{
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.carrier.fail("Turin", 1000)?;
        shop.send(3, 4).await?;
        // Dead in no time.
        let worker = shop.worker(&["--at-once"]).await?;
        shop.has_dead(2).await?;
        // With nothing mended they come back while it works, and it ends.
        let vain = shop.run(&["redrive", "--slow"]).await?;
        assert_eq!(
            vain.stdout.matches("redriven:").count(),
            2,
            "{}",
            vain.stdout
        );
        shop.has_dead(2).await?;
        stop(worker).await?;

        shop.carrier.mend()?;
        shop.carrier.fail("Turin", 1)?;
        let seen = shop.run(&["dead"]).await?.stdout;
        let kept = [
            "kept:     parcel-3, attempt 1 ",
            "kept:     parcel-4, attempt 4 ",
        ];
        ensure!(kept.iter().all(|it| seen.contains(it)), "{seen}");
        let name = shop.dead_place();
        let some = shop.run(&["redrive", "transient"]).await?;
        assert_eq!(
            some.stdout,
            format!("redriven: parcel-4\nleft:     1 in {name}\n")
        );
        shop.has_dead(1).await?;
        let rest = shop.run(&["redrive"]).await?;
        assert_eq!(
            rest.stdout,
            format!("redriven: parcel-3\nleft:     0 in {name}\n")
        );

        let worker = shop.worker(&[]).await?;
        shop.books(&[3, 4]).await?;
        let said = stop(worker).await?;
        // The count began anew: four attempts were over.
        let again = "failed:   parcel-4, attempt 1, Turin does not answer; again";
        ensure!(said.contains(again), "{said}");
        ensure!(said.contains("booked:   parcel-4, attempt 2\n"), "{said}");
        assert_eq!(shop.dead().await?, 0);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_killed_redrive_loses_nothing_and_books_nothing_twice() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.carrier.go_down(Duration::from_secs(3600))?;
        shop.send(1, 2).await?;
        let worker = shop.worker(&["--at-once"]).await?;
        shop.has_dead(2).await?;
        stop(worker).await?;
        let before = shop.carrier.requests()?.len();

        shop.carrier.mend()?;
        let mut killed =
            Example::start(shop.binary, &["redrive", "--slow"], shop.variable)?;
        killed.prints("redriven: parcel-1").await?;
        killed.prints("pause:").await?;
        killed.kill().await?;
        // It was sent back, and is still here.
        shop.has_dead(2).await?;
        let rest = shop.run(&["redrive"]).await?;
        let both = "redriven: parcel-1\nredriven: parcel-2\n";
        let name = shop.dead_place();
        assert_eq!(rest.stdout, format!("{both}left:     0 in {name}\n"));
        let worker = shop.worker(&[]).await?;
        shop.books(&[1, 2]).await?;
        let said = stop(worker).await?;
        // Twice on the way and known the second time; NATS has dropped the second.
        let known = said
            .matches("known:    parcel-1, not booked again\n")
            .count();
        let twice = usize::from(broker != Broker::Nats);
        assert_eq!(known, twice, "{said}");
        let requests = shop.carrier.requests()?.len() - before;
        assert_eq!(requests, 2 + twice, "{said}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_outage_of_two_seconds_is_survived() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        let worker = shop.worker(&[]).await?;
        shop.run(&["carrier", &shop.file, "down", "2"]).await?;
        shop.send(1, 2).await?;
        shop.books(&[1, 2]).await?;
        stop(worker).await?;
        assert_eq!(shop.dead().await?, 0);
        Ok(())
    })
    .await
}

/// As many attempts, and the same outage.
#[tokio::test]
async fn control_tried_again_at_once_all_parcels_are_dead() -> Result<()> {
    let _turn = TURN.lock().await;
    on_each(async |broker| {
        let shop = Shop::open(broker).await?;
        shop.run(&["carrier", &shop.file, "down", "2"]).await?;
        shop.send(1, 2).await?;
        let worker = shop.worker(&["--at-once"]).await?;
        shop.has_dead(2).await?;
        worker.interrupt().await?;
        let ended = worker.end().await?.succeeded()?;
        if broker == Broker::RabbitMq {
            ended.printed_what_the_book_shows("at-once")?;
        }
        let requests = shop.carrier.requests()?;
        assert_eq!(requests.len(), 8, "{requests:?}");
        ensure!(
            requests.iter().all(|request| !request.booked),
            "{requests:?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 7] = [
        &["producer", "5", "3"],
        &["consumer"],
        &["worker"],
        &["worker", "carrier.db", "--fast"],
        &["producer", "1", "many"],
        &["redrive", "some"],
        &["carrier", "carrier.db", "down", "long"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
