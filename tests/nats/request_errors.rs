//! Each way to get no answer has its kind, and a payload above the limit costs
//! neither the connection nor another message.

use anyhow::{Context as _, Result, ensure};
use async_nats::ServerAddr;
use futures_lite::{StreamExt as _, future::poll_once};
use tests::{Example, observe, wait::DEADLINE};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    sync::Mutex,
    time::timeout,
};

use crate::nats;

const REQUEST_ERRORS: &str = env!("CARGO_BIN_EXE_nats_request_errors");
const NOT_DEPLOYED: &str = "request_errors.stock.reserve";
const ON_HAND: &str = "request_errors.stock.on_hand";

/// A responder of another test would answer.
static TURN: Mutex<()> = Mutex::const_new(());

/// The kinds and their times are in the header; the observer sees what left the
/// client: one question of the time-out, one after the four errors.
#[tokio::test]
async fn four_errors_and_only_what_is_allowed_leaves_the_client() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut seen = observe::nats::subscribe(&observer, ON_HAND).await?;

    let ended = Example::start(REQUEST_ERRORS, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;
    let limit = observer.max_payload();
    let full = format!("limit of {limit} exceeded by message size of {}", limit + 1);
    ensure!(ended.stdout.contains(&full), "{}", ended.stdout);

    observe::nats::round_trip(&observer).await?;
    let mut payloads = Vec::new();
    while let Some(Some(message)) = poll_once(seen.next()).await {
        payloads.push(String::from_utf8_lossy(&message.payload).into_owned());
    }
    assert_eq!(payloads, ["no such sku", "sku-1"]);
    Ok(())
}

/// The same question, with a listener that does not answer: "no responders" is
/// a time-out now, and the next step is another one.
#[tokio::test]
async fn a_silent_listener_turns_no_responders_into_a_time_out() -> Result<()> {
    let _turn = TURN.lock().await;
    let nats = nats().await?;
    let observer = observe::nats::connect(nats.1).await?;
    let mut silent = observe::nats::subscribe(&observer, NOT_DEPLOYED).await?;

    let ended = Example::start(REQUEST_ERRORS, &[], nats)?.end().await?;
    let ended = ended.succeeded()?;
    timeout(DEADLINE, silent.next()).await?.context("none")?;
    ended.printed_what_the_book_shows("silent")
}

/// The control: a client that does not look at the limit loses its connection,
/// and the message behind the large one with it.
#[tokio::test]
async fn control_sent_all_the_same_it_ends_the_connection() -> Result<()> {
    let _turn = TURN.lock().await;
    let address = nats().await?.1;
    let observer = observe::nats::connect(address).await?;
    let mut seen = observe::nats::subscribe(&observer, ON_HAND).await?;
    let size = observer.max_payload() + 1;

    let server: ServerAddr = address.parse()?;
    let careless = TcpStream::connect((server.host(), server.port())).await?;
    let mut careless = BufReader::new(careless);
    let mut line = String::new();
    careless.read_line(&mut line).await?;
    ensure!(line.starts_with("INFO "), "{line}");
    // The server refuses the announced size without waiting for the payload.
    let large = format!(
        "CONNECT {{\"verbose\":false}}\r\nPUB {ON_HAND} {size}\r\n\
         PUB {ON_HAND} 5\r\nsku-1\r\n"
    );
    careless.write_all(large.as_bytes()).await?;
    let refused = async {
        let mut said = String::new();
        while careless.read_line(&mut said).await? > 0 {}
        Ok::<_, anyhow::Error>(said)
    };
    let said = timeout(DEADLINE, refused).await??;
    ensure!(said.contains("Maximum Payload Violation"), "{said}");

    observe::nats::round_trip(&observer).await?;
    let nothing = poll_once(seen.next()).await;
    assert!(nothing.is_none(), "{nothing:?}");
    Ok(())
}
