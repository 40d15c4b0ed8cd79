//! An example as its user sees it: a process, its lines, its end.

use std::{
    env, fs,
    path::Path,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use lab::{header, workspace};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::timeout,
};

use crate::wait::DEADLINE;

/// With this variable set, outputs are written to `docs/outputs` for the book
/// instead of being compared with what is there.
pub const RECORD: &str = "LAB_RECORD";

/// A running example. Dropped, it gets SIGKILL.
pub struct Example {
    name: String,
    child: Child,
    lines: UnboundedReceiver<Line>,
    stdout: String,
    stderr: String,
}

enum Line {
    Stdout(String),
    Stderr(String),
}

/// An example that has ended.
pub struct Ended {
    pub name: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Example {
    /// Starts a binary of the workspace, `env!("CARGO_BIN_EXE_<name>")`, with
    /// the address of its broker in the variable that it reads.
    ///
    /// # Errors
    ///
    /// If the binary cannot be started.
    pub fn start(
        binary: &str,
        args: &[&str],
        address: (&str, &str),
    ) -> Result<Self> {
        Self::start_with(binary, args, &[address])
    }

    /// As [`Self::start`], for an example that reads more than one variable.
    ///
    /// # Errors
    ///
    /// If the binary cannot be started.
    pub fn start_with(
        binary: &str,
        args: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let name = Path::new(binary)
            .file_stem()
            .context("the path of a binary")?
            .to_string_lossy()
            .into_owned();
        let mut child = Command::new(binary)
            .args(args)
            .envs(variables.iter().copied())
            // A back trace would be part of the output.
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let (sender, lines) = mpsc::unbounded_channel();
        let stdout = child.stdout.take().context("stdout is piped")?;
        let stderr = child.stderr.take().context("stderr is piped")?;
        tokio::spawn(read_lines(stdout, Line::Stdout, sender.clone()));
        tokio::spawn(read_lines(stderr, Line::Stderr, sender));
        Ok(Self {
            name,
            child,
            lines,
            stdout: String::new(),
            stderr: String::new(),
        })
    }

    /// Waits for a line on stdout that contains this text, among those that no
    /// earlier call has passed. Returns the line.
    ///
    /// # Errors
    ///
    /// If the example ends before, or after [`DEADLINE`]; with all its output.
    pub async fn prints(&mut self, text: &str) -> Result<String> {
        loop {
            let line = match timeout(DEADLINE, self.lines.recv()).await {
                Ok(Some(line)) => line,
                Ok(None) => bail!("ended without printing {text:?}{}", self.said()),
                Err(_elapsed) => bail!("has not printed {text:?}{}", self.said()),
            };
            if let Line::Stdout(line) = self.keep(line)
                && line.contains(text)
            {
                return Ok(line);
            }
        }
    }

    /// Whether a line with this text is among those that somebody has waited for.
    pub fn has_printed(&self, text: &str) -> bool {
        self.stdout.lines().any(|line| line.contains(text))
    }

    /// Passes over the lines that have come so far, as if somebody had waited for
    /// them.
    pub fn pass_over(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.keep(line);
        }
    }

    /// Ctrl-C: SIGINT.
    ///
    /// # Errors
    ///
    /// If the example has ended already.
    pub async fn interrupt(&self) -> Result<()> {
        self.signal("INT").await
    }

    /// What a service manager or `docker stop` sends: SIGTERM.
    ///
    /// # Errors
    ///
    /// If the example has ended already.
    pub async fn terminate(&self) -> Result<()> {
        self.signal("TERM").await
    }

