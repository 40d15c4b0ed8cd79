//! Real brokers for tests: containers, or processes where no Docker may run.

use std::{
    env,
    net::TcpListener,
    process::Command,
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use lab::{
    broker::Broker,
    cleanup::{self, Guard},
    images,
    kafka_settings::CONTAINER_JAVA,
    native, services, shell,
};
use testcontainers::{
    ContainerRequest, GenericImage, ImageExt as _, core::IntoContainerPort as _,
    runners::AsyncRunner as _,
};
use tokio::{
    runtime::Runtime,
    sync::OnceCell,
    task::{block_in_place, spawn_blocking},
};

use crate::{
    observe::{self, rabbitmq::Management},
    wait,
};

/// With this variable set, brokers are processes of this machine instead of
/// containers. `cargo lab test --native` sets it.
pub(crate) const NATIVE: &str = "LAB_NATIVE";

/// The plugins that Compose gives to RabbitMQ.
const PLUGINS: &[u8] = include_bytes!("../../images/rabbitmq/enabled_plugins");

/// Where RabbitMQ's management API listens in a container.
pub(crate) const MANAGEMENT: u16 = 15672;

/// The label of every container of a test.
const LABEL: &str = "mq-examples.test";

/// A broker of this test's own; dropped, it is gone with its data.
pub struct TestBroker {
    broker: Broker,
    address: String,
    /// The URL of RabbitMQ's management API; the other brokers have none.
    management: Option<String>,
    process: Process,
}

/// What runs it.
pub(crate) enum Process {
    Container { id: String, _guard: Guard },
    Native(Box<native::Server>),
}

/// The address of the broker that all tests of this binary share.
///
/// It is the one in the environment, if there is one, else started by the first
/// test that asks, and gone with the test binary, however that ends.
///
/// # Errors
///
/// If it cannot be started.
pub async fn shared(broker: Broker) -> Result<&'static str> {
    Ok(&find_or_start(broker).await?.0)
}

/// The management API of the RabbitMQ that all tests of this binary share.
///
/// For one that runs elsewhere, `RABBITMQ_MANAGEMENT_URL` names it; without that
/// variable it is taken to be on port 15672 of this machine.
///
/// # Errors
///
/// If RabbitMQ cannot be started.
pub async fn shared_management() -> Result<Management> {
    let (_, url) = find_or_start(Broker::RabbitMq).await?;
    Ok(Management::new(url.as_deref().unwrap_or_default()))
}

/// Address and management API.
type Found = (String, Option<String>);

async fn find_or_start(broker: Broker) -> Result<&'static Found> {
    static SHARED: [OnceCell<Found>; 3] = [const { OnceCell::const_new() }; 3];
    let start = async || {
        if let Ok(address) = env::var(broker.address_var()) {
            let management = env::var("RABBITMQ_MANAGEMENT_URL")
                .unwrap_or_else(|_| "http://localhost:15672".to_owned());
            return Ok((address, Some(management)));
        }
        let started = TestBroker::start(broker).await?;
        let found = (started.address.clone(), started.management.clone());
        // It has to outlive the test that happened to start it; the watcher of
        // `lab::cleanup` ends it together with this process.
        std::mem::forget(started);
        Ok::<_, anyhow::Error>(found)
    };
    SHARED[broker as usize].get_or_try_init(start).await
}

