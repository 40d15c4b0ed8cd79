//! Nothing is left behind: what is started here ends with this program, however
//! the program ends.
//!
//! A process that gets SIGKILL cannot tidy up. So a second one, the watcher,
//! does it: a shell in a process group of its own, out of reach of the
//! terminal's Ctrl-C, that reads a pipe whose other end only this program holds.
//! When the pipe ends, by whatever cause, it runs the duties that are left.
//!
//! Windows has no such shell: there, what a program leaves when it is ended has
//! to be removed by hand.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Error, Result};

use crate::shell;

/// Runs each duty, the newest first: processes end before their folder goes.
const WATCH: &str = r#"
trap '' HUP INT TERM
cat > /dev/null
for duty in $(ls -r "$1"); do sh "$1/$duty"; done
rm -rf "$1"
"#;

/// Something that must be undone: when this is dropped, or when the program
/// ends without dropping it.
pub struct Guard {
    script: String,
    /// The copy of the script that the watcher would run; none on Windows.
    duty: Option<PathBuf>,
    released: bool,
}

/// Ends a process group with SIGKILL, and returns when it is gone.
///
/// # Errors
///
/// If the watcher cannot be started.
pub fn group(id: u32) -> Result<Guard> {
    guard(ending("KILL", &format!("-- -{id}")))
}

/// Asks one process to end, and returns when it is gone.
///
/// # Errors
///
/// As [`group`].
pub fn process(id: u32) -> Result<Guard> {
    guard(ending("TERM", &id.to_string()))
}

fn ending(signal: &str, target: &str) -> String {
    // A process that has ended still counts until its parent has looked, which
    // in a container may be never; hence the limit of two seconds.
    format!(
        "kill -s {signal} {target} && n=20 && \
         while [ $n -gt 0 ] && kill -s 0 {target}; \
         do sleep 0.1; n=$((n - 1)); done"
    )
}

/// Removes a folder with all that is in it.
///
/// # Errors
///
/// As [`group`].
pub fn folder(path: &Path) -> Result<Guard> {
    guard(format!("rm -rf {}", shell::quoted(path)))
}

/// Removes the containers that carry this label, with their anonymous volumes.
///
/// # Errors
///
/// As [`group`].
pub fn containers_with_label(label: &str) -> Result<Guard> {
    let filter = shell::quoted(format!("label={label}"));
    guard(format!(
        "ids=$(docker ps -aq --filter {filter}); \
         [ -z \"$ids\" ] || docker rm -fv $ids"
    ))
}

/// Runs a script of the POSIX shell at the end.
///
/// # Errors
///
/// As [`group`].
pub fn guard(script: String) -> Result<Guard> {
    let mut guard = Guard {
        script,
        duty: None,
        released: false,
    };
    if cfg!(unix) {
        // Where this fails, after Ctrl-C for example, the guard is dropped and
        // undoes at once what nobody would undo later.
        guard.duty = Some(watcher()?.take_on(&guard.script)?);
    }
    Ok(guard)
}

impl Guard {
    /// Leaves everything as it is: there is nothing to undo any more, or it is
    /// to outlive this program.
    pub fn release(mut self) {
        self.released = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.released {
            // What is gone already needs no undoing, so a failure means nothing.
            let _ = shell::output(Command::new("sh").args(["-c", &self.script]));
        }
        if let Some(duty) = &self.duty {
            let _ = fs::remove_file(duty);
        }
    }
}

/// Ends this program on Ctrl-C, SIGTERM and SIGHUP, with status 130, after all
/// that is guarded has been undone. Without this they end it too, but it is then
/// gone a moment before what it started.
///
/// # Errors
///
/// If the program has such a handler already.
pub fn on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        if let Some(Ok(watcher)) = WATCHER.get() {
            watcher.finish();
        }
        process::exit(130);
    })
    .context("cannot wait for Ctrl-C")
}

/// After Ctrl-C, does not return: things fail now because they are being ended,
/// which is worth no message and no next step, and the handler ends this program
/// when all is undone. To be called before a failure is told.
pub fn hold_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Started with the first guard. An error is kept as text, to be given again.
static WATCHER: OnceLock<Result<Watcher, String>> = OnceLock::new();

struct Watcher {
    /// Holds a script for each guard.
    duties: PathBuf,
    process: Mutex<(Child, Option<ChildStdin>)>,
}

fn watcher() -> Result<&'static Watcher> {
    WATCHER
        .get_or_init(|| Watcher::start().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| Error::msg(error.clone()))
}

impl Watcher {
    fn start() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("lab-cleanup-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        let mut command = Command::new("sh");
        command
            .args(["-c", WATCH, "lab-cleanup"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().context("cannot start sh")?;
        let pipe = child.stdin.take();
        Ok(Self {
            // Kept, because from here on the watcher removes it.
            duties: folder.keep(),
            process: Mutex::new((child, pipe)),
        })
    }

    /// Writes down what to run at the end.
    fn take_on(&self, script: &str) -> Result<PathBuf> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let duty = self.duties.join(format!("{number:06}"));
        // Renamed when complete, and hidden from `ls` until then: the watcher
        // may have to start at any moment.
        let draft = self.duties.join(format!(".{number:06}"));
        fs::write(&draft, script)
            .and_then(|()| fs::rename(&draft, &duty))
            .context("this program is about to end")?;
        Ok(duty)
    }

    /// Lets the watcher do its duties now, and returns when it has.
    fn finish(&self) {
        let mut process =
            self.process.lock().unwrap_or_else(PoisonError::into_inner);
        drop(process.1.take());
        let _ = process.0.wait();
    }
}
