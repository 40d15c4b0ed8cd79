//! A document of ten megabytes and a message of a hundred bytes, and no document but the
//! one that was meant.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use patterns::claim_check::{Claim, Digest, document};
use rdkafka::{Message as _, message::Headers as _};
use tempfile::TempDir;
use tests::{Example, example::Ended, observe};
use tokio::{io::AsyncReadExt as _, sync::Mutex};

use crate::common::Pattern;

const PATTERN: Pattern = Pattern {
    kafka: env!("CARGO_BIN_EXE_claim_check_kafka"),
    rabbitmq: env!("CARGO_BIN_EXE_claim_check_rabbitmq"),
    nats: env!("CARGO_BIN_EXE_claim_check_nats"),
    topics: &[
        (TOPIC, "invoice-archive"),
        (DEAD_TOPIC, "none"),
        ("invoice-documents", "none"),
    ],
    queues: &[QUEUE, DEAD_QUEUE, "invoice.documents"],
    streams: &[STREAM, "OBJ_invoice_documents"],
};
const TOPIC: &str = "invoice-claims";
const DEAD_TOPIC: &str = "invoice-claims-dead";
const PARTITIONS: i32 = 4;
const QUEUE: &str = "invoice.claims";
const DEAD_QUEUE: &str = "invoice.claims-dead";
const STREAM: &str = "INVOICE_CLAIMS";
const SUBJECT: &str = "invoice.claims";
const DEAD_SUBJECT: &str = "invoice.claims.dead";
const BUCKET: &str = "invoice_documents";

type Variable = (&'static str, &'static str);

/// Queue, topic and stream belong to the pattern, so its tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn the_stories_archive_the_right_document_and_no_other() -> Result<()> {
    let _turn = TURN.lock().await;
    PATTERN.stories().await
}

/// A broker with its store: a folder, or the object store of NATS.
struct Shop {
    broker: Broker,
    binary: &'static str,
    variable: Variable,
    folder: TempDir,
}

impl Shop {
    async fn fresh(broker: Broker, binary: &'static str) -> Result<Self> {
        Ok(Self {
            broker,
            binary,
            variable: PATTERN.fresh(broker).await?,
            folder: tempfile::tempdir()?,
        })
    }

    fn documents(&self) -> PathBuf {
        self.folder.path().join("documents")
    }

    /// Starts a role, with the folder behind these words where there is one.
    fn start(&self, words: &[&str], last: &[&str]) -> Result<Example> {
        let documents = self.documents();
        let documents = documents.to_string_lossy();
        let folder: &[&str] = match self.broker {
            Broker::Nats => &[],
            _ => &[&documents],
        };
        let words = [words, folder, last].concat();
        Example::start(self.binary, &words, self.variable)
    }

    async fn run(&self, words: &[&str]) -> Result<Ended> {
        self.start(words, &[])?.end().await?.succeeded()
    }

    /// Puts these bytes where a document is, or takes it away.
    async fn tamper(&self, digest: &str, bytes: Option<&[u8]>) -> Result<()> {
        if self.broker == Broker::Nats {
            let jetstream = observe::nats::jetstream(self.variable.1).await?;
            let bucket = jetstream.get_object_store(BUCKET).await?;
            match bytes {
                Some(mut bytes) => drop(bucket.put(digest, &mut bytes).await?),
                None => bucket.delete(digest).await?,
            }
            return Ok(());
        }
        let place = self.documents().join(digest);
        ensure!(place.exists(), "{digest} is not stored");
        match bytes {
            Some(bytes) => fs::write(place, bytes)?,
            None => fs::remove_file(place)?,
        }
        Ok(())
    }

