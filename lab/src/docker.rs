//! The Docker engine: is there one, and what makes one answer.

use std::{
    env, fs,
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{cleanup, packages, progress, shell, trouble, workspace};

/// The package that brings the engine on Debian and Ubuntu.
const PACKAGE: &str = "docker.io";
/// How long an engine may take from its start to its first answer.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What answers to `docker`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    Ready {
        version: String,
    },
    /// There is a client, but no engine answers.
    NotRunning,
    /// An engine is there, but this user may not use its socket.
    NoPermission,
    /// There is not even a client.
    NotInstalled,
}

/// Asks the engine that `DOCKER_HOST` or the client's context names.
pub fn engine() -> Engine {
    if shell::which("docker").is_none() {
        return Engine::NotInstalled;
    }
    let mut version = Command::new("docker");
    version.args(["version", "--format", "{{.Server.Version}}"]);
    match shell::output(&mut version) {
        Ok(version) => Engine::Ready { version },
        Err(error) if denied(&format!("{error:#}")) => Engine::NoPermission,
        Err(_) => Engine::NotRunning,
    }
}

fn denied(message: &str) -> bool {
    message.to_lowercase().contains("permission denied")
}

/// The sentence that says why an engine does not answer and what to do about
/// it; `None` if it is ready.
pub fn way_out(engine: &Engine) -> Option<String> {
    match engine {
        Engine::Ready { .. } => None,
        Engine::NoPermission => Some(
            "you may not use Docker's socket; run `sudo usermod -aG docker $USER` \
             and log in again"
                .to_owned(),
        ),
        Engine::NotRunning | Engine::NotInstalled => Some(match remote() {
            Some(host) => format!(
                "no Docker engine answers at DOCKER_HOST={host}; start that one, \
                 or unset DOCKER_HOST"
            ),
            None => format!("no Docker engine is running; {}", start_advice()),
        }),
    }
}

fn remote() -> Option<String> {
    env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty())
}

fn start_advice() -> String {
    match env::consts::OS {
        "linux" => match start_commands() {
            Some(commands) => format!("run `{}`", commands.join(" && ")),
            None => "install the Docker engine with your package manager".to_owned(),
        },
        "macos" => "start Docker Desktop, or run `colima start`".to_owned(),
        _ => "start Docker Desktop".to_owned(),
    }
}

/// What [`install_and_start`] does, as one would type it; `None` where the
/// engine is not installed and there is no apt-get to install it.
fn start_commands() -> Option<Vec<String>> {
    let mut commands = Vec::new();
    if shell::which("dockerd").is_none() {
        commands.push(packages::install_command(&[PACKAGE])?);
    }
    let sudo = if packages::is_root() { "" } else { "sudo " };
    commands.push(if has_systemd() {
        format!("{sudo}systemctl start docker")
    } else {
        // In the background, with its log where one can read it.
        format!("{sudo}setsid --fork dockerd 2>dockerd.log")
    });
    Some(commands)
}

/// Is systemd the init process here? Its programs alone prove nothing, as
/// containers often have them without running them.
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes sure that an engine answers: with `yes` by installing it (Debian,
/// Ubuntu) and starting it.
///
/// # Errors
///
/// Without `yes`, an error with the commands to type; with it, if the user has
/// not the right, the system is another one, or the engine does not come up (the
/// error then ends with the tail of its log).
pub fn install_and_start(yes: bool) -> Result<()> {
    let engine = engine();
    let Some(way_out) = way_out(&engine) else {
        return Ok(());
    };
    let mendable = engine != Engine::NoPermission && remote().is_none();
    if !mendable || start_commands().is_none() {
        bail!(way_out);
    }
    if !yes {
        bail!("{way_out}, or run this again with --yes");
    }
    if shell::which("dockerd").is_none() {
        packages::install(&[PACKAGE]).map_err(trouble::explained)?;
    }
    start()
}

fn start() -> Result<()> {
    if has_systemd() {
        let step = progress::step("starting the Docker engine");
        shell::run(as_root("systemctl").args(["start", "docker"]))?;
        return wait_until_ready(step, None);
    }
    let log = workspace::cache().join("dockerd.log");
    fs::create_dir_all(workspace::cache())
        .and_then(|()| File::create(&log))
        .with_context(|| format!("cannot write {}", log.display()))?;
    let output = File::options().append(true).open(&log)?;
    // A session of its own: it is to outlive this program and its terminal.
    let mut command = as_root("setsid");
    command
        .arg("dockerd")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    progress::line(format!("$ {}", shell::shown(&command)));
    let step = progress::step("starting the Docker engine");
    let child = command.spawn().context("cannot start dockerd")?;
    let guard = cleanup::guard(format!("kill {}", child.id()))?;
    wait_until_ready(step, Some((child, &log)))?;
    guard.release();
    Ok(())
}

fn as_root(program: &str) -> Command {
    if packages::is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Polls until the engine answers. A daemon of ours that has ended is not yet a
/// failure: the package's own start script may have been quicker.
fn wait_until_ready(
    step: progress::Step,
    mut daemon: Option<(Child, &Path)>,
) -> Result<()> {
    const GRACE: Duration = Duration::from_secs(5);
    let mut deadline = Instant::now() + START_LIMIT;
    loop {
        match engine() {
            Engine::Ready { version } => {
                step.done(format!("Docker engine {version}"));
                return Ok(());
            }
            Engine::NoPermission => bail!(
                "the Docker engine is running, but {}",
                way_out(&Engine::NoPermission).unwrap_or_default()
            ),
            Engine::NotRunning | Engine::NotInstalled => {}
        }
        if let Some((child, _)) = &mut daemon
            && child.try_wait()?.is_some()
        {
            deadline = deadline.min(Instant::now() + GRACE);
        }
        if Instant::now() >= deadline {
            step.failed("the Docker engine did not start");
            let log = daemon.map(|(_, log)| log);
            let text = log.and_then(|log| fs::read_to_string(log).ok());
            bail!(
                "the Docker engine did not start{}",
                shell::tail(&text.unwrap_or_default())
            );
        }
        thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_socket_is_told_from_a_missing_one() {
        assert!(denied(
            "Got permission denied while trying to connect to the Docker daemon \
             socket"
        ));
        assert!(!denied("Cannot connect to the Docker daemon at unix:///x"));
    }

    #[test]
    fn each_state_but_ready_has_a_way_out() {
        let version = "28.0.0".to_owned();
        assert_eq!(way_out(&Engine::Ready { version }), None);
        for engine in [Engine::NotRunning, Engine::NoPermission] {
            assert!(way_out(&engine).is_some());
        }
    }
}
