//! This gateway in its default configuration, with its log in a file. All clients have one address,
//! which is therefore exempt from limits.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::net::UnixDatagram;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval};

use super::{Running, StartOptions};
use crate::lab::Lab;
use crate::process::Process;
use crate::support::gateway::Builder;

/// The time limit for the registration; ten times as long under valgrind.
const START: Duration = Duration::from_secs(20);

/// What lives as long as a gateway: its files, and the task that reads its service manager socket.
pub(crate) struct Kept {
    _builder: Builder,
    listening: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Running {
    /// One gateway, in the zone of the executor.
    pub(super) async fn ours(
        &mut self,
        which: usize,
        options: &StartOptions,
        lab: &Lab,
    ) -> Result<()> {
        let zuul = self.zuul()?;
        let builder = Builder::new(&zuul.system).zone(&zuul.zone);
        self.address = self.start_ours("gateway", which, builder, options, lab).await?;
        Ok(())
    }

    /// One for clients, and one in the zone of the executor.
    pub(super) async fn ours_pair(
        &mut self,
        which: usize,
        options: &StartOptions,
        lab: &Lab,
    ) -> Result<()> {
        let zuul = self.zuul()?;
        let inner = Builder::new(&zuul.system).zone(&zuul.zone).tls(&lab.identity);
        let outer = Builder::new(&zuul.system).tls(&lab.identity);
        self.start_ours("inner", which, inner.listeners(&["tls = true"]), options, lab).await?;
        self.address = self.start_ours("outer", which, outer, options, lab).await?;
        Ok(())
    }

    async fn start_ours(
        &mut self,
        name: &str,
        which: usize,
        builder: Builder,
        options: &StartOptions,
        lab: &Lab,
    ) -> Result<SocketAddr> {
        let builder = builder.limits("exempt_networks = [\"127.0.0.1\"]");
        let config = builder.write();
        let socket = builder.directory().join("notify");
        let notices = UnixDatagram::bind(&socket)?;
        let program = lab.gateways.get(which).context("a gateway's program")?;
        let mut command = match options.wrapper.split_first() {
            None => Command::new(program),
            Some((wrapper, args)) => {
                let mut command = Command::new(wrapper);
                command.args(args).arg(program);
                command
            }
        };
        command.args(["-f", "-c"]).arg(config).env("NOTIFY_SOCKET", &socket);
        let mut process = Process::start(name, &command, &self.file(&format!("{name}.log")))?;
        let patience = START * if options.wrapper.is_empty() { 1 } else { 10 };
        let address = ready(&notices, &mut process, patience).await?;
        // Unread messages would block the gateway when the buffer is full.
        let listening =
            tokio::spawn(async move { while notices.recv(&mut [0; 4096]).await.is_ok() {} });
        self._keep.push(Kept { _builder: builder, listening });
        self.processes.push(process);
        Ok(address)
    }
}

/// Waits for READY=1 and returns the address of the status before it.
async fn ready(
    notices: &UnixDatagram,
    process: &mut Process,
    patience: Duration,
) -> Result<SocketAddr> {
    let deadline = Instant::now() + patience;
    let mut check = interval(Duration::from_millis(100));
    let (mut address, mut buffer) = (None, vec![0; 4096]);
    loop {
        let count = tokio::select! {
            received = notices.recv(&mut buffer) => received?,
            _ = check.tick() => {
                process.still_runs()?;
                if Instant::now() > deadline {
                    bail!("the gateway is not ready:\n{}", process.output());
                }
                continue;
            }
        };
        let text = String::from_utf8_lossy(&buffer[..count]);
        for line in text.lines() {
            match line.split_once('=') {
                Some(("STATUS", status)) => {
                    let mut words = status.split([' ', ',', ';']);
                    address = words.find_map(|word| word.parse().ok()).or(address);
                }
                Some(("READY", "1")) => return address.context("an address in its status"),
                _ => {}
            }
        }
    }
}
