//! Failures of other programs that everybody meets once, with the way out.

use anyhow::{Error, anyhow};

/// What such a program prints, in small letters, and what to do about it.
const KNOWN: [(&str, &str); 9] = [
    ("no space left on device", DISK),
    ("not enough free space", DISK),
    ("temporary failure resolving", NETWORK),
    ("temporary failure in name resolution", NETWORK),
    ("could not resolve", NETWORK),
    ("no such host", NETWORK),
    ("network is unreachable", NETWORK),
    ("failed to establish a new connection", NETWORK),
    ("port is already allocated", PORT),
];

const DISK: &str = "the disk is full; `df -h` shows where, and `docker system \
                    prune` frees what Docker no longer needs";
const NETWORK: &str = "there is no network; connect this machine, or set \
                       HTTPS_PROXY if it stands behind a proxy";
const PORT: &str = "a port is taken by another program; `docker ps` may show by \
                    which, and `cargo lab up --help` how to take another port";

/// An error of a command cut down to one line, if its cause is well known; any
/// other error as it is.
pub fn explained(error: Error) -> Error {
    let text = format!("{error:#}");
    let lower = text.to_lowercase();
    let first = text.lines().next().unwrap_or_default();
    KNOWN
        .iter()
        .find(|(sign, _)| lower.contains(sign))
        .map(|(_, way_out)| anyhow!("{first}: {way_out}"))
        .unwrap_or(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_becomes_one_line() {
        let error = anyhow!(
            "`docker import` failed (exit status: 1)\n  | write /x: No space left on device"
        );
        let text = format!("{:#}", explained(error));
        assert!(text.starts_with("`docker import` failed"), "{text}");
        assert!(text.contains("the disk is full"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn what_is_not_known_stays() {
        let error = anyhow!("`x` failed\n  | odd");
        assert_eq!(format!("{:#}", explained(error)), "`x` failed\n  | odd");
    }
}
