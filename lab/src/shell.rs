//! Running other programs: shown before they run, explained when they fail.

use std::{
    env,
    ffi::OsStr,
    io::{self, ErrorKind, Read as _},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Error, Result, bail};

use crate::{cleanup, progress};

/// How many lines of a program's output, or of a log, an error repeats.
const TAIL_LINES: usize = 15;

static QUIET: AtomicBool = AtomicBool::new(false);

/// Whether [`run`] leaves out the `$ command` lines.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Prints `$ command` to stderr, unless [`set_quiet`], and runs it. Its output
/// is kept back.
///
/// # Errors
///
/// If it cannot be started or does not end with 0; the error names the command
/// and holds the last lines of what it printed.
pub fn run(command: &mut Command) -> Result<()> {
    if !QUIET.load(Ordering::Relaxed) {
        progress::line(format!("$ {}", shown(command)));
    }
    // One pipe for both, so that the lines keep their order.
    let (mut reader, writer) = io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .map_err(|error| not_started(command, error))?;
    // A download that went on alone would fill a folder that is being removed.
    let guard = cleanup::process(child.id())?;
    // The command keeps its ends of the pipe; while they are open, the read
    // below would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut printed = Vec::new();
    reader.read_to_end(&mut printed)?;
    let status = child.wait()?;
    guard.release();
    succeeded(command, status, &printed)
}

/// Runs a command silently and returns its stdout, trimmed.
///
/// # Errors
///
/// As [`run`]; the error holds the last lines of its stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| not_started(command, error))?;
    succeeded(command, result.status, &result.stderr)?;
    Ok(String::from_utf8_lossy(&result.stdout).trim().to_owned())
}

fn not_started(command: &Command, error: io::Error) -> Error {
    let program = command.get_program().to_string_lossy();
    match error.kind() {
        ErrorKind::NotFound => Error::msg(format!("{program} is not installed")),
        _ => Error::new(error).context(format!("cannot run {program}")),
    }
}

fn succeeded(command: &Command, status: ExitStatus, printed: &[u8]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let printed = tail(&String::from_utf8_lossy(printed));
    bail!("`{}` failed ({status}){printed}", shown(command))
}

/// The last lines of an output or log, indented, to stand at the end of an
/// error; empty for an empty text.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..]
        .iter()
        .map(|line| format!("\n  | {line}"))
        .collect()
}

/// The path of a program in `PATH`, if there is one.
pub fn which(program: &str) -> Option<PathBuf> {
    let name = format!("{program}{}", env::consts::EXE_SUFFIX);
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(&name))
        .find(|path| is_executable(path))
}

#[cfg(unix)]
fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_executable(path: &Path) -> bool {
    path.is_file()
}

/// A command as one can paste it into a POSIX shell: environment first, quoted
/// where needed.
pub fn shown(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={}", name.to_string_lossy(), quoted(value?)))
    });
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let line: Vec<String> = variables.chain(words.map(quoted)).collect();
    let line = line.join(" ");
    let here = env::current_dir().ok();
    match command.get_current_dir() {
        Some(folder) if here.as_deref() != Some(folder) => {
            format!("(cd {} && {line})", quoted(folder.as_os_str()))
        }
        _ => line,
    }
}

/// A word as a POSIX shell reads it back.
pub fn quoted(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref().to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("docker");
        command
            .args(["compose", "up", "-d"])
            .env("KAFKA_PORT", "19092");
        assert_eq!(shown(&command), "KAFKA_PORT=19092 docker compose up -d");
    }

    #[test]
    fn words_that_a_shell_would_change_are_quoted() {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $HOME; echo it's", ""])
            .env("A", "b c");
        assert_eq!(
            shown(&command),
            r"A='b c' sh -c 'echo $HOME; echo it'\''s' ''"
        );
    }

    #[cfg(unix)]
    #[test]
    fn what_is_shown_means_the_same_to_a_shell() -> Result<()> {
        let mut command = Command::new("printf");
        command.args(["%s|", "a b", "it's", "", "$HOME \"x\" \\"]);
        let direct = output(&mut command)?;
        let pasted = output(Command::new("sh").args(["-c", &shown(&command)]))?;
        assert_eq!(direct, pasted);
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_failure_names_the_command_and_its_last_lines() {
        let error =
            run(Command::new("sh").args(["-c", "echo no space >&2; exit 3"]));
        let text = error.map_err(|e| e.to_string()).err().unwrap_or_default();
        assert!(text.contains("exit 3'` failed"), "{text}");
        assert!(text.contains("\n  | no space"), "{text}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("no-such-program"));
        let text = error.map_err(|e| e.to_string()).err().unwrap_or_default();
        assert_eq!(text, "no-such-program is not installed");
    }

    #[test]
    fn a_tail_is_short() {
        let long: String = (1..=40).map(|n| format!("line {n}\n")).collect();
        assert_eq!(tail(&long).lines().count(), TAIL_LINES + 1);
        assert_eq!(tail("\n \n"), "");
    }
}
