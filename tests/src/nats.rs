//! NATS servers with configurations of their own, for lessons that are about the
//! server: users, TLS, accounts, leaf nodes, clusters.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use tests::nats::{Server, Servers};
//!
//! let [port] = Servers::ports()?;
//! let config = "authorization { user: clerk, password: secret }".to_owned();
//! let server = Server { name: "hub", config, port };
//! let servers = Servers::start(&[server], &[]).await?;
//! let url = servers.url("hub")?;
//! # Ok(())
//! # }
//! ```

use anyhow::Result;
use lab::{broker::Broker, native};

use crate::several::{Node, Several};

/// What one server is to be.
pub struct Server<'a> {
    /// By which the methods of [`Servers`] know it; letters, digits and hyphens,
    /// as its files are named after it.
    pub name: &'a str,
    /// The text of its configuration file, without address and port for clients
    /// and without the folder for JetStream, which come from the command line.
    /// Other ports, for leaf nodes or routes, are on `127.0.0.1`.
    pub config: String,
    /// The port for its clients, one of [`Servers::ports`].
    pub port: u16,
}

/// One or several NATS servers of a test's own. Dropped, or when the test ends in
/// whatever way, they are gone with their data.
///
/// The servers run side by side, as processes of this machine or in one container
/// whose client ports have the same numbers on this machine. So they find each
/// other on `127.0.0.1`, and one configuration is right for both ways.
pub struct Servers(Several);

impl Servers {
    /// Ports that were free a moment ago, all different.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn ports<const N: usize>() -> Result<[u16; N]> {
        native::free_ports()
    }

    /// Writes the configurations and these other files, certificates for example,
    /// into one folder, starts all servers in it, and returns when each serves
    /// clients. A path in a configuration is relative to that folder, and a file's
    /// path may have folders: `certs/ca.pem`.
    ///
    /// # Errors
    ///
    /// If one does not start; with the end of its log.
    pub async fn start(
        servers: &[Server<'_>],
        files: &[(String, Vec<u8>)],
    ) -> Result<Self> {
        let configs = servers.iter().map(|server| {
            let config = server.config.clone().into_bytes();
            (file_of(server.name), config)
        });
        let files = configs.chain(files.iter().cloned()).collect();
        let nodes = servers.iter().map(node).collect();
        let ready = "Server is ready";
        let mut several =
            Several::prepare(Broker::Nats, ready, nodes, files).await?;
        for server in servers {
            several.start(server.name).await?;
        }
        Ok(Self(several))
    }

    /// The address of a server, without user and password.
    ///
    /// # Errors
    ///
    /// If no server has this name.
    pub fn url(&self, name: &str) -> Result<String> {
        self.0.url(name)
    }

    /// SIGKILL; the server's data stay. Returns when the process is gone.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.0.kill(name).await
    }

    /// Starts a server again after [`Self::kill`], with its data, on the same
    /// port, and returns when it serves clients. Before, its files may have been
    /// [written](Self::write) anew.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        self.0.start(name).await
    }

    /// Sends a signal: `HUP` to read the configuration anew, `USR2` to have the
    /// clients leave before the server ends ("lame duck mode"), `STOP` and `CONT`
    /// to freeze it and let it go on.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn signal(&self, name: &str, signal: &str) -> Result<()> {
        self.0.signal(name, signal).await
    }

    /// Writes a file into the folder of the servers, over one that is there.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub async fn write(&self, path: &str, data: &[u8]) -> Result<()> {
        self.0.write(path, data).await
    }

    /// All that a server has written into its log.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub async fn log(&self, name: &str) -> Result<String> {
        self.0.log(name).await
    }
}

fn file_of(name: &str) -> String {
    format!("{name}.conf")
}

fn node(server: &Server<'_>) -> Node {
    let (name, port) = (server.name.to_owned(), server.port);
    let file = file_of(&name);
    Node {
        command: format!(
            "exec nats-server --config {file} --addr 0.0.0.0 --port {port} \
             --store_dir {name}.data"
        ),
        start: Box::new(move |folder| native::start_nats(&folder.join(file), port)),
        name,
        port,
    }
}
