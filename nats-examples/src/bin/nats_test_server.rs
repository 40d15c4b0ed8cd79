//! Testing: one throw-away server for each test.
//!
//! Teaches: a test that starts its own `nats-server`, on a free port and with an
//! empty folder, meets no message of another test and leaves none behind. The
//! server ends with the value that holds it, even when the test panics.
//!
//! Run, with `nats-server` in the `PATH` or named in `NATS_SERVER`:
//!
//! ```text
//! cargo run --bin nats_test_server
//! cargo test --bin nats_test_server -- --ignored    # the tests in this file
//! ```
//!
//! Expected output:
//!
//! ```text
//! started: server 1, port <port>
//! started: server 2, port <port>
//! placed:  1 order on server 1
//! counted: server 1 has 1 order, server 2 has 0
//! dropped: both servers and their folders are gone
//! ```
//!
//! Left out on purpose: a SIGKILL of the test itself. Nothing is dropped then,
//! and the server goes on; containers with a watcher of their own help there.

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::{self, stream};
use serde::Deserialize;
use tokio::time::{Instant, sleep};

const SERVER_VAR: &str = "NATS_SERVER";
const DEFAULT_PROGRAM: &str = "nats-server";
const STREAM: &str = "SHOP_ORDERS";
const SUBJECT: &str = "shop.orders";

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(8);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// ANCHOR: story
async fn story() -> Result<()> {
    let (first, second) = (TestServer::start().await?, TestServer::start().await?);
    println!("started: server 1, port {}", first.port);
    println!("started: server 2, port {}", second.port);

    let orders = OrderService::new(&first.url()).await?;
    orders.place("1 lamp").await?;
    println!("placed:  1 order on server 1");
    let others = OrderService::new(&second.url()).await?;
    println!(
        "counted: server 1 has {} order, server 2 has {}",
        orders.count().await?,
        others.count().await?
    );

    let folders = [first.folder.clone(), second.folder.clone()];
    drop((first, second));
    ensure!(
        !folders.iter().any(|folder| folder.exists()),
        "a folder is left"
    );
    println!("dropped: both servers and their folders are gone");
    Ok(())
}
// ANCHOR_END: story

// ---- What is tested --------------------------------------------------------

struct OrderService {
    jetstream: jetstream::Context,
}

impl OrderService {
    async fn new(url: &str) -> Result<Self> {
        let client = async_nats::connect(url).await?;
        let jetstream = jetstream::new(client);
        jetstream
            .get_or_create_stream(stream::Config {
                name: STREAM.to_owned(),
                subjects: vec![SUBJECT.to_owned()],
                ..Default::default()
            })
            .await?;
        Ok(Self { jetstream })
    }

    /// Returns when the order is stored.
    async fn place(&self, order: &str) -> Result<u64> {
        let order = order.to_owned().into();
        let stored = self.jetstream.publish(SUBJECT, order).await?.await?;
        Ok(stored.sequence)
    }

    async fn count(&self) -> Result<u64> {
        let stream = self.jetstream.get_stream(STREAM).await?;
        Ok(stream.cached_info().state.messages)
    }
}

// ---- The server of a test --------------------------------------------------

// ANCHOR: server
/// A `nats-server` of its own; dropped, it is killed and its folder removed.
struct TestServer {
    process: Child,
    port: u16,
    folder: PathBuf,
}

impl TestServer {
    async fn start() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nats-test-{}-{number}", std::process::id());
        let folder = env::temp_dir().join(name);
        fs::create_dir(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let process = spawn(&folder).inspect_err(|_error| {
            // Nothing holds the folder yet; if it stays, it is empty.
            let _ = fs::remove_dir(&folder);
        })?;
        // From here on, every `?` drops the server.
        let mut server = Self {
            process,
            port: 0,
            folder,
        };
        server.port = server.listening().await?;
        Ok(server)
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port, once the server has written it down: then it is listening.
    async fn listening(&mut self) -> Result<u16> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(port) = port_in(&self.folder)? {
                return Ok(port);
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("nats-server ended while starting ({status})");
            }
            if Instant::now() > deadline {
                bail!("nats-server was not ready after {PATIENCE:?}");
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure. Without `wait` the process stays
        // in the process table, and its files may be in use.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
// ANCHOR_END: server

// ANCHOR: spawn
fn spawn(folder: &Path) -> Result<Child> {
    let program = env::var(SERVER_VAR).unwrap_or_else(|_| DEFAULT_PROGRAM.into());
    Command::new(&program)
        // -1: any free port. A fixed one may be taken, by the next test too.
        .args(["--addr", "127.0.0.1", "--port", "-1", "--jetstream"])
        .arg("--store_dir")
        .arg(folder.join("data"))
        .arg("--ports_file_dir")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow!(
                "no program {program}; install nats-server, or name one in \
                 {SERVER_VAR}"
            ),
            _ => anyhow!("cannot start {program} ({error})"),
        })
}

#[derive(Deserialize)]
struct Ports {
    nats: Vec<String>,
}

fn port_in(folder: &Path) -> Result<Option<u16>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|end| end != "ports") {
            continue;
        }
        // Not complete yet: the next look finds it so.
        let Ok(ports) = serde_json::from_slice::<Ports>(&fs::read(&path)?) else {
            return Ok(None);
        };
        let url = ports.nats.first().context("the server has no port")?;
        let (_, port) = url.rsplit_once(':').context("a port")?;
        return Ok(Some(port.parse()?));
    }
    Ok(None)
}
// ANCHOR_END: spawn

// ANCHOR: tests
#[cfg(test)]
mod tests {
    use super::*;

    // Two tests with one stream and one subject, at the same time. On a shared
    // server one of them would count the order of the other.
    #[tokio::test]
    #[ignore = "starts nats-server"]
    async fn the_first_order_has_number_1() -> Result<()> {
        let server = TestServer::start().await?;
        let orders = OrderService::new(&server.url()).await?;
        assert_eq!(orders.place("1 lamp").await?, 1);
        assert_eq!(orders.count().await?, 1);
        Ok(())
    }

    #[tokio::test]
    #[ignore = "starts nats-server"]
    async fn three_orders_are_counted() -> Result<()> {
        let server = TestServer::start().await?;
        let orders = OrderService::new(&server.url()).await?;
        for order in ["1 lamp", "2 chairs", "1 table"] {
            orders.place(order).await?;
        }
        assert_eq!(orders.count().await?, 3);
        Ok(())
    }
}
// ANCHOR_END: tests
