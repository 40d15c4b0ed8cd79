//! The brokers of `docker-compose.yml`, through whichever Compose is here:
//! `docker compose` (version 2 and later) or `docker-compose` (1.29).

use std::{
    env,
    net::TcpListener,
    ops::Deref,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    broker::Broker,
    cleanup, images,
    job::Job,
    packages,
    probe::{self, Endpoint, Listener},
    progress, services, shell, trouble, workspace,
};

/// The project that `cargo lab up` starts and `cargo lab down` stops.
const NAME: &str = "mq-examples";
/// Several times what a broker needs on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// A way to call Compose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `docker compose`
    Plugin,
    /// `docker-compose`
    Standalone,
}

impl Tool {
    /// Which Compose is here, the newer one first.
    pub fn find() -> Option<Self> {
        let plugin = Self::Plugin.version().map(|_| Self::Plugin);
        plugin.or_else(|| shell::which("docker-compose").map(|_| Self::Standalone))
    }

    /// The version of this Compose.
    pub fn version(self) -> Option<String> {
        shell::output(self.command().args(["version", "--short"])).ok()
    }

    fn command(self) -> Command {
        match self {
            Self::Plugin => {
                let mut command = Command::new("docker");
                command.arg("compose");
                command
            }
            Self::Standalone => Command::new("docker-compose"),
        }
    }

    /// Finds Compose, or installs it if `yes`.
    fn ensure(yes: bool) -> Result<Self> {
        if let Some(tool) = Self::find() {
            return Ok(tool);
        }
        let Some(command) = install_command() else {
            bail!("Docker Compose is missing; install Docker's compose plugin");
        };
        if !yes {
            bail!(
                "Docker Compose is missing; run `{command}`, or this again with --yes"
            );
        }
        packages::install(&[package()]).map_err(trouble::explained)?;
        Self::find().context("Docker Compose was installed and cannot be found")
    }
}

/// The command that installs Compose; `None` where there is no apt-get.
pub fn install_command() -> Option<String> {
    packages::install_command(&[package()])
}

/// The package of Compose: on Ubuntu version 2 has a name of its own; on Debian
/// `docker-compose` is version 1.29 (bookworm) or 2 (later).
fn package() -> &'static str {
    const UBUNTU: &str = "docker-compose-v2";
    match shell::output(Command::new("apt-cache").args(["show", UBUNTU])) {
        Ok(_) => UBUNTU,
        Err(_) => "docker-compose",
    }
}

/// A set of containers, one for each broker, under one name.
pub struct Project {
    name: String,
    /// May Compose be installed if it is missing?
    yes: bool,
    /// Ports of its own; those of [`Project::ours`] come from the environment.
    ports: Vec<(String, String)>,
}

impl Project {
    /// The project of `cargo lab up`. With `yes`, Compose is installed when it is
    /// needed and missing.
    pub fn ours(yes: bool) -> Self {
        Self {
            name: NAME.to_owned(),
            yes,
            ports: Vec::new(),
        }
    }

