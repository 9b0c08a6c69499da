//! Common clients: Debian's `finger`, `nc` and `openssl s_client`, and Python's `ssl`.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdout, Command};

use crate::executor::{Executor, Log, new_build};
use crate::support::gateway::{Builder, Gateway};
use crate::support::haproxy::{Haproxy, reserve};
use crate::support::system::System;
use crate::support::within;

/// A client program with piped output; ends with the test.
struct Program {
    child: Child,
    stdout: ChildStdout,
}

impl Program {
    /// Starts the program, writes `input` to its stdin and closes it.
    async fn start(command: &[&str], input: &str) -> Self {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("a client that tests/run installs");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin.write_all(input.as_bytes()).await.expect("the client reads its stdin");
        let stdout = child.stdout.take().expect("stdout is piped");
        Self { child, stdout }
    }

    async fn prints(&mut self, text: &str) {
        let mut printed = vec![0; text.len()];
        within(text, self.stdout.read_exact(&mut printed)).await.expect("it prints on");
        assert_eq!(String::from_utf8_lossy(&printed), text);
    }

    /// Returns the output until the program exits, which must succeed.
    async fn ends(mut self) -> String {
        let mut rest = String::new();
        within("the client to end", self.stdout.read_to_string(&mut rest)).await.expect("text");
        let status = within("the client to end", self.child.wait()).await.expect("its status");
        assert!(status.success(), "{status}");
        rest
    }

    /// Checks that a log arrives line by line while it grows; the pauses between the lines are
    /// longer than the intervals at which the streamer checks for a closed client.
    async fn follows(mut self, mut log: Log) {
        for line in ["first\n", "second\n", "third\n"] {
            log.write(line.as_bytes());
            self.prints(line).await;
        }
        log.remove();
        assert_eq!(self.ends().await, "");
    }
}

/// A system with one executor and our gateway, without zones.
async fn start() -> (System, Gateway, Executor) {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start(&system, None).await;
    (system, gateway, executor)
}

/// `finger` supports only port 79. To avoid conflicts, the gateway uses it on a loopback address
/// made of the process ID, which no other process uses.
#[tokio::test]
async fn finger_prints_a_log() {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 64 + high, middle, low);
    if let Err(error) = TcpListener::bind((address, 79)) {
        panic!("{address}:79: {error}; this test needs root or CAP_NET_BIND_SERVICE");
    }
    let system = System::new().await;
    let listener = format!("address = \"{address}:79\"");
    let _gateway = Builder::new(&system).listeners(&[&listener]).ready().await;
    let mut executor = Executor::start(&system, None).await;

    // stdbuf: finger buffers its output into a pipe until it exits.
    let (build, log) = executor.run(None).await;
    let target = format!("{build}@{address}");
    Program::start(&["stdbuf", "-oL", "finger", &target], "").await.follows(log).await;
    // -l sends /W before the request.
    let (build, log) = executor.run(None).await;
    let target = format!("{build}@{address}");
    Program::start(&["stdbuf", "-oL", "finger", "-l", &target], "").await.follows(log).await;

    let target = format!("{}@{address}", new_build());
    assert_eq!(Program::start(&["finger", &target], "").await.ends().await, "Build not found\n");
}

/// `nc` leaves the connection open when its input ends.
#[tokio::test]
async fn nc_prints_a_log() {
    let (_system, gateway, mut executor) = start().await;
    let (build, log) = executor.run(None).await;
    let port = gateway.port().to_string();
    let command = ["nc.openbsd", "127.0.0.1", &port];
    Program::start(&command, &format!("{build}\n")).await.follows(log).await;
}

/// `nc -N` half-closes it, which the executor would take for a disconnect.
#[tokio::test]
async fn half_closing_nc_prints_a_log() {
    let (_system, gateway, mut executor) = start().await;
    let (build, log) = executor.run(None).await;
    let port = gateway.port().to_string();
    let command = ["nc.openbsd", "-N", "127.0.0.1", &port];
    Program::start(&command, &format!("{build}\n")).await.follows(log).await;
}

#[tokio::test]
async fn openssl_s_client_prints_a_log() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).tls(&identity).listeners(&["tls = true"]).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, log) = executor.run(None).await;
    let files = [&identity.cert, &identity.key, &identity.ca];
    let [cert, key, ca] = files.map(|path| path.to_str().expect("a path in UTF-8"));
    let address = gateway.address().to_string();
    #[rustfmt::skip]
    let command = [
        "openssl", "s_client", "-quiet", "-verify_return_error",
        "-connect", &address, "-cert", cert, "-key", key, "-CAfile", ca,
    ];
    Program::start(&command, &format!("{build}\n")).await.follows(log).await;
}

/// haproxy, which adds TLS for a plain client, turns the client's half-close into a close_notify.
#[tokio::test]
async fn half_closing_nc_before_a_tls_haproxy_prints_a_log() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).tls(&identity).listeners(&["tls = true"]).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, log) = executor.run(None).await;
    let haproxy = Haproxy::start(reserve(), |address, _| {
        let (crt, ca) = (identity.both.display(), identity.ca.display());
        format!(
            "defaults\n mode tcp\n timeout connect 60s\n timeout client 60s\n \
             timeout server 60s\nlisten finger\n bind {address}\n \
             server gateway {} ssl verify required sni str(localhost) crt {crt} ca-file {ca}\n",
            gateway.address()
        )
    })
    .await;
    let port = haproxy.address.port().to_string();
    let command = ["nc.openbsd", "-N", "127.0.0.1", &port];
    Program::start(&command, &format!("{build}\n")).await.follows(log).await;
}

/// Sends a request over TLS, then a close_notify, and continues to read, as stunnel, socat and
/// GnuTLS do when their input ends. `SSLSocket.unwrap` waits for the peer's close_notify, so the
/// records pass through memory BIOs.
const CLOSE_NOTIFY: &str = r#"
import socket, ssl, sys
port, build, cert, key, ca = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.load_cert_chain(cert, key)
received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(received, to_send, server_hostname="localhost")
tcp = socket.create_connection(("127.0.0.1", int(port)))

def step(action, *arguments):
    while True:
        try:
            return action(*arguments)
        except ssl.SSLWantReadError:
            tcp.sendall(to_send.read())
            received.write(tcp.recv(65536))
        finally:
            tcp.sendall(to_send.read())

step(tls.do_handshake)
tls.write(build.encode() + b"\n")
try:
    tls.unwrap()
except ssl.SSLWantReadError:
    tcp.sendall(to_send.read())
while True:
    try:
        log = tls.read(65536)
    except ssl.SSLZeroReturnError:
        break
    except ssl.SSLWantReadError:
        records = tcp.recv(65536)
        if not records:
            sys.exit("no close_notify before the end")
        received.write(records)
    else:
        if not log:
            break
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()
"#;

#[tokio::test]
async fn python_reads_on_after_close_notify() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).tls(&identity).listeners(&["tls = true"]).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, log) = executor.run(None).await;
    let files = [&identity.cert, &identity.key, &identity.ca];
    let [cert, key, ca] = files.map(|path| path.to_str().expect("a path in UTF-8"));
    let port = gateway.port().to_string();
    let command = ["python3", "-c", CLOSE_NOTIFY, &port, &build, cert, key, ca];
    Program::start(&command, "").await.follows(log).await;
}
