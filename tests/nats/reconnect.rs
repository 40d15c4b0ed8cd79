//! The client comes back by itself, with its subscription and with what waited;
//! what waits in a process that ends is lost.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::stream;
use futures_lite::StreamExt as _;
use lab::broker::Broker;
use tests::{Example, TestBroker, example::Ended, observe, wait};
use tokio::{sync::Mutex, time::timeout};

use crate::nats;

const RECONNECT: &str = env!("CARGO_BIN_EXE_nats_reconnect");
const READINGS: &str = "edge.readings";
const COMMANDS: &str = "edge.commands";

/// The subjects belong to the example; tests with a server of their own need no
/// turn.
static TURN: Mutex<()> = Mutex::const_new(());

/// A server that keeps the readings on disk, for the test to look at: a plain
/// observer could be back after the gateway and miss some.
async fn server() -> Result<(TestBroker, String)> {
    let server = TestBroker::start(Broker::Nats).await?;
    let address = server.address().to_owned();
    let jetstream = observe::nats::jetstream(&address).await?;
    jetstream
        .create_stream(stream::Config {
            name: "OBSERVED_READINGS".to_owned(),
            subjects: vec![READINGS.to_owned()],
            ..Default::default()
        })
        .await?;
    Ok((server, address))
}

/// The numbers of all readings that the server has.
async fn readings(address: &str) -> Result<Vec<u64>> {
    let jetstream = observe::nats::jetstream(address).await?;
    let stream = jetstream.get_stream("OBSERVED_READINGS").await?;
    let mut numbers = Vec::new();
    for sequence in 1..=stream.cached_info().state.messages {
        let message = stream.get_raw_message(sequence).await?;
        let text = std::str::from_utf8(&message.payload)?;
        numbers.push(text.strip_prefix("reading ").context("?")?.parse()?);
    }
    Ok(numbers)
}

async fn gateway(address: &str) -> Result<Example> {
    let address = ("NATS_URL", address);
    let mut gateway = Example::start(RECONNECT, &["gateway"], address)?;
    gateway.prints("ready: ").await?;
    Ok(gateway)
}

/// The number of the next reading that the gateway publishes.
async fn next_reading(gateway: &mut Example) -> Result<u64> {
    let line = gateway.prints("reading: ").await?;
    Ok(line.strip_prefix("reading: ").context("?")?.parse()?)
}

/// The numbers of five readings that the gateway publishes without a server.
async fn five_in_the_outage(gateway: &mut Example) -> Result<Vec<u64>> {
    gateway.prints("event: disconnected").await?;
    let mut numbers = Vec::new();
    for _ in 0..5 {
        numbers.push(next_reading(gateway).await?);
    }
    Ok(numbers)
}

