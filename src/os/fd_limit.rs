//! The limit of open files, and how many connections fit below it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Two for each stream: the client's and the next hop's.
const PER_CONNECTION: u64 = 2;

/// Kept free for all that is no stream: 64 refusals, 32 pipes of two ends, 80 connections for health
/// and metrics (`admin`), 8 for commands, and 40 for ZooKeeper, listeners, logs, and the addresses of
/// a next hop that are tried at once.
const RESERVE: u64 = 256;

/// Raises the limit of open files as far as it may be raised, and returns how many of the wanted
/// `connections` fit below it.
pub(crate) fn budget(connections: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    // Refused where it is raised already; the current one is what counts then.
    let _ = setrlimit(Resource::Nofile, raised);
    let Some(files) = getrlimit(Resource::Nofile).current else { return connections };
    let fitting = fitting(files);
    if connections > fitting {
        warn!(
            files,
            wanted = connections,
            allowed = fitting,
            "limit of open files (LimitNOFILE, ulimit -n) is too low for limits.connections; one \
             address has at most half of those allowed"
        );
    }
    connections.min(fitting)
}

fn fitting(files: u64) -> usize {
    let connections = files.saturating_sub(RESERVE).max(files / 2) / PER_CONNECTION;
    usize::try_from(connections).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::fitting;

    #[test]
    fn a_reserve_is_kept() {
        assert_eq!(fitting(65_536), 32_640);
        assert_eq!(fitting(1024), 384);
        assert_eq!(fitting(100), 25, "half of very little");
        assert_eq!(fitting(0), 1);
        assert_eq!(fitting(u64::MAX) as u64, (u64::MAX - 256) / 2);
    }
}