    /// `kill -9`: SIGKILL. Returns when the process is gone.
    ///
    /// # Errors
    ///
    /// If the process cannot be ended.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await?;
        Ok(())
    }

    /// Any other signal, by its name without `SIG`: `STOP` and `CONT` for a program
    /// that hangs for a while.
    ///
    /// # Errors
    ///
    /// If the example has ended already.
    pub async fn signal(&self, signal: &str) -> Result<()> {
        let id = self.id()?;
        let sent = Command::new("kill")
            .args(["-s", signal, &id.to_string()])
            .status()
            .await?;
        ensure!(sent.success(), "cannot send {signal} to {}", self.name);
        Ok(())
    }

    /// The number of the process, for what the system knows of it.
    ///
    /// # Errors
    ///
    /// If the example has ended already.
    pub fn id(&self) -> Result<u32> {
        self.child.id().context("the example has ended")
    }

    /// Whether the process is gone, which does not wait for it.
    ///
    /// # Errors
    ///
    /// If the system does not tell.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits until the example ends.
    ///
    /// # Errors
    ///
    /// After [`DEADLINE`], with all its output.
    pub async fn end(mut self) -> Result<Ended> {
        let rest = async {
            while let Some(line) = self.lines.recv().await {
                self.keep(line);
            }
            self.child.wait().await
        };
        match timeout(DEADLINE, rest).await {
            Ok(status) => Ok(Ended {
                status: status?,
                name: self.name,
                stdout: self.stdout,
                stderr: self.stderr,
            }),
            Err(_elapsed) => bail!("has not ended{}", self.said()),
        }
    }

    fn keep(&mut self, line: Line) -> Line {
        let (text, kept) = match &line {
            Line::Stdout(text) => (text, &mut self.stdout),
            Line::Stderr(text) => (text, &mut self.stderr),
        };
        kept.push_str(text);
        kept.push('\n');
        line
    }

    fn said(&self) -> String {
        said(&self.name, &self.stdout, &self.stderr)
    }
}

impl Ended {
    /// Exit status 0, and not a word on stderr.
    ///
    /// # Errors
    ///
    /// With all its output, if it was otherwise.
    pub fn succeeded(self) -> Result<Self> {
        if self.status.success() && self.stderr.is_empty() {
            return Ok(self);
        }
        bail!("{}{}", self.status, self.said())
    }

    /// Compares stdout with the header of the example's file and with the
    /// output that the book shows.
    ///
    /// # Errors
    ///
    /// With both texts, if they differ.
    pub fn printed_what_its_header_says(&self) -> Result<()> {
        let example = workspace::examples()?
            .into_iter()
            .find(|example| example.name == self.name)
            .with_context(|| format!("no example is named {}", self.name))?;
        let expected = &example.header.output;
        header::compare(expected, &self.stdout)
            .map_err(Error::msg)
            .with_context(|| format!("the header of {}", self.name))?;

        recorded(&self.name, expected, &self.stdout)
    }

    /// Compares all that the example printed with what the book shows of this
    /// experiment, `docs/outputs/<example>.<experiment>.txt`.
    ///
    /// # Errors
    ///
    /// With both texts, if they differ.
    pub fn printed_what_the_book_shows(&self, experiment: &str) -> Result<()> {
        let printed = format!("{}{}", self.stdout, self.stderr);
        self.printed_as_the_book_shows(experiment, &printed)
    }

    /// As [`Self::printed_what_the_book_shows`], with placeholders where this pattern
    /// has them: for what differs from run to run.
    ///
    /// # Errors
    ///
    /// With both texts, if they differ.
    pub fn printed_as_the_book_shows(
        &self,
        experiment: &str,
        pattern: &str,
    ) -> Result<()> {
        let name = format!("{}.{experiment}", self.name);
        let printed = format!("{}{}", self.stdout, self.stderr);
        header::compare(pattern, &printed)
            .map_err(Error::msg)
            .with_context(|| name.clone())?;
        recorded(&name, pattern, &printed)
    }

    /// The one line on stderr of an example that failed: not a panic, not a back
    /// trace, nothing on stdout that claims success.
    ///
    /// # Errors
    ///
    /// With all its output, if it was otherwise.
    pub fn one_line_error(&self) -> Result<&str> {
        match self.stderr.lines().collect::<Vec<_>>()[..] {
            [line]
                if self.status.code() == Some(1) && line.starts_with("error: ") =>
            {
                Ok(line)
            }
            _ => bail!(
                "not a one-line error with status 1: {}{}",
                self.status,
                self.said()
            ),
        }
    }

    /// A [`Self::one_line_error`] with these words, and nothing on stdout: it did
    /// not get in. Returns the line.
    ///
    /// # Errors
    ///
    /// With all its output, if it was otherwise.
    pub fn refused(&self, words: &str) -> Result<&str> {
        let line = self.one_line_error()?;
        ensure!(line.contains(words), "{words:?} is not in {line:?}");
        ensure!(self.stdout.is_empty(), "it got in: {}", self.stdout);
        Ok(line)
    }