    /// A project with a name and free ports of its own, which is removed with
    /// all its data when the value is dropped or this program ends.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn temporary(yes: bool) -> Result<Temporary> {
        let project = Self {
            name: format!("{NAME}-{}", std::process::id()),
            yes,
            ports: free_ports()?,
        };
        let guard = cleanup::guard(removal(&project.name, "", true))?;
        Ok(Temporary {
            project,
            _guard: guard,
        })
    }

    /// Starts these brokers, and returns when all accept clients. Images are pulled
    /// or built first, where that is needed. Interrupted, it removes the
    /// containers that it has made.
    ///
    /// # Errors
    ///
    /// If one does not start; the error ends with the last lines of its log.
    pub fn up(&self, brokers: &[Broker]) -> Result<()> {
        // First of all: without Compose, an image is of no use.
        let mut command = self.command()?;
        let images = images::ensure(brokers, self.yes)?;
        let running = self.running();
        let new = brokers.iter().filter(|broker| !running.contains(broker));
        let guards = new
            .map(|broker| cleanup::guard(removal(&self.name, broker.name(), false)))
            .collect::<Result<Vec<_>>>()?;
        command.args(["up", "-d"]).args(names(brokers));
        for (broker, (variable, image)) in brokers.iter().zip(images) {
            if image != services::image(*broker) {
                command.env(variable, image);
            }
        }
        let step = progress::step(format!("starting {}", titles(brokers)));
        let job = Job::start(&mut command)?;
        job.finish(&step).map_err(trouble::explained)?;
        self.wait_until_ready(brokers, &step)?;
        step.done(format!("{} ready", titles(brokers)));
        for guard in guards {
            guard.release();
        }
        Ok(())
    }

    /// Polls, because docker-compose 1.29 has no `--wait`.
    fn wait_until_ready(
        &self,
        brokers: &[Broker],
        step: &progress::Step,
    ) -> Result<()> {
        let deadline = Instant::now() + READY_LIMIT;
        let mut waiting = brokers.to_vec();
        loop {
            waiting.retain(|broker| !self.is_ready(*broker));
            if waiting.is_empty() {
                return Ok(());
            }
            for broker in &waiting {
                let state = self.health(*broker)?;
                let hopeful = ["running starting", "running healthy"];
                if !hopeful.contains(&state.as_str()) || Instant::now() >= deadline {
                    bail!(
                        "{broker} did not start ({state}){}",
                        shell::tail(&self.recent_log(*broker))
                    );
                }
            }
            step.say(format!("waiting for {}", titles(&waiting)));
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Is the broker healthy, or does it answer already? Its health is looked at
    /// every few seconds only; but an engine on another machine publishes its
    /// ports there, so nothing else can tell.
    fn is_ready(&self, broker: Broker) -> bool {
        match self.health(broker).unwrap_or_default().as_str() {
            "running healthy" => true,
            "running starting" => self.port(broker).is_some_and(|port| {
                let host = "127.0.0.1".to_owned();
                let listener = probe::listener(broker, &Endpoint { host, port });
                matches!(listener, Listener::Broker { .. })
            }),
            _ => false,
        }
    }

    /// State and health, such as `running starting` or `exited unhealthy`.
    fn health(&self, broker: Broker) -> Result<String> {
        let container = self
            .container(broker)
            .with_context(|| format!("the container of {broker} has gone"))?;
        let mut inspect = Command::new("docker");
        inspect
            .args(["inspect", "--format"])
            .arg("{{.State.Status}} {{.State.Health.Status}}")
            .arg(container);
        shell::output(&mut inspect)
    }

    fn recent_log(&self, broker: Broker) -> String {
        let Some(container) = self.container(broker) else {
            return String::new();
        };
        // NATS writes its log to stderr, and one needs both in their order.
        let script = format!("docker logs --tail 15 {container} 2>&1");
        shell::output(Command::new("sh").args(["-c", &script])).unwrap_or_default()
    }

    /// Stops and removes the containers, and with `volumes` their data.
    ///
    /// # Errors
    ///
    /// If Compose fails.
    pub fn down(&self, volumes: bool) -> Result<()> {
        let mut command = self.command()?;
        command.arg("down");
        if volumes {
            command.arg("--volumes");
        }
        shell::run(&mut command)
    }

    /// The brokers that run and accept clients.
    pub fn running(&self) -> Vec<Broker> {
        let ready = |broker: &Broker| self.is_ready(*broker);
        Broker::ALL.into_iter().filter(ready).collect()
    }

    /// The port on which clients reach a broker; `None` if it does not run.
    pub fn port(&self, broker: Broker) -> Option<u16> {
        self.published(broker, broker.default_port())
    }

    /// Where a port of a broker's container is published on this machine.
    pub fn published(&self, broker: Broker, inside: u16) -> Option<u16> {
        let container = self.container(broker)?;
        let mut port = Command::new("docker");
        port.args(["port", &container, &inside.to_string()]);
        let published = shell::output(&mut port).ok()?;
        published.lines().next()?.rsplit(':').next()?.parse().ok()
    }

    /// Has this broker a container, whatever its state?
    pub fn has(&self, broker: Broker) -> bool {
        self.container(broker).is_some()
    }

    /// Are there containers, running or not?
    pub fn has_containers(&self) -> bool {
        Broker::ALL.into_iter().any(|broker| self.has(broker))
    }

    /// Are there data of this project?
    pub fn has_volumes(&self) -> bool {
        let mut list = Command::new("docker");
        list.args(["volume", "ls", "--quiet"]);
        for label in labels(&self.name, "") {
            list.arg("--filter").arg(format!("label={label}"));
        }
        shell::output(&mut list).is_ok_and(|names| !names.is_empty())
    }

    /// The command that shows the logs of these brokers (all, if none is named).
    ///
    /// # Errors
    ///
    /// If there is no Compose.
    pub fn logs(&self, brokers: &[Broker], follow: bool) -> Result<Command> {
        let mut command = self.command()?;
        command.args(["logs", "--tail", "200"]);
        if follow {
            command.arg("--follow");
        }
        command.args(names(brokers));
        Ok(command)
    }

    /// The container of a broker. Found by its labels, which both kinds of
    /// Compose set, as its name is not the same with both.
    fn container(&self, broker: Broker) -> Option<String> {
        let mut list = Command::new("docker");
        list.args(["ps", "--all", "--quiet"]);
        for label in labels(&self.name, broker.name()) {
            list.arg("--filter").arg(format!("label={label}"));
        }
        let ids = shell::output(&mut list).ok()?;
        ids.lines().next().map(str::to_owned)
    }

    fn command(&self) -> Result<Command> {
        let mut command = Tool::ensure(self.yes)?.command();
        command.args(["-p", &self.name]);
        let ports = self.ports.iter().map(|(name, value)| (name, value));
        command.envs(ports);
        // Left out where it changes nothing: the line that is shown stays short.
        let root = workspace::root();
        if env::current_dir().is_ok_and(|here| here != root) {
            command.current_dir(root);
        }
        Ok(command)
    }
}

/// A [`Project`] that does not outlive this value.
pub struct Temporary {
    project: Project,
    /// Removes the containers, the volumes and the network.
    _guard: cleanup::Guard,
}

impl Deref for Temporary {
    type Target = Project;

    fn deref(&self) -> &Project {
        &self.project
    }
}

/// The labels of a project's containers, or of those of one service.
fn labels(project: &str, service: &str) -> Vec<String> {
    let mut labels = vec![format!("com.docker.compose.project={project}")];
    if !service.is_empty() {
        labels.push(format!("com.docker.compose.service={service}"));
    }
    labels
}

/// A script that removes containers and, if nothing else uses it, the network
/// without Compose, which would take a second only to start.
fn removal(project: &str, service: &str, volumes: bool) -> String {
    let filters: String = labels(project, service)
        .iter()
        .map(|label| format!(" --filter label={label}"))
        .collect();
    let mut script = format!(
        "ids=$(docker ps -aq{filters}); [ -z \"$ids\" ] || docker rm -fv $ids; \
         docker network rm {project}_default"
    );
    if volumes {
        script.push_str(&format!(
            "; ids=$(docker volume ls -q{filters}); \
             [ -z \"$ids\" ] || docker volume rm -f $ids"
        ));
    }
    script
}

/// A free port for each port of the Compose file, all different.
fn free_ports() -> Result<Vec<(String, String)>> {
    let ports: Vec<services::Port> =
        Broker::ALL.into_iter().flat_map(services::ports).collect();
    // All are held until the last one is found, so that none is found twice.
    let held = ports
        .iter()
        .map(|_| TcpListener::bind(("127.0.0.1", 0)))
        .collect::<Result<Vec<_>, _>>()
        .context("no port is free")?;
    let number = |(port, listener): (services::Port, &TcpListener)| {
        Ok((port.variable, listener.local_addr()?.port().to_string()))
    };
    ports.into_iter().zip(&held).map(number).collect()
}

fn names(brokers: &[Broker]) -> Vec<&'static str> {
    brokers.iter().map(|broker| broker.name()).collect()
}

fn titles(brokers: &[Broker]) -> String {
    let titles: Vec<&str> = brokers.iter().map(|broker| broker.title()).collect();
    titles.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_is_limited_to_its_project_and_service() {
        let script = removal("p", "kafka", false);
        assert!(script.contains("label=com.docker.compose.project=p"));
        assert!(script.contains("label=com.docker.compose.service=kafka"));
        assert!(!script.contains("volume"));
        assert!(removal("p", "", true).contains("docker volume rm"));
    }

    #[test]
    fn free_ports_are_different() -> Result<()> {
        let mut ports = free_ports()?;
        let count = ports.len();
        ports.sort_by(|a, b| a.1.cmp(&b.1));
        ports.dedup_by(|a, b| a.1 == b.1);
        assert_eq!(ports.len(), count);
        Ok(())
    }
}
