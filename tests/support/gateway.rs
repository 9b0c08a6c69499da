//! The built binary as a process.
//!
//! Its readiness and state come through the service manager's notification protocol
//! (sd_notify(3)), its addresses with them: every listener takes port 0.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::certificates::Identity;
use super::system::System;
use super::within;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_zuul-fingergw");

/// What a gateway is started with.
pub(crate) struct Builder {
    directory: TempDir,
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    /// Keys of the root table, as TOML lines.
    pub(crate) root: String,
    /// Each a `[[listener]]` table's lines but for the address.
    pub(crate) listeners: Vec<String>,
    pub(crate) tls: Option<Identity>,
    pub(crate) verify_hostnames: bool,
    pub(crate) common_name_fallback: bool,
    pub(crate) zookeeper: String,
    pub(crate) zookeeper_identity: Identity,
    pub(crate) hosts: String,
    /// Whether it tells health and metrics; the address comes behind the listeners'.
    pub(crate) admin: bool,
    /// Where the command socket is to be.
    pub(crate) control: Option<PathBuf>,
    pub(crate) limits: String,
    pub(crate) log: String,
    pub(crate) tracing: String,
}

impl Builder {
    /// A gateway of `system`, with one plain listener and no zone.
    pub(crate) fn new(system: &System) -> Self {
        Self {
            directory: TempDir::new().expect("a directory for the gateway"),
            hostname: "localhost".to_owned(),
            zone: None,
            root: String::new(),
            listeners: vec![String::new()],
            tls: None,
            verify_hostnames: true,
            common_name_fallback: true,
            zookeeper: String::new(),
            zookeeper_identity: system.zookeeper.identity.clone(),
            hosts: system.hosts(),
            admin: false,
            control: None,
            limits: String::new(),
            log: String::new(),
            tracing: String::new(),
        }
    }

    pub(crate) fn zone(mut self, zone: &str) -> Self {
        self.zone = Some(zone.to_owned());
        self
    }

    /// With certificates, for dialing as well as for TLS listeners.
    pub(crate) fn tls(mut self, identity: &Identity) -> Self {
        self.tls = Some(identity.clone());
        self
    }

    /// With these listeners, such as `""` for a plain one and `"tls = true"`.
    pub(crate) fn listeners(mut self, listeners: &[&str]) -> Self {
        self.listeners = listeners.iter().map(ToString::to_string).collect();
        self
    }

    /// With lines such as `grace = "1s"` in `[limits]`.
    pub(crate) fn limits(mut self, lines: &str) -> Self {
        self.limits = lines.to_owned();
        self
    }

    /// With lines in `[log]`.
    pub(crate) fn log(mut self, lines: &str) -> Self {
        self.log = lines.to_owned();
        self
    }

    /// With lines in `[tracing]`.
    pub(crate) fn tracing(mut self, lines: &str) -> Self {
        self.tracing = lines.to_owned();
        self
    }

    /// With lines in `[zookeeper]`.
    pub(crate) fn zookeeper(mut self, lines: &str) -> Self {
        self.zookeeper = lines.to_owned();
        self
    }

    /// With a command socket in its directory.
    pub(crate) fn control(mut self) -> Self {
        self.control = Some(self.directory().join("control.socket"));
        self
    }

