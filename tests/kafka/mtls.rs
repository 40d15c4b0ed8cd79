//! A certificate is a user, who may do what is permitted to it and nothing else;
//! who has none, or a wrong one, does not get in.

use anyhow::{Context as _, Result, ensure};
use certs::CLIENT;
use tests::{Example, example::Ended, kafka::Kafka, observe, tls::Files};
use tokio::sync::OnceCell;

use crate::tls::{second_opinion, with_listener};

const MTLS: &str = env!("CARGO_BIN_EXE_kafka_mtls");
const ORDERS: &str = "mtls.orders";
const BILLING: &str = "mtls-billing";

/// The settings that a reader starts a Kafka with.
const SETTINGS: &str =
    include_str!("../../kafka-examples/config/kafka_mtls.properties");

struct Shop {
    kafka: Kafka,
    files: Files,
}

/// One Kafka for all tests that change nothing in it. Beside the listener of the
/// settings there are two that show certificates which are to be refused.
async fn shop() -> Result<&'static Shop> {
    static SHOP: OnceCell<Shop> = OnceCell::const_new();
    let open = async || {
        let settings = with_listener(SETTINGS, "EXPIRED", "expired-server");
        let settings = with_listener(&settings, "ELSEWHERE", "wrong-host-server");
        Shop::open(&settings).await
    };
    SHOP.get_or_try_init(open).await
}

impl Shop {
    async fn open(settings: &str) -> Result<Self> {
        let files = Files::make()?;
        let kafka = Kafka::start(settings, &files.for_server()).await?;
        Ok(Self { kafka, files })
    }

    /// Runs the example with the right settings but for these.
    async fn run(&self, changed: &[(&str, &str)]) -> Result<Ended> {
        let path = |name| self.files.path(name);
        let (ca, certificate, key) =
            (path("ca.pem"), path("client.pem"), path("client.key"));
        let right = [
            ("KAFKA_BROKERS", self.kafka.address()),
            ("KAFKA_CA", &ca),
            ("KAFKA_CERT", &certificate),
            ("KAFKA_KEY", &key),
        ];
        // Of two values the later one counts.
        let variables = [&right[..], changed].concat();
        Example::start_with(MTLS, &[], &variables)?.end().await
    }
}

#[tokio::test]
async fn the_certificate_is_the_user_with_its_permissions() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[]).await?.succeeded()?;
    ended.printed_what_its_header_says()?;

    // Through the listener that asks for no certificate.
    let inside = shop.kafka.inside();
    let records = observe::kafka::records(inside, ORDERS).await?;
    let last = records.last().context("no order")?;
    assert_eq!(
        observe::kafka::text(last),
        ("order-1".into(), "1 kettle".into())
    );
    let committed = observe::kafka::committed(inside, ORDERS, BILLING).await?;
    assert_eq!(committed, i64::try_from(records.len()).ok());
    let topics = observe::kafka::topics(inside).await?;
    ensure!(!topics.contains(&"mtls.refunds".to_owned()), "{topics:?}");

    // Kafka's own record of who was denied what.
    let log = shop.kafka.log().await?;
    let user = format!("Principal = User:{CLIENT} is Denied");
    for resource in ["Topic:LITERAL:mtls.refunds", "Group:LITERAL:mtls-audit"] {
        let mut denials = log.lines().filter(|line| line.contains(&user));
        let denied = denials.any(|line| line.contains(resource));
        ensure!(denied, "the log does not tell that {resource} was denied");
    }
    Ok(())
}

