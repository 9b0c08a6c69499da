//! Zuul's own gateway, from the Zuul in `target/venv`.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Running;
use crate::lab::Lab;
use crate::process::Process;

impl Running {
    /// One gateway, in the zone of the executor.
    pub(super) async fn zuul_gateway(&mut self) -> Result<()> {
        let zone = format!("zone = {}\n", self.zuul()?.zone);
        self.address = self.start_zuul_gateway("gateway", &zone).await?;
        Ok(())
    }

    /// One for clients, and one in the zone of the executor.
    pub(super) async fn zuul_gateway_pair(&mut self, lab: &Lab) -> Result<()> {
        let tls = lab.identity.zuul_conf();
        let zone = &self.zuul()?.zone;
        let inner = format!("zone = {zone}\n{tls}");
        let outer = format!("{tls}tls_client_only = true\n");
        self.start_zuul_gateway("inner", &inner).await?;
        self.address = self.start_zuul_gateway("outer", &outer).await?;
        Ok(())
    }

    async fn start_zuul_gateway(&mut self, name: &str, lines: &str) -> Result<SocketAddr> {
        let config = self.file(&format!("{name}.conf"));
        let system = &self.zuul()?.system;
        let text = format!(
            "[zookeeper]\nhosts = {}\n{}session_timeout = 30\n\
             [fingergw]\nlisten_address = 127.0.0.1\nport = 0\nhostname = localhost\n\
             command_socket = {}\n{lines}",
            system.hosts(),
            system.zookeeper.identity.zuul_conf(),
            self.file(&format!("{name}.socket")).display(),
        );
        fs::write(&config, text)?;
        let before: Vec<String> =
            system.entries().await.into_iter().map(|entry| entry.name).collect();
        let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin");
        let mut command = Command::new(venv.join("python"));
        // -B: write no compiled files.
        command.arg("-B").arg(venv.join("zuul-fingergw")).args(["-f", "-c"]).arg(&config);
        // Zuul's programs import GitPython, which otherwise needs git.
        command.env("GIT_PYTHON_REFRESH", "quiet");
        let process = Process::start(name, &command, &self.file(&format!("{name}.log")))?;
        let is_new = |entry: &crate::support::system::Entry| {
            !before.contains(&entry.name) && entry.content["state"] == "running"
        };
        let entries = system.until("Zuul's gateway to run", |all| all.iter().any(is_new)).await;
        self.processes.push(process);
        let entry = entries.iter().find(|entry| is_new(entry)).context("its entry")?;
        let port = entry.content["public_port"].as_u64().context("its port")?;
        Ok((Ipv4Addr::LOCALHOST, u16::try_from(port)?).into())
    }
}
