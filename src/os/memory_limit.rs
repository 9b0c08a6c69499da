//! The memory limit of this process's cgroup, and how many connections fit below it.

use std::fs;
use std::path::Path;

use tracing::warn;

use crate::config::Limits;

/// What a quiet connection takes at most, in bytes: its task, TLS on both sides, and its sockets.
const QUIET: u64 = 32 * 1024;

/// What the kernel may hold of what such a client sends, in bytes, its bookkeeping included:
/// `CLIENT_RECEIVE_BUFFER` of the gateway.
const RECEIVED: u64 = 128 * 1024;

/// What the gateway itself holds for a stream that waits for its client, in bytes: a buffer's length
/// below TLS, and as much on its way to the client.
const HELD: u64 = 128 * 1024;

/// The limit of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryLimit {
    bytes: u64,
    /// Memory of sockets counts as well: in version 2 alone (Linux, `Documentation/admin-guide/cgroup-v2.rst`).
    counts_sockets: bool,
}

/// Returns how many of the wanted connections fit below the memory limit of the cgroup, if there is one.
pub(crate) fn budget(limits: &Limits) -> usize {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(limit) = limit(Path::new("/sys/fs/cgroup"), &groups) else {
        return limits.connections;
    };
    let fitting = fitting(limit, limits.stream_buffer as u64);
    if limits.connections > fitting {
        warn!(
            bytes = limit.bytes,
            wanted = limits.connections,
            allowed = fitting,
            "memory limit of the cgroup (MemoryMax, limits.memory) is too low for limits.connections; \
             one address has at most half of those allowed; a smaller limits.stream_buffer makes room \
             for more"
        );
    }
    limits.connections.min(fitting)
}

/// The lowest limit of the groups that /proc/self/cgroup names and of those above them. In a container
/// the path may be the host's, which is not there; the top is the container's then.
fn limit(mounted: &Path, groups: &str) -> Option<MemoryLimit> {
    let limits = groups.lines().filter_map(|group| {
        let (_, group) = group.split_once(':')?;
        let (controllers, path) = group.split_once(':')?;
        let (mounted, file) = match controllers {
            "" => (mounted.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                (mounted.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let path = Path::new(path.trim_start_matches('/'));
        let bytes = path.ancestors().filter_map(|group| {
            let text = fs::read_to_string(mounted.join(group).join(file)).ok()?;
            // "max" is no limit.
            text.trim().parse().ok()
        });
        let bytes = bytes.min()?;
        Some(MemoryLimit { bytes, counts_sockets: controllers.is_empty() })
    });
    limits.min_by_key(|limit| limit.bytes)
}

/// A quarter is left for all that is no connection.
fn fitting(limit: MemoryLimit, stream_buffer: u64) -> usize {
    let buffers = if limit.counts_sockets { 2 * stream_buffer + RECEIVED } else { 0 };
    let connection = QUIET + (HELD + buffers) / Limits::WAITING as u64;
    let connections = limit.bytes / 4 * 3 / connection;
    usize::try_from(connections).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// The limit where these files are below the mount.
    fn found(files: &[(&str, &str)], groups: &str) -> Option<MemoryLimit> {
        let mounted = TempDir::new().expect("a directory");
        for (file, text) in files {
            let path = mounted.path().join(file);
            fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
            fs::write(path, text).expect("a file");
        }
        limit(mounted.path(), groups)
    }

    #[test]
    fn the_lowest_limit_on_the_path_counts() {
        let limit = |bytes, counts_sockets| Some(MemoryLimit { bytes, counts_sockets });
        let files =
            [("memory.max", "max\n"), ("a/memory.max", "300\n"), ("a/b/memory.max", "400\n")];
        assert_eq!(found(&files, "0::/a/b\n"), limit(300, true));
        assert_eq!(found(&files, "0::/\n"), None);
        let files = [("memory/memory.limit_in_bytes", "200\n"), ("memory.max", "100\n")];
        let groups = "5:cpu:/x\n4:hugetlb,memory:/docker/not-here\n";
        assert_eq!(found(&files, groups), limit(200, false));
        assert_eq!(found(&files, "1:name=systemd:/\n"), None);
        assert_eq!(found(&files, "garbage\n0::\n"), limit(100, true));
        assert_eq!(found(&[], "0::/a/b\n4:memory:/\n"), None);
    }

    #[test]
    fn connections_fit_with_what_they_hold() {
        let fitting = |bytes, counts_sockets, stream_buffer| {
            fitting(MemoryLimit { bytes, counts_sockets }, stream_buffer)
        };
        let (pod, buffer) = (256 << 20, 1 << 20);
        assert_eq!(fitting(pod, true, buffer), 614);
        assert_eq!(fitting(pod, true, 256 << 10), 1536);
        assert_eq!(fitting(pod, false, buffer), 4096);
        assert_eq!(fitting(0, true, buffer), 1);
        // No limit, in version 1.
        assert!(fitting(0x7fff_ffff_ffff_f000, false, buffer) > 1_000_000);
    }
}
