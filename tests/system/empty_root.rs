//! The static program without anything else: no libraries, no users, no /proc, no writable
//! directory, as process 1 and as a user without a name, as in a container from scratch.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Output;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::client::Client;
use crate::support::container::ARBITRARY_USER;
use crate::support::executor::Executor;
use crate::support::gateway::{BINARY, Builder, Gateway, open_to_all};
use crate::support::process::field;
use crate::support::static_program::static_program;
use crate::support::system::{System, Worker};
use crate::support::within;

const ROOT: &str = "0:0";

/// Root directory, directory of the gateway's files, user, and arguments of the program.
const INTO_ROOT: &str = r#"
    root=$0 files=$1 user=$2
    shift 2
    mkdir -p "$root$files" && mount --bind "$root" "$root" && mount --bind "$files" "$root$files" &&
        mount -o remount,bind,ro "$root" && mount -o remount,bind,ro "$root$files" &&
        exec chroot --userspec="$user" --groups= "$root" /zuul-fingergw "$@""#;

/// Creates a root directory with the program and these files in /etc.
fn empty_root(etc: &[(&str, &str)]) -> TempDir {
    let root = TempDir::new().expect("a directory");
    open_to_all(root.path());
    fs::copy(static_program(), root.path().join("zuul-fingergw")).expect("a copy");
    fs::create_dir(root.path().join("etc")).expect("a directory");
    for (name, text) in etc {
        fs::write(root.path().join("etc").join(name), text).expect("a file");
    }
    root
}

/// Changes the command to run in `root` as `user`, as process 1.
fn enter(command: &mut Command, root: &Path, files: &Path, user: &str) {
    let inner = command.as_std();
    let mut outer = Command::new("unshare");
    outer.args(["--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", INTO_ROOT]);
    outer.arg(root).arg(files).arg(user).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    *command = outer;
}

async fn start(builder: Builder, root: &Path, user: &str) -> Gateway {
    let builder = builder.readable_by_all();
    let files = builder.directory().to_owned();
    builder.start_changed(|command| enter(command, root, &files, user)).await
}

/// Returns the gateway's PID; its parent has created the namespaces.
fn process_1(gateway: &Gateway) -> Pid {
    let pid = gateway.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let child = children.expect("its children").trim().parse().expect("a child");
    Pid::from_raw(child).expect("a pid")
}

/// A log from an executor whose name is only in /etc/hosts.
async fn serves_by_name(system: &System, gateway: &Gateway) {
    let executor = Executor::start().await;
    let worker = Worker { hostname: "executor.example".to_owned(), ..executor.worker(None) };
    let build = system.put_build(None, Some(&worker)).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"all there is\n").await;
    assert_eq!(client.text().await, "all there is\n");
}

#[tokio::test]
async fn static_program_serves_in_an_empty_root() {
    let system = System::new().await;
    let port = system.zookeeper.port;
    let hosts = ("hosts", "127.0.0.1 localhost executor.example\n");
    // As on this machine, but the root lacks the modules.
    let modules = ("nsswitch.conf", "passwd: files sss systemd\nhosts: files myhostname dns\n");
    for (etc, zookeeper) in [
        (&[hosts][..], format!("127.0.0.1:{port}")),
        (&[hosts, modules], format!("localhost:{port}")),
    ] {
        let root = empty_root(etc);
        let mut builder = Builder::new(&system);
        builder.hosts = format!("{zookeeper}{}", system.chroot());
        let mut gateway = start(builder, root.path(), ARBITRARY_USER).await;
        gateway.ready().await;
        let pid = process_1(&gateway);
        assert_eq!(field(pid, "Uid:"), "1000660000 1000660000 1000660000 1000660000");
        assert_eq!(field(pid, "NSpid:").split(' ').next_back(), Some("1"));
        let maps = fs::read_to_string(format!("/proc/{}/maps", pid.as_raw_nonzero()));
        assert!(!maps.expect("its memory").contains(".so"), "libraries");
        serves_by_name(&system, &gateway).await;
        kill_process(pid, Signal::TERM).expect("a signal");
        let status = gateway.exit().await;
        assert!(status.success(), "{status}");
    }
}

/// User names come from a file, if there is one.
#[tokio::test]
async fn static_program_becomes_a_user_of_etc_passwd() {
    let system = System::new().await;
    let hosts = ("hosts", "127.0.0.1 executor.example\n");
    let builder = || {
        let mut builder = Builder::new(&system);
        builder.root = "user = \"zuul\"".to_owned();
        builder
    };
    let root = empty_root(&[hosts, ("passwd", "zuul:x:10001:0::/:/none\n")]);
    let mut gateway = start(builder(), root.path(), ROOT).await;
    gateway.ready().await;
    let pid = process_1(&gateway);
    assert_eq!(field(pid, "Uid:"), "10001 10001 10001 10001");
    assert_eq!(field(pid, "Gid:"), "0 0 0 0");
    serves_by_name(&system, &gateway).await;
    // Explicitly: a process that has changed its user survives the parent that created its
    // namespaces (prctl(2), PR_SET_PDEATHSIG).
    kill_process(pid, Signal::TERM).expect("a signal");
    assert!(gateway.exit().await.success());

    let root = empty_root(&[hosts]);
    let builder = builder().readable_by_all();
    let mut command = Command::new(BINARY);
    command.arg("-c").arg(builder.write());
    enter(&mut command, root.path(), builder.directory(), ROOT);
    let Output { status, stderr, .. } =
        within("it to end", command.output()).await.expect("unshare");
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!((status.code(), status.signal()), (Some(78), None), "{stderr}");
    assert!(stderr.contains("user = zuul: there is no such user"), "{stderr}");
}
