//! Facts about a process from /proc, and limits of this process.

use std::fs;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, setrlimit};

use super::gateway::Gateway;

/// Returns the value of a field of /proc/PID/status.
pub(crate) fn field(pid: Pid, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()));
    let status = status.expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.expect(name).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Finds the gateway of a container: the process named zuul-fingergw below the container's first
/// one.
pub(crate) fn process_of(gateway: &Gateway) -> Pid {
    let mut todo = vec![gateway.pid().as_raw_nonzero().get()];
    while let Some(pid) = todo.pop() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "zuul-fingergw" {
            return Pid::from_raw(pid).expect("a pid");
        }
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            todo.extend(children.split_whitespace().flat_map(str::parse::<i32>));
        }
    }
    panic!("no zuul-fingergw among what the test has started")
}

/// Raises this process's limit of open files to the hard limit: tests with many connections have
/// both ends of each.
pub(crate) fn raise_file_limit() {
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).expect("files");
}