    /// With files that every user may read: the certificates are copied.
    pub(crate) fn readable_by_all(mut self) -> Self {
        let directory = self.directory.path();
        open_to_all(directory);
        for (name, identity) in self
            .tls
            .iter_mut()
            .map(|tls| ("tls", tls))
            .chain([("zk", &mut self.zookeeper_identity)])
        {
            let Identity { cert, key, ca, .. } = identity;
            for (kind, file) in [("cert", cert), ("key", key), ("ca", ca)] {
                let copy = directory.join(format!("{name}-{kind}.pem"));
                fs::copy(&file, &copy).expect("a copy");
                open_to_all(&copy);
                *file = copy;
            }
        }
        self
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn toml(&self) -> String {
        let mut toml = format!("hostname = \"{}\"\n{}\n", self.hostname, self.root);
        if let Some(zone) = &self.zone {
            let _ = writeln!(toml, "zone = \"{zone}\"");
        }
        for listener in &self.listeners {
            let any =
                if listener.contains("address = ") { "" } else { "address = \"127.0.0.1:0\"" };
            let _ = writeln!(toml, "[[listener]]\n{any}\n{listener}");
        }
        if let Some(Identity { cert, key, ca, .. }) = &self.tls {
            let _ = writeln!(
                toml,
                "[tls]\ncert = {cert:?}\nkey = {key:?}\nca = {ca:?}\nverify_hostnames = {}\n\
                 common_name_fallback = {}",
                self.verify_hostnames, self.common_name_fallback
            );
        }
        let Identity { cert, key, ca, .. } = &self.zookeeper_identity;
        let _ = writeln!(
            toml,
            "[zookeeper]\nhosts = \"{}\"\ntls_cert = {cert:?}\ntls_key = {key:?}\ntls_ca = {ca:?}\n{}",
            self.hosts, self.zookeeper
        );
        if self.admin {
            let _ = writeln!(toml, "[admin]\naddress = \"127.0.0.1:0\"");
        }
        if let Some(socket) = &self.control {
            let _ = writeln!(toml, "[control]\nsocket = {socket:?}");
        }
        // Most tests of an end are not about who comes late.
        let lame_duck = if self.limits.contains("lame_duck") { "" } else { "lame_duck = \"0s\"\n" };
        let _ = writeln!(toml, "[limits]\n{}{}\n[log]\n{}", lame_duck, self.limits, self.log);
        if !self.tracing.is_empty() {
            let _ = writeln!(toml, "[tracing]\n{}", self.tracing);
        }
        toml
    }

    /// Writes the configuration and returns its path.
    pub(crate) fn write(&self) -> PathBuf {
        let path = self.directory.path().join("gateway.toml");
        fs::write(&path, self.toml()).expect("the configuration");
        path
    }

    /// Writes a `zuul.conf` with these lines in `[fingergw]` and returns its path. Of the rest it
    /// has the host name and ZooKeeper.
    pub(crate) fn write_zuul_conf(&self, fingergw: &str) -> PathBuf {
        let path = self.directory.path().join("zuul.conf");
        let Identity { cert, key, ca, .. } = &self.zookeeper_identity;
        let (cert, key, ca) = (cert.display(), key.display(), ca.display());
        let text = format!(
            "[zookeeper]\nhosts = {}\ntls_cert = {cert}\ntls_key = {key}\ntls_ca = {ca}\n\
             [fingergw]\nlisten_address = 127.0.0.1\nport = 0\nhostname = {}\n{fingergw}\n",
            self.hosts, self.hostname
        );
        fs::write(&path, text).expect("zuul.conf");
        path
    }

    /// Starts the gateway from such a `zuul.conf`, its command changed by `change`, and waits until
    /// it is listening and registered as running.
    pub(crate) async fn ready_from_zuul_conf(
        self,
        fingergw: &str,
        change: impl FnOnce(&mut Command),
    ) -> Gateway {
        let config = self.write_zuul_conf(fingergw);
        let mut gateway = Gateway::with_command(self.directory, &config, change).await;
        gateway.ready().await;
        gateway
    }

    /// Starts the gateway and waits until it listens.
    pub(crate) async fn start(self) -> Gateway {
        let config = self.write();
        Gateway::with_config(self.directory, &config).await
    }

    /// The same with its command changed by `change`.
    pub(crate) async fn start_changed(self, change: impl FnOnce(&mut Command)) -> Gateway {
        let config = self.write();
        Gateway::with_command(self.directory, &config, change).await
    }

    /// Starts the gateway and waits until it is listening and registered as running.
    pub(crate) async fn ready(self) -> Gateway {
        let mut gateway = self.start().await;
        gateway.ready().await;
        gateway
    }
}

/// What the process has told its service manager.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notices {
    pub(crate) status: String,
    pub(crate) ready: bool,
    pub(crate) stopping: bool,
    /// Everything but STATUS, in order.
    pub(crate) messages: Vec<String>,
}

pub(crate) struct Gateway {
    child: Child,
    pid: Pid,
    notices: watch::Receiver<Notices>,
    log: watch::Receiver<Vec<String>>,
    /// Of each listener, in the configuration's order.
    pub(crate) addresses: Vec<SocketAddr>,
    directory: TempDir,
}

impl Gateway {
    /// Starts it with a configuration file of any kind; `directory` is kept as long as it runs.
    pub(crate) async fn with_config(directory: TempDir, config: &Path) -> Self {
        Self::with_command(directory, config, |_| {}).await
    }

