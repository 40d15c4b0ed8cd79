//! One example of the demo: run, shown, and compared with its header.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use lab::{cleanup, header, workspace::Example};

use super::stage::Staged;

/// How long an example may be silent. Ends a demo that hangs; a Kafka consumer
/// that joins a group needs some seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// The last line of an example that runs until it is asked to stop.
const STOPPED: &str = "stopped";

pub enum Outcome {
    /// Ended with 0 and printed what its header says; the seconds that it took.
    AsItsHeaderSays(f32),
    Bad(String),
}

/// Runs an example; one that would run for ever is sent Ctrl-C when it has
/// printed all that its header promises.
///
/// # Errors
///
/// If it cannot be started or asked to stop.
pub fn play(example: &Example, staged: &Staged) -> Result<Outcome> {
    let address = match &staged.address {
        Ok(address) => address,
        Err(reason) => return Ok(Outcome::Bad(format!("not run: {reason:#}"))),
    };
    let started = Instant::now();
    let mut command = Command::new("cargo");
    command
        .args(["run", "--quiet", "--bin", &example.name])
        .env(example.broker.address_var(), address)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // The terminal's Ctrl-C is for the demo, which then ends what it started.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", example.name))?;
    let guard = cleanup::group(child.id())?;

    let expected = match staged.fresh {
        true => example.header.output.clone(),
        false => among_others(&example.header.output),
    };
    let lines = lines_of(&mut child)?;
    let printed = match show(&expected, &lines, &child)? {
        Some(printed) => printed,
        None => {
            drop(guard);
            return Ok(Outcome::Bad(format!("silent for {PATIENCE:?}")));
        }
    };
    let status = child.wait()?;
    cleanup::hold_if_interrupted();
    guard.release();
    if !status.success() {
        return Ok(Outcome::Bad(format!("ended with {status}")));
    }
    Ok(match header::compare(&expected, &printed) {
        Ok(()) => Outcome::AsItsHeaderSays(started.elapsed().as_secs_f32()),
        Err(difference) => {
            Outcome::Bad(format!("not what its header says\n{difference}"))
        }
    })
}

/// On a broker that others use, their messages may come in between.
fn among_others(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    format!("...\n{}\n...", lines.join("\n...\n"))
}

/// Prints each line as it comes, until the example ends; all of them, or `None`
/// if it has been silent for too long.
fn show(
    expected: &str,
    lines: &Receiver<String>,
    child: &Child,
) -> Result<Option<String>> {
    let until_asked = expected.trim_end_matches("\n...").strip_suffix(STOPPED);
    let mut asked = false;
    let mut printed = String::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                anstream::println!("{line}");
                printed.push_str(&line);
                printed.push('\n');
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(Some(printed)),
            Err(mpsc::RecvTimeoutError::Timeout) => return Ok(None),
        }
        let complete = until_asked
            .is_some_and(|expected| header::compare(expected, &printed).is_ok());
        if complete && !asked {
            interrupt(child)?;
            asked = true;
        }
    }
}

fn lines_of(child: &mut Child) -> Result<Receiver<String>> {
    let output = child.stdout.take().context("its output is piped")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Ok(lines)
}

/// Ctrl-C. `cargo run` has become the example by now, or passes it on.
fn interrupt(child: &Child) -> Result<()> {
    let id = child.id().to_string();
    let mut kill = Command::new("kill");
    kill.args(["-s", "INT", &id]);
    lab::shell::output(&mut kill)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_others_may_come_in_between() {
        let expected = among_others("waiting\nreceived: ours");
        for printed in ["waiting\nreceived: ours", "waiting\nother\nreceived: ours"]
        {
            assert_eq!(header::compare(&expected, printed), Ok(()));
        }
        assert!(header::compare(&expected, "waiting\nother").is_err());
    }
}
