//! The role of an executor's log streamer: a process of this program, so that it can be stopped.
//! Zuul's own log streamer, which cannot send generated logs, is tested in `tests/interop`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, Command};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::log::{self, End, LINE, Log};
use crate::support::executor::reset;

/// The time limit of a request.
const PATIENCE: Duration = Duration::from_secs(60);

/// The driver's handle of an executor, which ends when the driver ends.
pub(crate) struct Executor {
    child: Child,
    _stdin: ChildStdin,
    pub(crate) port: u16,
}

impl Executor {
    pub(crate) async fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("executor")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting an executor")?;
        let stdin = child.stdin.take().context("stdin is piped")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("stdout is piped")?)
            .read_line(&mut line)
            .await?;
        let address: SocketAddr = line.trim().parse().context("the executor's address")?;
        Ok(Self { child, _stdin: stdin, port: address.port() })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.expect("it runs"), signal).expect("a signal to the executor");
    }
}

/// Listens, prints the address, and serves until the driver ends.
pub(crate) fn run() -> Result<()> {
    log::pattern();
    Runtime::new()?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("{}", listener.local_addr()?);
        let mut ended = [0];
        let mut driver = tokio::io::stdin();
        tokio::select! {
            _ = driver.read(&mut ended) => Ok(()),
            failed = accept(listener) => failed,
        }
    })
}

async fn accept(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        // The client reports a connection that fails.
        tokio::spawn(answer(stream));
    }
}

async fn answer(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    timeout(PATIENCE, stream.read_line(&mut request)).await??;
    let Some(log) = Log::of(request.trim_end()) else { return Ok(()) };
    if log.end == End::Empty {
        return Ok(());
    }
    if log.pace == 0 {
        stream.write_all(log.bytes()).await?;
    } else {
        let pause = Duration::from_millis(log.pace.into());
        let mut nothing = [0; 64];
        for line in log.bytes().chunks(LINE) {
            stream.write_all(line).await?;
            // A client that closes has left, as for Zuul's log streamer.
            if let Ok(gone) = timeout(pause, stream.read(&mut nothing)).await {
                gone?;
                return Ok(());
            }
        }
    }
    if log.end == End::Reset {
        reset(stream.get_ref());
    }
    Ok(())
}
