//! Shared by the test binaries: a real ZooKeeper with TLS, certificates created at run time, the
//! gateway as a process, Zuul's data, and executors and clients whose behavior a test controls.

pub(crate) mod admin;
pub(crate) mod certificates;
pub(crate) mod checkout;
pub(crate) mod client;
pub(crate) mod container;
pub(crate) mod continuous_clients;
pub(crate) mod debian_root;
pub(crate) mod executor;
pub(crate) mod gateway;
pub(crate) mod haproxy;
pub(crate) mod limits;
pub(crate) mod logs;
pub(crate) mod namespace;
pub(crate) mod page_commands;
pub(crate) mod pages;
pub(crate) mod process;
pub(crate) mod program;
pub(crate) mod prometheus;
pub(crate) mod proxy;
pub(crate) mod proxy_header;
pub(crate) mod registration_failures;
pub(crate) mod reloadable;
pub(crate) mod running_stream;
pub(crate) mod sandbox;
pub(crate) mod static_program;
pub(crate) mod system;
pub(crate) mod tls;
pub(crate) mod zones;
pub(crate) mod zookeeper;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Far longer than anything takes in these tests; a longer wait is a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Any connection.
pub(crate) trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin {}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Duplex for S {}

/// Waits for `event`, but at most for [`DEADLINE`].
pub(crate) async fn within<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Runs a command that must succeed, and returns its output.
pub(crate) fn tool(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error} (see tests/run)"));
    let Output { status, stdout, stderr } = output;
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout
}

/// Writes `input` to a command and waits for its end. The command must read all of it before it
/// writes much.
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn();
    let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error} (see tests/run)"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(input.as_bytes()).expect("it reads everything");
    drop(stdin);
    child.wait_with_output().expect("its status")
}

/// Reports that this test is skipped, directly to stderr: the harness hides output of passing
/// tests.
pub(crate) fn report_skipped(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}
