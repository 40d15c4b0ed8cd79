//! Mock cluster: something like Kafka inside your program, for your own tests.
//!
//! Teaches: librdkafka brings a simulated cluster that any client can use, good
//! enough to try producers and consumers where no Kafka can be had. It is not
//! Kafka: nothing is stored on disk, there is no administration, no security.
//!
//! Run, and give the address that it prints to another example:
//!
//! ```text
//! cargo run --bin kafka_mock_cluster
//! KAFKA_BROKERS=127.0.0.1:40001 cargo run --bin kafka_producer
//! ```
//!
//! Expected output:
//!
//! ```text
//! mock cluster ready: KAFKA_BROKERS=<address>
//! this is a simulation and forgets all when it ends, Ctrl-C to stop
//! stopped
//! ```
//!
//! Left out on purpose: injected errors and slow brokers, which the mock cluster
//! can also play.

use std::{
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Result, anyhow};
use rdkafka::mocking::MockCluster;
use tokio::sync::Notify;

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: serve
async fn serve() -> Result<()> {
    // Lives as long as this value: dropped, it takes its port with it.
    let cluster = MockCluster::new(1)
        .map_err(|error| anyhow!("cannot start the mock cluster: {error}"))?;
    let stop = stop_signal()?;
    println!(
        "mock cluster ready: KAFKA_BROKERS={}",
        cluster.bootstrap_servers()
    );
    println!("this is a simulation and forgets all when it ends, Ctrl-C to stop");
    stop.await;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: serve

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
