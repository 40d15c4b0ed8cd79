//! Commands that run for longer: their lines are read as they come, and they end
//! when this program does.

use std::{
    io::{BufRead as _, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cleanup::{self, Guard},
    progress::{self, Step},
    shell,
};

/// A running command.
pub struct Job {
    child: Child,
    /// As one would type it.
    shown: String,
    lines: mpsc::Receiver<String>,
    /// What has been read of them.
    printed: Vec<String>,
    guard: Guard,
}

impl Job {
    /// Prints `$ command` and starts it in a process group of its own: the
    /// terminal's Ctrl-C reaches this program alone, which then ends the command
    /// before it undoes what the command has made.
    ///
    /// # Errors
    ///
    /// If the command cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let shown = shell::shown(command);
        progress::line(format!("$ {shown}"));
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `{shown}`"))?;
        let guard = cleanup::guard(end(child.id()))?;
        let (sender, lines) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            forward(pipe, sender.clone());
        }
        if let Some(pipe) = child.stderr.take() {
            forward(pipe, sender);
        }
        Ok(Self {
            child,
            shown,
            lines,
            printed: Vec::new(),
            guard,
        })
    }

    /// Waits for the next line of stdout or stderr.
    ///
    /// # Errors
    ///
    /// `Timeout` if none comes in time, `Disconnected` after the last one.
    pub fn line(&mut self, patience: Duration) -> Result<&str, RecvTimeoutError> {
        self.printed.push(self.lines.recv_timeout(patience)?);
        Ok(self.printed.last().map_or("", String::as_str))
    }

    /// Shows each line in the step until the command ends.
    ///
    /// # Errors
    ///
    /// If it does not end with 0; the error holds its last lines.
    pub fn finish(mut self, step: &Step) -> Result<()> {
        for line in &self.lines {
            step.say(&line);
            self.printed.push(line);
        }
        let status = self.child.wait()?;
        self.guard.release();
        if !status.success() {
            let tail = shell::tail(&self.printed.join("\n"));
            bail!("`{}` failed ({status}){tail}", self.shown);
        }
        Ok(())
    }

    /// Ends the command before its time.
    pub fn stop(mut self) {
        // The guard waits until the process has gone, and that it has only when
        // somebody asked for its status; so, both at the same time.
        let waiting = thread::spawn(move || self.child.wait());
        drop(self.guard);
        let _ = waiting.join();
    }
}

/// A script that ends a process group: asked first, so that it can tidy up, and
/// forced when it has not ended after ten seconds.
fn end(group: u32) -> String {
    format!(
        "kill -s TERM -- -{group} && n=100 && \
         while [ $n -gt 0 ] && kill -s 0 -- -{group}; \
         do sleep 0.1; n=$((n - 1)); done; kill -s KILL -- -{group}"
    )
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

/// Runs a command that shows its own progress, with this program's output as
/// its own. Like a [`Job`], it ends when this program does.
///
/// # Errors
///
/// If the command cannot be started.
pub fn in_view(command: &mut Command) -> Result<ExitStatus> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run `{}`", shell::shown(command)))?;
    let guard = cleanup::guard(end(child.id()))?;
    let status = child.wait()?;
    cleanup::hold_if_interrupted();
    guard.release();
    Ok(status)
}
