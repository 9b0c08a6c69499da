//! The built binary as a command: its output and exit status.

use std::path::Path;
use std::process::Stdio;

use rustix::process::geteuid;
use serde_json::Value;
use tokio::process::Command;

use super::gateway::{BINARY, Builder};
use super::system::System;
use super::within;

/// Output and exit status of a process.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end.
pub(crate) async fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = within("the program to end", output).await.expect("a program");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// Runs the program with `arguments` and a configuration.
pub(crate) async fn program(arguments: &[&str], config: &Path) -> Outcome {
    run(Command::new(BINARY).args(arguments).arg("-c").arg(config)).await
}

/// Returns the JSON output of `zuul-fingergw resolve`.
pub(crate) async fn resolve(config: &Path, build: &str) -> Value {
    let Outcome { stdout, stderr, .. } = program(&["resolve", "--json", build], config).await;
    assert_eq!(stderr, "");
    serde_json::from_str(&stdout).expect("JSON")
}

pub(crate) fn as_root() {
    assert!(geteuid().is_root(), "run the tests as root: this test is about dropping privileges");
}

/// Builder of a gateway that drops root privileges.
pub(crate) fn unprivileged(system: &System) -> Builder {
    as_root();
    let identity = system.zookeeper.authority.identity("localhost");
    let mut builder = Builder::new(system).tls(&identity).listeners(&["", "tls = true"]);
    builder.root = "user = \"nobody\"".to_owned();
    builder.readable_by_all()
}
