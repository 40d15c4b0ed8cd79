//! A throw-away server for each test: alone, and gone afterwards.

use std::{env, fs, net::TcpStream, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use lab::{native, workspace};
use tests::Example;
use tokio::{process::Command, task::spawn_blocking};

const TEST_SERVER: &str = env!("CARGO_BIN_EXE_nats_test_server");

/// The program that the example starts.
async fn program() -> Result<String> {
    let program = spawn_blocking(native::nats_server).await??;
    Ok(program.to_string_lossy().into_owned())
}

/// A folder in which the example's own temporary folders can be counted.
fn temporary(name: &str) -> Result<PathBuf> {
    let folder = env::temp_dir().join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn is_empty_then_remove(folder: &PathBuf) -> Result<()> {
    let left = fs::read_dir(folder)?.count();
    ensure!(left == 0, "{left} folders are left in {}", folder.display());
    fs::remove_dir(folder)?;
    Ok(())
}

#[tokio::test]
async fn two_servers_share_nothing_and_leave_nothing() -> Result<()> {
    let program = program().await?;
    let folder = temporary("nats-story")?;
    let shown = folder.to_string_lossy();
    let variables = [("NATS_SERVER", &*program), ("TMPDIR", &*shown)];
    let ended = Example::start_with(TEST_SERVER, &[], &variables)?
        .end()
        .await?;
    let ended = ended.succeeded()?;
    ended.printed_what_its_header_says()?;

    let ports: Vec<u16> = ended
        .stdout
        .lines()
        .filter_map(|line| line.split_once(", port "))
        .map(|(_, port)| port.parse())
        .collect::<Result<_, _>>()?;
    let [first, second] = ports[..] else {
        anyhow::bail!("not two ports: {}", ended.stdout)
    };
    assert_ne!(first, second);
    for port in ports {
        let answer = TcpStream::connect(("127.0.0.1", port));
        ensure!(answer.is_err(), "server {port} is still there");
    }
    is_empty_then_remove(&folder)
}

/// The example's own tests run at the same time, with one stream name, and both
/// count from nothing.
#[tokio::test]
async fn the_tests_in_the_example_pass_side_by_side() -> Result<()> {
    let program = program().await?;
    let folder = temporary("nats-own-tests")?;
    let cargo = env::var_os("CARGO").context("run by cargo")?;
    let output = Command::new(cargo)
        .args(["test", "--bin", "nats_test_server", "--", "--ignored"])
        .args(["--test-threads", "2"])
        .current_dir(workspace::root())
        .env("NATS_SERVER", program)
        .env("TMPDIR", &folder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && text.contains("2 passed; 0 failed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    is_empty_then_remove(&folder)
}

#[tokio::test]
async fn no_program_is_one_line_with_the_way_out() -> Result<()> {
    let folder = temporary("nats-no-program")?;
    let shown = folder.to_string_lossy();
    let variables = [("NATS_SERVER", "no-nats-server"), ("TMPDIR", &*shown)];
    let ended = Example::start_with(TEST_SERVER, &[], &variables)?
        .end()
        .await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("NATS_SERVER"), "{line}");
    ended.printed_what_the_book_shows("no-program")?;
    is_empty_then_remove(&folder)
}

/// A server that cannot start is told from one that is slow, and leaves nothing.
#[tokio::test]
async fn a_program_that_ends_is_one_line() -> Result<()> {
    let folder = temporary("nats-false")?;
    let shown = folder.to_string_lossy();
    let variables = [("NATS_SERVER", "false"), ("TMPDIR", &*shown)];
    let ended = Example::start_with(TEST_SERVER, &[], &variables)?
        .end()
        .await?;
    let line = ended.one_line_error()?;
    ensure!(line.contains("ended while starting"), "{line}");
    is_empty_then_remove(&folder)
}
