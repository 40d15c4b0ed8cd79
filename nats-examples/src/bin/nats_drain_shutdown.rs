//! Graceful shutdown: a member of a queue group leaves without dropping its work.
//!
//! Teaches: on SIGTERM, drain the subscription, work off what has arrived until
//! the stream ends, flush the answers, then end. A draining connection takes no
//! publish any more, so the subscription is drained first, and alone.
//!
//! Run, after `cargo lab up nats`:
//!
//! ```text
//! cargo run --bin nats_drain_shutdown                      # the whole story
//! cargo run --bin nats_drain_shutdown worker               # terminal 1, and 2
//! cargo run --bin nats_drain_shutdown publisher            # terminal 3
//! cargo run --bin nats_drain_shutdown worker --no-drain    # the mistake
//! ```
//!
//! Expected output:
//!
//! ```text
//! members 1 and 2 are ready, queue group label-printers
//! ordered: 100 labels, all answered
//! member 1 stopped: received <n>, printed <n>
//! ordered: 200 labels during its restart, all answered
//! member 2 stopped: received <n>, printed <n>
//! ordered: 200 labels during its restart, all answered
//! ```
//!
//! Left out on purpose: labels that must never be printed twice. An order that
//! is asked for again may be one whose answer was lost.

use std::{
    env,
    future::Future,
    ops::Range,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use async_nats::{
    Client, ConnectErrorKind, Message, Request, RequestErrorKind, ServerAddr,
    Subscriber,
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::sleep,
};

const DEFAULT_URL: &str = "nats://localhost:4222";
const SUBJECT: &str = "shipments.label";
const GROUP: &str = "label-printers";
/// Where a printed label is announced.
const PRINTED: &str = "shipments.labelled";
const USAGE: &str = "usage: nats_drain_shutdown [publisher | worker [--no-drain]]";

/// How long a label takes: long enough that labels wait in the member's memory.
const WORK: Duration = Duration::from_millis(5);

/// How many orders wait for their answer at a time.
const IN_FLIGHT: usize = 32;

/// How often an order is tried, and how long each try may take.
const TRIES: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => story().await,
        ["publisher"] => publisher().await,
        ["worker"] => worker(Leave::Drain).await,
        ["worker", "--no-drain"] => worker(Leave::AtOnce).await,
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

#[derive(Clone, Copy)]
enum Leave {
    Drain,
    /// The mistake: what waits in the client's memory dies with the process.
    AtOnce,
}

// ---- The whole story in one process ----------------------------------------

// ANCHOR: story
async fn story() -> Result<()> {
    let client = connect().await?;
    let (stop_1, member_1) = start_member().await?;
    let (stop_2, member_2) = start_member().await?;
    println!("members 1 and 2 are ready, queue group {GROUP}");
    order(&client, 0..100).await?;
    println!("ordered: 100 labels, all answered");

    // One after the other, as a rolling restart does, and orders keep coming.
    let mut next = 100;
    let mut new_members = Vec::new();
    for (name, stop, member) in [(1, stop_1, member_1), (2, stop_2, member_2)] {
        let restart = async {
            new_members.push(start_member().await?);
            // Nobody listens if the member has failed; `member` has the reason.
            stop.send(()).ok();
            let stopped = member.await??;
            println!("member {name} stopped: {stopped}");
            Ok::<_, anyhow::Error>(())
        };
        let orders = order(&client, next..next + 200);
        // Either error ends the other half.
        tokio::try_join!(orders, restart)?;
        next += 200;
        println!("ordered: 200 labels during its restart, all answered");
    }
    for (stop, member) in new_members {
        stop.send(()).ok();
        member.await??;
    }
    Ok(())
}

type Member = (oneshot::Sender<()>, JoinHandle<Result<String>>);

/// Each member has a connection of its own, as a process of its own would.
async fn start_member() -> Result<Member> {
    let client = connect().await?;
    let labels = join_group(&client).await?;
    let (stop, stopped) = oneshot::channel();
    let stop_signal = async move {
        // A sender that is gone means stop, too.
        stopped.await.ok();
    };
    let member =
        tokio::spawn(print_labels(client, labels, stop_signal, Leave::Drain));
    Ok((stop, member))
}
// ANCHOR_END: story

// ---- Worker ----------------------------------------------------------------

async fn worker(leave: Leave) -> Result<()> {
    let client = connect().await?;
    let labels = join_group(&client).await?;
    let stop = stop_signal()?;
    println!("waiting for labels on {SUBJECT}, Ctrl-C to stop");
    let stopped = print_labels(client, labels, stop, leave).await?;
    println!("stopped: {stopped}");
    Ok(())
}

// ANCHOR: join
async fn join_group(client: &Client) -> Result<Subscriber> {
    let labels = client.queue_subscribe(SUBJECT, GROUP.into()).await?;
    // The server answers in order: with this answer, it knows the subscription.
    // A flush only writes it to the socket.
    match client.request("shipments.nobody", "".into()).await {
        Err(error) if error.kind() != RequestErrorKind::NoResponders => {
            Err(error).context("the server does not answer")
        }
        _ => Ok(labels),
    }
}
// ANCHOR_END: join

// ANCHOR: worker
async fn print_labels(
    client: Client,
    mut labels: Subscriber,
    stop: impl Future<Output = ()>,
    leave: Leave,
) -> Result<String> {
    let mut printed = 0_u64;
    tokio::pin!(stop);
    loop {
        let label = tokio::select! {
            biased;
            () = &mut stop => break,
            label = labels.next() => label,
        };
        print_label(&client, &label.context("the subscription ended")?).await?;
        printed += 1;
    }
    if let Leave::Drain = leave {
        // Only asks: the server sends no more, and the stream ends after what
        // has arrived. Whoever does not read on to that end has drained nothing.
        labels.drain().await?;
        while let Some(label) = labels.next().await {
            print_label(&client, &label).await?;
            printed += 1;
        }
    }
    // `client.drain()` here, before the loop above, would refuse the answers.
    client.flush().await?;
    // Whatever this connection has received, but for the answer in `join_group`.
    let received = client.statistics().in_messages.load(Ordering::Relaxed) - 1;
    Ok(format!("received {received}, printed {printed}"))
}
// ANCHOR_END: worker

async fn print_label(client: &Client, label: &Message) -> Result<()> {
    sleep(WORK).await;
    client.publish(PRINTED, label.payload.clone()).await?;
    // A label that was only published has nobody who waits for an answer.
    if let Some(reply_to) = &label.reply {
        client.publish(reply_to.clone(), "printed".into()).await?;
    }
    Ok(())
}

// ANCHOR: stop
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
// ANCHOR_END: stop

// ---- Publisher -------------------------------------------------------------

async fn publisher() -> Result<()> {
    let client = connect().await?;
    order(&client, 0..1000).await?;
    println!("ordered: 1000 labels, all answered");
    Ok(())
}

// ANCHOR: order
async fn order(client: &Client, numbers: Range<u32>) -> Result<()> {
    stream::iter(numbers)
        .map(|number| order_one(client, number))
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<()>()
        .await
}

/// Core NATS delivers at most once. An order that must not be lost needs an
/// answer, and is sent again when none comes.
async fn order_one(client: &Client, number: u32) -> Result<()> {
    for _try in 0..TRIES {
        let request = Request::new()
            .payload(format!("label {number}").into())
            .timeout(Some(PATIENCE));
        match client.send_request(SUBJECT, request).await {
            Ok(_printed) => return Ok(()),
            Err(error) if error.kind() == RequestErrorKind::TimedOut => {}
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                bail!("no member of {GROUP}; start a worker")
            }
            Err(error) => return Err(error).context("cannot order a label"),
        }
    }
    bail!("label {number} was not answered in {TRIES} tries")
}
// ANCHOR_END: order

async fn connect() -> Result<Client> {
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
    async_nats::connect(server)
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