    /// The names of all documents.
    async fn stored(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        if self.broker == Broker::Nats {
            let jetstream = observe::nats::jetstream(self.variable.1).await?;
            let bucket = jetstream.get_object_store(BUCKET).await?;
            let mut documents = bucket.list().await?;
            while let Some(document) = documents.next().await {
                names.push(document?.name);
            }
        } else {
            for entry in fs::read_dir(self.documents())? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// A document, as it is stored.
    async fn document(&self, digest: &str) -> Result<Vec<u8>> {
        if self.broker == Broker::Nats {
            let jetstream = observe::nats::jetstream(self.variable.1).await?;
            let bucket = jetstream.get_object_store(BUCKET).await?;
            let mut bytes = Vec::new();
            bucket.get(digest).await?.read_to_end(&mut bytes).await?;
            return Ok(bytes);
        }
        Ok(fs::read(self.documents().join(digest))?)
    }

    /// Publishes what no publisher of ours would.
    async fn publish(&self, payload: &[u8]) -> Result<()> {
        let address = self.variable.1;
        match self.broker {
            Broker::Kafka => {
                let text = str::from_utf8(payload)?;
                observe::kafka::produce(address, TOPIC, "stranger", text).await
            }
            Broker::RabbitMq => {
                let (connection, channel) =
                    observe::rabbitmq::connect(address).await?;
                let (options, properties) = Default::default();
                channel
                    .basic_publish(
                        "".into(),
                        QUEUE.into(),
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
                let payload = payload.to_vec().into();
                jetstream.publish(SUBJECT, payload).await?.await?;
                Ok(())
            }
        }
    }

    /// What the broker holds of these claims: all bytes of a message, and its payload.
    /// From a queue they are taken.
    async fn claims(&self) -> Result<Vec<(usize, Vec<u8>)>> {
        let address = self.variable.1;
        Ok(match self.broker {
            Broker::Kafka => kafka(address, TOPIC)
                .await?
                .into_iter()
                .map(|(size, _reason, payload)| (size, payload))
                .collect(),
            Broker::RabbitMq => observe::rabbitmq::drain(address, QUEUE)
                .await?
                .into_iter()
                .map(|message| (message.data.len(), message.data.clone()))
                .collect(),
            Broker::Nats => nats(address, SUBJECT)
                .await?
                .into_iter()
                .map(|(size, _reason, payload)| (size, payload))
                .collect(),
        })
    }

    /// Reasons and payloads of those that are dead, sorted.
    async fn dead(&self) -> Result<Vec<(String, String)>> {
        let address = self.variable.1;
        let dead = match self.broker {
            Broker::Kafka => kafka(address, DEAD_TOPIC).await?,
            Broker::Nats => nats(address, DEAD_SUBJECT).await?,
            Broker::RabbitMq => {
                let messages = observe::rabbitmq::drain(address, DEAD_QUEUE).await?;
                let dead = messages.iter().map(|message| {
                    let headers = message.properties.headers().clone();
                    let headers = headers.unwrap_or_default();
                    let reason = headers.inner().get("reason");
                    let reason = reason.and_then(|value| value.as_long_string());
                    let reason = reason.map(ToString::to_string);
                    (0, reason.unwrap_or_default(), message.data.clone())
                });
                dead.collect()
            }
        };
        let dead = dead.into_iter().map(|(_size, reason, payload)| {
            (reason, String::from_utf8_lossy(&payload).into_owned())
        });
        let mut dead: Vec<_> = dead.collect();
        dead.sort();
        Ok(dead)
    }
}

type Held = Vec<(usize, String, Vec<u8>)>;

async fn kafka(address: &str, topic: &str) -> Result<Held> {
    let records =
        observe::kafka::read_all(address, topic, PARTITIONS, "read_committed");
    let records = records.await?;
    let held = records.iter().map(|record| {
        let mut reason = String::new();
        let payload = record.payload().unwrap_or_default().to_vec();
        let mut size = payload.len() + record.key().unwrap_or_default().len();
        for header in record.headers().into_iter().flat_map(|all| all.iter()) {
            let value = header.value.unwrap_or_default();
            size += header.key.len() + value.len();
            reason = String::from_utf8_lossy(value).into_owned();
        }
        (size, reason, payload)
    });
    Ok(held.collect())
}

async fn nats(address: &str, subject: &str) -> Result<Held> {
    let jetstream = observe::nats::jetstream(address).await?;
    let mut stream = jetstream.get_stream(STREAM).await?;
    let state = stream.info().await?.state.clone();
    let mut held = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        // Acknowledged ones are gone.
        let Ok(message) = stream.get_raw_message(sequence).await else {
            continue;
        };
        if message.subject.as_str() != subject {
            continue;
        }
        let reason = message.headers.get("Reason");
        let reason = reason.map(ToString::to_string).unwrap_or_default();
        let payload = message.payload.to_vec();
        held.push((payload.len() + reason.len(), reason, payload));
    }
    Ok(held)
}

#[tokio::test]
async fn the_message_stays_below_a_kibibyte_and_the_document_is_whole() -> Result<()>
{
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let shop = Shop::fresh(broker, binary).await?;
        shop.run(&["publish", "1", "2"]).await?;
        let claims = shop.claims().await?;
        assert_eq!(claims.len(), 2, "{broker:?}");
        for (size, payload) in &claims {
            ensure!(*size < 1024, "{broker:?}: {size} bytes in a message");
            let claim: serde_json::Value = serde_json::from_slice(payload)?;
            let digest = claim["sha256"].as_str().context("a digest")?;
            let stored = shop.document(digest).await?;
            assert_eq!(stored.len(), 10_000_000, "{broker:?}");
            assert_eq!(Digest::of(&stored).as_str(), digest, "{broker:?}");
        }
        // Published again, it is the same document.
        shop.run(&["publish", "1", "2"]).await?;
        assert_eq!(shop.stored().await?.len(), 2, "{broker:?}");
    }
    Ok(())
}

/// One good claim among those with which something is wrong; all are dealt with.
#[tokio::test]
async fn what_does_not_match_goes_to_the_dead_ones_with_the_reason() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let shop = Shop::fresh(broker, binary).await?;
        shop.run(&["publish", "1", "5"]).await?;
        let claims: Vec<Claim> = (1..=5)
            .map(|number| Claim::new(format!("invoice-{number}"), &document(number)))
            .collect();
        let digest = |number: usize| claims[number - 1].sha256.as_str();
        // One bit, the last byte, one byte more, everything.
        let mut changed = document(1);
        changed[5_000_000] ^= 1;
        shop.tamper(digest(1), Some(&changed)).await?;
        shop.tamper(digest(2), Some(&document(2)[..9_999_999]))
            .await?;
        let longer = [&document(3)[..], b"\n"].concat();
        shop.tamper(digest(3), Some(&longer)).await?;
        shop.tamper(digest(4), None).await?;
        // A file that is there, by a path that leads to it, with its right length.
        let secret = shop.folder.path().join("secret");
        fs::write(&secret, "the key of the shop")?;
        let outside = |path: &str| {
            let claim = serde_json::json!({
                "invoice": "invoice-6", "sha256": path, "length": 19,
            });
            claim.to_string()
        };
        let paths = ["../secret", &secret.to_string_lossy()].map(outside);
        for path in &paths {
            shop.publish(path.as_bytes()).await?;
        }
        shop.publish(b"\x01").await?;
        let huge = serde_json::json!({
            "invoice": "invoice-7", "sha256": digest(5), "length": u64::MAX,
        });
        shop.publish(huge.to_string().as_bytes()).await?;

