//! The machine of a run, and what its processes use, from /proc. Elsewhere than
//! on Linux these are not measured.

use std::{fs, process::Command, thread};

use lab::shell;

use crate::report::Machine;

/// Linux counts the time of processes in hundredths of a second for programs,
/// on each architecture that Rust runs on, whatever the kernel counts in.
const TICKS_A_SECOND: f64 = 100.0;

pub fn describe() -> Machine {
    let uname = |what: &str| shell::output(Command::new("uname").arg(what)).ok();
    let system = [uname("-s"), uname("-r"), uname("-m")];
    let system: Vec<String> = system.into_iter().flatten().collect();
    let proc = |file: &str| fs::read_to_string(format!("/proc/{file}")).ok();
    Machine {
        system: match system.is_empty() {
            true => std::env::consts::OS.to_owned(),
            false => system.join(" "),
        },
        processor: proc("cpuinfo")
            .and_then(|text| value(&text, "model name").map(str::to_owned))
            .unwrap_or_else(|| "unknown".to_owned()),
        cores: thread::available_parallelism()
            .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX)),
        memory_gib: proc("meminfo")
            .and_then(|text| kib(&text, "MemTotal"))
            .map(|kib| (kib / 1024.0 / 1024.0 * 10.0).round() / 10.0),
        load_before: proc("loadavg")
            .and_then(|text| text.split_whitespace().next()?.parse().ok()),
    }
}

/// What all child processes that have ended and were waited for have used, in
/// seconds.
pub fn children_cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    Some(Times::parse(&stat)?.children)
}

/// Of this process and those that it has started, the one with the most memory: the
/// server itself, where a shell starts it.
pub fn heaviest(process: u32) -> u32 {
    let mut family = vec![process];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        let children = children.split_whitespace();
        family.extend(children.filter_map(|child| child.parse::<u32>().ok()));
        next += 1;
    }
    let memory = |process: &u32| {
        let peak = peak_mib(*process).unwrap_or_default();
        (peak * 1024.0) as u64
    };
    family.into_iter().max_by_key(memory).unwrap_or(process)
}

/// What a running process has used so far, in seconds.
pub fn cpu_seconds(process: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    Some(Times::parse(&stat)?.own)
}

/// The most memory that a running process has held, in MiB.
pub fn peak_mib(process: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    kib(&status, "VmHWM").map(|kib| kib / 1024.0)
}

/// Lets [`peak_mib`] count from now. None if this process may not.
pub fn reset_peak(process: u32) -> Option<()> {
    fs::write(format!("/proc/{process}/clear_refs"), "5").ok()
}

#[derive(Debug, PartialEq)]
struct Times {
    own: f64,
    children: f64,
}

impl Times {
    /// Reads `/proc/<id>/stat`; see proc(5) for the numbers of the fields.
    fn parse(stat: &str) -> Option<Self> {
        // The second field is a name in brackets, which may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let seconds = |number: usize| -> Option<f64> {
            let ticks: f64 = fields.get(number - 3)?.parse().ok()?;
            Some(ticks / TICKS_A_SECOND)
        };
        Some(Self {
            own: seconds(14)? + seconds(15)?,
            children: seconds(16)? + seconds(17)?,
        })
    }
}

/// The text after `name` and a colon.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// A number of kB, as /proc calls units of 1024 bytes.
fn kib(text: &str, name: &str) -> Option<f64> {
    value(text, name)?.strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_whatever_the_name_of_the_program() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 150 50 30 70 20 0 1 0 777";
        let times = Times::parse(&format!("42 (a) b) {fields}"));
        let expected = Times {
            own: 2.0,
            children: 1.0,
        };
        assert_eq!(times, Some(expected));
        assert_eq!(Times::parse("42 (a) S 1"), None);
    }

    #[test]
    fn memory_is_read_in_its_unit() {
        let status = "Name:\tnats\nVmPeak:\t  9 kB\nVmHWM:\t   2048 kB\n";
        assert_eq!(kib(status, "VmHWM"), Some(2048.0));
        assert_eq!(kib(status, "VmSwap"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_used_something() {
        let own = std::process::id();
        assert!(cpu_seconds(own).is_some());
        assert!(peak_mib(own).is_some_and(|mib| mib > 1.0));
        assert!(children_cpu_seconds().is_some());
    }
}
