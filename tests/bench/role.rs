//! The roles beside the driver: executor and client, each this program again as a process of its
//! own, so that what they cost is not counted for anybody else.
//!
//! A role gets jobs on stdin and answers on stdout, a JSON text a line, one after the other. It ends
//! when its stdin does: with the driver, however that ends.

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

    /// What it says next. A job that failed is an error, and does no harm to later ones.
    pub(crate) async fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = timeout(PATIENCE, self.stdout.next_line()).await;
        let line = line.with_context(|| format!("the {} says nothing", self.name))?;
        let Some(line) = line? else {
            bail!("the {} has ended: {}", self.name, self.child.wait().await?);
        };
        let answer: Result<T, String> = serde_json::from_str(&line)
            .with_context(|| format!("the {} said {line:?}", self.name))?;
        answer.map_err(|error| anyhow!("the {}: {error}", self.name))
    }

    /// Gives it a job whose answer is fetched later.
    pub(crate) async fn tell(&mut self, job: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(job)? + "\n";
        self.stdin.write_all(line.as_bytes()).await.with_context(|| format!("the {}", self.name))
    }

    /// Gives it a job and waits for the answer.
    pub(crate) async fn ask<T: DeserializeOwned>(&mut self, job: &impl Serialize) -> Result<T> {
        self.tell(job).await?;
        self.answer().await
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

    /// The next job; `None` when there will be no more.
    pub(crate) async fn job<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Some(line) = self.stdin.next_line().await? else { return Ok(None) };
        Ok(Some(serde_json::from_str(&line).with_context(|| format!("a job: {line:?}"))?))
    }
}

/// Answers the driver.
pub(crate) fn say<T: Serialize>(answer: Result<T>) -> Result<()> {
    let answer = answer.map_err(|error| format!("{error:#}"));
    println!("{}", serde_json::to_string(&answer)?);
    Ok(())
}

/// What a role or the driver runs on, with so many workers.
pub(crate) fn runtime(workers: usize) -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    Ok(builder.worker_threads(workers).enable_all().build()?)
}
