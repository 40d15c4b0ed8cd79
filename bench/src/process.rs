//! The measured programs: started, read, waited for, and gone with this one.

use std::{
    io::{BufRead as _, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, anyhow};
use lab::{
    cleanup::{self, Guard},
    shell,
};

use crate::machine;

/// Ends a run that hangs, such as a subscriber that lost a message.
const LIMIT: Duration = Duration::from_secs(180);

/// How often a program is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A command line.
#[derive(Clone, Debug)]
pub struct Call {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Variables of the environment. Not shown: an address may hold a password.
    pub environment: Vec<(String, String)>,
}

impl Call {
    /// With the name of the program alone, without the folder.
    pub fn shown(&self) -> String {
        let name = self.program.file_stem().unwrap_or_default();
        shell::shown(Command::new(name).args(&self.arguments))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs it to its end, unmeasured, and returns its stdout.
    pub fn output(&self) -> Result<String> {
        shell::output(&mut self.command())
    }
}

/// A program that runs.
pub struct Running {
    shown: String,
    child: Child,
    lines: Receiver<String>,
    printed: String,
    peak: JoinHandle<Option<f64>>,
    guard: Guard,
}

/// What is left of a program that has ended.
pub struct Ended {
    /// Both outputs.
    pub printed: String,
    pub peak_mib: Option<f64>,
}

impl Running {
    pub fn start(call: &Call) -> Result<Self> {
        let shown = call.shown();
        let mut command = call.command();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Ctrl-C must reach this program alone, which then ends all others.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {shown}"))?;
        let id = child.id();
        let guard = cleanup::group(id)?;
        let (sender, lines) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            forward(pipe, sender.clone());
        }
        if let Some(pipe) = child.stderr.take() {
            forward(pipe, sender);
        }
        Ok(Self {
            shown,
            child,
            lines,
            printed: String::new(),
            peak: watch_peak(id),
            guard,
        })
    }

    /// Returns after a line with this text.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) => {
                    let found = line.contains(text);
                    self.keep(&line);
                    if found {
                        return Ok(());
                    }
                }
                Err(_) => {
                    return Err(self.failure(&format!("has not printed {text:?}")));
                }
            }
        }
    }

    /// Waits until it has ended, and fails if it did not end well.
    pub fn end(mut self) -> Result<Ended> {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                return Err(self.failure("has not ended"));
            }
            match self.lines.recv_timeout(POLL) {
                Ok(line) => self.keep(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(POLL),
            }
        };
        if !status.success() {
            // All of it: the pipes end with the program.
            while let Ok(line) = self.lines.recv() {
                self.keep(&line);
            }
            return Err(self.failure(&format!("failed ({status})")));
        }
        Ok(self.ended())
    }

    /// Asks it to stop. How it ends is its own affair: the tool knows no end but
    /// a signal.
    pub fn stop(mut self) -> Result<Ended> {
        let mut kill = Command::new("sh");
        kill.args(["-c", &format!("kill -s INT {}", self.child.id())]);
        shell::output(&mut kill)?;
        let deadline = Instant::now() + LIMIT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err(self.failure("does not stop"));
            }
            thread::sleep(POLL);
        }
        Ok(self.ended())
    }

    fn ended(mut self) -> Ended {
        while let Ok(line) = self.lines.recv() {
            self.keep(&line);
        }
        self.guard.release();
        Ended {
            printed: self.printed,
            peak_mib: self.peak.join().unwrap_or_default(),
        }
    }

    fn keep(&mut self, line: &str) {
        self.printed.push_str(line);
        self.printed.push('\n');
    }

    fn failure(&mut self, what: &str) -> Error {
        while let Ok(line) = self.lines.try_recv() {
            self.keep(&line);
        }
        anyhow!("{} {what}{}", self.shown, shell::tail(&self.printed))
    }
}

/// Looks at the memory of a program until it ends; afterwards nothing is left to
/// be read.
fn watch_peak(process: u32) -> JoinHandle<Option<f64>> {
    thread::spawn(move || {
        let mut last = None;
        while let Some(peak) = machine::peak_mib(process) {
            last = Some(peak);
            thread::sleep(POLL);
        }
        last
    })
}

fn forward(pipe: impl Read + Send + 'static, sender: Sender<String>) {
    thread::spawn(move || {
        let lines = BufReader::new(pipe).lines().map_while(Result::ok);
        for line in lines {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell_call(script: &str) -> Call {
        Call {
            program: "sh".into(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            environment: vec![("WORD".to_owned(), "hello".to_owned())],
        }
    }

    #[test]
    fn what_both_outputs_hold_is_kept() -> Result<()> {
        let running = Running::start(&shell_call("echo $WORD; echo b >&2"))?;
        let ended = running.end()?;
        let mut lines: Vec<&str> = ended.printed.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["b", "hello"]);
        Ok(())
    }

    #[test]
    fn a_failure_is_told_with_what_was_printed() {
        let call = shell_call("echo no room >&2; exit 3");
        let ended = Running::start(&call).and_then(Running::end);
        let error = ended.map(|ended| ended.printed).expect_err("it failed");
        assert!(error.to_string().contains("| no room"), "{error}");
    }

    #[test]
    fn a_program_without_an_end_is_stopped() -> Result<()> {
        let script = "trap 'echo bye; exit 1' INT; echo ready; \
                      while true; do sleep 0.05; done";
        let mut running = Running::start(&shell_call(script))?;
        running.wait_for("ready")?;
        assert!(running.stop()?.printed.ends_with("bye\n"));
        Ok(())
    }
}
