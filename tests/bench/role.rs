//! The roles besides the driver: executor and client, each a process of this program, so that its
//! CPU time is accounted to no other process.
//!
//! A role reads jobs from standard input and writes replies to standard output, one line of JSON
//! each. It ends at the end of its input, which is when the driver ends.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, Stdin};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// Longer than any job takes.
const PATIENCE: Duration = Duration::from_secs(600);

/// A role as the driver sees it.
pub(crate) struct Role {
    name: &'static str,
    /// Killed when this is dropped.
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Role {
    /// Starts this program as `name`.
    pub(crate) fn start(name: &'static str) -> Result<Self> {
        let program = std::env::current_exe().context("this program's path")?;
        let mut child = Command::new(program)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting the {name}"))?;
        let stdin = child.stdin.take().context("stdin is piped")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
        Ok(Self { name, child, stdin, stdout })
    }

    /// Receives the next reply.
    ///
    /// # Errors
    /// The job has failed. Later jobs are not affected.
    pub(crate) async fn reply<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = timeout(PATIENCE, self.stdout.next_line()).await;
        let line = line.with_context(|| format!("the {} does not reply", self.name))?;
        let Some(line) = line? else {
            bail!("the {} has ended: {}", self.name, self.child.wait().await?);
        };
        let reply: Result<T, String> = serde_json::from_str(&line)
            .with_context(|| format!("the {} replied {line:?}", self.name))?;
        reply.map_err(|error| anyhow!("the {}: {error}", self.name))
    }

    /// Sends a job, whose reply is received later.
    pub(crate) async fn send(&mut self, job: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(job)? + "\n";
        self.stdin.write_all(line.as_bytes()).await.with_context(|| format!("the {}", self.name))
    }

    /// Sends a job and waits for the reply.
    pub(crate) async fn run<T: DeserializeOwned>(&mut self, job: &impl Serialize) -> Result<T> {
        self.send(job).await?;
        self.reply().await
    }
}

/// The driver as a role sees it.
pub(crate) struct Driver {
    stdin: Lines<BufReader<Stdin>>,
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self { stdin: BufReader::new(tokio::io::stdin()).lines() }
    }

    /// The next job; `None` at the end.
    pub(crate) async fn job<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Some(line) = self.stdin.next_line().await? else { return Ok(None) };
        Ok(Some(serde_json::from_str(&line).with_context(|| format!("a job: {line:?}"))?))
    }
}

/// Sends a reply to the driver.
pub(crate) fn reply<T: Serialize>(reply: Result<T>) -> Result<()> {
    let reply = reply.map_err(|error| format!("{error:#}"));
    println!("{}", serde_json::to_string(&reply)?);
    Ok(())
}

/// The runtime of a role or the driver.
pub(crate) fn runtime(workers: usize) -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    Ok(builder.worker_threads(workers).enable_all().build()?)
}
