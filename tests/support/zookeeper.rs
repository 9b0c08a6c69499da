//! A real ZooKeeper server, TLS only, client certificates required.
//!
//! Most tests share one server per test process, each below its own chroot; tests that break the
//! server start their own.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex, OnceCell};
use zookeeper_client::{Client, TlsOptions};

use super::certificates::{Authority, Identity};
use super::{DEADLINE, client, within};

/// Installed by Debian's packages libzookeeper-java, libnetty-java and libslf4j-java.
const CLASSES: &str = "/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar:\
                       /usr/share/java/netty-all.jar:/usr/share/java/*";

/// Options for a small Java process that starts quickly.
const SMALL: [&str; 3] = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"];

/// Ends the server when our end of its stdin is closed: when the server is stopped, and when the
/// test process ends for any reason.
const SUPERVISOR: &str = r#""$@" & echo $!; read -r _; kill -9 $!; wait $! 2>/dev/null"#;

pub(crate) struct ZooKeeper {
    pub(crate) port: u16,
    pub(crate) authority: Arc<Authority>,
    /// The identity of clients.
    pub(crate) identity: Identity,
    /// The members of the ensemble, as in a connect string.
    servers: String,
    _reservations: Vec<Socket>,
    directory: TempDir,
    java: &'static [&'static str],
    /// Further configuration lines of a member of an ensemble.
    member: String,
    server: Mutex<Option<Server>>,
}

struct Server {
    supervisor: Child,
    /// Closing this ends the server.
    stdin: ChildStdin,
    pid: Pid,
}

/// Returns the server that a test process shares.
pub(crate) async fn shared() -> Arc<ZooKeeper> {
    static SHARED: OnceCell<Arc<ZooKeeper>> = OnceCell::const_new();
    Arc::clone(SHARED.get_or_init(ZooKeeper::start).await)
}

impl ZooKeeper {
    /// Starts a small server.
    pub(crate) async fn start() -> Arc<Self> {
        Self::start_with(&SMALL).await
    }