    fn said(&self) -> String {
        said(&self.name, &self.stdout, &self.stderr)
    }
}

/// Starts each binary with this address and expects what the contract of an
/// example says of an address that does not work: one line with these parts,
/// status 1, no password, within ten seconds.
///
/// # Errors
///
/// If an example answers otherwise.
pub async fn fail_with_one_line(
    binaries: &[impl AsRef<str>],
    address: (&str, &str),
    parts: &[&str],
) -> Result<()> {
    fail_with_one_line_each(binaries, &[address], parts).await
}

/// As [`fail_with_one_line`], for examples that read more than one variable.
///
/// # Errors
///
/// If an example answers otherwise.
pub async fn fail_with_one_line_each(
    binaries: &[impl AsRef<str>],
    variables: &[(&str, &str)],
    parts: &[&str],
) -> Result<()> {
    let started = Instant::now();
    // All at the same time: one that waits for an answer keeps nobody else.
    let examples = binaries
        .iter()
        .map(|binary| Example::start_with(binary.as_ref(), &[], variables))
        .collect::<Result<Vec<_>>>()?;
    for example in examples {
        let name = example.name.clone();
        let ended = example.end().await?;
        let line = ended.one_line_error()?;
        for part in parts {
            ensure!(line.contains(part), "{name}: {part:?} is not in {line:?}");
        }
        ensure!(
            !line.contains(SECRET),
            "{name} shows the password: {line:?}"
        );
        // A promise, and not a matter of speed: the limits within each example
        // add up to less.
        let took = started.elapsed();
        ensure!(took < Duration::from_secs(10), "{name}: {took:?}");
    }
    Ok(())
}

/// The binaries of all examples in the package of this one,
/// `env!("CARGO_BIN_EXE_<name>")`, that read the address of a broker: a new
/// example keeps the contract without being named in a second place.
///
/// An example whose source does not name the variable starts its own broker, and
/// has no address that could be wrong. [`without_address`] has those.
///
/// # Errors
///
/// If the sources cannot be read.
pub fn siblings(binary: &str) -> Result<Vec<String>> {
    family(binary, true)
}

/// As [`siblings`], those that read no address: a test lists them, so that none
/// is left out by mistake.
///
/// # Errors
///
/// If the sources cannot be read.
pub fn without_address(binary: &str) -> Result<Vec<String>> {
    family(binary, false)
}

fn family(binary: &str, reads_address: bool) -> Result<Vec<String>> {
    let path = Path::new(binary);
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let all = workspace::examples()?;
    let package = all
        .iter()
        .find(|example| example.name == name)
        .with_context(|| format!("no example is named {name}"))?
        .package
        .clone();
    let mut binaries = Vec::new();
    for example in all.iter().filter(|example| example.package == package) {
        let source = fs::read_to_string(&example.path)?;
        if source.contains(example.broker.address_var()) == reads_address {
            let file = format!("{}{}", example.name, env::consts::EXE_SUFFIX);
            binaries.push(path.with_file_name(file).to_string_lossy().into_owned());
        }
    }
    Ok(binaries)
}

/// A password for addresses in tests, to be recognised wherever it is shown.
pub const SECRET: &str = "secret";

/// Compares an output with the recorded one, or records it, with placeholders
/// where `pattern` has them.
fn recorded(name: &str, pattern: &str, output: &str) -> Result<()> {
    let file = workspace::root().join(format!("docs/outputs/{name}.txt"));
    if env::var_os(RECORD).is_some() {
        fs::write(&file, header::placeholders(pattern, output))?;
        return Ok(());
    }
    let shown = file.display();
    let text = fs::read_to_string(&file).with_context(|| format!("{shown}"))?;
    header::compare(&text, output)
        .map_err(Error::msg)
        .with_context(|| format!("{shown}; if it is right, cargo lab record"))
}

fn said(name: &str, stdout: &str, stderr: &str) -> String {
    format!("\n--- stdout of {name}\n{stdout}--- stderr\n{stderr}---")
}

async fn read_lines(
    stream: impl AsyncRead + Unpin,
    kind: fn(String) -> Line,
    sender: UnboundedSender<Line>,
) {
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // The test may have ended before the example.
        if sender.send(kind(line)).is_err() {
            break;
        }
    }
}
