//! The daemon as a good guest of its machine: whom it runs as. Most of it needs root, as starting
//! on port 79 does.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tokio::process::{Child, Command};

use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{BINARY, Builder};
use crate::support::system::{Entry, System};
use crate::support::within;

/// What a process has said, and how it ended.
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs a command to its end.
async fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = within("the program to end", output).await.expect("a program");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// Runs the program with `arguments` and a configuration.
async fn program(arguments: &[&str], config: &Path) -> Outcome {
    run(Command::new(BINARY).args(arguments).arg("-c").arg(config)).await
}

fn as_root() {
    assert!(geteuid().is_root(), "run the tests as root: this one is about giving it up");
}

/// Who the threads of a process are: the lines of /proc/PID/task/TID/status that say so.
fn identities(pid: Pid) -> BTreeSet<String> {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    let tasks: Vec<_> = fs::read_dir(tasks).expect("its threads").flatten().collect();
    assert!(tasks.len() > 1, "the runtime has threads");
    let status = |path: &Path| fs::read_to_string(path.join("status")).unwrap_or_default();
    let all: String = tasks.iter().map(|task| status(&task.path())).collect();
    let about = |line: &&str| ["Uid:", "Gid:", "Groups:"].iter().any(|key| line.starts_with(key));
    let line = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    all.lines().filter(about).map(line).collect()
}

fn nobody(system: &System) -> Builder {
    as_root();
    let identity = system.zookeeper.authority.identity("localhost");
    let mut builder = Builder::new(system).tls(&identity).listeners(&["", "tls = true"]);
    builder.root = "user = \"nobody\"".to_owned();
    builder.readable_by_all()
}

/// Starts `binary` by setpriv(1), as who `options` say, and waits until it is registered.
async fn start_as(system: &System, options: &[&str], binary: &Path, config: &Path) -> (Child, Pid) {
    let mut command = Command::new("setpriv");
    command.args(options).arg("--").arg(binary).args(["-f", "-c"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().expect("setpriv");
    let running = |all: &[Entry]| all.iter().any(|entry| entry.content["state"] == "running");
    system.until("it to run", running).await;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
    (child, pid)
}

/// Stops it and returns its log.
async fn stopped((child, pid): (Child, Pid)) -> String {
    kill_process(pid, Signal::TERM).expect("a signal");
    let output = within("its end", child.wait_with_output()).await.expect("its output");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn root_is_given_up() {
    let system = System::new().await;
    let builder = nobody(&system);
    let config = builder.write();
    let started = start_as(&system, &["--groups", "4,24"], BINARY.as_ref(), &config).await;
    let expected = ["Gid: 65534 65534 65534 65534", "Groups:", "Uid: 65534 65534 65534 65534"];
    assert_eq!(identities(started.1).iter().collect::<Vec<_>>(), expected);
    let log = stopped(started).await;
    assert_eq!(
        log.matches("root given up user=\"nobody\" uid=65534 gid=65534").count(),
        1,
        "{log}"
    );
}

/// What reads files and dials after it, works.
#[tokio::test]
async fn streams_without_root() {
    let system = System::new().await;
    let gateway = nobody(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

#[tokio::test]
async fn without_a_user_nothing_is_given_up() {
    as_root();
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    assert!(identities(gateway.pid()).contains("Uid: 0 0 0 0"));
}

#[tokio::test]
async fn keys_that_only_root_can_read() {
    let system = System::new().await;
    let builder = nobody(&system);
    let tls = builder.tls.clone().expect("certificates");
    let keys = [&tls.key, &builder.zookeeper_identity.key];
    for key in keys {
        fs::set_permissions(key, Permissions::from_mode(0o600)).expect("permissions");
    }
    let config = builder.write();
    // `check` stays who it is, and root can read all.
    assert_eq!(program(&["check"], &config).await.code, Some(0));
    let Outcome { code, stdout, stderr } = program(&["-f"], &config).await;
    assert_eq!(code, Some(78), "{stdout}{stderr}");
    for key in keys {
        let fault = format!("{}: cannot be read by user nobody: Permission denied", key.display());
        assert_eq!(stdout.matches(&fault).count(), 1, "{fault}: {stdout}");
    }
}

#[tokio::test]
async fn a_user_that_does_not_exist() {
    let system = System::new().await;
    let mut builder = nobody(&system);
    builder.root = "user = \"no-such-user\"".to_owned();
    let config = builder.write();
    for arguments in [["check"], ["-f"]] {
        let Outcome { code, stdout, stderr } = program(&arguments, &config).await;
        assert_eq!((code, stdout.as_str()), (Some(78), ""), "{stderr}");
        assert!(stderr.starts_with("user = no-such-user: there is no such user"), "{stderr}");
    }
}

/// Whoever is not root cannot become anybody else, and need not: in a container its number may
/// have no name at all.
#[tokio::test]
async fn another_user_than_root_stays_who_it_is() {
    let system = System::new().await;
    let mut builder = nobody(&system);
    builder.root = "user = \"no-such-user\"".to_owned();
    let (directory, config) = (builder.directory().to_owned(), builder.write());
    let binary = directory.join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that everybody can run");
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let options = ["--reuid", "12345", "--regid", "12345", "--clear-groups"];
    let started = start_as(&system, &options, &binary, &config).await;
    assert!(identities(started.1).contains("Uid: 12345 12345 12345 12345"));
    let log = stopped(started).await;
    let ignored = "not started as root: user is ignored user=\"no-such-user\"";
    assert_eq!(log.matches(ignored).count(), 1, "{log}");
}
