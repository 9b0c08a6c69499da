//! A Python script of this directory, run by the Python with real Zuul, and the protocol between
//! test and script: a command a line, a response a line. See `lines.py` for the script's side.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::support::checkout::{installed, top};
use crate::support::within;

pub(crate) struct Script {
    name: String,
    /// Killed when this is dropped.
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: NamedTempFile,
    /// Messages received while waiting for a response.
    unread: VecDeque<Value>,
}

impl Script {
    pub(crate) fn start<'a>(name: &str, args: impl IntoIterator<Item = &'a Path>) -> Self {
        let stderr = NamedTempFile::new().expect("a file for the script's stderr");
        let mut child = python()
            .arg(top().join("tests/interop").join(name))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.reopen().expect("the file just made"))
            .spawn()
            .expect("real Zuul in target/venv (tests/run puts it there)");
        Self {
            name: name.to_owned(),
            stdin: child.stdin.take().expect("stdin is piped"),
            stdout: BufReader::new(child.stdout.take().expect("stdout is piped")).lines(),
            child,
            stderr,
            unread: VecDeque::new(),
        }
    }

    /// Returns the next message.
    pub(crate) async fn next(&mut self) -> Value {
        match self.unread.pop_front() {
            Some(message) => message,
            None => self.read().await,
        }
    }

    /// Sends a command, waits until it is done, and returns its result.
    pub(crate) async fn ask(&mut self, command: &str) -> Value {
        let line = format!("{command}\n");
        self.stdin.write_all(line.as_bytes()).await.expect("a script that takes commands");
        loop {
            let mut message = self.read().await;
            if let Some(error) = message.get("error") {
                panic!("{}: {command}: {error}", self.name);
            }
            if message.get("done").is_some() {
                return message["result"].take();
            }
            self.unread.push_back(message);
        }
    }

    /// Waits until the script's stderr contains `text`, and returns all of it. There is no
    /// notification of writes to a file, so this polls.
    pub(crate) async fn logs(&self, text: &str) -> String {
        within(text, async {
            loop {
                let log = fs::read_to_string(self.stderr.path()).expect("its stderr");
                if log.contains(text) {
                    return log;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    /// Kills the script.
    pub(crate) async fn kill(mut self) {
        within("the script to end", self.child.kill()).await.expect("its status");
    }

    async fn read(&mut self) -> Value {
        let line = within(&self.name, self.stdout.next_line()).await.expect("its stdout");
        let line = line.unwrap_or_else(|| panic!("{} has ended", self.name));
        serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{} printed {line:?}: {error}", self.name))
    }
}

impl Drop for Script {
    /// Prints the script's stderr when a test fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.stderr.path()).unwrap_or_default();
            eprintln!("--- stderr of {}\n{log}", self.name);
        }
    }
}

/// Returns the interpreter that has Zuul.
pub(crate) fn python() -> Command {
    let mut command = Command::new(venv().join("python"));
    // -B: no compiled files in the source tree.
    command.arg("-B").kill_on_drop(true);
    // Zuul's programs import GitPython, which otherwise requires git.
    command.env("GIT_PYTHON_REFRESH", "quiet");
    command
}

/// Returns the directory with Zuul's programs.
pub(crate) fn venv() -> PathBuf {
    installed("venv/bin")
}

/// Reads an exposition; prints each family's name and type, and the labels of each exemplar.
const READ_EXPOSITION: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    print(family.name, family.type, len(family.samples))
    for sample in family.samples:
        if sample.exemplar:
            print('exemplar', sample.name, sample.exemplar.labels)
";

/// Returns what Prometheus' Python client reads from an exposition.
pub(crate) async fn parse_exposition(exposition: &str) -> String {
    let mut reader = python();
    reader.args(["-c", READ_EXPOSITION]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.spawn().expect("real Zuul in target/venv (tests/run puts it there)");
    let mut stdin = reader.stdin.take().expect("stdin is piped");
    stdin.write_all(exposition.as_bytes()).await.expect("it reads everything");
    drop(stdin);
    let output = within("the Python client", reader.wait_with_output()).await.expect("its answer");
    assert!(output.status.success(), "refused:\n{exposition}");
    String::from_utf8(output.stdout).expect("UTF-8")
}
