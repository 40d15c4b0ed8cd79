//! Brokers that `cargo lab up` starts and that stay up: by Docker where an
//! engine runs, else as native processes.

use std::thread;

use anyhow::{Result, anyhow, bail};

use crate::{
    broker::Broker,
    compose::Project,
    docker::{self, Engine},
    native::{self, Detached},
    probe::{self, Endpoint, Listener},
    progress,
    services::{self, Port},
};

/// The page or interface through which one watches a broker, as a port inside
/// the container.
const MANAGEMENT: [(Broker, u16); 2] =
    [(Broker::RabbitMq, 15672), (Broker::Nats, 8222)];

/// Who has started a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Docker,
    Native,
    /// Not `cargo lab`.
    Foreign,
}

/// The way on which brokers are to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Docker where an engine runs, else native.
    Any,
    Docker,
    Native,
}

/// A broker that answers.
#[derive(Clone, Debug)]
pub struct Running {
    pub broker: Broker,
    pub by: By,
    pub endpoint: Endpoint,
    pub version: Option<String>,
    /// The URL of RabbitMQ's management page or of NATS' monitoring.
    pub management: Option<String>,
}

/// The brokers that answer now: those of `cargo lab up`, or else one that
/// somebody else has started at the address which the examples use.
///
/// # Errors
///
/// If the environment holds a broken address.
pub fn running() -> Result<Vec<Running>> {
    let mut all = ours();
    for broker in Broker::ALL {
        if all.iter().all(|running| running.broker != broker) {
            all.extend(foreign(broker)?);
        }
    }
    Ok(all)
}

/// The brokers that `cargo lab up` has started.
fn ours() -> Vec<Running> {
    let project = Project::ours(false);
    let healthy = project.running();
    let native = native::detached().into_iter().map(of_native);
    let docker = healthy
        .into_iter()
        .filter_map(|broker| of_docker(&project, broker));
    native.chain(docker).collect()
}

fn of_native(detached: Detached) -> Running {
    Running {
        broker: detached.broker,
        by: By::Native,
        endpoint: here(detached.port),
        version: Some(detached.version),
        management: detached.management,
    }
}

fn of_docker(project: &Project, broker: Broker) -> Option<Running> {
    let endpoint = here(project.port(broker)?);
    let management = MANAGEMENT
        .iter()
        .find(|(of, _)| *of == broker)
        .and_then(|(_, inside)| project.published(broker, *inside))
        .map(|port| format!("http://localhost:{port}"));
    Some(Running {
        broker,
        by: By::Docker,
        version: version(broker, &endpoint),
        endpoint,
        management,
    })
}

fn foreign(broker: Broker) -> Result<Option<Running>> {
    let endpoint = probe::endpoint(broker)?;
    Ok(match probe::listener(broker, &endpoint) {
        Listener::Broker { version } => Some(Running {
            broker,
            by: By::Foreign,
            endpoint,
            version,
            management: None,
        }),
        Listener::Nothing | Listener::Other => None,
    })
}

fn version(broker: Broker, endpoint: &Endpoint) -> Option<String> {
    match probe::listener(broker, endpoint) {
        Listener::Broker { version } => version,
        Listener::Nothing | Listener::Other => None,
    }
}

fn here(port: u16) -> Endpoint {
    Endpoint {
        host: "localhost".to_owned(),
        port,
    }
}

/// Starts those of these brokers that are not up. Returns all of them, and
/// whether any had to be started.
///
/// # Errors
///
/// If a port is taken, which is looked at before anything is started; if
/// something is missing that `yes` does not allow to install; if a broker does
/// not get ready.
pub fn start(
    brokers: &[Broker],
    way: Way,
    yes: bool,
) -> Result<(Vec<Running>, bool)> {
    let wanted = |running: &Running| brokers.contains(&running.broker);
    let up: Vec<Running> = ours().into_iter().filter(wanted).collect();
    for running in &up {
        require_as_asked(running, way)?;
    }
    let missing: Vec<Broker> = brokers
        .iter()
        .filter(|broker| up.iter().all(|running| running.broker != **broker))
        .copied()
        .collect();
    if missing.is_empty() {
        return Ok((up, false));
    }
    if by_docker(way, yes)? {
        start_by_docker(&missing, yes)?;
    } else {
        start_natively(&missing, yes)?;
    }
    Ok((ours().into_iter().filter(wanted).collect(), true))
}

