//! Upstream's own `zuul-fingergw`, run as a program.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;
use tokio::sync::watch;

use crate::script::{python, venv};
use crate::support::system::System;
use crate::support::within;
use crate::zuul_conf::ZuulConf;

pub(crate) struct Upstream {
    /// Killed when this is dropped.
    _child: Child,
    pub(crate) address: SocketAddr,
    log: watch::Receiver<Vec<String>>,
}

impl Upstream {
    /// Starts it in the foreground and waits until it listens and is registered as running.
    /// `conf` has to give it port 0, and it has to be the first of its kind in `system`.
    pub(crate) async fn start(system: &System, conf: &ZuulConf) -> Self {
        let mut child = python()
            .arg(venv().join("zuul-fingergw"))
            // -d: only the debug log tells which way a stream took.
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
        let mut upstream = Self { _child: child, address: (Ipv4Addr::LOCALHOST, 0).into(), log };
        upstream.logged("Finger gateway is started").await;
        let entries = system.entries().await;
        let entry = entries.iter().find(|entry| entry.content["version"] == "14.3.0");
        let port = entry.expect("its entry").content["public_port"].as_u64().expect("its port");
        upstream.address.set_port(u16::try_from(port).expect("a port"));
        upstream
    }

    /// Waits for a log line with this text.
    pub(crate) async fn logged(&mut self, text: &str) {
        let wanted = |log: &Vec<String>| log.iter().any(|line| line.contains(text));
        within(text, self.log.wait_for(wanted)).await.expect("upstream runs");
    }
}

impl Drop for Upstream {
    /// Shows what happened when a test fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- upstream's zuul-fingergw at {}", self.address);
            for line in self.log.borrow().iter() {
                eprintln!("{line}");
            }
        }
    }
}

/// Reads lines all the time: a full pipe would stop the program.
fn collect(pipe: impl AsyncRead + Unpin + Send + 'static, log: watch::Sender<Vec<String>>) {
    let mut lines = BufReader::new(pipe).lines();
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            log.send_modify(|log| log.push(line));
        }
    });
}
