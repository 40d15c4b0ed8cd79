//! Servers of one broker that run side by side, as a cluster does.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{broker::Broker, cleanup::Guard, native, shell};
use testcontainers::{ImageExt as _, core::IntoContainerPort as _};
use tokio::task::{block_in_place, spawn_blocking};

use crate::{
    broker::{NATIVE, docker, image, run_container},
    files, wait,
};

/// One of them.
pub(crate) struct Node {
    /// Letters, digits and hyphens, as its files are named after it.
    pub name: String,
    /// The port for its clients.
    pub port: u16,
    /// In a container: what `sh` runs, where the files are. It ends with `exec`.
    pub command: String,
    /// As a process of this machine: what starts it, given the folder with the files.
    pub start: Start,
}

pub(crate) type Start = Box<dyn FnOnce(&Path) -> Result<native::Server> + Send>;

/// Servers of a test's own. Dropped, or when the test ends in whatever way, they are
/// gone with their data.
///
/// They run as processes of this machine or in one container whose client ports have
/// the same numbers on this machine. So they find each other on `127.0.0.1`, and one
/// configuration is right for both ways.
pub(crate) struct Several {
    broker: Broker,
    /// What a log says when clients are served.
    ready: &'static str,
    nodes: Vec<Running>,
    place: Place,
}

struct Running {
    name: String,
    port: u16,
    command: String,
    /// How often it was started: a log has as many lines that it is ready.
    starts: usize,
    /// None in a container.
    process: Option<Process>,
}

enum Process {
    New(Start),
    Known(Box<native::Server>),
}

enum Place {
    Container { id: String, _guard: Guard },
    Native { folder: PathBuf, _guard: Guard },
}

/// How long a server may take: as long as one that starts alone.
const START_LIMIT: Duration = Duration::from_secs(90);

/// Where the files are in a container.
pub(crate) const FOLDER: &str = "/servers";

/// In a container: stays, while the servers come and go. A shell, as it buries the
/// processes whose parents have been killed.
const STAY: [&str; 3] = ["/bin/sh", "-c", "while :; do sleep 3600 & wait; done"];

/// In a container: runs `$1` as `$0`, and leaves the id of its process group.
const START: &str = "echo $$ > $0.pid; exec sh -c \"$1\" $0 >> $0.log 2>&1";

/// In a container: ends `$0`, and returns when it is gone.
const KILL: &str = "id=$(cat $0.pid) || exit; rm $0.pid; exec 2> /dev/null; \
    kill -KILL -$id; while kill -0 -$id; do sleep 0.05; done";

/// In a container: the log of `$0`, and a last line when it has ended.
const LOOK: &str = "cat $0.log 2> /dev/null; \
    [ ! -f $0.pid ] || kill -0 -$(cat $0.pid) 2> /dev/null || \
    printf '\nended'";

impl Several {
    /// Makes the place for these servers, with these files. None is started yet.
    pub(crate) async fn prepare(
        broker: Broker,
        ready: &'static str,
        nodes: Vec<Node>,
        files: Vec<(String, Vec<u8>)>,
    ) -> Result<Self> {
        let native = env::var_os(NATIVE).is_some();
        let place = match native {
            true => Place::folder(broker, &files)?,
            false => Place::container(broker, &nodes, files).await?,
        };
        let nodes = nodes.into_iter().map(|node| Running {
            name: node.name,
            port: node.port,
            command: node.command,
            starts: 0,
            process: native.then_some(Process::New(node.start)),
        });
        Ok(Self {
            broker,
            ready,
            nodes: nodes.collect(),
            place,
        })
    }

    /// The address of a server, without user and password.
    pub(crate) fn url(&self, name: &str) -> Result<String> {
        Ok(self.broker.address(self.find(name)?.port))
    }

