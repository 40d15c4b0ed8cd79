//! A broker's processes: a group of their own, started, watched and signalled
//! together.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{Launch, version::at_least};
use crate::{
    broker::Broker,
    cleanup::{self, Guard},
    shell,
};

/// How often a log or a process is looked at while waiting for it.
const POLL: Duration = Duration::from_millis(20);

/// How long a broker may take. Several times what a busy laptop needs: it is
/// there to end a wait, not to judge the speed.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How long the kernel may take to end a process after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How long a broker may take to stop of its own accord.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A running process group; dropped, it gets SIGKILL.
pub(super) struct Process {
    leader: Child,
    /// None once the group is to outlive this program.
    guard: Option<Guard>,
}

impl Process {
    /// Starts a broker and returns it with its version when it accepts clients.
    pub(super) fn start(
        broker: Broker,
        launch: &mut Launch,
    ) -> Result<(Self, String)> {
        let earlier = fs::metadata(&launch.log).map_or(0, |log| log.len());
        let mut process = Self::spawn(&mut launch.command, &launch.log)
            .with_context(|| format!("cannot start {broker}"))?;
        let version = process.wait_until_ready(broker, launch, earlier)?;
        let oldest = launch.oldest;
        if !at_least(&version, oldest) {
            let oldest: Vec<_> = oldest.iter().map(u32::to_string).collect();
            let oldest = oldest.join(".");
            bail!("{broker} {version} is too old; {oldest} or newer is needed");
        }
        Ok((process, version))
    }

    fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        // The terminal sends Ctrl-C to the group in its foreground. A broker
        // must not get it: an example that finishes its work on Ctrl-C needs it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let leader = command.spawn()?;
        let mut process = Self {
            leader,
            guard: None,
        };
        match cleanup::group(process.id()) {
            Ok(guard) => process.guard = Some(guard),
            Err(error) => {
                process.kill()?;
                return Err(error);
            }
        }
        Ok(process)
    }

    fn wait_until_ready(
        &mut self,
        broker: Broker,
        launch: &Launch,
        earlier: u64,
    ) -> Result<String> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            // First the port: a log is long, and to search it again and again takes
            // the time that the broker needs.
            if is_open(launch.port) {
                let log = read_from(&launch.log, earlier)?;
                if log.contains(launch.ready) {
                    let version = word_after(&log, launch.version_mark);
                    return Ok(version.unwrap_or("unknown").to_owned());
                }
            }
            let tail =
                || read_from(&launch.log, earlier).map(|log| shell::tail(&log));
            if let Some(status) = self.leader.try_wait()? {
                bail!("{broker} ended while starting ({status}){}", tail()?);
            }
            if Instant::now() > deadline {
                let limit = START_LIMIT.as_secs();
                bail!("{broker} was not ready after {limit} s{}", tail()?);
            }
            thread::sleep(POLL);
        }
    }

    /// The id of the leader and of its group.
    pub(super) fn id(&self) -> u32 {
        self.leader.id()
    }

    /// Ends the group with SIGKILL and returns when it is gone.
    pub(super) fn kill(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // Fails when all have ended before, which is what is wanted.
        let _ = signal(self.id(), "KILL");
        // Without this the leader stays in the process table.
        self.leader.wait()?;
        wait_until_gone(self.id());
        self.release();
        Ok(())
    }

    /// Asks the broker to stop, as its data are to be used again; ends it if it
    /// does not.
    pub(super) fn stop(mut self) -> Result<()> {
        ask_to_stop(self.id())?;
        let deadline = Instant::now() + STOP_LIMIT;
        while self.leader.try_wait()?.is_none() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        self.end()
    }

    fn release(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.release();
        }
    }

    /// Lets the group outlive this program.
    pub(super) fn detach(mut self) {
        self.release();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.guard.is_some() {
            // Nobody is left to hear of a failure, and the watcher tries again.
            let _ = self.end();
        }
    }
}

/// Sends a signal to all processes of a group. By the shell, because the `kill`
/// program is missing on small systems.
pub(super) fn signal(group: u32, name: &str) -> Result<()> {
    kill(&format!("-s {name} -- -{group}"))
}