    /// The same with its command changed by `change`.
    pub(crate) async fn with_command(
        directory: TempDir,
        config: &Path,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let socket = directory.path().join("notify");
        let (notices, notices_seen) = watch::channel(Notices::default());
        let datagrams = UnixDatagram::bind(&socket).expect("a notify socket");
        // Some gateways become another user.
        open_to_all(&socket);
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(count) = datagrams.recv(&mut buffer).await {
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                notices.send_modify(|notices| {
                    for line in text.lines() {
                        match line.split_once('=') {
                            Some(("STATUS", status)) => notices.status = status.to_owned(),
                            _ => notices.messages.push(line.to_owned()),
                        }
                        match line.split_once('=') {
                            Some(("READY", _)) => notices.ready = true,
                            Some(("STOPPING", _)) => notices.stopping = true,
                            _ => {}
                        }
                    }
                });
            }
        });
        let mut command = Command::new(BINARY);
        command.args(["-f", "-c"]).arg(config).env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        change(&mut command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the built binary");
        let (log, log_seen) = watch::channel(Vec::new());
        collect(child.stdout.take().expect("stdout is piped"), log.clone());
        collect(child.stderr.take().expect("stderr is piped"), log);
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
        let mut gateway = Self {
            child,
            pid,
            notices: notices_seen,
            log: log_seen,
            addresses: Vec::new(),
            directory,
        };
        let status = tokio::select! {
            ended = gateway.child.wait() => panic!("the gateway has ended: {ended:?}"),
            notices = within("it to listen", gateway.notices.wait_for(|n| !n.status.is_empty())) => {
                notices.expect("the collecting task lives").status.clone()
            }
        };
        gateway.addresses =
            status.split([' ', ',', ';']).filter_map(|word| word.parse().ok()).collect();
        gateway
    }

    /// The address of the first listener.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    pub(crate) fn port(&self) -> u16 {
        self.address().port()
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Waits for READY=1.
    pub(crate) async fn ready(&mut self) {
        self.notice("READY=1", |notices| notices.ready).await;
    }

    /// Waits until its entry says that it runs.
    pub(crate) async fn until_running(&mut self, system: &System) {
        let running = |entries: &[super::system::Entry]| {
            entries.iter().any(|entry| entry.content["state"] == "running")
        };
        system.until("the entry to say running", running).await;
    }

    /// Waits for a STATUS line that is as `wanted` says.
    pub(crate) async fn status(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        self.notice(what, |notices| wanted(&notices.status)).await.status
    }

    /// Waits for what the service manager is to be told.
    pub(crate) async fn notice(
        &mut self,
        what: &str,
        wanted: impl FnMut(&Notices) -> bool,
    ) -> Notices {
        let notices = within(what, self.notices.wait_for(wanted)).await;
        notices.expect("the collecting task lives").clone()
    }

    /// Waits for a log line that is as `wanted` says.
    pub(crate) async fn logged(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let find = |log: &[String]| log.iter().find(|line| wanted(line)).cloned();
        let log = within(what, self.log.wait_for(|log| find(log).is_some())).await;
        find(&log.expect("the process logs as long as it lives")).expect("it was there")
    }

    /// Waits until there are so many log lines that are as `wanted` says.
    pub(crate) async fn logged_times(
        &mut self,
        what: &str,
        times: usize,
        wanted: impl Fn(&str) -> bool,
    ) {
        let often = |log: &Vec<String>| log.iter().filter(|line| wanted(line)).count() >= times;
        let log = within(what, self.log.wait_for(often)).await;
        log.expect("the process logs as long as it lives");
    }

    /// Waits for a log line that is as `wanted` says, and returns how many there are by then. The log
    /// has a thread of its own, so lines come a moment after what they report.
    pub(crate) async fn count_logged(&self, what: &str, wanted: impl Fn(&str) -> bool) -> usize {
        let count = |log: &Vec<String>| log.iter().filter(|line| wanted(line)).count();
        let mut log = self.log.clone();
        let log = within(what, log.wait_for(|log| count(log) > 0)).await;
        count(&log.expect("the process logs as long as it lives"))
    }

    /// How many sockets it has open.
    pub(crate) fn sockets(&self) -> usize {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("its descriptors");
        let is_socket = |file: &fs::DirEntry| {
            // One that is closed meanwhile has no name any more.
            let name = fs::read_link(file.path());
            name.is_ok_and(|name| name.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        };
        descriptors.flatten().filter(is_socket).count()
    }

    /// Waits until it has no more than `count` sockets open. The kernel tells nobody, so this asks
    /// again.
    pub(crate) async fn until_sockets(&self, count: usize) {
        within("its sockets to be closed", async {
            while self.sockets() > count {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Every log line so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("a signal to the gateway");
    }

    /// Waits for its end. All of its log is there afterwards.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let status = within("the gateway to end", self.child.wait()).await.expect("its status");
        // Both readers are gone when both pipes have been read to their end.
        within("the end of the log", async { while self.log.changed().await.is_ok() {} }).await;
        status
    }
}

impl Drop for Gateway {
    /// Shows what happened when a test fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let status = &self.notices.borrow().status;
            eprintln!("--- gateway {}: {status}", self.pid);
            for line in self.log.borrow().iter() {
                eprintln!("{line}");
            }
        }
    }
}

/// Has `wrapper` run the command, whose words come behind its own. It must run it in its own place.
pub(crate) fn wrap(command: &mut Command, wrapper: &[&str]) {
    let inner = command.as_std();
    let mut outer = Command::new(wrapper[0]);
    outer.args(&wrapper[1..]).arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    *command = outer;
}

/// Lets every user do everything with the file at `path`.
pub(crate) fn open_to_all(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o777)).expect("permissions");
}

/// Reads lines all the time: a full pipe would stop the process.
fn collect(pipe: impl AsyncRead + Unpin + Send + 'static, log: watch::Sender<Vec<String>>) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(pipe).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            log.send_modify(|log| log.push(line));
        }
    });
}
