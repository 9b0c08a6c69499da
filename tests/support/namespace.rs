//! Network namespaces with a link between them, and mount namespaces, in which tests can break
//! things without breaking this machine. Both need root, as which the tests run.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use tempfile::NamedTempFile;

use super::tool;

/// Runs an asynchronous test in a thread with its own namespaces. Sockets and processes belong to
/// the namespaces of the thread that creates them.
pub(crate) fn in_namespaces(flags: CloneFlags, test: impl AsyncFnOnce() + Send + 'static) {
    let run = move || {
        unshare(flags).expect("namespaces (the tests are run as root)");
        if flags.contains(CloneFlags::CLONE_NEWNET) {
            ip("link set lo up");
        }
        if flags.contains(CloneFlags::CLONE_NEWNS) {
            command("mount", "--make-rprivate /");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(test());
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Resolves `names` to loopback in this thread, which must live [`in_namespaces`] in a mount namespace,
/// until the returned file is dropped.
pub(crate) fn resolve_locally(names: &[&str]) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("127.0.0.1 localhost {}\n", names.join(" ")))
        .expect("a file");
    command("mount", &format!("--bind {} /etc/hosts", file.path().display()));
    file
}

/// Another host at the other end of a link, for a thread that lives [`in_namespaces`].
pub(crate) struct Host {
    /// Process that keeps the namespace, and so the link.
    holder: Child,
    namespace: File,
}

impl Host {
    const HERE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
    pub(crate) const THERE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

    pub(crate) fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare (util-linux)");
        // The echoed byte shows that the namespace exists.
        let mut byte = [b'\n'];
        let stdin = holder.stdin.as_mut().expect("stdin is piped");
        std::io::Write::write_all(stdin, &byte).expect("a byte");
        let stdout = holder.stdout.as_mut().expect("stdout is piped");
        std::io::Read::read_exact(stdout, &mut byte).expect("the same byte");
        let pid = holder.id();
        let namespace = File::open(format!("/proc/{pid}/ns/net")).expect("its namespace");
        ip(&format!("link add near0 type veth peer name far0 netns {pid}"));
        ip(&format!("address add {}/30 dev near0", Self::HERE));
        ip("link set near0 up");
        let host = Self { holder, namespace };
        host.on(|| {
            ip("link set lo up");
            ip(&format!("address add {}/30 dev far0", Self::THERE));
            ip("link set far0 up");
        });
        host
    }

    /// Runs `what` on that host.
    pub(crate) fn on<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("its namespace");
                what()
            });
            there.join().expect("no panic")
        })
    }

    /// Returns a listener on that host.
    pub(crate) fn listen(&self) -> (tokio::net::TcpListener, SocketAddr) {
        let listener = self.on(|| std::net::TcpListener::bind((Self::THERE, 0)).expect("a port"));
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("its address");
        (tokio::net::TcpListener::from_std(listener).expect("a socket"), address)
    }

    /// Takes the link down: packets are lost, and neither side is notified.
    pub(crate) fn cut(&self) {
        self.on(|| ip("link set far0 down"));
    }

    pub(crate) fn restore_link(&self) {
        self.on(|| ip("link set far0 up"));
    }

    /// Delays what that host sends: limits the bit rate and queues the rest. (`netem`, which would
    /// add a given delay, is not in every kernel.)
    pub(crate) fn slow(&self, rate: &str) {
        let arguments = format!("qdisc add dev far0 root tbf rate {rate} burst 16kb latency 60s");
        self.on(|| command("tc", &arguments));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn ip(arguments: &str) {
    command("ip", arguments);
}

/// Runs a system command that must succeed.
pub(crate) fn command(program: &str, arguments: &str) {
    tool(Command::new(program).args(arguments.split(' ')));
}