    /// Starts a server with these options for Java.
    pub(crate) async fn start_with(java: &'static [&'static str]) -> Arc<Self> {
        let authority = Arc::new(Authority::new());
        let identity = authority.identity("client");
        let (port, reservation) = reserve_port();
        let zookeeper = Self {
            port,
            servers: format!("127.0.0.1:{port}"),
            _reservations: vec![reservation],
            identity,
            directory: TempDir::new().expect("a directory for ZooKeeper"),
            java,
            member: String::new(),
            server: Mutex::new(None),
            authority,
        };
        zookeeper.run().await;
        Arc::new(zookeeper)
    }

    /// Starts three servers with one CA. A member without a quorum gives read-only sessions to
    /// clients that allow them. Waits until the ensemble gives sessions.
    pub(crate) async fn ensemble() -> [Arc<Self>; 3] {
        const JAVA: &[&str] = &[SMALL[0], SMALL[1], SMALL[2], "-Dreadonlymode.enabled=true"];
        let root = Arc::new(Authority::new());
        let ports: [_; 3] =
            std::array::from_fn(|_| [reserve_port(), reserve_port(), reserve_port()]);
        let mut member = "initLimit=50\nsyncLimit=15\n4lw.commands.whitelist=srvr\n".to_owned();
        for (id, [_, (quorum, _), (election, _)]) in ports.iter().enumerate() {
            let _ = writeln!(member, "server.{id}=127.0.0.1:{quorum}:{election}");
        }
        let clients = ports.each_ref().map(|[(port, _), ..]| format!("127.0.0.1:{port}"));
        let members = ports.map(|reserved| {
            let directory = TempDir::new().expect("a directory for ZooKeeper");
            let port = reserved[0].0;
            let id = clients.iter().position(|client| client.ends_with(&format!(":{port}")));
            let data = directory.path().join("data");
            std::fs::create_dir(&data).expect("a directory");
            std::fs::write(data.join("myid"), id.expect("its own").to_string()).expect("myid");
            Arc::new(Self {
                port,
                servers: clients.join(","),
                _reservations: reserved.into_iter().map(|(_, socket)| socket).collect(),
                identity: root.identity("client"),
                directory,
                java: JAVA,
                member: member.clone(),
                server: Mutex::new(None),
                authority: Arc::clone(&root),
            })
        });
        for member in &members {
            member.launch().await;
        }
        within("the ensemble to give a session", members[0].client("")).await;
        members
    }

    /// Returns the server's mode, such as `leader`; `None` if it does not run.
    pub(crate) async fn mode(&self) -> Option<String> {
        let (address, identity) = ((Ipv4Addr::LOCALHOST, self.port).into(), &self.identity);
        let connecting =
            client::Client::try_connect_tls(address, "localhost", identity, Some(identity));
        let mut connection = connecting.await.ok()?;
        connection.send(b"srvr").await;
        let (output, _) = connection.rest().await;
        let output = String::from_utf8(output).expect("UTF-8");
        output.lines().find_map(|line| line.strip_prefix("Mode: ")).map(str::to_owned)
    }

    /// Starts the server, with existing data if there is any, and waits until it gives sessions.
    pub(crate) async fn run(&self) {
        self.launch().await;
        within("ZooKeeper to give a session", self.client("")).await;
    }

    /// Starts the server, with existing data if there is any.
    pub(crate) async fn launch(&self) {
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
    }

    /// Kills the server.
    pub(crate) async fn kill(&self) {
        let server = self.server.lock().await.take().expect("ZooKeeper runs");
        let Server { mut supervisor, stdin, .. } = server;
        drop(stdin);
        within("ZooKeeper to end", supervisor.wait()).await.expect("the supervisor's status");
    }

    /// Stops the server's process (SIGSTOP). Its threads run on for a moment, so this polls their
    /// state.
    pub(crate) async fn pause(&self) {
        let pid = self.signal(Signal::STOP).await;
        within("ZooKeeper's threads to stop", async {
            while !all_stopped(pid) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Continues the stopped process.
    pub(crate) async fn resume(&self) {
        self.signal(Signal::CONT).await;
    }

    async fn signal(&self, signal: Signal) -> Pid {
        let server = self.server.lock().await;
        let pid = server.as_ref().expect("ZooKeeper runs").pid;
        kill_process(pid, signal).expect("a signal to ZooKeeper");
        pid
    }

    /// Opens a session for the test itself, below `chroot`.
    pub(crate) async fn client(&self, chroot: &str) -> Client {
        let text = |path| Identity::text(path);
        let tls = TlsOptions::new()
            .with_pem_ca(&text(&self.identity.ca))
            .and_then(|tls| {
                tls.with_pem_identity(&text(&self.identity.cert), &text(&self.identity.key))
            })
            .expect("certificates just made");
        Client::connector()
            .with_session_timeout(DEADLINE)
            .with_tls(tls)
            .secure_connect(&self.hosts(chroot))
            .await
            .unwrap_or_else(|error| panic!("no session: {error}\n{}", self.log()))
    }

    /// Returns the connect string for `chroot`.
    pub(crate) fn hosts(&self, chroot: &str) -> String {
        format!("{}{chroot}", self.servers)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Writes the configuration. Ticks are short, so that tests may use short sessions.
    fn write_config(&self) -> PathBuf {
        let path = self.directory.path().join("zoo.cfg");
        // The configurations in the documentation name servers of this domain.
        let server = self.authority.identity("*.example.org");
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
             ssl.clientAuth=need\nssl.hostnameVerification=false\n{}",
            self.member
        )
        .expect("zoo.cfg");
        path
    }
}

/// Returns whether every thread of `pid` is stopped (`T` in proc(5)).
fn all_stopped(pid: Pid) -> bool {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    std::fs::read_dir(tasks).expect("ZooKeeper's threads").flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
    })
}

/// Reserves a port that stays ours across restarts of the server, because ZooKeeper cannot report a
/// port that the kernel has chosen. Two sockets that both set SO_REUSEADDR may share a port as long
/// as only one of them listens (socket(7)), and ZooKeeper sets it; no other process gets the port.
pub(crate) fn reserve_port() -> (u16, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    let address = socket.local_addr().expect("its address").as_socket();
    (address.expect("an IP address").port(), socket)
}
