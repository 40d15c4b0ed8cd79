//! Reconnect: what a lost connection costs, and what comes back by itself.
//!
//! Teaches: the client connects again and subscribes again by itself. Publishes
//! wait in its memory meanwhile and are sent later, unless the process ends
//! before. Only events tell of it; no call fails.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_reconnect            # cuts its own connection
//! cargo run --bin nats_reconnect gateway    # then stop and start the server
//! ```
//!
//! Expected output:
//!
//! ```text
//! event:     connected
//! received:  reading 1
//! event:     disconnected
//! published: readings 2 to 6, without a connection
//! event:     connected
//! received:  reading 2
//! ...
//! received:  reading 6
//! ```
//!
//! Left out on purpose: several servers. With more than one address, the client
//! tries the others first; what it does is the same.

use std::{
    env,
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Subscriber,
};
use futures_lite::StreamExt as _;
use tokio::{
    sync::{
        Notify,
        mpsc::{self, Receiver},
    },
    time::{interval, timeout},
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const READINGS: &str = "edge.readings";
const COMMANDS: &str = "edge.commands";
const USAGE: &str = "usage: nats_reconnect [gateway]";

/// How often the gateway publishes a reading.
const TICK: Duration = Duration::from_millis(200);

/// How long anything may take that is possible only with a connection.
const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["gateway"] => gateway().await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let (client, mut events) = connect(ConnectOptions::new()).await?;
    wait_for(&mut events, &Event::Connected).await?;
    let mut readings = client.subscribe(READINGS).await?;
    client.publish(READINGS, "reading 1".into()).await?;
    receive(&mut readings).await?;

    // As if the server had gone. For the client it is the same.
    client.force_reconnect().await?;
    wait_for(&mut events, &Event::Disconnected).await?;
    for number in 2..=6 {
        // Ends at once: the reading waits in the client (`client_capacity`,
        // 2048 commands). A `flush` here would wait for the connection.
        let reading = format!("reading {number}");
        client.publish(READINGS, reading.into()).await?;
    }
    println!("published: readings 2 to 6, without a connection");

    wait_for(&mut events, &Event::Connected).await?;
    // The subscription is the old one; the client has renewed it, before it
    // sent the readings.
    for _number in 2..=6 {
        receive(&mut readings).await?;
    }
    client.drain().await?;
    Ok(())
}
// ANCHOR_END: story

async fn wait_for(events: &mut Receiver<Event>, wanted: &Event) -> Result<()> {
    let event = timeout(PATIENCE, events.recv())
        .await
        .with_context(|| format!("not {wanted} within 5 s"))?
        .context("the client has ended")?;
    println!("event:     {event}");
    if event != *wanted {
        bail!("that should have been: {wanted}");
    }
    Ok(())
}

async fn receive(readings: &mut Subscriber) -> Result<()> {
    let reading = timeout(PATIENCE, readings.next())
        .await
        .context("no reading came back within 5 s; may this user read edge.>?")?
        .context("the server ended the subscription")?;
    println!("received:  {}", String::from_utf8_lossy(&reading.payload));
    Ok(())
}

// ANCHOR: gateway
async fn gateway() -> Result<()> {
    // Without this, a gateway that starts before the server would just fail.
    let options = ConnectOptions::new().retry_on_initial_connect();
    let (client, mut events) = connect(options).await?;
    let mut commands = client.subscribe(COMMANDS).await?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut ticks = interval(TICK);
    let mut number = 0;
    let mut waiting = Vec::new();
    let mut connected = false;
    println!("ready: readings on {READINGS}, Ctrl-C to stop");
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            Some(event) = events.recv() => {
                println!("event: {event}");
                match event {
                    Event::Connected => { connected = true; waiting.clear(); }
                    Event::Disconnected => connected = false,
                    _ => {}
                }
            }
            command = commands.next() => {
                let command = command.context("the client has given up")?;
                println!("command: {}", String::from_utf8_lossy(&command.payload));
            }
            _ = ticks.tick() => {
                number += 1;
                publish(&client, number).await?;
                if !connected { waiting.push(number); }
            }
        }
    }
    finish(&client, &waiting).await
}
// ANCHOR_END: gateway

// ANCHOR: publish
async fn publish(client: &Client, number: u64) -> Result<()> {
    let reading = format!("reading {number}");
    // Waits when the client's memory for commands is full: an outage must not
    // stop the gateway for as long as it lasts.
    match timeout(TICK, client.publish(READINGS, reading.into())).await {
        Ok(published) => {
            published.context("the client has given up")?;
            println!("reading: {number}");
        }
        Err(_elapsed) => eprintln!("no room any more: reading {number} is dropped"),
    }
    Ok(())
}
// ANCHOR_END: publish

// ANCHOR: finish
/// Sends what waits. Without a connection, `flush` would wait for one for ever.
async fn finish(client: &Client, waiting: &[u64]) -> Result<()> {
    match timeout(PATIENCE, client.flush()).await {
        Ok(flushed) => flushed?,
        Err(_elapsed) => match waiting {
            [first, .., last] => bail!("not sent, lost: readings {first} to {last}"),
            [only] => bail!("not sent, lost: reading {only}"),
            [] => bail!("the connection takes nothing; something may be lost"),
        },
    }
    println!("stopped");
    Ok(())
}
// ANCHOR_END: finish

/// Ends on the first Ctrl-C or SIGTERM. A second one ends the program at once.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let stop = Arc::new(Notify::new());
    let asked = AtomicBool::new(false);
    let notify = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            // 130 is what a shell reports for a program that Ctrl-C ended.
            std::process::exit(130);
        }
        notify.notify_one();
    })?;
    Ok(async move { stop.notified().await })
}

// ANCHOR: connect
async fn connect(options: ConnectOptions) -> Result<(Client, Receiver<Event>)> {
    let url = env::var("NATS_URL").unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let server = url
        .parse()
        .ok()
        .filter(|server: &ServerAddr| !server.host().is_empty())
        .with_context(|| {
            format!("NATS_URL is not a NATS address; a right one: {DEFAULT_URL}")
        })?;
    // Only host and port are shown: the address may hold a password.
    let place = format!("{}:{}", server.host(), server.port());
    let (sender, events) = mpsc::channel(16);
    let client = options
        .event_callback(move |event| {
            let sender = sender.clone();
            async move {
                // Nobody listens any more when the program is about to end.
                sender.send(event).await.ok();
            }
        })
        // Before the first attempt too. The default grows up to 4 s; many
        // clients that wait equally long come back all at once, so a fleet
        // should add something random.
        .reconnect_delay_callback(|attempt| match attempt {
            0..10 => Duration::from_millis(200),
            _ => Duration::from_secs(2),
        })
        .connect(server)
        .await
        .map_err(|error| match error.kind() {
            ConnectErrorKind::AuthorizationViolation => anyhow!(
                "NATS at {place} refuses this user; check name and password in \
                 NATS_URL"
            ),
            _ => anyhow!(
                "no NATS server at {place} ({error}); start one: cargo lab up nats"
            ),
        })?;
    Ok((client, events))
}
// ANCHOR_END: connect
