//! What the reader sees while something takes longer: a spinner on a terminal,
//! plain lines elsewhere. All on stderr, so that stdout holds only what the
//! examples print.

use std::{
    io::{IsTerminal as _, stderr},
    sync::LazyLock,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All spinners of this program: several brokers start at the same time.
static SPINNERS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Something that takes a while. Dropped without [`Step::done`] or
/// [`Step::failed`], its spinner disappears.
pub struct Step {
    text: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

/// Shows that something has begun.
pub fn step(text: impl Into<String>) -> Step {
    let text = text.into();
    let spinner = stderr().is_terminal().then(|| spinner(&text));
    if spinner.is_none() {
        eprintln!("  {text} ...");
    }
    Step {
        text,
        started: Instant::now(),
        spinner,
    }
}

fn spinner(text: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let spinner = SPINNERS.add(ProgressBar::new_spinner());
    spinner.set_style(style);
    spinner.set_message(text.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Prints a line to stderr, above the spinners.
pub fn line(text: impl AsRef<str>) {
    SPINNERS.suspend(|| eprintln!("{}", text.as_ref()));
}

impl Step {
    /// Shows what is being done right now, on a terminal only.
    pub fn say(&self, detail: impl AsRef<str>) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(format!("{}: {}", self.text, detail.as_ref()));
        }
    }

    /// Ends the step well; prints the text and the seconds that it took.
    pub fn done(self, text: impl AsRef<str>) {
        self.end('✓', text.as_ref());
    }

    /// Ends the step badly; the error itself is printed by whoever gets it.
    pub fn failed(self, text: impl AsRef<str>) {
        self.end('✗', text.as_ref());
    }

    fn end(self, mark: char, text: &str) {
        let seconds = self.started.elapsed().as_secs_f32();
        line(format!("{mark} {text} ({seconds:.1} s)"));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
            SPINNERS.remove(spinner);
        }
    }
}