/// Asks a broker to stop. Only the leader: RabbitMQ's forwards it, and its name
/// service is needed until the end.
fn ask_to_stop(leader: u32) -> Result<()> {
    kill(&format!("-s TERM {leader}"))
}

fn kill(arguments: &str) -> Result<()> {
    let mut kill = Command::new("sh");
    shell::output(kill.args(["-c", &format!("kill {arguments}")])).map(drop)
}

/// Ends the group of a broker that an earlier program has started: asks first,
/// and uses SIGKILL after a while.
pub(super) fn stop_group(group: u32) -> Result<()> {
    ask_to_stop(group)?;
    let deadline = Instant::now() + STOP_LIMIT;
    while identity(group).is_some() && Instant::now() < deadline {
        thread::sleep(POLL);
    }
    // Fails when all have ended, which is what is wanted.
    let _ = signal(group, "KILL");
    wait_until_gone(group);
    Ok(())
}

/// After SIGKILL: returns when the group holds no file and no port any more.
fn wait_until_gone(group: u32) {
    let deadline = Instant::now() + KILL_LIMIT;
    while is_running(group) && Instant::now() < deadline {
        thread::sleep(POLL);
    }
}

/// Has the group a process that has not ended? One that has ended may still be
/// in the process table, in some containers for ever.
fn is_running(group: u32) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return signal(group, "0").is_ok();
    };
    let group = group.to_string();
    processes
        .flatten()
        .filter_map(|process| fs::read_to_string(process.path().join("stat")).ok())
        .filter_map(|stat| Stat::parse(&stat).map(|s| s.running && s.group == group))
        .any(|of_group| of_group)
}

/// What tells a process from any other that had or will have the same id: when
/// it was started. None if there is no such process.
pub(super) fn identity(id: u32) -> Option<String> {
    // In /proc where there is one: `ps` is missing on small systems.
    match fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(boot) => {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
            let stat = Stat::parse(&stat).filter(|stat| stat.running)?;
            Some(format!("{} {}", boot.trim(), stat.start))
        }
        Err(_) => {
            let id = id.to_string();
            let mut ps = Command::new("ps");
            shell::output(ps.args(["-o", "lstart=", "-p", &id])).ok()
        }
    }
}

/// What `/proc/<id>/stat` tells.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    group: String,
    /// Has it not ended yet?
    running: bool,
    /// In clock ticks since the machine was started.
    start: String,
}

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        // The second field is the program's name in brackets and may hold
        // anything. The numbers of the others are those of proc(5).
        let (_, rest) = line.rsplit_once(") ")?;
        let fields: Vec<_> = rest.split(' ').collect();
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            running: !["Z", "X"].contains(&field(3)?),
            group: field(5)?.to_owned(),
            start: field(22)?.to_owned(),
        })
    }
}

fn read_from(path: &Path, start: u64) -> Result<String> {
    let mut log = File::open(path)?;
    log.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    log.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn is_open(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn word_after<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(mark)?;
    rest.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_strange_name_is_read() {
        let rest = "S 1 40 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        let expected = Stat {
            group: "40".to_owned(),
            running: true,
            start: "777".to_owned(),
        };
        let found = Stat::parse(&format!("42 (a) b) {rest}"));
        assert_eq!(found, Some(expected));
        let ended = Stat::parse(&format!("42 (sh) {}", rest.replacen('S', "Z", 1)));
        assert_eq!(ended.map(|stat| stat.running), Some(false));
        assert_eq!(Stat::parse("nonsense"), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_process_keeps_its_identity_until_it_ends() -> Result<()> {
        let mut child = Command::new("sleep").arg("60").spawn()?;
        let first = identity(child.id());
        assert!(first.is_some());
        assert_eq!(identity(child.id()), first);
        child.kill()?;
        child.wait()?;
        assert_eq!(identity(child.id()), None);
        Ok(())
    }

    #[test]
    fn a_version_is_read_from_a_log() {
        let log = "[1] INFO Kafka version: 4.3.1 (AppInfoParser)\n[2] more";
        assert_eq!(word_after(log, "Kafka version: "), Some("4.3.1"));
        assert_eq!(word_after(log, "Starting RabbitMQ "), None);
    }
}
