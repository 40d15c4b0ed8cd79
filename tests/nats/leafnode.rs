//! The till works without the office, which misses what was live and catches up
//! with what is stored.

use anyhow::{Result, ensure};
use async_nats::jetstream;
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{
    Example,
    nats::{Server, Servers},
    observe,
    wait::{self, DEADLINE},
};

const LEAFNODE: &str = env!("CARGO_BIN_EXE_nats_leafnode");

/// The configurations that a reader starts the servers with.
const OFFICE: &str = include_str!("../../nats-examples/config/leafnode/office.conf");
const TILL: &str = include_str!("../../nats-examples/config/leafnode/till.conf");

async fn servers() -> Result<Servers> {
    let ports: [u16; 3] = Servers::ports()?;
    let config = |text: &str| {
        let pairs = [4222, 4223, 7422].into_iter().zip(ports);
        pairs.fold(text.to_owned(), |text, (written, port)| {
            text.replace(&format!(":{written}"), &format!(":{port}"))
        })
    };
    let [office, till] = [("office", OFFICE, ports[0]), ("till", TILL, ports[1])]
        .map(|(name, text, port)| Server {
            name,
            config: config(text),
            port,
        });
    Servers::start(&[office, till], &[]).await
}

fn start(servers: &Servers, words: &[&str]) -> Result<Example> {
    let (office, till) = (servers.url("office")?, servers.url("till")?);
    let variables = [("NATS_URL", office.as_str()), ("NATS_TILL_URL", &till)];
    Example::start_with(LEAFNODE, words, &variables)
}

/// The payloads in a stream, asked at the server that has it.
async fn stored(url: &str, domain: &str, stream: &str) -> Result<Vec<String>> {
    let client = observe::nats::connect(url).await?;
    let jetstream = jetstream::with_domain(client, domain);
    let mut stream = jetstream.get_stream(stream).await?;
    let last = stream.info().await?.state.last_sequence;
    let mut stored = Vec::new();
    for sequence in 1..=last {
        let message = stream.get_raw_message(sequence).await?;
        stored.push(String::from_utf8(message.payload.to_vec())?);
    }
    Ok(stored)
}

fn sales(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("sale-{n}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_till_sells_without_the_office_which_catches_up() -> Result<()> {
    let mut servers = servers().await?;
    for _run in 0..2 {
        let ended = start(&servers, &[])?.end().await?;
        ended.succeeded()?.printed_what_its_header_says()?;
    }
    let office = servers.url("office")?;
    let till = servers.url("till")?;
    assert_eq!(stored(&office, "office", "OFFICE_SALES").await?, sales(3));

    servers.kill("office").await?;
    // The control: without a stream, the same message is for nobody.
    let observer = observe::nats::connect(&till).await?;
    observer.publish("leaf.live", "sale-lost".into()).await?;
    observe::nats::round_trip(&observer).await?;
    let ended = start(&servers, &["till"])?.end().await?.succeeded()?;
    ensure!(ended.stdout.contains("till:   6 sales"), "{}", ended.stdout);
    assert_eq!(stored(&till, "till", "TILL_SALES").await?, sales(6));
    let ended = start(&servers, &["office"])?.end().await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("config/leafnode/office.conf"), "{line}");

    servers.restart("office").await?;
    let back = observe::nats::connect(&office).await?;
    let mut live = observe::nats::subscribe(&back, "leaf.live").await?;
    // By itself, before anybody asks: the server copies. It has looked for the
    // till's stream before the line was up, and looks again after 10 s, then after
    // 20 s, and so on.
    wait::within(DEADLINE * 3, "six sales", async || {
        let stored = stored(&office, "office", "OFFICE_SALES").await?;
        ensure!(stored == sales(6), "{stored:?}");
        Ok(())
    })
    .await?;
    let ended = start(&servers, &["office"])?.end().await?.succeeded()?;
    ensure!(
        ended.stdout
            == "office: 6 sales are in OFFICE_SALES here, none is missing\n",
        "{}",
        ended.stdout
    );
    ended.printed_what_the_book_shows("back")?;
    ensure!(
        poll_once(live.next()).await.is_none(),
        "an old live message"
    );
    Ok(())
}

/// One server is not enough, and the example says what is.
#[tokio::test]
async fn a_single_server_is_one_line_that_says_what_is_needed() -> Result<()> {
    let (_, url) = crate::nats().await?;
    let variables = [("NATS_URL", url), ("NATS_TILL_URL", url)];
    let ended = Example::start_with(LEAFNODE, &[], &variables)?
        .end()
        .await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("config/leafnode/office.conf"), "{line}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_word_gets_the_usage_and_status_2() -> Result<()> {
    let ended = Example::start(LEAFNODE, &["nobody"], ("NATS_URL", "nats://x"))?;
    let ended = ended.end().await?;
    assert_eq!(ended.status.code(), Some(2));
    ensure!(ended.stderr.starts_with("usage: nats_leafnode"));
    Ok(())
}
