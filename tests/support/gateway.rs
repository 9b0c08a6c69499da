//! The built binary as a process.
//!
//! Readiness and state come through the service manager's notification protocol (sd_notify(3)), and
//! with them the addresses: every listener takes port 0.

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

/// Settings of a gateway to start.
pub(crate) struct Builder {
    directory: TempDir,
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    /// Keys of the root table, as TOML lines.
    pub(crate) root: String,
    /// Lines of each `[[listener]]` table, without the address.
    pub(crate) listeners: Vec<String>,
    pub(crate) tls: Option<Identity>,
    pub(crate) verify_hostnames: bool,
    pub(crate) common_name_fallback: bool,
    pub(crate) zookeeper: String,
    pub(crate) zookeeper_identity: Identity,
    pub(crate) hosts: String,
    /// Whether the admin listener is enabled; its address follows the listeners' addresses.
    pub(crate) admin: bool,
    /// Path of the command socket.
    pub(crate) control: Option<PathBuf>,
    pub(crate) limits: String,
    pub(crate) log: String,
    pub(crate) tracing: String,
}

impl Builder {
    /// Starts with one plain listener and no zone.
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

    /// Sets certificates, for outgoing connections and for TLS listeners.
    pub(crate) fn tls(mut self, identity: &Identity) -> Self {
        self.tls = Some(identity.clone());
        self
    }

    /// Sets the listeners, such as `""` for a plain one and `"tls = true"`.
    pub(crate) fn listeners(mut self, listeners: &[&str]) -> Self {
        self.listeners = listeners.iter().map(ToString::to_string).collect();
        self
    }

    /// Adds lines such as `grace = "1s"` to `[limits]`.
    pub(crate) fn limits(mut self, lines: &str) -> Self {
        self.limits = lines.to_owned();
        self
    }

    /// Adds lines to `[log]`.
    pub(crate) fn log(mut self, lines: &str) -> Self {
        self.log = lines.to_owned();
        self
    }

    /// Adds lines to `[tracing]`.
    pub(crate) fn tracing(mut self, lines: &str) -> Self {
        self.tracing = lines.to_owned();
        self
    }

    /// Adds lines to `[zookeeper]`.
    pub(crate) fn zookeeper(mut self, lines: &str) -> Self {
        self.zookeeper = lines.to_owned();
        self
    }

    /// Sets a command socket in the gateway's directory.
    pub(crate) fn control(mut self) -> Self {
        self.control = Some(self.directory().join("control.socket"));
        self
    }

    /// Makes all files readable by every user; copies the certificates.
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
        // Only tests of the lame duck period need it.
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

    /// Writes a `zuul.conf` with these lines in `[fingergw]`, the host name and ZooKeeper, and
    /// returns its path.
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

    /// Starts the gateway from such a `zuul.conf`, with its command modified by `change`, and waits
    /// until it listens and is registered as running.
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

    /// Like [`Self::start`], with the command modified by `change`.
    pub(crate) async fn start_changed(self, change: impl FnOnce(&mut Command)) -> Gateway {
        let config = self.write();
        Gateway::with_command(self.directory, &config, change).await
    }

    /// Starts the gateway and waits until it listens and is registered as running.
    pub(crate) async fn ready(self) -> Gateway {
        let mut gateway = self.start().await;
        gateway.ready().await;
        gateway
    }
}

/// Notifications that the process has sent to its service manager.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notices {
    pub(crate) status: String,
    pub(crate) ready: bool,
    pub(crate) stopping: bool,
    /// All notifications but STATUS, in order.
    pub(crate) messages: Vec<String>,
}

pub(crate) struct Gateway {
    child: Child,
    pid: Pid,
    notices: watch::Receiver<Notices>,
    log: watch::Receiver<Vec<String>>,
    /// Addresses of the listeners, in the order of the configuration.
    pub(crate) addresses: Vec<SocketAddr>,
    directory: TempDir,
}

