//! Who has the password gets in, over TLS, at the Kafka whom the client trusts;
//! everybody else is refused for a reason that is told in one line.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rdkafka::{
    ClientConfig,
    admin::AdminClient,
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use tests::{Example, example::Ended, kafka::Kafka, observe, tls::Files};
use tokio::{sync::OnceCell, task::spawn_blocking};

use crate::tls::{second_opinion, with_listener};

const SASL_SCRAM: &str = env!("CARGO_BIN_EXE_kafka_sasl_scram");
const TOPIC: &str = "scram.orders";

/// The settings that a reader starts a Kafka with.
const SETTINGS: &str =
    include_str!("../../kafka-examples/config/kafka_sasl_scram.properties");

/// One Kafka for all tests here. Beside the listener of the settings there are
/// two that show certificates which are to be refused.
struct Shop {
    kafka: Kafka,
    files: Files,
}

async fn shop() -> Result<&'static Shop> {
    static SHOP: OnceCell<Shop> = OnceCell::const_new();
    let open = async || {
        let files = Files::make()?;
        let settings = with_listener(SETTINGS, "EXPIRED", "expired-server");
        let settings = with_listener(&settings, "ELSEWHERE", "wrong-host-server");
        let kafka = Kafka::start(&settings, &files.for_server()).await?;
        Ok::<_, anyhow::Error>(Shop { kafka, files })
    };
    SHOP.get_or_try_init(open).await
}

impl Shop {
    /// Runs the example with the right settings but for these.
    async fn run(&self, changed: &[(&str, &str)]) -> Result<Ended> {
        let ca = self.files.path("ca.pem");
        let right = [("KAFKA_BROKERS", self.kafka.address()), ("KAFKA_CA", &ca)];
        // Of two values the later one counts.
        let variables = [&right[..], changed].concat();
        Example::start_with(SASL_SCRAM, &[], &variables)?
            .end()
            .await
    }

    /// What a client of the test needs to get in.
    fn client(&self, password: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.kafka.address())
            .set("security.protocol", "SASL_SSL")
            .set("sasl.mechanism", "SCRAM-SHA-512")
            .set("sasl.username", "orders")
            .set("sasl.password", password)
            .set("ssl.ca.location", self.files.path("ca.pem"));
        config
    }
}

#[tokio::test]
async fn the_right_password_delivers() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[]).await?.succeeded()?;
    ended.printed_what_its_header_says()?;
    shop.run(&[]).await?.succeeded()?;

    // Through the listener that asks for no password.
    let records = observe::kafka::records(shop.kafka.inside(), TOPIC).await?;
    let texts: Vec<_> = records.iter().map(observe::kafka::text).collect();
    let order = ("order-1".to_owned(), "1 kettle".to_owned());
    assert_eq!(texts, [order.clone(), order]);
    Ok(())
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_are_refused() -> Result<()> {
    let shop = shop().await?;
    let wrong = ("KAFKA_PASSWORD", "a-guess");
    let mut ended = shop.run(&[wrong]).await?;
    let words = "does not let orders in with this password";
    let line = ended.refused(words)?;
    ensure!(!line.contains(wrong.1), "the password is shown: {line}");
    // The port is another one on each run.
    ended.stderr = ended.stderr.replace(shop.kafka.address(), "<address>");
    ended.printed_what_the_book_shows("password")?;

    let ended = shop.run(&[("KAFKA_USER", "nobody")]).await?;
    ended.refused("does not let nobody in with this password")?;
    Ok(())
}

/// librdkafka says the same in all three cases; the command in the line does not.
#[tokio::test]
async fn a_certificate_that_does_not_hold_is_refused() -> Result<()> {
    let shop = shop().await?;
    let words = "does not hold: by another authority than KAFKA_CA, for another \
                 host, or expired";

    let foreign = shop.files.path("foreign-ca.pem");
    let mut ended = shop.run(&[("KAFKA_CA", &foreign)]).await?;
    let opinion = second_opinion(ended.refused(words)?)?;
    ensure!(opinion.contains("unable to get local issuer"), "{opinion}");
    ended.stderr = ended.stderr.replace(shop.kafka.address(), "<address>");
    ended.stderr = ended.stderr.replace(&foreign, "certs/foreign-ca.pem");
    ended.printed_what_the_book_shows("foreign")?;

    for (listener, reason) in [
        ("EXPIRED", "certificate has expired"),
        ("ELSEWHERE", "hostname mismatch"),
    ] {
        let address = shop.kafka.address_of(listener)?;
        let ended = shop.run(&[("KAFKA_BROKERS", &address)]).await?;
        let opinion = second_opinion(ended.refused(words)?)?;
        ensure!(opinion.contains(reason), "{listener}: {opinion}");
    }

    // Without a file, whom the system trusts; that is not us.
    shop.run(&[("KAFKA_CA", "")]).await?.refused(words)?;
    Ok(())
}

#[tokio::test]
async fn a_kafka_without_tls_is_refused() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[("KAFKA_BROKERS", shop.kafka.inside())]).await?;
    ended.refused("speaks no TLS")?;
    Ok(())
}

#[tokio::test]
async fn a_missing_file_is_named_with_the_command_that_makes_it() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[("KAFKA_CA", "nowhere.pem")]).await?;
    ended.refused("cannot read nowhere.pem; make it: cargo run")?;
    Ok(())
}

/// The control to the lines above: what is left of a wrong password where nobody
/// listens to the client's reports.
#[tokio::test]
async fn control_a_producer_alone_only_says_that_time_is_up() -> Result<()> {
    let shop = shop().await?;
    let topic = "scram.careless";
    observe::kafka::create_topic(shop.kafka.inside(), topic).await?;
    let send = async |password: &str| {
        let producer: FutureProducer = shop
            .client(password)
            .set("message.timeout.ms", "2000")
            .create()?;
        let record = FutureRecord::to(topic).key("order-1").payload("1 kettle");
        let sent = producer.send(record, Duration::ZERO).await;
        Ok::<_, anyhow::Error>(sent.map_err(|(error, _record)| error))
    };
    let timed_out = RDKafkaErrorCode::MessageTimedOut;
    match send("a-guess").await? {
        Err(KafkaError::MessageProduction(code)) if code == timed_out => {}
        other => bail!("not a time-out: {other:?}"),
    }
    let records = observe::kafka::records(shop.kafka.inside(), topic).await?;
    assert!(records.is_empty(), "it got in: {records:?}");

    send("orders-password").await??;
    let records = observe::kafka::records(shop.kafka.inside(), topic).await?;
    assert_eq!(records.len(), 1);
    Ok(())
}

/// The control to the listener: it takes neither plain text nor TLS alone.
#[tokio::test]
async fn control_nobody_gets_in_without_tls_and_password() -> Result<()> {
    let shop = shop().await?;
    for (protocol, gets_in) in
        [("PLAINTEXT", false), ("SSL", false), ("SASL_SSL", true)]
    {
        let client: AdminClient<DefaultClientContext> = shop
            .client("orders-password")
            .set("security.protocol", protocol)
            .create()?;
        let patience = Duration::from_secs(2);
        let asked =
            spawn_blocking(move || client.inner().fetch_metadata(None, patience));
        let asked = asked.await?.map(drop);
        ensure!(asked.is_ok() == gets_in, "{protocol}: {asked:?}");
    }
    Ok(())
}