/// A broker that is up stays as it is; fails if it was asked for otherwise.
fn require_as_asked(running: &Running, way: Way) -> Result<()> {
    let broker = running.broker;
    let other_way = match running.by {
        By::Docker => way == Way::Native,
        By::Native => way == Way::Docker,
        By::Foreign => false,
    };
    let port = client_port(broker).number()?;
    let moved = std::env::var_os(broker.port_var()).is_some()
        && port != running.endpoint.port;
    if other_way || moved {
        bail!(
            "{broker} is up already, on port {} ({}); stop it first: cargo lab down",
            running.endpoint.port,
            running.by
        );
    }
    Ok(())
}

fn client_port(broker: Broker) -> Port {
    services::ports(broker).swap_remove(0)
}

/// Chooses, and makes sure that an engine runs if it was asked for.
fn by_docker(way: Way, yes: bool) -> Result<bool> {
    match way {
        Way::Native => Ok(false),
        Way::Docker => docker::install_and_start(yes).map(|()| true),
        Way::Any => {
            let engine = docker::engine();
            let ready = matches!(engine, Engine::Ready { .. });
            if !ready {
                progress::line("no Docker engine answers, so natively");
            }
            Ok(ready)
        }
    }
}

fn start_by_docker(brokers: &[Broker], yes: bool) -> Result<()> {
    let project = Project::ours(yes);
    for broker in brokers {
        // A container of ours that is not healthy may hold the ports itself.
        if !project.has(*broker) {
            for port in services::ports(*broker) {
                services::require_free(*broker, &port)?;
            }
        }
    }
    project.up(brokers)
}

fn start_natively(brokers: &[Broker], yes: bool) -> Result<()> {
    for broker in brokers {
        services::require_free(*broker, &client_port(*broker))?;
    }
    thread::scope(|scope| {
        let start = |broker: &Broker| {
            let broker = *broker;
            scope.spawn(move || {
                let port = client_port(broker).number()?;
                native::start_detached(broker, port, yes).map(drop)
            })
        };
        let threads: Vec<_> = brokers.iter().map(start).collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| anyhow!("a broker's thread ended"))?
        })
    })
}

/// Stops what `cargo lab up` has started, and with `volumes` removes its data,
/// also those of brokers that are not up. Returns whether there was anything.
///
/// # Errors
///
/// If something cannot be stopped or removed.
pub fn stop(volumes: bool) -> Result<bool> {
    let mut any = false;
    for detached in native::detached() {
        let step = progress::step(format!("stopping {}", detached.broker));
        let done = format!("stopped {}", detached.broker);
        detached.stop(volumes)?;
        step.done(done);
        any = true;
    }
    if volumes {
        for broker in Broker::ALL {
            any |= native::remove_data(broker)?;
        }
    }
    let project = Project::ours(false);
    if project.has_containers() || (volumes && project.has_volumes()) {
        let step = progress::step("stopping the containers");
        project.down(volumes)?;
        step.done("stopped and removed the containers");
        any = true;
    }
    Ok(any)
}

impl std::fmt::Display for By {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Docker => "Docker",
            Self::Native => "native",
            Self::Foreign => "not started by cargo lab",
        })
    }
}

impl Running {
    /// The address without user and password, fit to be shown.
    pub fn shown(&self) -> String {
        let Endpoint { host, port } = &self.endpoint;
        match self.broker {
            Broker::Kafka => format!("{host}:{port}"),
            Broker::RabbitMq => format!("amqp://{host}:{port}"),
            Broker::Nats => format!("nats://{host}:{port}"),
        }
    }
}
