//! The memory limit of this process's cgroup.

use std::fs;
use std::path::Path;

/// The limit of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    pub(crate) bytes: u64,
    /// Whether the memory of sockets counts as well: only in version 2 (Linux,
    /// `Documentation/admin-guide/cgroup-v2.rst`).
    pub(crate) counts_sockets: bool,
}

/// Returns the memory limit of this process, if there is one.
pub(crate) fn of_cgroup() -> Option<MemoryLimit> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    lowest(Path::new("/sys/fs/cgroup"), &groups)
}

/// Returns the lowest limit of the cgroups in `groups` (`/proc/self/cgroup`) and their parents. In
/// a container the path may be the host's, which does not exist there; the root is then the
/// container's own cgroup.
fn lowest(mount: &Path, groups: &str) -> Option<MemoryLimit> {
    let limits = groups.lines().filter_map(|group| {
        let (_, group) = group.split_once(':')?;
        let (controllers, path) = group.split_once(':')?;
        let (mount, file) = match controllers {
            "" => (mount.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let path = Path::new(path.trim_start_matches('/'));
        let limits = path.ancestors().filter_map(|group| {
            let text = fs::read_to_string(mount.join(group).join(file)).ok()?;
            // "max" means no limit.
            text.trim().parse().ok()
        });
        Some(MemoryLimit { bytes: limits.min()?, counts_sockets: controllers.is_empty() })
    });
    limits.min_by_key(|limit| limit.bytes)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Returns the limit found where `files` are below the mount point.
    fn found(files: &[(&str, &str)], groups: &str) -> Option<MemoryLimit> {
        let mount = TempDir::new().expect("a directory");
        for (file, text) in files {
            let path = mount.path().join(file);
            fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
            fs::write(path, text).expect("a file");
        }
        lowest(mount.path(), groups)
    }

    #[test]
    fn lowest_limit_on_the_path_counts() {
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
}
