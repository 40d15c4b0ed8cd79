//! `cargo lab book`: both books, built by mdBook.

use std::{
    env::consts::EXE_SUFFIX,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use lab::{
    book::Language,
    progress, shell,
    workspace::{self, shown},
};

/// The version that is installed; any 0.5 that is there already is used.
const MDBOOK: &str = "0.5.4";

/// Builds the book in both languages, into target/book.
#[derive(clap::Args)]
pub struct Args {
    /// Open the book in a browser
    #[arg(long)]
    open: bool,
    /// Serve one language on localhost and build it anew on each change
    #[arg(long)]
    serve: bool,
    /// Only this language, en or zh-CN; --open and --serve take en by default
    #[arg(long)]
    language: Option<Language>,
    /// Install mdBook below target/lab if it is missing, in about a minute
    #[arg(long)]
    yes: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let root = workspace::root();
    let mdbook = find_or_install(args)?;
    let in_browser = args.language.unwrap_or(Language::English);
    if args.serve {
        return serve(&mdbook, root, in_browser, args.open);
    }
    for language in Language::ALL {
        if args.language.is_none_or(|only| only == language) {
            build(&mdbook, root, language)?;
        }
    }
    if args.open {
        shell::run(command(&mdbook, root, "build", in_browser).arg("--open"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn build(mdbook: &Path, root: &Path, language: Language) -> Result<()> {
    let mut build = command(mdbook, root, "build", language);
    println!("$ {}", shell::shown(&build));
    let result = build.output().context("mdBook does not start")?;
    let log = String::from_utf8_lossy(&result.stderr);
    // mdBook reports a missing file or anchor and still ends with 0.
    let complaints: Vec<&str> =
        log.lines().filter(|line| is_complaint(line)).collect();
    if !complaints.is_empty() || !result.status.success() {
        bail!(
            "mdBook does not accept the book in {}; cargo lab check tells where:\n{}",
            shown(root, &language.folder(root)),
            complaints.join("\n")
        );
    }
    let start = root.join("target/book").join(language.code());
    println!("  {}", shown(root, &start.join("src/index.html")));
    Ok(())
}

/// Each line of mdBook's log begins with its level.
fn is_complaint(line: &str) -> bool {
    matches!(line.split_whitespace().next(), Some("WARN" | "ERROR"))
}

fn serve(
    mdbook: &Path,
    root: &Path,
    language: Language,
    open: bool,
) -> Result<ExitCode> {
    let mut serve = command(mdbook, root, "serve", language);
    if open {
        serve.arg("--open");
    }
    println!("$ {}    # Ctrl-C stops it", shell::shown(&serve));
    let status = serve.status().context("mdBook does not start")?;
    // It knows no other end than Ctrl-C, which is not a failure.
    match status.code() {
        Some(code) if code != 0 => bail!("mdBook ended with status {code}"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn command(mdbook: &Path, root: &Path, action: &str, language: Language) -> Command {
    let mut command = Command::new(mdbook);
    command
        .current_dir(root)
        .arg(action)
        .arg(format!("docs/{}", language.code()));
    command
}

fn find_or_install(args: &Args) -> Result<PathBuf> {
    let tools = workspace::cache().join("tools");
    let ours = tools.join("bin").join(format!("mdbook{EXE_SUFFIX}"));
    let found = shell::which("mdbook")
        .into_iter()
        .chain([ours.clone()])
        .find(|mdbook| fits(mdbook, args.serve));
    if let Some(mdbook) = found {
        return Ok(mdbook);
    }
    let mut install = install(&tools, args.serve);
    if !args.yes {
        bail!(
            "mdBook 0.5 is missing; run again with --yes, or install it: {}",
            shell::shown(&install)
        );
    }
    let step = progress::step("installing mdBook");
    shell::run(&mut install)?;
    step.done("installed mdBook");
    Ok(ours)
}

/// A book is built the same by each 0.5; our own mdBook may have been built
/// without its server.
fn fits(mdbook: &Path, serve: bool) -> bool {
    let output = |arguments: &[&str]| {
        shell::output(Command::new(mdbook).args(arguments)).ok()
    };
    output(&["--version"]).is_some_and(|version| version.contains("v0.5."))
        && (!serve || output(&["serve", "--help"]).is_some())
}

/// The server brings an async runtime and a web server along, a third of the
/// build time, so it is built in only when somebody asks for it.
fn install(tools: &Path, serve: bool) -> Command {
    let features = if serve { "search,serve" } else { "search" };
    let mut install = Command::new("cargo");
    install
        // Without optimisation it is built in a third of the time, and builds
        // these books in the blink of an eye all the same.
        .args([
            "install",
            "mdbook",
            "--version",
            MDBOOK,
            "--locked",
            "--debug",
        ])
        .args(["--no-default-features", "--features", features, "--root"])
        .arg(tools);
    install
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_warnings_and_errors_are_complaints() {
        assert!(is_complaint(" WARN Caused By: failed to read `x`"));
        assert!(is_complaint("ERROR Error updating \"{{#include x}}\""));
        assert!(!is_complaint(" INFO Running the html backend"));
        assert!(!is_complaint(""));
    }
}
