//! RabbitMQ: from the machine's packages, else from a Debian tree that is only
//! unpacked, not installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{Launch, Missing, fetch};
use crate::{packages, progress, shell, workspace};

const OLDEST: [u32; 2] = [3, 10];

/// What the log says when clients are served.
const READY: &str = "Server startup complete";

/// Where packages put the server itself. The program of the same name in `PATH`
/// may be a wrapper that serves only root and the user `rabbitmq`.
const INSTALLED: [&str; 4] = [
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/opt/homebrew/sbin/rabbitmq-server",
    "/usr/local/sbin/rabbitmq-server",
    "/opt/rabbitmq/sbin/rabbitmq-server",
];

/// The Debian release with RabbitMQ 4.3, and the folder in the cache.
const SUITE: &str = "forky";
const TREE: &str = "rabbitmq-forky";

/// What the server and its scripts use.
const TREE_PACKAGES: &str = "rabbitmq-server,bash,coreutils,sed,grep,hostname,\
                             libc-bin,mawk,util-linux";

/// Not needed to run it, and half of the size.
const LEFT_OUT: [&str; 6] = [
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/lib/systemd/*",
    "/usr/lib/*/gconv/*",
];

/// What every server has.
const PLUGINS: &str = "[rabbitmq_management,rabbitmq_consistent_hash_exchange].\n";

/// The user `rabbitmq` of the tree, who is unknown outside.
const USER: &str = "999:999";

/// Where the tree sees the data folder.
const HOME: &str = "/var/lib/rabbitmq";

/// Runs a server beside a name service of Erlang that ends with it; the one that
/// the server would start by itself stays.
const SERVE: &str = r#"
epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT" & names=$!
"$0" & server=$!
trap 'kill -s TERM $server' TERM
# The trap ends a wait before the server has ended.
while kill -s 0 $server 2> /dev/null; do wait $server; status=$?; done
kill $names
exit $status
"#;

/// Runs a tool of RabbitMQ's in the place of the server.
const TOOL: &str = r#"exec "$0" "$@""#;

/// Runs the name service alone, for the nodes of a cluster.
const NAMES: &str = r#"exec epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT""#;

/// Arguments: tree, data folder, then what to run inside.
const ENTER: &str = r#"
tree=$1 data=$2
shift 2
mount --rbind /dev "$tree/dev" &&
mount -t proc proc "$tree/proc" &&
mount --bind "$data" "$tree/var/lib/rabbitmq" &&
exec chroot --userspec="$USER_IDS" "$tree" "$@"
"#;

/// How RabbitMQ runs on this machine.
enum Way {
    /// The server of this path.
    Installed(PathBuf),
    /// The unpacked tree in this folder, through chroot.
    Tree(PathBuf),
}

impl Way {
    fn found() -> Option<Self> {
        let installed = INSTALLED.iter().map(PathBuf::from).find(|p| p.is_file());
        let tree = workspace::cache().join(TREE);
        match installed.or_else(|| shell::which("rabbitmq-server")) {
            Some(server) => Some(Self::Installed(server)),
            None => (tree.is_dir() && may_enter_tree()).then_some(Self::Tree(tree)),
        }
    }
}

/// May this program mount and change the root? Root may, except in a container
/// without the right to.
fn may_enter_tree() -> bool {
    cfg!(target_os = "linux")
        && packages::is_root()
        && shell::output(Command::new("unshare").args(["--mount", "true"])).is_ok()
}

pub(super) fn missing() -> Vec<Missing> {
    match Way::found() {
        Some(Way::Installed(_)) if shell::which("epmd").is_none() => {
            vec![Missing {
                what: "epmd, a part of Erlang, in PATH".to_owned(),
                command: None,
                by_yes: false,
            }]
        }
        Some(_) => Vec::new(),
        None => vec![Missing {
            what: "rabbitmq-server".to_owned(),
            command: install_command(),
            by_yes: may_enter_tree()
                && (shell::which("mmdebstrap").is_some() || packages::can_install()),
        }],
    }
}

fn install_command() -> Option<String> {
    packages::install_command(&["rabbitmq-server"])
        .or_else(|| shell::which("brew").map(|_| "brew install rabbitmq".to_owned()))
}

pub(super) fn fetch() -> Result<()> {
    if Way::found().is_some() {
        return Ok(());
    }
    if shell::which("mmdebstrap").is_none() {
        packages::install(&["mmdebstrap", "debian-archive-keyring"])?;
    }
    let step = progress::step("unpacking RabbitMQ");
    fetch::provide(TREE, |tree| {
        unpack(tree)?;
        complete(tree).context("cannot complete the unpacked RabbitMQ")
    })?;
    step.done("unpacked RabbitMQ");
    Ok(())
}

/// Unpacks packages without running their installation scripts.
fn unpack(tree: &Path) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--variant=extract", "--format=directory"])
        // A mirror that is frozen at some day still serves.
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg(format!("--include={TREE_PACKAGES}"));
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    shell::run(command.arg(SUITE).arg(tree))
}

/// Does what the installation scripts would have done, as far as RabbitMQ needs
/// it.
fn complete(tree: &Path) -> Result<()> {
    for (link, target) in [("awk", "mawk"), ("sh", "bash")] {
        let link = tree.join("usr/bin").join(link);
        if !link.exists() {
            shell::output(Command::new("ln").args(["-s", target]).arg(&link))?;
        }
    }
    let etc = tree.join("etc");
    let passwd =
        format!("root:x:0:0::/root:/bin/sh\nrabbitmq:x:{USER}::{HOME}:/bin/sh\n");
    fs::write(etc.join("passwd"), passwd)?;
    fs::write(etc.join("group"), "root:x:0:\nrabbitmq:x:999:\n")?;
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n")?;
    for mount_point in ["dev", "proc", "tmp", "var/lib/rabbitmq"] {
        fs::create_dir_all(tree.join(mount_point))?;
    }
    for filled_again in ["var/cache/apt", "var/lib/apt"] {
        fs::remove_dir_all(tree.join(filled_again))?;
    }
    Ok(())
}

pub(super) fn launch(
    data: &Path,
    log: PathBuf,
    port: u16,
    ports: [u16; 3],
) -> Result<Launch> {
    let node = Node::alone(port, ports);
    launch_with(data, log, &node, PLUGINS, |_home| String::new())
}

/// By which name and on which ports a server is reached.
pub(super) struct Node {
    name: &'static str,
    port: u16,
    /// None without the plugin.
    management: Option<u16>,
    /// Of the name service.
    names: u16,
    distribution: u16,
    /// Is there a name service already, for all nodes of a cluster?
    named: bool,
}

impl Node {
    /// A server with a name service of its own, so its name is unique.
    pub(super) fn alone(
        port: u16,
        [management, names, distribution]: [u16; 3],
    ) -> Self {
        Self {
            name: "rabbit@localhost",
            port,
            management: Some(management),
            names,
            distribution,
            named: false,
        }
    }

    /// A node of a cluster.
    pub(super) fn of_cluster(
        name: &'static str,
        [port, names, distribution]: [u16; 3],
    ) -> Self {
        Self {
            name,
            port,
            management: None,
            names,
            distribution,
            named: true,
        }
    }
}

/// As [`launch`], with these plugins and more settings, which may name files of
/// the data folder as the server sees it.
pub(super) fn launch_with(
    data: &Path,
    log: PathBuf,
    node: &Node,
    plugins: &str,
    settings: impl FnOnce(&Path) -> String,
) -> Result<Launch> {
    let way = Way::found().context("RabbitMQ is gone; run again")?;
    let home = match way {
        Way::Installed(_) => data,
        Way::Tree(_) => Path::new(HOME),
    };
    write_settings(data, node, &settings(home))?;
    fs::write(data.join("enabled_plugins"), plugins)?;
    let script = if node.named { TOOL } else { SERVE };
    let mut command = match way {
        Way::Installed(server) => script_with(script, &server),
        Way::Tree(tree) => in_tree(&tree, data, script)?,
    };
    command
        .env("HOME", home)
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_EPMD_PORT", node.names.to_string())
        .env("RABBITMQ_DIST_PORT", node.distribution.to_string())
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "-kernel inet_dist_use_interface {127,0,0,1}",
        )
        // The data belong to this name.
        .env("RABBITMQ_NODENAME", node.name)
        .env("RABBITMQ_MNESIA_BASE", home.join("data"))
        .env("RABBITMQ_LOG_BASE", home.join("logs"))
        .env("RABBITMQ_CONFIG_FILE", home.join("rabbitmq.conf"))
        .env(
            "RABBITMQ_ENABLED_PLUGINS_FILE",
            home.join("enabled_plugins"),
        )
        // The machine's own settings are for the machine's own server.
        .env(
            "RABBITMQ_ADVANCED_CONFIG_FILE",
            home.join("advanced.config"),
        )
        .env("RABBITMQ_CONF_ENV_FILE", "/dev/null");
    Ok(Launch {
        command,
        port: node.port,
        log,
        ready: READY,
        version_mark: "Starting RabbitMQ ",
        oldest: &OLDEST,
        management: node
            .management
            .map(|port| format!("http://localhost:{port}")),
    })
}

/// The name service for the nodes of a cluster. It outlives each of them.
pub(super) fn names(data: &Path, log: PathBuf, port: u16) -> Result<Launch> {
    let way = Way::found().context("RabbitMQ is gone; run again")?;
    let mut command = match way {
        Way::Installed(server) => script_with(NAMES, &server),
        Way::Tree(tree) => in_tree(&tree, data, NAMES)?,
    };
    command.env("ERL_EPMD_PORT", port.to_string());
    Ok(Launch {
        command,
        port,
        log,
        // It says nothing at all.
        ready: "",
        version_mark: "",
        oldest: &[],
        management: None,
    })
}

/// Runs `rabbitmqctl` where the server of this launch runs, with its cookie and
/// its name service, and returns what it prints.
pub(super) fn ctl(launch: &Launch, words: &[&str]) -> Result<String> {
    let serve = &launch.command;
    let mut command = Command::new(serve.get_program());
    if serve.get_program() == "unshare" {
        command.env_clear();
    }
    for arg in serve.get_args() {
        let path = Path::new(arg);
        if arg == SERVE {
            command.arg(TOOL);
        } else if path.ends_with("rabbitmq-server") {
            command.arg(path.with_file_name("rabbitmqctl"));
        } else {
            command.arg(arg);
        }
    }
    command.args(words);
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    shell::output(&mut command)
}

fn write_settings(data: &Path, node: &Node, more: &str) -> Result<()> {
    let management = node.management.map_or_else(String::new, |port| {
        format!("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n")
    });
    let settings = format!(
        "\
listeners.tcp.default = 127.0.0.1:{}
{management}log.console = true
log.console.use_colors = off
log.file = false
{more}",
        node.port
    );
    fs::write(data.join("rabbitmq.conf"), settings)?;
    Ok(())
}

/// Runs a script of the shell that knows the server as `$0`.
fn script_with(script: &str, server: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(server);
    command
}

/// The same inside the tree, with mounts that nobody else sees and that end
/// with the server.
fn in_tree(tree: &Path, data: &Path, script: &str) -> Result<Command> {
    shell::output(Command::new("chown").args(["-R", USER]).arg(data))?;
    let inside = script_with(script, Path::new(INSTALLED[0]));
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", ENTER, "sh"])
        .args([tree, data])
        .arg(inside.get_program())
        .args(inside.get_args())
        .env_clear()
        .env("USER_IDS", USER)
        .env(
            "PATH",
            "/usr/lib/rabbitmq/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LANG", "C.UTF-8");
    Ok(command)
}
