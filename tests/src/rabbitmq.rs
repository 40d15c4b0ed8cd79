//! A RabbitMQ with settings of its own, for lessons that are about the broker:
//! users, TLS, permissions.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use tests::rabbitmq::RabbitMq;
//!
//! let rabbitmq = RabbitMq::start("max_message_size = 1000\n", None, &[]).await?;
//! let address = rabbitmq.address();
//! # Ok(())
//! # }
//! ```

use std::env;

use anyhow::Result;
use lab::{
    broker::Broker,
    cleanup::Guard,
    native,
    rabbitmq_settings::{
        CONTAINER_CONFIG, CONTAINER_FOLDER, DEFINITIONS, PLUGINS, RabbitMqSettings,
        TLS_PORT,
    },
};
use testcontainers::{ImageExt as _, core::IntoContainerPort as _};
use tokio::task::spawn_blocking;

use crate::{
    TestBroker,
    broker::{MANAGEMENT, NATIVE, Process, free_port, request, run_container},
    files,
    observe::rabbitmq::Management,
    wait,
};

/// A RabbitMQ of a test's own. Dropped, or when the test ends in whatever way, it
/// is gone with its data.
pub struct RabbitMq {
    /// Its address is that of the plain port.
    broker: TestBroker,
    address: String,
    /// As the server knows it.
    tls_port: Option<u16>,
    /// Of a native server.
    _folder: Option<Guard>,
}

impl RabbitMq {
    /// Starts a RabbitMQ with these lines of a `rabbitmq.conf` on top of those
    /// that it has anyway, and returns when it serves clients.
    ///
    /// The definitions, if there are any, have to know the user `guest`, as the
    /// observers of a test come as that one, through a port without TLS. The
    /// files, certificates for example, are where the configuration looks for them
    /// below `/etc/rabbitmq`: `certs/ca.pem`.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn start(
        config: &str,
        definitions: Option<&str>,
        files: &[(String, Vec<u8>)],
    ) -> Result<Self> {
        let settings = RabbitMqSettings {
            config: config.to_owned(),
            definitions: definitions.map(str::to_owned),
        };
        let rabbitmq = match env::var_os(NATIVE) {
            Some(_) => start_process(settings, files).await?,
            None => start_container(&settings, files).await?,
        };
        rabbitmq.broker.ready().await?;
        if let Some(port) = rabbitmq.tls_port {
            let path = format!("health/checks/port-listener/{port}");
            let management = rabbitmq.management()?;
            wait::until("the port for TLS", || management.get(&path)).await?;
        }
        Ok(rabbitmq)
    }

    /// What an example wants in its environment variable: the port with TLS, if
    /// the configuration has one.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The address without TLS, for `tests::observe`.
    pub fn plain(&self) -> &str {
        self.broker.address()
    }

    /// As [`TestBroker::rabbitmqctl`].
    ///
    /// # Errors
    ///
    /// If it fails.
    pub async fn rabbitmqctl(&self, words: &[&str]) -> Result<String> {
        self.broker.rabbitmqctl(words).await
    }

    /// The management API, as the user `guest`.
    ///
    /// # Errors
    ///
    /// Never; see [`TestBroker::management`].
    pub fn management(&self) -> Result<Management> {
        self.broker.management()
    }
}

async fn start_process(
    settings: RabbitMqSettings,
    files: &[(String, Vec<u8>)],
) -> Result<RabbitMq> {
    let (folder, guard) = files::folder("lab-rabbitmq-", files)?;
    let own = settings.clone();
    let start = move || native::start_rabbitmq(&own, &folder);
    let (server, tls) = spawn_blocking(start).await??;
    let address = settings.address(server.port(), tls);
    let plain = server.address().to_owned();
    let management = server.management().map(str::to_owned);
    let process = Process::Native(Box::new(server));
    Ok(RabbitMq {
        broker: TestBroker::from_process(
            Broker::RabbitMq,
            plain,
            management,
            process,
        ),
        address,
        tls_port: settings.has_tls().then_some(tls),
        _folder: Some(guard),
    })
}

async fn start_container(
    settings: &RabbitMqSettings,
    files: &[(String, Vec<u8>)],
) -> Result<RabbitMq> {
    let [plain, tls, management] = [free_port()?, free_port()?, free_port()?];
    let in_folder = |path: &str| format!("{CONTAINER_FOLDER}/{path}");
    let mut request = request(Broker::RabbitMq, plain)?
        .with_mapped_port(tls, TLS_PORT.tcp())
        .with_mapped_port(management, MANAGEMENT.tcp())
        .with_copy_to(CONTAINER_CONFIG, settings.config.clone().into_bytes())
        .with_copy_to(in_folder("enabled_plugins"), PLUGINS.as_bytes().to_vec());
    if let Some(definitions) = &settings.definitions {
        let data = definitions.clone().into_bytes();
        request = request.with_copy_to(in_folder(DEFINITIONS), data);
    }
    for (path, data) in files {
        request = request.with_copy_to(in_folder(path), data.clone());
    }
    let (id, guard) = run_container(request).await?;
    let process = Process::Container { id, _guard: guard };
    Ok(RabbitMq {
        broker: TestBroker::from_process(
            Broker::RabbitMq,
            Broker::RabbitMq.address(plain),
            Some(format!("http://localhost:{management}")),
            process,
        ),
        address: settings.address(plain, tls),
        tls_port: settings.has_tls().then_some(TLS_PORT),
        _folder: None,
    })
}
