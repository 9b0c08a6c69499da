//! haproxy in `mode tcp`: a plain relay without lookups.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;

use super::Running;
use crate::lab::Lab;
use crate::process::Process;

/// How long it may take to listen.
const START: Duration = Duration::from_secs(10);

impl Running {
    /// One haproxy between client and executor.
    pub(super) async fn haproxy(&mut self, threads: u8, splice: bool) -> Result<()> {
        let option = if splice { "option splice-auto" } else { "" };
        let server = format!("server executor {}", self.executor);
        self.address = self.start_haproxy("haproxy", threads, option, "", &server).await?;
        Ok(())
    }

    /// One with a plain listener, which connects over TLS to one in front of the executor.
    pub(super) async fn haproxy_pair(&mut self, resume: bool, lab: &Lab) -> Result<()> {
        let identity = &lab.identity;
        let (both, ca) = (identity.both.display(), identity.ca.display());
        let tickets = if resume { "" } else { "no-tls-tickets" };
        let bind = format!("ssl crt {both} ca-file {ca} verify required {tickets}");
        let server = format!("server executor {}", self.executor);
        let inner = self.start_haproxy("inner", 2, "", &bind, &server).await?;
        let reuse = if resume { "" } else { "no-ssl-reuse" };
        let server = format!(
            "server inner {inner} ssl crt {both} ca-file {ca} verify required \
             verifyhost localhost sni str(localhost) {reuse}"
        );
        self.address = self.start_haproxy("outer", 2, "", "", &server).await?;
        Ok(())
    }

    async fn start_haproxy(
        &mut self,
        name: &str,
        threads: u8,
        option: &str,
        bind: &str,
        server: &str,
    ) -> Result<SocketAddr> {
        let (address, _reservation) = reserve()?;
        let config = self.file(&format!("{name}.cfg"));
        // Limits that permit 9,000 streams, within 20,000 descriptors.
        let text = format!(
            "global\n    maxconn 9500\n    maxpipes 200\n    nbthread {threads}\n\
             defaults\n    mode tcp\n    timeout connect 30s\n    timeout client 1h\n    \
             timeout server 1h\n    {option}\n\
             listen relay\n    bind {address} backlog 4096 {bind}\n    {server}\n"
        );
        fs::write(&config, text)?;
        let mut command = Command::new("haproxy");
        command.args(["-db", "-f"]).arg(&config);
        let mut process = Process::start(name, &command, &self.file(&format!("{name}.log")))?;
        // haproxy does not report when it listens.
        let start = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            process.still_runs()?;
            ensure!(start.elapsed() < START, "haproxy does not listen: {}", process.output());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.processes.push(process);
        Ok(address)
    }
}

/// Reserves a free address: sockets with SO_REUSEADDR may share one as long as only one of them
/// listens (socket(7)).
fn reserve() -> Result<(SocketAddr, Socket)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let address = socket.local_addr()?.as_socket();
    Ok((address.ok_or_else(|| anyhow::anyhow!("an IP address"))?, socket))
}