        let mut archive = shop.start(&["archive"], &[])?;
        let mut lines = Vec::new();
        // In any order, as Kafka has it.
        while lines.len() < 9 {
            let line = archive.prints(": ").await?;
            if !line.starts_with("ready:") {
                lines.push(line);
            }
        }
        archive.interrupt().await?;
        archive.end().await?.succeeded()?;
        lines.retain(|line| !line.starts_with("dead:"));
        let archived = "archived:  invoice-5, 10000000 bytes, the right ones";
        assert_eq!(lines, [archived], "{broker:?}");

        let claim = |number: usize| serde_json::to_string(&claims[number - 1]);
        let mut expected = vec![
            ("another digest".to_owned(), claim(1)?),
            ("9999999 bytes instead of 10000000".to_owned(), claim(2)?),
            ("more than 10000000 bytes".to_owned(), claim(3)?),
            ("no such document".to_owned(), claim(4)?),
            ("not a claim".to_owned(), "\u{1}".to_owned()),
            (
                "claims 18446744073709551615 bytes, too many".to_owned(),
                huge.to_string(),
            ),
        ];
        for path in paths {
            expected.push(("not a claim".to_owned(), path));
        }
        expected.sort();
        assert_eq!(shop.dead().await?, expected, "{broker:?}");

        // Done with: none comes again.
        shop.run(&["publish", "9", "9"]).await?;
        let mut archive = shop.start(&["archive"], &[])?;
        archive.prints("archived:  invoice-9").await?;
        archive.interrupt().await?;
        let ended = archive.end().await?.succeeded()?;
        ensure!(!ended.stdout.contains("dead:"), "{}", ended.stdout);
    }
    Ok(())
}

/// Between the two steps: the document is there, and nobody has heard of it.
#[tokio::test]
async fn a_publisher_that_dies_leaves_an_orphan_that_a_sweep_finds() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let shop = Shop::fresh(broker, binary).await?;
        let died = shop.start(&["publish", "1", "1"], &["--die"])?;
        let died = died.end().await?;
        let said = died.refused("invoice-1 is stored, and its publisher dies");
        said.with_context(|| format!("{broker:?}"))?;
        assert_eq!(shop.claims().await?, [], "{broker:?}");
        let orphan = Claim::new("invoice-1".to_owned(), &document(1));
        assert_eq!(shop.stored().await?, [orphan.sha256.as_str()], "{broker:?}");

        let early = shop.run(&["sweep", "3600"]).await?;
        assert_eq!(early.stdout, "swept:     0 documents\n", "{broker:?}");
        let sweep = shop.run(&["sweep", "0"]).await?;
        assert_eq!(sweep.stdout, "swept:     1 documents\n", "{broker:?}");
        assert_eq!(shop.stored().await?, [""; 0], "{broker:?}");
    }
    Ok(())
}