impl TestBroker {
    /// Starts a broker and returns when it serves clients.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn start(broker: Broker) -> Result<Self> {
        let (address, management, process) = if env::var_os(NATIVE).is_some() {
            start_process(broker).await?
        } else {
            start_container(broker).await?
        };
        let started = Self {
            broker,
            address,
            management,
            process,
        };
        started.ready().await?;
        Ok(started)
    }

    /// For a broker that was started with settings of its own.
    pub(crate) fn from_process(
        broker: Broker,
        address: String,
        management: Option<String>,
        process: Process,
    ) -> Self {
        Self {
            broker,
            address,
            management,
            process,
        }
    }

    /// What an example wants in its environment variable.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The management API of this RabbitMQ.
    ///
    /// # Errors
    ///
    /// If it is another broker.
    pub fn management(&self) -> Result<Management> {
        let url = self.management.as_deref();
        Ok(Management::new(url.context("only RabbitMQ has one")?))
    }

    /// SIGKILL, as if the machine had died, but for the disk.
    ///
    /// # Errors
    ///
    /// If the broker is not running.
    pub async fn kill(&mut self) -> Result<()> {
        match &mut self.process {
            Process::Container { id, .. } => {
                docker(&["kill", "--signal", "KILL", id]).await.map(drop)
            }
            // Blocks for as long as the process takes to go.
            Process::Native(server) => block_in_place(|| server.kill()),
        }
    }

    /// Starts it again after [`Self::kill`], with its data, on the same port.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn restart(&mut self) -> Result<()> {
        match &mut self.process {
            Process::Container { id, .. } => {
                docker(&["start", id]).await?;
            }
            Process::Native(server) => block_in_place(|| server.restart())?,
        }
        self.ready().await
    }

    /// Runs RabbitMQ's `rabbitmqctl`, as an operator would, and returns what it
    /// prints.
    ///
    /// # Errors
    ///
    /// If it fails, as it does for another broker.
    pub async fn rabbitmqctl(&self, words: &[&str]) -> Result<String> {
        match &self.process {
            Process::Container { id, .. } => {
                let command = [&["exec", id, "rabbitmqctl"][..], words].concat();
                docker(&command).await
            }
            // Blocks for as long as the tool runs.
            Process::Native(server) => {
                block_in_place(|| native::rabbitmqctl(server, words))
            }
        }
    }

    /// Sends a signal that the broker knows, such as `USR2`, which puts NATS into
    /// lame duck mode. For one that ends it, there is [`Self::kill`].
    ///
    /// # Errors
    ///
    /// If the broker is not running.
    pub async fn signal(&self, name: &str) -> Result<()> {
        match &self.process {
            Process::Container { id, .. } => {
                docker(&["kill", "--signal", name, id]).await.map(drop)
            }
            Process::Native(server) => block_in_place(|| server.signal(name)),
        }
    }

    /// Stops all its processes where they are, so that it answers nobody, and its
    /// connections stay open.
    ///
    /// # Errors
    ///
    /// If the broker is not running.
    pub async fn freeze(&self) -> Result<()> {
        match &self.process {
            // On a loaded machine now and then "unable to freeze", and all goes on.
            Process::Container { id, .. } => {
                wait::until("the broker to be frozen", async || {
                    docker(&["pause", id]).await.map(drop)
                })
                .await
            }
            Process::Native(server) => block_in_place(|| server.signal("STOP")),
        }
    }

    /// Lets it go on after [`Self::freeze`].
    ///
    /// # Errors
    ///
    /// If the broker is not running.
    pub async fn thaw(&self) -> Result<()> {
        match &self.process {
            Process::Container { id, .. } => {
                docker(&["unpause", id]).await.map(drop)
            }
            Process::Native(server) => block_in_place(|| server.signal("CONT")),
        }
    }

    /// Waits until a client is served: an open port is not enough, Docker's
    /// proxy opens it before the broker does.
    pub(crate) async fn ready(&self) -> Result<()> {
        let address = &self.address;
        let ready = match self.broker {
            Broker::Kafka => {
                wait::until("Kafka", async || observe::kafka::ready(address).await)
                    .await
            }
            Broker::RabbitMq => {
                wait::until("RabbitMQ", async || {
                    let (connection, _channel) =
                        observe::rabbitmq::connect(address).await?;
                    Ok(connection.close(200, "".into()).await?)
                })
                .await
            }
            Broker::Nats => {
                wait::until("NATS", async || {
                    observe::nats::connect(address).await?;
                    Ok(())
                })
                .await
            }
        };
        ready.with_context(|| self.log_tail())
    }

    fn log_tail(&self) -> String {
        let mut show = match &self.process {
            Process::Container { id, .. } => {
                let mut logs = Command::new("sh");
                logs.args(["-c", "docker logs --tail 20 \"$0\" 2>&1", id]);
                logs
            }
            Process::Native(server) => {
                let mut tail = Command::new("tail");
                tail.args(["-n", "20"]).arg(server.log());
                tail
            }
        };
        let log = shell::output(&mut show).unwrap_or_else(|error| error.to_string());
        format!(
            "{} does not serve clients; its log ends:\n{log}",
            self.broker
        )
    }
}

