//! The daemon as a good guest of its machine: whom it runs as, its command socket. Some of it needs
//! root, as starting on port 79 does.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
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

/// Asks the gateway of `config` how it stands, in JSON.
async fn status(config: &Path) -> Value {
    let Outcome { code, stdout, stderr } = program(&["status", "--json"], config).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    serde_json::from_str(&stdout).expect("JSON")
}

/// Asks until it stands as `wanted` says: nothing tells when it does.
async fn status_until(config: &Path, wanted: impl Fn(&Value) -> bool) -> Value {
    within("the status", async {
        loop {
            let status = status(config).await;
            if wanted(&status) {
                return status;
            }
        }
    })
    .await
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("a file").permissions().mode()
}

#[tokio::test]
async fn the_status_lists_streams() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let builder = Builder::new(&system).zone("west").tls(&identity).listeners(&["", "tls = true"]);
    let builder = builder.control();
    let config = builder.write();
    let gateway = builder.ready().await;
    assert_eq!(status(&config).await["streams"], json!([]));

    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut log = executor.accept().await;
    log.write(b"first\n").await;
    client.expect(b"first\n").await;
    let now = status_until(&config, |status| status["streams"][0]["bytes"] == 6).await;
    let stream = &now["streams"][0];
    let peer = client.stream.local_addr().expect("an address").to_string();
    assert_eq!((&stream["peer"], &stream["build"]), (&json!(peer), &json!(build)));
    let route = format!("executor {}", executor.address);
    assert_eq!(stream["route"], json!(route));
    assert!(stream["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{now}");
    let [plain, tls] = [0, 1].map(|index| gateway.addresses[index].to_string());
    let listeners = json!([
        { "address": plain, "tls": false, "advertised": false },
        { "address": tls, "tls": true, "advertised": true },
    ]);
    let name = &system.entries().await[0].name;
    let expected = json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": gateway.pid().as_raw_nonzero().get(),
        "state": "running", "hostname": "localhost", "zone": "west", "listeners": listeners,
        "zookeeper": format!("registered as {name}"), "streams": [stream],
    });
    assert_eq!(now, expected);

    let Outcome { code, stdout, .. } = program(&["status"], &config).await;
    assert_eq!(code, Some(0));
    let lines: Vec<_> = stdout.lines().collect();
    let pid = gateway.pid();
    let head =
        format!("zuul-fingergw {} on localhost, pid {pid}: running", env!("CARGO_PKG_VERSION"));
    let doors = format!("zone west; plain {plain}, TLS {tls}");
    let zookeeper = format!("ZooKeeper: registered as {name}");
    assert_eq!(lines[..4], [&head, &doors, &zookeeper, "1 stream:"]);
    let end = format!(" s, 6 bytes of {build} from {route} to {peer}");
    assert!(lines.len() == 5 && lines[4].ends_with(&end), "{stdout}");

    log.finish().await;
    assert_eq!(client.text().await, "");
    status_until(&config, |status| status["streams"] == json!([])).await;
}

#[tokio::test]
async fn stopped_by_command() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut log = executor.accept().await;
    log.write(b"before\n").await;
    client.expect(b"before\n").await;

    // Twice: unlike a second signal, a second command changes nothing.
    for _ in 0..2 {
        let Outcome { code, stdout, stderr } = program(&["stop"], &config).await;
        assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "", ""));
    }
    system.until("the entry to be gone", <[Entry]>::is_empty).await;
    assert_eq!(status(&config).await["state"], "stopping");
    log.write(b"after\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "after\n");
    drop(client);
    assert!(gateway.exit().await.success());
    assert!(!socket.exists(), "the socket is removed");
    for command in ["stop", "status"] {
        let Outcome { code, stdout, stderr } = program(&[command], &config).await;
        assert_eq!((code, stdout.as_str()), (Some(1), ""));
        let fault = format!("{}: nobody listens", socket.display());
        assert!(stderr.starts_with(&fault), "{stderr}");
    }
}

