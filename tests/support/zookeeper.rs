//! A real ZooKeeper server, TLS only, client certificates required.
//!
//! Most tests share one for the whole test process, each below a chroot of its own; those that
//! break it start their own.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex, OnceCell};
use zookeeper_client::{Client, TlsOptions};

use super::certificates::{Authority, Identity};
use super::within;

/// Debian's packages libzookeeper-java, libnetty-java and libslf4j-java put them here.
const CLASSES: &str = "/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar:\
                       /usr/share/java/netty-all.jar:/usr/share/java/*";

/// Ends the server when our end of its stdin is closed: when it is stopped, and when the test
/// process dies, however it dies.
const SUPERVISOR: &str = r#""$@" & echo $!; read -r _; kill -9 $!; wait $! 2>/dev/null"#;

pub(crate) struct ZooKeeper {
    pub(crate) port: u16,
    pub(crate) authority: Authority,
    /// The identity of clients.
    pub(crate) identity: Identity,
    _reservation: Socket,
    directory: TempDir,
    java: &'static [&'static str],
    server: Mutex<Option<Server>>,
}

struct Server {
    supervisor: Child,
    /// Closing it ends the server.
    stdin: ChildStdin,
    pid: Pid,
}

/// The server that a test process shares.
pub(crate) async fn shared() -> Arc<ZooKeeper> {
    static SHARED: OnceCell<Arc<ZooKeeper>> = OnceCell::const_new();
    Arc::clone(SHARED.get_or_init(ZooKeeper::start).await)
}

impl ZooKeeper {
    /// Starts a server of one's own, that is up soon and small.
    pub(crate) async fn start() -> Arc<Self> {
        Self::start_with(&["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]).await
    }

    /// Starts one whose Java has these options.
    pub(crate) async fn start_with(java: &'static [&'static str]) -> Arc<Self> {
        let authority = Authority::new();
        let identity = authority.identity("client");
        let (port, reservation) = reserve_port();
        let zookeeper = Self {
            port,
            _reservation: reservation,
            identity,
            directory: TempDir::new().expect("a directory for ZooKeeper"),
            java,
            server: Mutex::new(None),
            authority,
        };
        zookeeper.run().await;
        Arc::new(zookeeper)
    }

    /// Starts the server, again with the data it had, and waits until it gives sessions.
    pub(crate) async fn run(&self) {
        let mut slot = self.server.lock().await;
        assert!(slot.is_none(), "ZooKeeper runs already");
        let config = self.write_config();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .expect("ZooKeeper's log");
        let mut supervisor = Command::new("sh")
            .args(["-c", SUPERVISOR, "sh", "java"])
            .args(self.java)
            .args(["-cp", CLASSES])
            .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("sh and java (tests/run installs them)");
        let stdin = supervisor.stdin.take().expect("stdin is piped");
        let mut stdout = BufReader::new(supervisor.stdout.take().expect("stdout is piped"));
        let mut pid = String::new();
        stdout.read_line(&mut pid).await.expect("the server's pid");
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw).expect("a pid");
        *slot = Some(Server { supervisor, stdin, pid });
        drop(slot);
        within("ZooKeeper to give a session", self.client("")).await;
    }

    /// Kills the server at once.
    pub(crate) async fn kill(&self) {
        let server = self.server.lock().await.take().expect("ZooKeeper runs");
        let Server { mut supervisor, stdin, .. } = server;
        drop(stdin);
        within("ZooKeeper to end", supervisor.wait()).await.expect("the supervisor's status");
    }

    /// Stops the server's process without ending it. Its threads run on for a moment; nothing
    /// but their state tells when they have stopped.
    pub(crate) async fn pause(&self) {
        let pid = self.signal(Signal::STOP).await;
        within("ZooKeeper's threads to stop", async {
            while !all_stopped(pid) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Lets it go on.
    pub(crate) async fn resume(&self) {
        self.signal(Signal::CONT).await;
    }

    async fn signal(&self, signal: Signal) -> Pid {
        let server = self.server.lock().await;
        let pid = server.as_ref().expect("ZooKeeper runs").pid;
        kill_process(pid, signal).expect("a signal to ZooKeeper");
        pid
    }

    /// A session of the test's own, below `chroot`.
    pub(crate) async fn client(&self, chroot: &str) -> Client {
        let text = |path| Identity::text(path);
        let tls = TlsOptions::new()
            .with_pem_ca(&text(&self.identity.ca))
            .and_then(|tls| {
                tls.with_pem_identity(&text(&self.identity.cert), &text(&self.identity.key))
            })
            .expect("certificates just made");
        Client::connector()
            .with_session_timeout(Duration::from_secs(30))
            .with_tls(tls)
            .secure_connect(&format!("127.0.0.1:{}{chroot}", self.port))
            .await
            .unwrap_or_else(|error| panic!("no session: {error}\n{}", self.log()))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Ticks are short, so that a session may be as short as a test wants it.
    fn write_config(&self) -> PathBuf {
        let path = self.directory.path().join("zoo.cfg");
        let server = self.authority.identity("zookeeper");
        let mut file = std::fs::File::create(&path).expect("zoo.cfg");
        let (port, directory) = (self.port, self.directory.path().display());
        let (key_store, trust_store) = (server.both.display(), server.ca.display());
        write!(
            file,
            "tickTime=200\nminSessionTimeout=400\nmaxSessionTimeout=60000\n\
             dataDir={directory}/data\nadmin.enableServer=false\nmaxClientCnxns=0\n\
             secureClientPort={port}\nsecureClientPortAddress=127.0.0.1\n\
             serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\n\
             ssl.keyStore.type=PEM\nssl.keyStore.location={key_store}\n\
             ssl.trustStore.type=PEM\nssl.trustStore.location={trust_store}\n\
             ssl.clientAuth=need\nssl.hostnameVerification=false\n"
        )
        .expect("zoo.cfg");
        path
    }
}

/// Whether every thread of `pid` is stopped (`T` in proc(5)).
fn all_stopped(pid: Pid) -> bool {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    std::fs::read_dir(tasks).expect("ZooKeeper's threads").flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
    })
}

/// A port that stays ours while the server is started and started again: ZooKeeper cannot tell
/// which one it got. Two sockets that both allow it may share a port as long as only one of them
/// listens (socket(7), SO_REUSEADDR), and ZooKeeper's does; nobody else is given it.
pub(crate) fn reserve_port() -> (u16, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    let address = socket.local_addr().expect("its address").as_socket();
    (address.expect("an IP address").port(), socket)
}
