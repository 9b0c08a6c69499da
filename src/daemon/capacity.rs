//! How many connections the limits of the process allow: its open files and its memory.

use tracing::warn;

use crate::config::Limits;
use crate::gateway::SettingsHandle;
use crate::gateway::upstream::SPARE_SOCKETS;
use crate::os::memory_limit::MemoryLimit;
use crate::os::{fd_limit, memory_limit};

/// The descriptors of one connection: the client's and the hop's.
const FILES_PER_CONNECTION: u64 = 2;

/// Descriptors that are kept free for everything else: 64 refusals, 32 pipes with two ends each, 80
/// connections for health and metrics (`admin`), 8 for commands, 40 for ZooKeeper, listeners and
/// log files, and the sockets of requests that try several hops or addresses concurrently.
const RESERVED_FILES: u64 = 256 + SPARE_SOCKETS as u64;

/// The memory of an idle connection, in bytes: its task, TLS on both sides, and its sockets.
const IDLE_BYTES: u64 = 32 * 1024;

/// The most that the kernel holds of what a client sends, in bytes, with its bookkeeping: twice
/// `CLIENT_RECEIVE_BUFFER` of the gateway.
const RECEIVE_BYTES: u64 = 128 * 1024;

/// The buffers of a stream that waits for its client, in bytes: one below TLS, and one on its way
/// to the client.
const BUFFER_BYTES: u64 = 128 * 1024;

/// Raises the limit of open files, and returns how many of the configured connections fit below it
/// and below the memory limit of the cgroup. Logs a warning for each limit that is too low.
pub(super) fn fit(limits: &Limits) -> usize {
    let mut connections = limits.connections;
    if let Some(limit) = memory_limit::of_cgroup() {
        let allowed = below_memory_limit(limit, limits.stream_buffer as u64);
        if connections > allowed {
            warn!(
                bytes = limit.bytes,
                wanted = connections,
                allowed,
                "memory limit of the cgroup (MemoryMax, limits.memory) is too low for \
                 limits.connections; one address is allowed at most half of those; a smaller \
                 limits.stream_buffer makes room for more"
            );
            connections = allowed;
        }
    }
    if let Some(files) = fd_limit::raise() {
        let allowed = below_file_limit(files);
        if connections > allowed {
            warn!(
                files,
                wanted = connections,
                allowed,
                "limit of open files (LimitNOFILE, ulimit -n) is too low for limits.connections; \
                 one address is allowed at most half of those"
            );
            connections = allowed;
        }
    }
    connections
}

/// Returns how many connections fit after a reload. As long as the keys that matter are the same,
/// that is what was found before, without another warning.
pub(super) fn refit(new: &Limits, running: &Limits, gateway: &SettingsHandle) -> usize {
    if new.connections == running.connections && new.stream_buffer == running.stream_buffer {
        gateway.settings().limits.connections
    } else {
        fit(new)
    }
}

/// Returns how many connections fit below a limit of open files.
fn below_file_limit(files: u64) -> usize {
    let connections = files.saturating_sub(RESERVED_FILES).max(files / 2) / FILES_PER_CONNECTION;
    usize::try_from(connections).unwrap_or(usize::MAX).max(1)
}

/// Returns how many connections fit below a memory limit. A quarter of it is kept for everything
/// else.
fn below_memory_limit(limit: MemoryLimit, stream_buffer: u64) -> usize {
    let sockets = if limit.counts_sockets { 2 * stream_buffer + RECEIVE_BYTES } else { 0 };
    let connection = IDLE_BYTES + (BUFFER_BYTES + sockets) / Limits::WAITING as u64;
    let connections = limit.bytes / 4 * 3 / connection;
    usize::try_from(connections).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserve_of_open_files_is_kept() {
        assert_eq!(below_file_limit(65_536), 32_576);
        assert_eq!(below_file_limit(1024), 320);
        assert_eq!(below_file_limit(100), 25, "half of a very low limit");
        assert_eq!(below_file_limit(0), 1);
        assert_eq!(below_file_limit(u64::MAX) as u64, (u64::MAX - RESERVED_FILES) / 2);
    }

    #[test]
    fn connections_fit_with_their_buffers() {
        let fitting = |bytes, counts_sockets, stream_buffer| {
            below_memory_limit(MemoryLimit { bytes, counts_sockets }, stream_buffer)
        };
        let pod = 256 << 20;
        let buffer = 1 << 20;
        assert_eq!(fitting(pod, true, buffer), 614);
        assert_eq!(fitting(pod, true, 256 << 10), 1536);
        assert_eq!(fitting(pod, false, buffer), 4096);
        assert_eq!(fitting(0, true, buffer), 1);
        // The value of version 1 that means no limit.
        assert!(fitting(0x7fff_ffff_ffff_f000, false, buffer) > 1_000_000);
    }
}
