//! A measured process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use rustix::process::{Signal, kill_process};

/// How long a process may take to end after a signal.
const ENDING: Duration = Duration::from_secs(30);

/// A process that is killed when this is dropped, and by the kernel when the driver ends.
pub(crate) struct Process {
    name: String,
    child: Child,
    /// Its standard output and standard error.
    log: PathBuf,
}

/// The resources that processes use.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// CPU seconds since the start.
    pub(crate) cpu: f64,
    /// Resident KiB, shared pages included.
    pub(crate) resident: f64,
    /// Private KiB.
    pub(crate) private: f64,
    pub(crate) threads: f64,
    pub(crate) descriptors: f64,
}

impl Process {
    /// Starts `command` with its output in the file `log`.
    pub(crate) fn start(name: &str, command: &Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| log.display().to_string())?;
        // setpriv executes the program, so it has the same process ID.
        let mut by = Command::new("setpriv");
        by.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => by.env(key, value),
                None => by.env_remove(key),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            by.current_dir(directory);
        }
        let child = by
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("setpriv (Debian's util-linux)")?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its output until now.
    pub(crate) fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// # Errors
    /// The process has ended; the error has the end of its output.
    pub(crate) fn still_runs(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let output = self.output();
            let tail: Vec<&str> = output.lines().rev().take(20).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("{} has ended, {status}:\n{}", self.name, tail.join("\n"));
        }
        Ok(())
    }

    /// Sends `signal` and waits until the process has ended.
    pub(crate) async fn end(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(self.pid()?, signal)?;
        }
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < ENDING, "{} does not end", self.name);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn pid(&self) -> Result<rustix::process::Pid> {
        rustix::process::Pid::from_raw(self.id().cast_signed()).context("a pid")
    }

    /// The resources that it uses now.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let pid = self.id();
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("{}: {path}", self.name))
        };
        let memory = read("smaps_rollup")?;
        let status = read("status")?;
        Ok(Usage {
            cpu: self.cpu()?,
            resident: field(&memory, "Rss:"),
            private: field(&memory, "Private_Clean:") + field(&memory, "Private_Dirty:"),
            threads: field(&status, "Threads:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64,
        })
    }

    /// CPU seconds of all its threads, ended ones included, with nanosecond resolution.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(self.id().cast_signed()))
            .with_context(|| format!("{}: its CPU clock", self.name))?;
        let time = clock_gettime(clock)?;
        Ok(Duration::from(time).as_secs_f64())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number after `name` in a file of /proc.
fn field(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0.0)
}
