//! Brokers that outlive the program that started them: `cargo lab up` without
//! Docker. A small file remembers each.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::{Launch, data_folder, prepare, process, process::Process};
use crate::{broker::Broker, progress, workspace};

/// A broker that runs on its own until [`Detached::stop`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detached {
    pub broker: Broker,
    /// For clients, on 127.0.0.1.
    pub port: u16,
    pub address: String,
    pub version: String,
    /// The address of RabbitMQ's management API, or of NATS' monitoring.
    pub management: Option<String>,
    pub log: PathBuf,
    group: u32,
    /// Tells the leader of the group from a later process with its id.
    identity: String,
}

/// Starts a broker that outlives this program, and returns when it accepts
/// clients. Its data stay in the cache folder until [`remove_data`].
///
/// # Errors
///
/// If it runs already, or as [`super::start`].
pub fn start_detached(broker: Broker, port: u16, yes: bool) -> Result<Detached> {
    if let Some(running) = detached().into_iter().find(|d| d.broker == broker) {
        bail!("{broker} runs already, on {}", running.address);
    }
    prepare(broker, yes)?;
    let step = progress::step(format!("starting {broker}"));
    let (data, _) = data_folder(Some(&data_of(broker)))?;
    let mut launch = Launch::new(broker, Some(port), &data)?;
    // The log of an earlier run would be shown as this one's.
    fs::write(&launch.log, "")?;
    let (process, version) = Process::start(broker, &mut launch)?;
    let group = process.id();
    let started = Detached {
        broker,
        port,
        address: broker.address(port),
        version,
        management: launch.management,
        log: launch.log,
        group,
        identity: process::identity(group)
            .with_context(|| format!("{broker} ended right after its start"))?,
    };
    let file = state_file(broker);
    fs::write(&file, started.to_text())
        .with_context(|| format!("cannot write {}", file.display()))?;
    process.detach();
    let Detached {
        version, address, ..
    } = &started;
    step.done(format!("{broker} {version} is ready on {address}"));
    Ok(started)
}

/// The brokers that [`start_detached`] has started and that run now.
pub fn detached() -> Vec<Detached> {
    Broker::ALL.into_iter().filter_map(running).collect()
}

fn running(broker: Broker) -> Option<Detached> {
    let text = fs::read_to_string(state_file(broker)).ok()?;
    let known = Detached::from_text(broker, &text)?;
    // Else it has ended, or the machine was started anew.
    let same = process::identity(known.group)? == known.identity;
    same.then_some(known)
}

/// Removes the data that a detached broker has left; false if there are none.
///
/// # Errors
///
/// If the folder cannot be removed.
pub fn remove_data(broker: Broker) -> Result<bool> {
    let data = data_of(broker);
    if !data.is_dir() {
        return Ok(false);
    }
    fs::remove_dir_all(&data)
        .with_context(|| format!("cannot remove {}", data.display()))?;
    Ok(true)
}

impl Detached {
    /// Stops the broker and returns when it is gone; with `volumes`, removes its
    /// data too.
    ///
    /// # Errors
    ///
    /// If it belongs to another user.
    pub fn stop(self, volumes: bool) -> Result<()> {
        process::stop_group(self.group)
            .with_context(|| format!("cannot stop {}", self.broker))?;
        fs::remove_file(state_file(self.broker))?;
        if volumes {
            remove_data(self.broker)?;
        }
        Ok(())
    }

    fn to_text(&self) -> String {
        let Self {
            port,
            address,
            version,
            group,
            identity,
            ..
        } = self;
        let log = self.log.display();
        let management = self.management.as_deref().unwrap_or_default();
        format!(
            "group={group}\nidentity={identity}\nport={port}\naddress={address}\n\
             version={version}\nmanagement={management}\nlog={log}\n"
        )
    }

    /// None if the text is not what [`Self::to_text`] writes.
    fn from_text(broker: Broker, text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        };
        Some(Self {
            broker,
            port: value("port")?.parse().ok()?,
            address: value("address")?,
            version: value("version")?,
            management: value("management").filter(|text| !text.is_empty()),
            log: value("log")?.into(),
            group: value("group")?.parse().ok()?,
            identity: value("identity")?,
        })
    }
}

fn folder() -> PathBuf {
    workspace::cache().join("up")
}

fn state_file(broker: Broker) -> PathBuf {
    folder().join(format!("{}.state", broker.name()))
}

fn data_of(broker: Broker) -> PathBuf {
    folder().join(broker.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Detached {
        Detached {
            broker: Broker::RabbitMq,
            port: 5672,
            address: Broker::RabbitMq.address(5672),
            version: "4.3.6".to_owned(),
            management: Some("http://localhost:15672".to_owned()),
            log: PathBuf::from("/a = b/log"),
            group: 4711,
            identity: "boot 99".to_owned(),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let known = example();
        let text = known.to_text();
        assert_eq!(Detached::from_text(Broker::RabbitMq, &text), Some(known));
    }

    #[test]
    fn a_file_that_is_cut_off_or_foreign_counts_as_none() {
        let text = example().to_text();
        assert_eq!(Detached::from_text(Broker::Nats, &text[..20]), None);
        assert_eq!(Detached::from_text(Broker::Nats, ""), None);
        let wrong = text.replace("4711", "many");
        assert_eq!(Detached::from_text(Broker::Nats, &wrong), None);
    }
}
