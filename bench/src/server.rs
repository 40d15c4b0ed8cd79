//! The broker that both sides are measured on.

use std::{any::Any, env};

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    compose::Project,
    docker::{self, Engine},
    native::{self, Options},
    probe::{self, Listener},
};

use crate::machine;

/// A broker that answers; dropped, it is gone if this program has started it.
pub struct Server {
    pub address: String,
    pub version: String,
    /// Where it came from, for the reader.
    pub from: String,
    /// Nobody else uses it, so that what is in it may be deleted.
    pub ours: bool,
    /// Its process, if it can be looked at.
    pub process: Option<u32>,
    _keep: Option<Box<dyn Any>>,
}

impl Server {
    /// Takes the one in the environment, else starts a process, else a container.
    ///
    /// # Errors
    ///
    /// If there is none of them.
    pub fn find(broker: Broker, yes: bool) -> Result<Self> {
        if let Ok(address) = env::var(broker.address_var()) {
            return Ok(Self {
                address,
                version: version(broker)?,
                from: format!("not ours, from {}", broker.address_var()),
                ours: false,
                process: None,
                _keep: None,
            });
        }
        let missing = native::missing(broker);
        let natively = missing.iter().all(|missing| yes && missing.by_yes);
        let engine = docker::engine();
        if !natively && matches!(engine, Engine::Ready { .. }) {
            return Self::in_container(broker, yes);
        }
        let options = Options {
            yes,
            ..Options::default()
        };
        let server = native::start(broker, &options)?;
        Ok(Self {
            address: server.address().to_owned(),
            version: server.version().to_owned(),
            from: "a process of this run".to_owned(),
            ours: true,
            process: server.process_id().map(machine::heaviest),
            _keep: Some(Box::new(server)),
        })
    }

    fn in_container(broker: Broker, yes: bool) -> Result<Self> {
        let project = Project::temporary(yes)?;
        project.up(&[broker])?;
        let port = project.port(broker).context("the container has no port")?;
        let endpoint = probe::Endpoint {
            host: "localhost".to_owned(),
            port,
        };
        Ok(Self {
            address: broker.address(port),
            version: version_at(broker, &endpoint),
            from: "a container of this run".to_owned(),
            ours: true,
            process: None,
            _keep: Some(Box::new(project)),
        })
    }
}

fn version(broker: Broker) -> Result<String> {
    Ok(version_at(broker, &probe::endpoint(broker)?))
}

fn version_at(broker: Broker, endpoint: &probe::Endpoint) -> String {
    match probe::listener(broker, endpoint) {
        Listener::Broker { version } => version,
        Listener::Nothing | Listener::Other => None,
    }
    .unwrap_or_else(|| "of unknown version".to_owned())
}