    /// The folder with the files, of processes of this machine.
    pub(crate) fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Native { folder, .. } => Some(folder),
            Place::Container { .. } => None,
        }
    }

    /// SIGKILL; the server's data stay. Returns when the process is gone.
    pub(crate) async fn kill(&mut self, name: &str) -> Result<()> {
        if let Place::Container { .. } = &self.place {
            return self.in_container(name, KILL).await.map(drop);
        }
        let at = self.at(name)?;
        match &mut self.nodes[at].process {
            // Blocks for as long as the process takes to go.
            Some(Process::Known(server)) => block_in_place(|| server.kill()),
            _ => bail!("{name} does not run"),
        }
    }

    /// Starts a server, or starts it again after [`Self::kill`], with its data, and
    /// returns when it serves clients.
    pub(crate) async fn start(&mut self, name: &str) -> Result<()> {
        self.begin(name).await.with_context(|| said(name))?;
        self.ready(name).await.with_context(|| said(name))
    }

    /// As [`Self::start`], all of them at once: each may wait for the others.
    pub(crate) async fn start_all(&mut self) -> Result<()> {
        if let Place::Container { .. } = &self.place {
            let names: Vec<_> =
                self.nodes.iter().map(|node| node.name.clone()).collect();
            for name in &names {
                self.begin(name).await.with_context(|| said(name))?;
            }
            for name in &names {
                self.ready(name).await.with_context(|| said(name))?;
            }
            return Ok(());
        }
        let mut starting = Vec::new();
        for at in 0..self.nodes.len() {
            starting.push(self.first_start(at)?);
        }
        for (node, starting) in self.nodes.iter_mut().zip(starting) {
            let server = starting.await?;
            let server = server.with_context(|| said(&node.name))?;
            node.process = Some(Process::Known(Box::new(server)));
        }
        Ok(())
    }

    /// In a container the server is on its way then; a process serves already.
    async fn begin(&mut self, name: &str) -> Result<()> {
        let at = self.at(name)?;
        if let Place::Container { id, .. } = &self.place {
            let stopped = self.in_container(name, "[ ! -f $0.pid ]").await;
            ensure!(stopped.is_ok(), "it runs already");
            let command = ["sh", "-c", START, name, &self.nodes[at].command];
            let exec = ["exec", "--detach", "--user", "root"];
            let place = ["--workdir", FOLDER, id];
            docker(&[&exec[..], &place[..], &command[..]].concat()).await?;
            self.nodes[at].starts += 1;
            return Ok(());
        }
        if let Some(Process::Known(server)) = &mut self.nodes[at].process {
            return block_in_place(|| server.restart());
        }
        let server = self.first_start(at)?.await??;
        self.nodes[at].process = Some(Process::Known(Box::new(server)));
        Ok(())
    }

    fn first_start(
        &mut self,
        at: usize,
    ) -> Result<tokio::task::JoinHandle<Result<native::Server>>> {
        let Place::Native { folder, .. } = &self.place else {
            bail!("the servers run in a container");
        };
        let folder = folder.clone();
        let node = &mut self.nodes[at];
        match node.process.take() {
            Some(Process::New(start)) => Ok(spawn_blocking(move || start(&folder))),
            _ => bail!("{} was started before", node.name),
        }
    }

    /// Waits until the log of a server in the container says that it is ready:
    /// a client might need a certificate or a password to be served.
    async fn ready(&self, name: &str) -> Result<()> {
        if let Place::Native { .. } = &self.place {
            return Ok(());
        }
        let starts = self.find(name)?.starts;
        let ended = wait::within(START_LIMIT, name, async || {
            let log = self.in_container(name, LOOK).await?;
            let ended = log.ends_with("\nended");
            let ready = log.matches(self.ready).count() >= starts;
            ensure!(ended || ready, "its log ends:{}", shell::tail(&log));
            Ok(ended.then_some(log))
        })
        .await?;
        match ended {
            Some(log) => bail!("it ended while starting{}", shell::tail(&log)),
            None => Ok(()),
        }
    }

    /// Sends a signal to all processes of a server: `STOP` and `CONT` freeze it and
    /// let it go on.
    pub(crate) async fn signal(&self, name: &str, signal: &str) -> Result<()> {
        if let Place::Container { .. } = &self.place {
            let script = format!("kill -{signal} -$(cat $0.pid)");
            return self.in_container(name, &script).await.map(drop);
        }
        match &self.find(name)?.process {
            Some(Process::Known(server)) => server.signal(signal),
            _ => bail!("{name} does not run"),
        }
    }

    /// Writes a file into the folder of the servers, over one that is there.
    pub(crate) async fn write(&self, path: &str, data: &[u8]) -> Result<()> {
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
    pub(crate) async fn log(&self, name: &str) -> Result<String> {
        match &self.place {
            Place::Container { .. } => self.in_container(name, "cat $0.log").await,
            Place::Native { .. } => match &self.find(name)?.process {
                Some(Process::Known(server)) => {
                    Ok(fs::read_to_string(server.log())?)
                }
                _ => bail!("{name} was never started"),
            },
        }
    }

    /// Runs a script of the POSIX shell where the files are; `$0` is the server.
    async fn in_container(&self, name: &str, script: &str) -> Result<String> {
        self.find(name)?;
        let Place::Container { id, .. } = &self.place else {
            bail!("the servers run natively");
        };
        let exec = ["exec", "--user", "root", "--workdir", FOLDER, id];
        docker(&[&exec[..], &["sh", "-c", script, name]].concat()).await
    }

    fn find(&self, name: &str) -> Result<&Running> {
        self.at(name).map(|at| &self.nodes[at])
    }

    fn at(&self, name: &str) -> Result<usize> {
        let found = self.nodes.iter().position(|node| node.name == name);
        found.with_context(|| format!("no server is named {name}"))
    }
}

fn said(name: &str) -> String {
    format!("the server {name}")
}

impl Place {
    fn folder(broker: Broker, files: &[(String, Vec<u8>)]) -> Result<Self> {
        let prefix = format!("lab-{}-", broker.name());
        let (folder, guard) = files::folder(&prefix, files)?;
        Ok(Self::Native {
            folder,
            _guard: guard,
        })
    }

    async fn container(
        broker: Broker,
        nodes: &[Node],
        files: Vec<(String, Vec<u8>)>,
    ) -> Result<Self> {
        let [program, arguments @ ..] = STAY;
        let mut request = image(broker)?
            .with_entrypoint(program)
            .with_cmd(arguments)
            // So that it may write beside files that were copied.
            .with_user("root");
        for node in nodes {
            request = request.with_mapped_port(node.port, node.port.tcp());
        }
        for (path, data) in files {
            request = request.with_copy_to(format!("{FOLDER}/{path}"), data);
        }
        let (id, guard) = run_container(request).await?;
        Ok(Self::Container { id, _guard: guard })
    }
}
