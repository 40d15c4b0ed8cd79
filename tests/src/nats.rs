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

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{broker::Broker, cleanup::Guard, native, shell};
use testcontainers::{ImageExt as _, core::IntoContainerPort as _};
use tokio::task::{block_in_place, spawn_blocking};

use crate::{
    broker::{NATIVE, docker, image, run_container},
    files, wait,
};

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
pub struct Servers {
    servers: Vec<Running>,
    place: Place,
}

struct Running {
    name: String,
    port: u16,
    /// How often it was started: a log has as many lines that it is ready.
    starts: usize,
    /// None in a container.
    process: Option<native::Server>,
}

enum Place {
    Container { id: String, _guard: Guard },
    Native { folder: PathBuf, _guard: Guard },
}

/// What a server's log says when it serves clients.
const READY: &str = "Server is ready";

/// Where the files are in a container.
const FOLDER: &str = "/servers";

/// In a container: starts `$0` on port `$1`, and leaves the id of its process.
const START: &str = "echo $$ > $0.pid; exec nats-server --config $0.conf \
    --addr 0.0.0.0 --port $1 --store_dir $0.data >> $0.log 2>&1";

/// In a container: ends `$0`, and returns when it is gone.
const KILL: &str = "id=$(cat $0.pid) || exit; rm $0.pid; exec 2> /dev/null; \
    kill -s KILL $id; while kill -s 0 $id; do sleep 0.05; done";