/// Killed anywhere, as often as it takes: no claim is without its document.
#[tokio::test]
async fn a_killed_publisher_has_told_of_no_document_that_is_not_there() -> Result<()>
{
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let shop = Shop::fresh(broker, binary).await?;
        // The other way round: what is being written once more has a claim already.
        for kill in [3, 2, 1, 3, 2, 1] {
            let mut publisher = shop.start(&["publish", "1", "1000"], &[])?;
            publisher.prints(&format!("invoice-{kill},")).await?;
            publisher.kill().await?;
        }
        shop.run(&["publish", "2000", "2000"]).await?;
        let claims = shop.claims().await?;
        ensure!(claims.len() >= 13, "{broker:?}: {} claims", claims.len());
        for (_size, payload) in &claims {
            let claim: Claim = serde_json::from_slice(payload)?;
            let document = shop.document(claim.sha256.as_str()).await;
            let document = document.with_context(|| claim.invoice.clone())?;
            let found = claim.check(&document);
            ensure!(found.is_ok(), "{broker:?}: {} {found:?}", claim.invoice);
        }
    }
    Ok(())
}

/// What happens to a document in one message: two brokers refuse it, the third holds it.
#[tokio::test]
async fn control_a_whole_document_is_refused_or_lies_in_the_broker() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        let shop = Shop::fresh(broker, binary).await?;
        let address = shop.variable.1;
        let whole = async |megabytes| {
            let words = ["whole", megabytes];
            let whole = Example::start(binary, &words, shop.variable)?;
            whole.end().await?.succeeded()
        };
        let ten = whole("10").await?;
        ten.printed_what_the_book_shows("whole")?;
        match broker {
            Broker::RabbitMq => {
                ensure!(ten.stdout.starts_with("taken:"), "{}", ten.stdout);
                let queue = "invoice.documents";
                let held = observe::rabbitmq::drain(address, queue).await?;
                let sizes: Vec<_> = held.iter().map(|it| it.data.len()).collect();
                assert_eq!(sizes, [10_000_000]);
                let twenty = whole("20").await?;
                twenty.printed_what_the_book_shows("too-large")?;
                ensure!(twenty.stdout.starts_with("refused:"), "{}", twenty.stdout);
                let held = observe::rabbitmq::drain(address, queue).await?;
                assert_eq!(held.len(), 0);
            }
            Broker::Kafka | Broker::Nats => {
                ensure!(ten.stdout.starts_with("refused:"), "{}", ten.stdout);
                let held = match broker {
                    Broker::Kafka => kafka(address, "invoice-documents").await?,
                    _ => nats(address, SUBJECT).await?,
                };
                assert_eq!(held.len(), 0, "{broker:?}");
            }
        }
    }
    Ok(())
}

/// Neither archived nor dead: the claim stays until the store can be read.
#[cfg(unix)]
#[tokio::test]
async fn while_the_store_cannot_be_read_no_claim_is_given_up() -> Result<()> {
    let _turn = TURN.lock().await;
    for (broker, binary) in PATTERN.binaries() {
        if broker == Broker::Nats {
            // Store and broker are one.
            continue;
        }
        let shop = Shop::fresh(broker, binary).await?;
        shop.run(&["publish", "1", "1"]).await?;
        let claim = Claim::new("invoice-1".to_owned(), &document(1));
        let place = shop.documents().join(claim.sha256.as_str());
        let whole = fs::read(&place)?;
        fs::remove_file(&place)?;
        // A folder is there and cannot be read as a file, also by root.
        fs::create_dir(&place)?;
        let ended = shop.start(&["archive"], &[])?.end().await?;
        let line = ended.stderr.lines().last().unwrap_or_default();
        let said = line.starts_with("error: cannot read invoice-1");
        ensure!(said, "{broker:?}: {}", ended.stderr);
        assert_eq!(shop.dead().await?, [], "{broker:?}");

        mend(&place, &whole)?;
        let mut archive = shop.start(&["archive"], &[])?;
        archive.prints("archived:  invoice-1").await?;
        archive.interrupt().await?;
        archive.end().await?.succeeded()?;
    }
    Ok(())
}

fn mend(place: &Path, document: &[u8]) -> Result<()> {
    fs::remove_dir(place)?;
    Ok(fs::write(place, document)?)
}

#[tokio::test]
async fn wrong_words_get_the_usage_and_no_broker_one_line() -> Result<()> {
    let wrong: [&[&str]; 6] = [
        &["publish", "1"],
        &["publish", "5", "3"],
        &["publish", "5", "3", "x"],
        &["publish", "1", "many", "x"],
        &["whole", "0"],
        &["sweep", "soon"],
    ];
    PATTERN.says_what_is_wrong(&wrong).await
}
