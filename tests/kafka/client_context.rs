//! A wrong password is spotted in the context of the client, which is the only
//! place where a producer hears of it.

use anyhow::{Result, ensure};
use tests::{Example, kafka::Kafka, observe};
use tokio::sync::OnceCell;

const CLIENT_CONTEXT: &str = env!("CARGO_BIN_EXE_kafka_client_context");
const TOPIC: &str = "context.orders";

/// The settings that a reader starts a Kafka with.
const SETTINGS: &str =
    include_str!("../../kafka-examples/config/kafka_client_context.properties");

/// One Kafka for all tests here.
async fn kafka() -> Result<&'static Kafka> {
    static KAFKA: OnceCell<Kafka> = OnceCell::const_new();
    KAFKA.get_or_try_init(|| Kafka::start(SETTINGS, &[])).await
}

#[tokio::test]
async fn a_wrong_password_is_spotted_and_delivers_nothing() -> Result<()> {
    let kafka = kafka().await?;
    let address = ("KAFKA_BROKERS", kafka.address());
    let ended = Example::start(CLIENT_CONTEXT, &[], address)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;

    // Of three orders the one with the right password.
    let records = observe::kafka::records(kafka.inside(), TOPIC).await?;
    assert_eq!(records.len(), 1, "{records:?}");
    // The producer, and the consumer; both tried more than once.
    let log = kafka.log().await?;
    let failed = "Authentication failed: Invalid username or password";
    let told = log.lines().filter(|line| line.contains(failed)).count();
    ensure!(told >= 2, "Kafka's log tells of {told} wrong passwords");
    Ok(())
}

/// Without a word on the way, the first thing that the example does is refused.
#[tokio::test]
async fn the_wrong_password_of_a_reader_is_one_line() -> Result<()> {
    let kafka = kafka().await?;
    let variables = [
        ("KAFKA_BROKERS", kafka.address()),
        ("KAFKA_PASSWORD", "a-guess"),
    ];
    let example = Example::start_with(CLIENT_CONTEXT, &[], &variables)?;
    let mut ended = example.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("does not let orders in"), "{line}");
    ensure!(!line.contains("a-guess"), "the password is shown: {line}");
    let text = &ended.stdout;
    ensure!(text.contains("code=Authentication"), "{text}");
    // The port is another one on each run.
    for text in [&mut ended.stdout, &mut ended.stderr] {
        *text = text.replace(kafka.address(), "<address>");
    }
    ended.printed_what_the_book_shows("password")?;
    Ok(())
}

/// What librdkafka logs in detail comes as events too, each with its client; and
/// the password is not in them.
#[tokio::test]
async fn details_are_logged_if_asked_for() -> Result<()> {
    let kafka = kafka().await?;
    let variables = [
        ("KAFKA_BROKERS", kafka.address()),
        ("KAFKA_DEBUG", "security"),
        ("KAFKA_PASSWORD", "a-guess"),
    ];
    let example = Example::start_with(CLIENT_CONTEXT, &[], &variables)?;
    let ended = example.end().await?;
    let text = &ended.stdout;
    for part in [
        "DEBUG kafka: ",
        "Broker supported SASL mechanisms: PLAIN",
        r#"client="admin" facility="SASLMECHS""#,
    ] {
        ensure!(text.contains(part), "{part:?} is not in: {text}");
    }
    ensure!(!text.contains("a-guess"), "the password is shown: {text}");
    Ok(())
}