async fn start_process(broker: Broker) -> Result<(String, Option<String>, Process)> {
    let options = native::Options {
        port: None,
        data: None,
        yes: false,
    };
    let server = spawn_blocking(move || native::start(broker, &options)).await??;
    Ok((
        server.address().to_owned(),
        server.management().map(str::to_owned),
        Process::Native(Box::new(server)),
    ))
}

async fn start_container(
    broker: Broker,
) -> Result<(String, Option<String>, Process)> {
    // Chosen here, not by Docker: Kafka must be told under which port its
    // clients will find it, and no broker may move when it is restarted.
    let port = free_port()?;
    let mut request = request(broker, port)?;
    let mut management = None;
    if broker == Broker::RabbitMq {
        let port = free_port()?;
        request = request.with_mapped_port(port, MANAGEMENT.tcp());
        management = Some(format!("http://localhost:{port}"));
    }
    let (id, guard) = run_container(request).await?;
    Ok((
        broker.address(port),
        management,
        Process::Container { id, _guard: guard },
    ))
}

/// Starts a container that is gone with the guard, or with this process.
pub(crate) async fn run_container(
    request: ContainerRequest<GenericImage>,
) -> Result<(String, Guard)> {
    let label = container_label()?;
    // Before the container, so that there is no moment without it.
    let guard = cleanup::containers_with_label(&format!("{LABEL}={label}"))?;
    let request = request.with_label(LABEL, label);

    // The client of the Docker engine lives as long as the runtime on which it
    // was first used; a test's own runtime ends with that test.
    static RUNTIME: LazyLock<Result<Runtime, std::io::Error>> =
        LazyLock::new(Runtime::new);
    let runtime = RUNTIME.as_ref().context("cannot start a Tokio runtime")?;
    let container = runtime.spawn(request.start()).await??;
    let id = container.id().to_owned();
    // Its own clean-up needs a runtime that is still alive; the guard does not.
    std::mem::forget(container);
    Ok((id, guard))
}

/// The image of a broker, with nothing set yet.
pub(crate) fn image(broker: Broker) -> Result<GenericImage> {
    // Without a local one, the official image: testcontainers pulls it.
    let name = images::available(broker)
        .unwrap_or_else(|| services::image(broker).to_owned());
    let (image, tag) = name
        .rsplit_once(':')
        .with_context(|| format!("{name} is not an image with a tag"))?;
    Ok(GenericImage::new(image, tag))
}

pub(crate) fn request(
    broker: Broker,
    port: u16,
) -> Result<ContainerRequest<GenericImage>> {
    let mut request = image(broker)?
        .with_mapped_port(port, broker.default_port().tcp())
        // Kafka calls itself by the name of the service.
        .with_hostname(broker.name())
        .with_startup_timeout(Duration::from_secs(90));
    for (name, value) in services::environment(broker, port) {
        request = request.with_env_var(name, value);
    }
    Ok(match broker {
        Broker::Nats => request.with_cmd(["-js"]),
        // The official image brings fewer of them.
        Broker::RabbitMq => {
            request.with_copy_to("/etc/rabbitmq/enabled_plugins", PLUGINS.to_vec())
        }
        Broker::Kafka => {
            request.with_env_var("KAFKA_JVM_PERFORMANCE_OPTS", CONTAINER_JAVA)
        }
    })
}

pub(crate) fn free_port() -> Result<u16> {
    // Free at this moment; that another program takes it before the container
    // does is possible, and then the container says so.
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn container_label() -> Result<String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(format!("{now}-{}-{count}", std::process::id()))
}

pub(crate) async fn docker(args: &[&str]) -> Result<String> {
    let mut command = Command::new("docker");
    command.args(args);
    spawn_blocking(move || shell::output(&mut command)).await?
}
