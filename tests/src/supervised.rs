//! A program that is started again when it ends, as a service manager does it.

use std::{mem, time::Duration};

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::{Example, example::Ended, wait::DEADLINE};

/// The pause before it is started again.
const PAUSE: Duration = Duration::from_millis(200);

/// What a program says that runs until it is stopped; see [`Supervised::says`].
const READY: &str = "ready:";

/// How long a process may take to be gone after its output has ended.
const ENDING: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// An example that is started again whenever it has ended.
pub struct Supervised {
    command: Command,
    ready: &'static str,
    running: Example,
    /// What it printed before it was started again.
    earlier: String,
    /// Why it has ended by itself, one line each.
    errors: Vec<String>,
}

/// How it is started.
struct Command {
    binary: String,
    words: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Command {
    fn start(&self) -> Result<Example> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        let variables: Vec<(&str, &str)> = self
            .variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        Example::start_with(&self.binary, &words, &variables)
    }
}

impl Supervised {
    /// Starts it, as [`Example::start_with`].
    ///
    /// # Errors
    ///
    /// If the binary cannot be started.
    pub fn start(
        binary: &str,
        words: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let command = Command {
            binary: binary.to_owned(),
            words: words.iter().map(|&word| word.to_owned()).collect(),
            variables: variables
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        };
        Ok(Self {
            running: command.start()?,
            command,
            ready: READY,
            earlier: String::new(),
            errors: Vec::new(),
        })
    }

    /// What it says instead of `ready:`.
    #[must_use]
    pub fn says(mut self, ready: &'static str) -> Self {
        self.ready = ready;
        self
    }

    /// SIGKILL, and starts it again.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub async fn kill(&mut self) -> Result<()> {
        self.dead_while(async { Ok(()) }).await
    }

    /// SIGKILL, and starts it again when this is done.
    ///
    /// # Errors
    ///
    /// If it cannot be started, and those of what is done meanwhile.
    pub async fn dead_while<T>(
        &mut self,
        meanwhile: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        // It may have ended by itself at this very moment.
        let _ = self.running.signal("KILL").await;
        while !self.running.has_ended()? {
            sleep(POLL).await;
        }
        let done = meanwhile.await?;
        self.start_again().await?;
        Ok(done)
    }

    /// As [`Example::pass_over`].
    pub fn pass_over(&mut self) {
        self.running.pass_over();
    }

    /// Any other signal, by its name without `SIG`.
    ///
    /// # Errors
    ///
    /// If it has ended.
    pub async fn signal(&self, signal: &str) -> Result<()> {
        self.running.signal(signal).await
    }

    /// Starts it again if it has ended.
    ///
    /// # Errors
    ///
    /// If it has ended otherwise than with one line that says why.
    pub async fn look_after(&mut self) -> Result<()> {
        if self.running.has_ended()? {
            sleep(PAUSE).await;
            let ended = self.start_again().await?;
            self.errors.push(ended.reason()?.to_owned());
        }
        Ok(())
    }

    async fn start_again(&mut self) -> Result<Ended> {
        let next = self.command.start()?;
        let ended = mem::replace(&mut self.running, next).end().await?;
        self.earlier.push_str(&ended.stdout);
        Ok(ended)
    }

    /// Waits for a line with this text, also when it has to be started again for it.
    ///
    /// # Errors
    ///
    /// After [`DEADLINE`].
    pub async fn prints(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = self.running.prints(text).await {
            // Its output ends a moment before the process.
            let gone = timeout(ENDING, async {
                while !self.running.has_ended()? {
                    sleep(POLL).await;
                }
                Ok::<_, anyhow::Error>(())
            });
            if gone.await.is_err() || Instant::now() > deadline {
                bail!(error);
            }
            self.look_after().await?;
        }
        Ok(())
    }

    /// Waits for an end without an error. Returns as [`Self::stop`].
    ///
    /// # Errors
    ///
    /// If it does not end, or not with one line that says why.
    pub async fn finish(mut self) -> Result<(String, Vec<String>)> {
        loop {
            let ended = self.running.end().await?;
            self.earlier.push_str(&ended.stdout);
            if ended.status.success() {
                return Ok((self.earlier, self.errors));
            }
            self.errors.push(ended.reason()?.to_owned());
            sleep(PAUSE).await;
            self.running = self.command.start()?;
        }
    }

    /// Ctrl-C, and no error after it. Returns all that it has printed since it was
    /// started for the first time, and why it was started again.
    ///
    /// # Errors
    ///
    /// If it ends with one, or does not say that it is ready before.
    pub async fn stop(mut self) -> Result<(String, Vec<String>)> {
        // One that has just been started has no handler for the signal yet.
        if !self.running.has_printed(self.ready) {
            self.prints(self.ready).await?;
        }
        self.running.interrupt().await?;
        let ended = self.running.end().await?;
        if !ended.status.success() {
            bail!("{} {}", ended.status, ended.stderr);
        }
        Ok((self.earlier + &ended.stdout, self.errors))
    }
}

impl Ended {
    /// The last line on stderr of a program that could not go on; before it, it may
    /// have said that it has lost its broker.
    ///
    /// # Errors
    ///
    /// If it ended in another way.
    pub fn reason(&self) -> Result<&str> {
        match self.stderr.lines().last() {
            Some(line)
                if self.status.code() == Some(1) && line.starts_with("error: ") =>
            {
                Ok(line)
            }
            _ => bail!(
                "{} has ended without a reason: {} {}{}",
                self.name,
                self.status,
                self.stdout,
                self.stderr
            ),
        }
    }
}