/// Sends `bytes` to the socket, closes this side, and returns the answer.
async fn say(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.expect("a connection");
    // What is too long is not read to its end.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    // Unread bytes make the end of a unix stream a reset, behind the answer.
    let _ = within("an answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8(answer).expect("UTF-8")
}

#[tokio::test]
async fn nonsense_to_the_command_socket() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    let _gateway = builder.ready().await;
    assert_eq!(mode(&socket) & 0o777, 0o600);
    let unknown = "unknown command; known are stop, status and status [\"json\"]\n";
    let cut = "a request is one line of at most 1024 bytes\n";
    let long = [b'x'; 100_000];
    let cases: [(&[u8], &str); 8] = [
        (b"", cut),
        (b"stop", cut),
        (&long, cut),
        (b"\n", unknown),
        (b"_stop\n", unknown),
        (b"reload\n", unknown),
        (b"stop [1]\n", "behind the command comes a JSON list of strings, or nothing\n"),
        (b"\xff\x00\n", "a request is UTF-8 text\n"),
    ];
    for (bytes, answer) in cases {
        assert_eq!(
            say(&socket, bytes).await,
            answer,
            "{}",
            bytes[..bytes.len().min(20)].escape_ascii()
        );
    }
    // As many as there are places, and they say nothing: they are sent away.
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(UnixStream::connect(&socket).await.expect("a connection"));
    }
    assert_eq!(status(&config).await["state"], "running");
}

#[tokio::test]
async fn a_command_socket_that_cannot_be_made() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).control();
    let occupied = builder.directory().join("occupied");
    fs::write(&occupied, "dear").expect("a file");
    builder.control = Some(occupied.clone());
    let config = builder.write();
    let mut gateway = builder.ready().await;
    let warned = |line: &str| line.contains(" WARN ") && line.contains("no command socket");
    let line = gateway.logged("a warning", warned).await;
    assert!(line.contains(&*occupied.to_string_lossy()), "{line}");
    assert_eq!(gateway.log().iter().filter(|line| warned(line)).count(), 1);
    assert_eq!(program(&["status"], &config).await.code, Some(1));
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    assert_eq!(fs::read_to_string(&occupied).expect("the file"), "dear");

    let mut builder = Builder::new(&system).control();
    builder.control = Some(builder.directory().join("missing/control.socket"));
    let mut gateway = builder.ready().await;
    gateway.logged("a warning", warned).await;
}

#[tokio::test]
async fn a_command_socket_that_was_left_behind() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket"));
    assert!(program(&["status"], &config).await.stderr.contains("nobody listens"));
    let mut first = builder.ready().await;
    assert_eq!(status(&config).await["pid"], first.pid().as_raw_nonzero().get());

    // Another one takes the place; the first leaves it alone when it goes.
    let mut builder = Builder::new(&system);
    builder.control = Some(socket.clone());
    let mut second = builder.ready().await;
    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    assert_eq!(status(&config).await["pid"], second.pid().as_raw_nonzero().get());
    second.signal(Signal::TERM);
    second.exit().await;
    assert!(!socket.exists());
}

/// The socket is the user's, and nobody else gets in but root.
#[tokio::test]
async fn only_the_owner_and_root_may_command() {
    let system = System::new().await;
    let builder = nobody(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let binary = builder.directory().join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that everybody can run");
    let _gateway = builder.ready().await;
    assert_eq!(mode(&socket) & 0o777, 0o600);
    let mut codes = Vec::new();
    for user in ["0", "65534", "12345"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", user, "--clear-groups", "--"]).arg(&binary);
        let outcome = run(command.args(["status", "-c"]).arg(&config)).await;
        let refused = outcome.stderr.contains("only root and the gateway's own user");
        codes.push((outcome.code, refused));
    }
    assert_eq!(codes, [(Some(0), false), (Some(0), false), (Some(1), true)]);
}

#[tokio::test]
async fn commands_without_a_command_socket() {
    let system = System::new().await;
    let builder = Builder::new(&system);
    let Outcome { code, stderr, .. } = program(&["stop"], &builder.write()).await;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("sets no command socket"), "{stderr}");
}