impl Gateway {
    /// Starts a gateway with any configuration file; keeps `directory` as long as it runs.
    pub(crate) async fn with_config(directory: TempDir, config: &Path) -> Self {
        Self::with_command(directory, config, |_| {}).await
    }

    /// Like [`Self::with_config`], with the command modified by `change`.
    pub(crate) async fn with_command(
        directory: TempDir,
        config: &Path,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let socket = directory.path().join("notify");
        let (notices, notices_seen) = watch::channel(Notices::default());
        let datagrams = UnixDatagram::bind(&socket).expect("a notify socket");
        // For gateways that change their user.
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

    /// Returns the address of the first listener.
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

    /// Waits until the gateway's entry is in state running.
    pub(crate) async fn until_running(&mut self, system: &System) {
        let running = |entries: &[super::system::Entry]| {
            entries.iter().any(|entry| entry.content["state"] == "running")
        };
        system.until("an entry in state running", running).await;
    }

    /// Waits for a STATUS that satisfies `wanted`.
    pub(crate) async fn status(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        self.notice(what, |notices| wanted(&notices.status)).await.status
    }

    /// Waits for notifications that satisfy `wanted`.
    pub(crate) async fn notice(
        &mut self,
        what: &str,
        wanted: impl FnMut(&Notices) -> bool,
    ) -> Notices {
        let notices = within(what, self.notices.wait_for(wanted)).await;
        notices.expect("the collecting task lives").clone()
    }

    /// Waits for a log line that satisfies `wanted`.
    pub(crate) async fn logged(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let find = |log: &[String]| log.iter().find(|line| wanted(line)).cloned();
        let log = within(what, self.log.wait_for(|log| find(log).is_some())).await;
        find(&log.expect("the process logs as long as it lives")).expect("it was there")
    }

    /// Waits for `times` log lines that satisfy `wanted`.
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

    /// Waits for a log line that satisfies `wanted`, and returns how many there are by then. A
    /// separate thread writes the log, so lines appear shortly after the event.
    pub(crate) async fn count_logged(&self, what: &str, wanted: impl Fn(&str) -> bool) -> usize {
        let count = |log: &Vec<String>| log.iter().filter(|line| wanted(line)).count();
        let mut log = self.log.clone();
        let log = within(what, log.wait_for(|log| count(log) > 0)).await;
        count(&log.expect("the process logs as long as it lives"))
    }

    /// Returns the number of open sockets.
    pub(crate) fn sockets(&self) -> usize {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("its descriptors");
        let is_socket = |file: &fs::DirEntry| {
            // A descriptor that has been closed meanwhile has no name.
            let name = fs::read_link(file.path());
            name.is_ok_and(|name| name.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        };
        descriptors.flatten().filter(is_socket).count()
    }

    /// Waits until at most `count` sockets are open. The kernel sends no notification of that, so
    /// this polls.
    pub(crate) async fn until_sockets(&self, count: usize) {
        within("its sockets to close", async {
            while self.sockets() > count {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Returns every log line so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("a signal to the gateway");
    }

    /// Waits for the end of the process. Afterwards its log is complete.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let status = within("the gateway to end", self.child.wait()).await.expect("its status");
        // Both readers end when both pipes have been read to their end.
        within("the end of the log", async { while self.log.changed().await.is_ok() {} }).await;
        status
    }
}

impl Drop for Gateway {
    /// Prints the log when a test fails.
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

/// Changes `command` to run through `wrapper`, which must exec its arguments.
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

/// Gives every user all permissions for the file at `path`.
pub(crate) fn open_to_all(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o777)).expect("permissions");
}

/// Reads lines continuously, because a full pipe would block the process.
fn collect(pipe: impl AsyncRead + Unpin + Send + 'static, log: watch::Sender<Vec<String>>) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(pipe).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            log.send_modify(|log| log.push(line));
        }
    });
}
