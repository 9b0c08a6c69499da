//! The command lines of Zuul's program and ours compared: what Zuul's accepts ours accepts as well,
//! with the same exit status and the same output stream.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::script::{Script, python, venv};
use crate::support::gateway::BINARY;
use crate::support::system::System;
use crate::support::within;
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

/// Result of one run of a program.
#[derive(Debug)]
struct Outcome {
    status: i64,
    stdout: String,
    stderr: String,
}

/// Both programs with their configuration in one directory.
struct Programs {
    home: TempDir,
    theirs: Script,
}

impl Programs {
    fn new() -> Self {
        let home = TempDir::new().expect("a home");
        let theirs = Script::start("command_line.py", [home.path()]);
        Self { home, theirs }
    }

    async fn theirs(&mut self, arguments: &[&str]) -> Outcome {
        let arguments = json!(arguments);
        let answer = self.theirs.ask(&format!("run {arguments}")).await;
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        Outcome {
            status: answer[0].as_i64().expect("a status"),
            stdout: text(&answer[1]),
            stderr: text(&answer[2]),
        }
    }

    async fn ours(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(BINARY);
        command.args(arguments).env("HOME", self.home.path());
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
        let output = within("the program to end", output).await.expect("the built binary");
        Outcome {
            status: output.status.code().expect("a status").into(),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

/// The requested text, on standard output.
const PRINTED: (i64, i64) = (0, 0);
/// The command line is invalid.
const REFUSED: (i64, i64) = (2, 2);
/// The configuration cannot be found: a documented difference.
const NO_CONFIGURATION: (i64, i64) = (1, 78);
/// No process listens on the command socket.
const NOT_RUNNING: (i64, i64) = (1, 1);

#[tokio::test]
async fn command_lines_of_zuuls_gateway_are_accepted() {
    let at_work = Path::new("/etc/zuul");
    assert!(!at_work.exists(), "this test would stop the gateway of {}", at_work.display());
    let mut programs = Programs::new();
    let home = programs.home.path();
    let socket = home.join("no.socket");
    let files = "tls_cert = /c\ntls_key = /k\ntls_ca = /a\n";
    let text = format!(
        "[zookeeper]\nhosts = zk:2281\n{files}[fingergw]\ncommand_socket = {}\n",
        socket.display()
    );
    fs::write(home.join("zuul.conf"), text).expect("zuul.conf");

    let cases: [(&[&str], _); 30] = [
        (&["--version"], PRINTED),
        (&["--vers"], PRINTED),
        (&["--v"], PRINTED),
        (&["-fd", "--version"], PRINTED),
        (&["-c", "/missing", "--version"], PRINTED),
        (&["--version", "--frobnicate"], PRINTED),
        (&["-h"], PRINTED),
        (&["-hf"], PRINTED),
        (&["--help"], PRINTED),
        (&["--he"], PRINTED),
        (&["stop", "-h"], PRINTED),
        (&["stop", "--help"], PRINTED),
        (&["-f", "-c", "/missing"], NO_CONFIGURATION),
        (&["-c", "/missing"], NO_CONFIGURATION),
        (&["-c/missing", "-f"], NO_CONFIGURATION),
        (&["-c=/missing", "-f"], NO_CONFIGURATION),
        (&["-dfc/missing"], NO_CONFIGURATION),
        (&["-d", "-f", "-d", "-f", "-c", "~/zuul.conf", "-c", "/missing"], NO_CONFIGURATION),
        (&["-c", "/missing", "stop"], NO_CONFIGURATION),
        (&["-f", "-d", "-c", "~/zuul.conf", "stop"], NOT_RUNNING),
        (&["-c", "", "stop"], NOT_RUNNING),
        (&["stop"], NOT_RUNNING),
        (&["-c"], REFUSED),
        (&["-c", "-f"], REFUSED),
        (&["-x"], REFUSED),
        (&["--config", "/missing"], REFUSED),
        (&["--version=1"], REFUSED),
        (&["frobnicate"], REFUSED),
        (&["sto"], REFUSED),
        (&["stop", "now"], REFUSED),
    ];
    for (arguments, statuses) in cases {
        let theirs = programs.theirs(arguments).await;
        let ours = programs.ours(arguments).await;
        let found = (theirs.status, ours.status);
        assert_eq!(found, statuses, "{arguments:?}: theirs {theirs:?}, ours {ours:?}");
        for Outcome { status, stdout, stderr } in [&theirs, &ours] {
            let streams = (!stdout.is_empty(), !stderr.is_empty());
            assert_eq!(streams, (*status == 0, *status != 0), "{arguments:?}: {stdout}{stderr}");
        }
    }

    // Beyond Zuul's: our commands, and options after them.
    for arguments in [["stop", "-c", "~/zuul.conf"], ["status", "-c", "~/zuul.conf"]] {
        assert_eq!(programs.theirs(&arguments).await.status, 2, "{arguments:?}");
        assert_eq!(programs.ours(&arguments).await.status, 1, "{arguments:?}");
    }
}

/// The text differs, but the last word is the version, as in the registry.
#[tokio::test]
async fn version_ends_with_the_version_number() {
    let mut programs = Programs::new();
    let theirs = programs.theirs(&["--version"]).await;
    let ours = programs.ours(&["--version"]).await;
    assert_eq!((theirs.status, ours.status), (0, 0));
    assert_eq!((theirs.stderr.as_str(), ours.stderr.as_str()), ("", ""));
    assert_eq!(theirs.stdout, "Zuul version: 14.3.0\n");
    assert_eq!(ours.stdout, concat!("zuul-fingergw ", env!("CARGO_PKG_VERSION"), "\n"));
    for (Outcome { stdout, .. }, version) in [(theirs, "14.3.0"), (ours, env!("CARGO_PKG_VERSION"))]
    {
        assert_eq!(stdout.split_whitespace().last(), Some(version));
    }
}

/// The `stop` command of either program stops either gateway.
#[tokio::test]
async fn each_program_stops_the_other() {
    let system = System::new().await;
    let conf = ZuulConf::gateway(&system, "west", "");
    let mut theirs = ZuulGateway::start(&system, &conf).await;
    let mut status = Command::new(BINARY);
    status.arg("status").arg("-c").arg(conf.path()).stdin(Stdio::null()).kill_on_drop(true);
    let asked = within("status", status.output()).await.expect("the program");
    let stderr = String::from_utf8_lossy(&asked.stderr);
    assert!(asked.status.code() == Some(1) && stderr.contains("Zuul's own gateway"), "{stderr}");
    let stopped = stop(Command::new(BINARY), conf.path()).await;
    assert_eq!(stopped, Some(0));
    theirs.logged("Finger gateway is stopped").await;

    let conf = ZuulConf::gateway(&system, "west", "");
    let mut ours = conf.ours().await;
    let mut program = python();
    program.arg(venv().join("zuul-fingergw"));
    assert_eq!(stop(program, conf.path()).await, Some(0));
    assert!(ours.exit().await.success());
}

async fn stop(mut program: Command, conf: &Path) -> Option<i32> {
    program.arg("-c").arg(conf).arg("stop").stdin(Stdio::null()).kill_on_drop(true);
    within("stop", program.status()).await.expect("the program").code()
}