#[tokio::test]
async fn the_story_gets_back_what_it_published_without_a_connection() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, READINGS).await?;
    let ended = Example::start(RECONNECT, &[], nats)?.end().await?;
    ended.succeeded()?.printed_what_its_header_says()?;
    for number in 1..=6 {
        let reading = timeout(wait::DEADLINE, seen.next())
            .await?
            .context("the subscription ended")?;
        assert_eq!(reading.payload, format!("reading {number}"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_outage_the_subscription_and_five_waiting_readings_are_back()
-> Result<()> {
    let (mut server, address) = server().await?;
    let mut gateway = gateway(&address).await?;
    gateway.prints("event: connected").await?;
    next_reading(&mut gateway).await?;
    server.kill().await?;
    let waited = five_in_the_outage(&mut gateway).await?;
    server.restart().await?;
    gateway.prints("event: connected").await?;

    wait::until("the readings of the outage", async || {
        let stored = readings(&address).await?;
        let there = |number| stored.iter().filter(|n| *n == number).count() == 1;
        ensure!(waited.iter().all(there), "{waited:?} in {stored:?}");
        Ok(())
    })
    .await?;
    let observer = observe::nats::connect(&address).await?;
    observer.publish(COMMANDS, "open valve 7".into()).await?;
    observer.flush().await?;
    gateway.prints("command: open valve 7").await?;

    gateway.terminate().await?;
    let ended = gateway.end().await?.succeeded()?;
    ensure!(ended.stdout.ends_with("stopped\n"), "{}", ended.stdout);
    let events: Vec<_> = ended
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        // One for each attempt in vain.
        .filter(|event| *event != "client error: nats: IO error")
        .collect();
    assert_eq!(events, ["connected", "disconnected", "connected"]);
    Ok(())
}

/// The control: the same outage, and a process that ends in it.
#[tokio::test(flavor = "multi_thread")]
async fn control_what_waits_in_a_killed_process_is_lost() -> Result<()> {
    let (mut server, address) = server().await?;
    let mut killed = gateway(&address).await?;
    killed.prints("event: connected").await?;
    next_reading(&mut killed).await?;
    server.kill().await?;
    let waited = five_in_the_outage(&mut killed).await?;
    killed.kill().await?;
    server.restart().await?;
    let stored = readings(&address).await?;
    let there = waited.iter().filter(|n| stored.contains(n)).count();
    assert_eq!(there, 0, "{waited:?} in {stored:?}");
    Ok(())
}

/// And one that is asked to stop says what it could not send.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_stops_in_an_outage_names_what_is_lost() -> Result<()> {
    let (mut server, address) = server().await?;
    let mut gateway = gateway(&address).await?;
    gateway.prints("event: connected").await?;
    server.kill().await?;
    let waited = five_in_the_outage(&mut gateway).await?;
    gateway.terminate().await?;
    let ended = gateway.end().await?;
    let line = ended.one_line_error()?;
    let (first, last) = line
        .strip_prefix("error: not sent, lost: readings ")
        .and_then(|numbers| numbers.split_once(" to "))
        .with_context(|| line.to_owned())?;
    assert_eq!(first.parse::<u64>()?, waited[0]);
    ensure!(last.parse::<u64>()? >= waited[4], "{line}");
    // The number of readings and of attempts differs from run to run.
    let recorded = Ended {
        stdout: String::new(),
        stderr: "error: not sent, lost: readings <n> to <n>\n".to_owned(),
        ..ended
    };
    recorded.printed_what_the_book_shows("outage")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_starts_before_the_server_loses_no_reading() -> Result<()> {
    let (mut server, address) = server().await?;
    server.kill().await?;
    let mut gateway = gateway(&address).await?;
    assert_eq!(next_reading(&mut gateway).await?, 1);
    server.restart().await?;
    gateway.prints("event: connected").await?;
    gateway.terminate().await?;
    let ended = gateway.end().await?.succeeded()?;
    let printed = ended.stdout.matches("reading: ").count() as u64;
    let expected: Vec<_> = (1..=printed).collect();
    // What it has flushed may still be on its way.
    wait::until("all readings", async || {
        let stored = readings(&address).await?;
        ensure!(stored == expected, "{stored:?} of {printed}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_about_to_go_says_so() -> Result<()> {
    let (server, address) = server().await?;
    let mut gateway = gateway(&address).await?;
    gateway.prints("event: connected").await?;
    let observer = observe::nats::connect(&address).await?;
    server.signal("USR2").await?;
    gateway.prints("event: lame duck mode detected").await?;

    // It takes no new client, but still serves the old ones: there is time to
    // go elsewhere.
    let mut seen = observe::nats::subscribe(&observer, READINGS).await?;
    let reading = timeout(wait::DEADLINE, seen.next()).await?;
    ensure!(reading.is_some(), "no reading any more");
    let new = observe::nats::connect(&address).await;
    ensure!(new.is_err(), "it takes a new client");
    gateway.terminate().await?;
    gateway.end().await?.succeeded()?;
    Ok(())
}

#[tokio::test]
async fn an_unknown_role_gets_the_usage_and_status_2() -> Result<()> {
    let nowhere = ("NATS_URL", "nats://localhost:1");
    let ended = Example::start(RECONNECT, &["server"], nowhere)?
        .end()
        .await?;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.starts_with("usage: nats_reconnect"));
    Ok(())
}