#[tokio::test]
async fn a_client_is_refused_without_a_certificate_or_with_a_foreign_one()
-> Result<()> {
    let shop = shop().await?;
    let none = [("KAFKA_CERT", ""), ("KAFKA_KEY", "")];
    let mut ended = shop.run(&none).await?;
    ended.refused("asks for a certificate; set KAFKA_CERT")?;
    // The port is another one on each run.
    ended.stderr = ended.stderr.replace(shop.kafka.address(), "<address>");
    ended.printed_what_the_book_shows("nobody")?;

    // By nobody whom Kafka trusts; then a server's, which is not for clients.
    for name in ["foreign-client", "server"] {
        let certificate = shop.files.path(&format!("{name}.pem"));
        let key = shop.files.path(&format!("{name}.key"));
        let other = [
            ("KAFKA_CERT", certificate.as_str()),
            ("KAFKA_KEY", key.as_str()),
        ];
        let ended = shop.run(&other).await?;
        ended.refused(&format!("does not accept {certificate}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_kafka_is_refused_that_is_not_who_it_should_be() -> Result<()> {
    let shop = shop().await?;
    let words = "does not hold: by another authority than KAFKA_CA, for another \
                 host, or expired";
    let foreign = shop.files.path("foreign-ca.pem");
    let ended = shop.run(&[("KAFKA_CA", &foreign)]).await?;
    let opinion = second_opinion(ended.refused(words)?)?;
    ensure!(opinion.contains("unable to get local issuer"), "{opinion}");
    for (listener, reason) in [
        ("EXPIRED", "certificate has expired"),
        ("ELSEWHERE", "hostname mismatch"),
    ] {
        let address = shop.kafka.address_of(listener)?;
        let ended = shop.run(&[("KAFKA_BROKERS", &address)]).await?;
        let opinion = second_opinion(ended.refused(words)?)?;
        ensure!(opinion.contains(reason), "{listener}: {opinion}");
    }
    let ended = shop.run(&[("KAFKA_BROKERS", shop.kafka.inside())]).await?;
    ended.refused("speaks no TLS")?;
    Ok(())
}

#[tokio::test]
async fn a_missing_file_is_named_with_the_command_that_makes_it() -> Result<()> {
    let shop = shop().await?;
    let ended = shop.run(&[("KAFKA_KEY", "nowhere.key")]).await?;
    ended.refused("cannot read nowhere.key; make it: cargo run")?;
    let foreign = shop.files.path("foreign-client.key");
    let ended = shop.run(&[("KAFKA_KEY", &foreign)]).await?;
    ended.refused("key values mismatch")?;
    Ok(())
}

/// What is permitted can be taken back while everything runs: first the group,
/// then the topic, and each is one line. Then all of it is open, as it is without
/// an authorizer, and the example says that too.
#[tokio::test]
async fn what_is_not_permitted_is_named() -> Result<()> {
    let shop = Shop::open(SETTINGS).await?;
    shop.run(&[]).await?.succeeded()?;
    let acl = async |change: &str| {
        shop.kafka.run(&format!("kafka-acls.sh {change}")).await
    };
    let acls = acl("--list").await?;
    ensure!(acls.contains("principal=User:app"), "{acls}");

    acl("--remove --force --group mtls-billing").await?;
    let ended = shop.run(&[]).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("does not permit mtls-billing"), "{line}");
    ended.printed_what_the_book_shows("group")?;

    acl("--remove --force --topic mtls.orders").await?;
    let ended = shop.run(&[]).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("does not permit mtls.orders"), "{line}");
    let records = observe::kafka::records(shop.kafka.inside(), ORDERS).await?;
    assert_eq!(records.len(), 2, "a denied order is in the topic");
    Ok(())
}

/// The control: without an authorizer a certificate is not worth more than none.
#[tokio::test]
async fn control_without_an_authorizer_nothing_is_denied() -> Result<()> {
    let lines = SETTINGS.lines();
    let open: Vec<_> = lines
        .filter(|line| !line.starts_with("authorizer.class.name="))
        .filter(|line| !line.starts_with('#'))
        .collect();
    let shop = Shop::open(&open.join("\n")).await?;
    observe::kafka::create_topic(shop.kafka.inside(), "mtls.refunds").await?;
    let ended = shop.run(&[]).await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("Kafka permits everything"), "{line}");
    Ok(())
}
