//! Slow consumer: the client drops what a subscription has no room for.
//!
//! Teaches: messages wait in the client, in a buffer for each subscription. When
//! it is full, new ones are dropped: no error, only an event. So read at once,
//! keep what you need, and do the slow work elsewhere.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_slow_consumer
//! ```
//!
//! Expected output:
//!
//! ```text
//! busy:    arrived 1000, kept 500, the last one is from tick 4
//! event:   slow consumer, <n> times
//! reading: arrived 1000, kept 1000, the last one is from tick 9
//! event:   none
//! ```
//!
//! Left out on purpose: the server's side. It closes a connection that takes no
//! more bytes for ten seconds (`write_deadline`).

use std::{
    collections::BTreeMap,
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, RequestErrorKind, ServerAddr,
    Subscriber,
};
use futures_lite::StreamExt as _;
use tokio::time::{MissedTickBehavior, interval};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "telemetry.temperature";

/// Every sensor reports once in a tick.
const SENSORS: u32 = 100;
const TICKS: u32 = 10;
const TICK: Duration = Duration::from_millis(10);

/// How many messages a subscription holds that nobody has read. Small, to see it
/// full; the client's own default is 65536.
const ROOM: usize = 500;

#[tokio::main]
async fn main() -> ExitCode {
    match compare().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn compare() -> Result<()> {
    busy().await?;
    reading().await
}

// ANCHOR: busy
/// A dashboard that draws while the readings come, and reads them afterwards.
async fn busy() -> Result<()> {
    let dashboard = Dashboard::connect().await?;
    let mut readings = dashboard.client.subscribe(SUBJECT).await?;
    dashboard.measure().await?;

    // Ends the stream after what is in the buffer.
    readings.drain().await?;
    let seen = Seen::read(readings).await?;
    dashboard.report("busy:   ", &seen);
    Ok(())
}
// ANCHOR_END: busy

// ANCHOR: reading
/// A dashboard that reads in a task which does nothing else.
async fn reading() -> Result<()> {
    let dashboard = Dashboard::connect().await?;
    let readings = dashboard.client.subscribe(SUBJECT).await?;
    // It drains from now on: `Seen` keeps one value for each sensor, so there is
    // no second buffer that could overflow. Drawing may take its time.
    let reader = tokio::spawn(Seen::read(readings));
    dashboard.measure().await?;

    dashboard.client.drain().await?;
    let seen = reader.await??;
    dashboard.report("reading:", &seen);
    Ok(())
}
// ANCHOR_END: reading

// ANCHOR: seen
#[derive(Default)]
struct Seen {
    kept: u64,
    /// The newest tick of each sensor: an older one is of no use any more.
    latest: BTreeMap<u32, u32>,
}

impl Seen {
    async fn read(mut readings: Subscriber) -> Result<Self> {
        let mut seen = Self::default();
        while let Some(reading) = readings.next().await {
            let text = std::str::from_utf8(&reading.payload)?;
            let (tick, sensor) = text.split_once(' ').context("not a reading")?;
            seen.latest.insert(sensor.parse()?, tick.parse()?);
            seen.kept += 1;
        }
        Ok(seen)
    }
}
// ANCHOR_END: seen

struct Dashboard {
    client: Client,
    slow: Arc<AtomicU64>,
}

impl Dashboard {
    // ANCHOR: connect
    async fn connect() -> Result<Self> {
        let slow = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&slow);
        let options = ConnectOptions::new()
            .subscription_capacity(ROOM)
            // Without a callback nobody hears of a dropped message.
            .event_callback(move |event| {
                if let Event::SlowConsumer(_subscription) = event {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                std::future::ready(())
            });
        let client = connect(options).await?;
        Ok(Self { client, slow })
    }
    // ANCHOR_END: connect

    /// All sensors report, as fast as ever, whether anybody reads or not.
    async fn measure(&self) -> Result<()> {
        round_trip(&self.client).await?;
        let sensors = connect(ConnectOptions::new()).await?;
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 0..TICKS {
            ticks.tick().await;
            for sensor in 0..SENSORS {
                let reading = format!("{tick} {sensor}");
                sensors.publish(SUBJECT, reading.into()).await?;
            }
            round_trip(&sensors).await?;
        }
        // Behind the last reading: with this answer, all of them have arrived.
        round_trip(&self.client).await
    }

    fn report(&self, how: &str, seen: &Seen) {
        let arrived = self.client.statistics().in_messages.load(Ordering::Relaxed);
        println!(
            "{how} arrived {}, kept {}, the last one is from tick {}",
            arrived - 2, // the two answers in `measure`
            seen.kept,
            seen.latest.values().max().copied().unwrap_or_default()
        );
        match self.slow.load(Ordering::Relaxed) {
            0 => println!("event:   none"),
            times => println!("event:   slow consumer, {times} times"),
        }
    }
}

/// The server answers in order, so this returns after all that it had before.
async fn round_trip(client: &Client) -> Result<()> {
    match client.request("telemetry.nobody", "".into()).await {
        Err(error) if error.kind() != RequestErrorKind::NoResponders => {
            Err(error).context("the server does not answer")
        }
        _ => Ok(()),
    }
}

async fn connect(options: ConnectOptions) -> Result<Client> {
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
    options
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
        })
}