/// In a container: the log of `$0`, and a last line when it has ended.
const LOOK: &str = "cat $0.log 2> /dev/null; \
    [ ! -f $0.pid ] || kill -s 0 $(cat $0.pid) 2> /dev/null || \
    printf '\nended'";

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
            let path = format!("{}.conf", server.name);
            (path, server.config.clone().into_bytes())
        });
        let files: Vec<_> = configs.chain(files.iter().cloned()).collect();
        let place = match env::var_os(NATIVE) {
            Some(_) => Place::folder(&files)?,
            None => Place::container(servers, files).await?,
        };
        let mut started = Self {
            servers: Vec::new(),
            place,
        };
        for server in servers {
            started.servers.push(Running {
                name: server.name.to_owned(),
                port: server.port,
                starts: 0,
                process: None,
            });
            started.restart(server.name).await?;
        }
        Ok(started)
    }

    /// The address of a server, without user and password.
    ///
    /// # Errors
    ///
    /// If no server has this name.
    pub fn url(&self, name: &str) -> Result<String> {
        Ok(Broker::Nats.address(self.find(name)?.port))
    }

    /// SIGKILL; the server's data stay. Returns when the process is gone.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        if let Place::Container { .. } = &self.place {
            return self.in_container(name, KILL).await.map(drop);
        }
        let at = self.at(name)?;
        let process = self.servers[at].process.as_mut();
        let process = process.with_context(|| format!("{name} does not run"))?;
        // Blocks for as long as the process takes to go.
        block_in_place(|| process.kill())
    }

    /// Starts a server again after [`Self::kill`], with its data, on the same
    /// port, and returns when it serves clients. Before, its files may have been
    /// [written](Self::write) anew.
    ///
    /// # Errors
    ///
    /// If it does not start; with the end of its log.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        let at = self.at(name)?;
        let started = self.launch(at, name).await;
        started.with_context(|| format!("the server {name}"))
    }

    async fn launch(&mut self, at: usize, name: &str) -> Result<()> {
        let port = self.servers[at].port;
        match &self.place {
            Place::Container { id, .. } => {
                let stopped = self.in_container(name, "[ ! -f $0.pid ]").await;
                ensure!(stopped.is_ok(), "it runs already");
                let port = port.to_string();
                let command = ["sh", "-c", START, name, &port];
                let exec = ["exec", "--detach", "--workdir", FOLDER, id];
                docker(&[&exec[..], &command[..]].concat()).await?;
                self.servers[at].starts += 1;
                self.ready(name).await
            }
            Place::Native { folder, .. } => {
                let config = folder.join(format!("{name}.conf"));
                let process = &mut self.servers[at].process;
                match process {
                    Some(process) => block_in_place(|| process.restart()),
                    None => {
                        let start = move || native::start_nats(&config, port);
                        *process = Some(spawn_blocking(start).await??);
                        Ok(())
                    }
                }
            }
        }
    }

    /// Sends a signal: `HUP` to read the configuration anew, `USR2` to have the
    /// clients leave before the server ends ("lame duck mode"), `STOP` and `CONT`
    /// to freeze it and let it go on.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub async fn signal(&self, name: &str, signal: &str) -> Result<()> {
        if let Place::Container { .. } = &self.place {
            let script = format!("kill -s {signal} $(cat $0.pid)");
            return self.in_container(name, &script).await.map(drop);
        }
        let process = self.find(name)?.process.as_ref();
        process
            .with_context(|| format!("{name} does not run"))?
            .signal(signal)
    }

    /// Writes a file into the folder of the servers, over one that is there.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub async fn write(&self, path: &str, data: &[u8]) -> Result<()> {
        match &self.place {
            Place::Native { folder, .. } => {
                files::write(folder, &[(path.to_owned(), data.to_vec())])
            }
            Place::Container { id, .. } => {
                let file = tempfile::NamedTempFile::new()?;
                fs::write(file.path(), data)?;
                let source = file.path().to_string_lossy();
                let target = format!("{id}:{FOLDER}/{path}");
                docker(&["cp", &source, &target]).await.map(drop)
            }
        }
    }

    /// All that a server has written into its log.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub async fn log(&self, name: &str) -> Result<String> {
        match &self.place {
            Place::Container { .. } => self.in_container(name, "cat $0.log").await,
            Place::Native { folder, .. } => {
                let path = folder.join(format!("{name}.log"));
                Ok(fs::read_to_string(path)?)
            }
        }
    }

    /// Waits until the log of a server in the container says that it is ready:
    /// a client might need a certificate or a password to be served.
    async fn ready(&self, name: &str) -> Result<()> {
        let starts = self.find(name)?.starts;
        let ended = wait::until(name, async || {
            let log = self.in_container(name, LOOK).await?;
            let ended = log.ends_with("\nended");
            let ready = log.matches(READY).count() >= starts;
            ensure!(ended || ready, "its log ends:{}", shell::tail(&log));
            Ok(ended.then_some(log))
        })
        .await?;
        match ended {
            Some(log) => bail!("it ended while starting{}", shell::tail(&log)),
            None => Ok(()),
        }
    }

    /// Runs a script of the POSIX shell where the files are; `$0` is the server.
    async fn in_container(&self, name: &str, script: &str) -> Result<String> {
        self.find(name)?;
        let Place::Container { id, .. } = &self.place else {
            bail!("the servers run natively");
        };
        docker(&["exec", "--workdir", FOLDER, id, "sh", "-c", script, name]).await
    }

    fn find(&self, name: &str) -> Result<&Running> {
        self.at(name).map(|at| &self.servers[at])
    }

    fn at(&self, name: &str) -> Result<usize> {
        let found = self.servers.iter().position(|server| server.name == name);
        found.with_context(|| format!("no server is named {name}"))
    }
}

impl Place {
    fn folder(files: &[(String, Vec<u8>)]) -> Result<Self> {
        let (folder, guard) = files::folder("lab-nats-", files)?;
        Ok(Self::Native {
            folder,
            _guard: guard,
        })
    }

    async fn container(
        servers: &[Server<'_>],
        files: Vec<(String, Vec<u8>)>,
    ) -> Result<Self> {
        // The servers come and go; this stays.
        let mut request = image(Broker::Nats)?
            .with_cmd(["tail", "-f", "/dev/null"])
            // So that it may write beside files that were copied.
            .with_user("root");
        for server in servers {
            request = request.with_mapped_port(server.port, server.port.tcp());
        }
        for (path, data) in files {
            request = request.with_copy_to(format!("{FOLDER}/{path}"), data);
        }
        let (id, guard) = run_container(request).await?;
        Ok(Self::Container { id, _guard: guard })
    }
}
