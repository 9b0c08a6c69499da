//! Zuul's own `zuul-fingergw`, run as a program.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;
use tokio::sync::watch;

use crate::script::{python, venv};
use crate::support::system::System;
use crate::support::within;
use crate::zuul_conf::ZuulConf;

pub(crate) struct ZuulGateway {
    /// Killed when this is dropped.
    child: Child,
    pub(crate) address: SocketAddr,
    log: watch::Receiver<Vec<String>>,
    /// Name of its registry entry.
    pub(crate) entry: String,
}

impl ZuulGateway {
    /// Starts the program in the foreground and waits until it listens and is registered as
    /// running. `conf` must contain port 0, and no other gateway may start in `system` at the same
    /// time.
    pub(crate) async fn start(system: &System, conf: &ZuulConf) -> Self {
        let others: Vec<_> = system.entries().await.into_iter().map(|entry| entry.name).collect();
        let mut child = python()
            .arg(venv().join("zuul-fingergw"))
            // -d: only the debug log contains the route of a stream.
            .args(["-f", "-d", "-c"])
            .arg(conf.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("real Zuul in target/venv (tests/run puts it there)");
        let (sender, log) = watch::channel(Vec::new());
        collect(child.stdout.take().expect("stdout is piped"), sender.clone());
        collect(child.stderr.take().expect("stderr is piped"), sender);
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let mut zuul_gateway = Self { child, address, log, entry: String::new() };
        zuul_gateway.logged("Finger gateway is started").await;
        let entry =
            system.entries().await.into_iter().find(|entry| {
                entry.content["version"] == "14.3.0" && !others.contains(&entry.name)
            });
        let entry = entry.expect("its entry");
        let port = entry.content["public_port"].as_u64().expect("its port");
        zuul_gateway.address.set_port(u16::try_from(port).expect("a port"));
        zuul_gateway.entry = entry.name;
        zuul_gateway
    }

    /// Waits for a log line with this text.
    pub(crate) async fn logged(&mut self, text: &str) {
        self.logged_nth(text, 0).await;
    }

    /// Waits for the log line with this text that comes after `before` others.
    pub(crate) async fn logged_nth(&mut self, text: &str, before: usize) -> String {
        let find =
            |log: &Vec<String>| log.iter().filter(|line| line.contains(text)).nth(before).cloned();
        let log = within(text, self.log.wait_for(|log| find(log).is_some())).await;
        find(&log.expect("the process runs")).expect("it was there")
    }

    /// Waits until the program knows that the gateway with this entry runs.
    pub(crate) async fn knows_running(&mut self, entry: &str) {
        let known = |line: &String| {
            line.contains(&format!("Component fingergw {entry} updated"))
                && line.contains("'state': 'running'")
        };
        let log = within(entry, self.log.wait_for(|log| log.iter().any(known))).await;
        log.expect("the process runs");
    }

    /// Returns every log line so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }

    /// Stops the program as a service manager does and waits for its exit: it serves its streams
    /// until they end.
    pub(crate) async fn stop(mut self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
        kill_process(pid, Signal::TERM).expect("a signal");
        let status = within("Zuul's gateway to exit", self.child.wait()).await.expect("its status");
        assert!(status.success(), "{status}");
    }

    /// Kills the program: its entry stays until its session has expired.
    pub(crate) async fn kill(mut self) {
        within("Zuul's gateway to exit", self.child.kill()).await.expect("its status");
    }
}

impl Drop for ZuulGateway {
    /// Prints the log when a test fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Zuul's zuul-fingergw at {}", self.address);
            for line in self.log.borrow().iter() {
                eprintln!("{line}");
            }
        }
    }
}

/// Reads lines continuously, because a full pipe would block the program.
fn collect(pipe: impl AsyncRead + Unpin + Send + 'static, log: watch::Sender<Vec<String>>) {
    let mut lines = BufReader::new(pipe).lines();
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            log.send_modify(|log| log.push(line));
        }
    });
}
