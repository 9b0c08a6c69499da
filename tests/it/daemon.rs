//! The daemon on its machine: its user, its command socket, how it detaches. Some of these tests
//! need root, as a start on port 79 does.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::support::certificates::Identity;
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{BINARY, Builder, open_to_all};
use crate::support::program::{Outcome, as_root, program, run, unprivileged};
use crate::support::proxy::Proxy;
use crate::support::system::{Entry, System};
use crate::support::{DEADLINE, within};

/// Returns the user and group IDs of the process's threads: the lines of /proc/PID/task/TID/status
/// with them.
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

/// Starts `binary` through setpriv(1) with `options`, and waits until it is registered.
async fn start_as(system: &System, options: &[&str], binary: &Path, config: &Path) -> (Child, Pid) {
    let mut command = Command::new("setpriv");
    command.args(options).arg("--").arg(binary).args(["-f", "-c"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().expect("setpriv");
    let running = |all: &[Entry]| all.iter().any(|entry| entry.content["state"] == "running");
    system.until("the gateway to run", running).await;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
    (child, pid)
}

/// Stops the gateway and returns its log.
async fn stopped((child, pid): (Child, Pid)) -> String {
    kill_process(pid, Signal::TERM).expect("a signal");
    let output = within("the gateway to exit", child.wait_with_output()).await.expect("its output");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn root_privileges_are_dropped() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let config = builder.write();
    let started = start_as(&system, &["--groups", "4,24"], BINARY.as_ref(), &config).await;
    let expected = ["Gid: 65534 65534 65534 65534", "Groups:", "Uid: 65534 65534 65534 65534"];
    assert_eq!(identities(started.1).iter().collect::<Vec<_>>(), expected);
    let log = stopped(started).await;
    assert_eq!(
        log.matches("root privileges dropped user=\"nobody\" uid=65534 gid=65534").count(),
        1,
        "{log}"
    );
}

/// Reading files and connecting work after privileges have been dropped.
#[tokio::test]
async fn streams_without_root() {
    let system = System::new().await;
    let gateway = unprivileged(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

#[tokio::test]
async fn privileges_are_kept_without_a_user() {
    as_root();
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    assert!(identities(gateway.pid()).contains("Uid: 0 0 0 0"));
}

#[tokio::test]
async fn files_that_the_user_cannot_read_are_errors() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let tls = builder.tls.clone().expect("certificates");
    // CA certificates are not secret, but some sites protect them.
    let keys = [&tls.key, &tls.ca, &builder.zookeeper_identity.key, &builder.zookeeper_identity.ca];
    for key in keys {
        fs::set_permissions(key, Permissions::from_mode(0o600)).expect("permissions");
    }
    let config = builder.write();
    let Outcome { code, stdout, stderr } = program(&["-f"], &config).await;
    assert_eq!(code, Some(78), "{stdout}{stderr}");
    for key in keys {
        let error = format!("{}: cannot be read by user nobody: Permission denied", key.display());
        assert_eq!(stdout.matches(&error).count(), 1, "{error}: {stdout}");
    }
}

#[tokio::test]
async fn unknown_user_is_an_error() {
    let system = System::new().await;
    let mut builder = unprivileged(&system);
    builder.root = "user = \"no-such-user\"".to_owned();
    let config = builder.write();
    for arguments in [["check"], ["-f"]] {
        let Outcome { code, stdout, stderr } = program(&arguments, &config).await;
        assert_eq!((code, stdout.as_str()), (Some(78), ""), "{stderr}");
        let error = format!("{}: user = no-such-user: there is no such user", config.display());
        assert!(stderr.starts_with(&error), "{stderr}");
    }
}

/// A process that is not root cannot change its user and need not: in a container, its user ID may
/// have no name.
#[tokio::test]
async fn user_is_ignored_when_not_started_as_root() {
    let system = System::new().await;
    let mut builder = unprivileged(&system);
    builder.root = "user = \"no-such-user\"".to_owned();
    let (directory, config) = (builder.directory().to_owned(), builder.write());
    let binary = directory.join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that every user can run");
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let options = ["--reuid", "12345", "--regid", "12345", "--clear-groups"];
    let started = start_as(&system, &options, &binary, &config).await;
    assert!(identities(started.1).contains("Uid: 12345 12345 12345 12345"));
    let log = stopped(started).await;
    let ignored = "not started as root: user is ignored user=\"no-such-user\"";
    assert_eq!(log.matches(ignored).count(), 1, "{log}");
}

/// Returns the JSON status of the gateway of `config`.
async fn status(config: &Path) -> Value {
    let Outcome { code, stdout, stderr } = program(&["status", "--json"], config).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    serde_json::from_str(&stdout).expect("JSON")
}

/// Polls the status until it satisfies `wanted`: the gateway sends no notification of changes.
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
async fn status_lists_streams() {
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
    let (host, port) = (executor.address.ip().to_string(), executor.address.port());
    let hop = json!({"kind": "executor", "host": host, "port": port, "zone": null, "tls": false});
    assert_eq!(stream["hop"], hop);
    assert!(stream["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{now}");
    let [plain, tls] = [0, 1].map(|index| gateway.addresses[index].to_string());
    let listeners = json!([
        { "address": plain, "tls": false, "advertised": false },
        { "address": tls, "tls": true, "advertised": true },
    ]);
    let name = &system.entries().await[0].name;
    let zookeeper = json!({
        "hosts": system.hosts(), "connected": true, "registration": format!("registered as {name}"),
        "entry": name, "disconnected_seconds": null, "disconnected_reason": null,
    });
    let certificate = |role, identity: &Identity, subject| {
        let file = &identity.cert;
        json!({"role": role, "file": file, "subject": subject, "not_after": "4096-01-01T00:00:00Z"})
    };
    let expected = json!({
        "status": "ok", "version": env!("CARGO_PKG_VERSION"), "pid": gateway.pid().as_raw_nonzero().get(),
        "state": "running", "hostname": "localhost", "zone": "west", "configuration": config,
        "uptime_seconds": now["uptime_seconds"], "listeners": listeners, "admin": null,
        "zookeeper": zookeeper,
        "certificates": [
            certificate("gateway", &identity, "CN=localhost"),
            certificate("zookeeper", &system.zookeeper.identity, "CN=client"),
        ],
        "connections": {"open": 1, "limit": now["connections"]["limit"]}, "gateways": [],
        "streams": [stream],
    });
    assert_eq!(now, expected);
    assert!(now["uptime_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{now}");
    assert!(now["connections"]["limit"].as_u64().is_some_and(|limit| limit > 100), "{now}");

    let Outcome { code, stdout, .. } = program(&["status"], &config).await;
    assert_eq!(code, Some(0));
    let lines: Vec<_> = stdout.lines().collect();
    let pid = gateway.pid();
    let head =
        format!("zuul-fingergw {} on localhost, pid {pid}: running", env!("CARGO_PKG_VERSION"));
    let doors = format!("zone west; plain {plain}, TLS {tls}");
    let zookeeper = format!("ZooKeeper: registered as {name}");
    assert_eq!(lines[..3], [&head, &doors, &zookeeper]);
    let up = lines[3].starts_with("up for ") && lines[3].ends_with(&*config.to_string_lossy());
    assert!(up && lines[4].starts_with("connections: 1 of at most "), "{stdout}");
    let certificate = |role: &str, identity: &Identity| {
        let file = identity.cert.display();
        format!("certificate ({role}): {file}, valid until 4096-01-01T00:00:00Z")
    };
    let certificates =
        [certificate("gateway", &identity), certificate("zookeeper", &system.zookeeper.identity)];
    assert_eq!(lines[5..7], certificates);
    assert_eq!(lines[7..9], ["no gateway of another zone is registered", "1 stream:"]);
    let end = format!(" s, 6 bytes of {build} from {route} to {peer}");
    assert!(lines.len() == 10 && lines[9].ends_with(&end), "{stdout}");

    log.finish().await;
    assert_eq!(client.text().await, "");
    status_until(&config, |status| status["streams"] == json!([])).await;
}

/// The kernel reports their addresses as `::ffff:127.0.0.1`.
#[tokio::test]
async fn ipv4_clients_of_a_dual_stack_listener_are_shown_as_ipv4() {
    let system = System::new().await;
    let builder = Builder::new(&system).listeners(&["address = \"[::]:0\""]).control();
    let config = builder.write();
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let address = ([127, 0, 0, 1], gateway.port()).into();
    let mut client = Client::ask(address, &build).await;
    let stream = executor.begin(&mut client).await;
    let peer = client.stream.local_addr().expect("an address").to_string();
    assert_eq!(status(&config).await["streams"][0]["peer"], json!(peer));
    stream.finish().await;
    let logged =
        |line: &str| line.contains("stream ended") && line.contains(&format!("peer={peer} "));
    gateway.logged("its line", logged).await;
}

#[tokio::test]
async fn status_lists_gateways_of_other_zones() {
    let system = System::new().await;
    let builder = Builder::new(&system).zone("west").control();
    let config = builder.write();
    let _gateway = builder.ready().await;
    system.put_gateway(Some("east"), Some(7979), true, "running").await;
    system.put_gateway(Some("north"), Some(7980), true, "stopped").await;
    let now = status_until(&config, |status| status["gateways"] != json!([])).await;
    let hop = "gateway localhost:7979 of zone east (TLS)";
    let expected = json!([{
        "kind": "gateway", "host": "localhost", "port": 7979, "zone": "east", "tls": true,
        "state": "untried", "failures": 0, "retry_seconds": null, "last_failure": null,
    }]);
    assert_eq!(now["gateways"], expected);
    let Outcome { stdout, .. } = program(&["status"], &config).await;
    let lines = format!("\ngateways of other zones:\n  {hop}: not tried yet\nno streams\n");
    assert!(stdout.ends_with(&lines), "{stdout}");
}

#[tokio::test]
async fn status_reports_why_zookeeper_cannot_be_reached() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    proxy.refuse();
    let mut builder = Builder::new(&system).control();
    builder.hosts = system.hosts_via(&proxy);
    let config = builder.write();
    let _gateway = builder.start().await;
    let disconnected = |status: &Value| status["zookeeper"]["disconnected_reason"].is_string();
    let now = status_until(&config, disconnected).await;
    let zookeeper = &now["zookeeper"];
    assert_eq!((&zookeeper["connected"], &zookeeper["entry"]), (&json!(false), &Value::Null));
    assert!(zookeeper["disconnected_seconds"].is_number(), "{now}");
    let reason = zookeeper["disconnected_reason"].as_str().expect("a text");
    assert!(reason.starts_with(&format!("{}: ", proxy.address)), "{reason}");
    let Outcome { stdout, .. } = program(&["status"], &config).await;
    let line = stdout.lines().find(|line| line.starts_with("ZooKeeper: ")).expect("its line");
    let cause = format!(" s: {}: ", proxy.address);
    assert!(line.starts_with("ZooKeeper: not connected for ") && line.contains(&cause), "{line}");
}

/// Zuul's programs log a stack trace of each thread and continue.
#[tokio::test]
async fn sigusr2_logs_the_status() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).limits("grace = \"1h\"").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let log = executor.begin(&mut client).await;

    let pid = gateway.pid();
    for (times, state) in [(1, "running"), (2, "stopping")] {
        gateway.signal(Signal::USR2);
        let head = format!(" on localhost, pid {pid}: {state}");
        gateway.logged("the state", |line| line.contains(" INFO ") && line.ends_with(&head)).await;
        let stream = format!(" of {build} from executor {} to ", executor.address);
        gateway.logged_times("the stream", times, |line| line.contains(&stream)).await;
        if times == 1 {
            gateway.signal(Signal::TERM);
            system.until("the entry to be removed", <[Entry]>::is_empty).await;
        }
    }
    log.finish().await;
    assert_eq!(client.text().await, "");
    drop(client);
    assert!(gateway.exit().await.success());
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
    let mut log = executor.begin(&mut client).await;

    // Twice: unlike a second signal, a second command changes nothing.
    for _ in 0..2 {
        let Outcome { code, stdout, stderr } = program(&["stop"], &config).await;
        let message = format!("{}: stop requested; the gateway ends after its", socket.display());
        assert!(code == Some(0) && stdout.starts_with(&message), "{stdout}");
        assert_eq!(stderr, "");
    }
    system.until("the entry to be removed", <[Entry]>::is_empty).await;
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
        let error = format!("{}: no gateway answers", socket.display());
        assert!(stderr.starts_with(&error), "{stderr}");
        assert!(stderr.contains("the path was changed after its start"), "{stderr}");
    }
}

/// Sends `bytes` to the socket, closes the sending side, and returns the response.
async fn send_to_socket(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.expect("a connection");
    // The gateway does not read an overlong request to its end.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    // Because of the unread bytes, a unix stream ends with a reset after the response.
    let _ = within("an answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8(answer).expect("UTF-8")
}

#[tokio::test]
async fn invalid_requests_on_the_command_socket_are_rejected() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    let _gateway = builder.ready().await;
    assert_eq!(mode(&socket) & 0o777, 0o600);
    let unknown = "unknown command; known are stop, reload, status and resolve [\"UUID\"]";
    let cut = "a request is one line of at most 1024 bytes";
    let long = [b'x'; 100_000];
    let cases: [(&[u8], &str); 8] = [
        (b"", cut),
        (b"stop", cut),
        (&long, cut),
        (b"\n", unknown),
        (b"_stop\n", unknown),
        (b"pause\n", unknown),
        (b"stop [1]\n", "expected a JSON array of strings after the command"),
        (b"\xff\x00\n", "a request is UTF-8 text"),
    ];
    for (bytes, error) in cases {
        let reply: Value =
            serde_json::from_str(&send_to_socket(&socket, bytes).await).expect("JSON");
        let shown = bytes[..bytes.len().min(20)].escape_ascii();
        assert_eq!(reply, json!({"status": "invalid_request", "error": error}), "{shown}");
    }
    // Silent connections up to the limit; the gateway closes them to accept new ones.
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(UnixStream::connect(&socket).await.expect("a connection"));
    }
    assert_eq!(status(&config).await["state"], "running");
}

#[tokio::test]
async fn command_socket_that_cannot_be_created_is_an_error() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).control();
    let occupied = builder.directory().join("occupied");
    fs::write(&occupied, "dear").expect("a file");
    builder.control = Some(occupied.clone());
    let config = builder.write();
    let mut gateway = builder.ready().await;
    let warned =
        |line: &str| line.contains(" WARN ") && line.contains("cannot create the command socket");
    let line = gateway.logged("a warning", warned).await;
    assert!(line.contains(&*occupied.to_string_lossy()), "{line}");
    assert_eq!(gateway.log().iter().filter(|line| warned(line)).count(), 1);
    assert_eq!(program(&["status"], &config).await.code, Some(1));
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    assert_eq!(fs::read_to_string(&occupied).expect("the file"), "dear");

    // A missing directory is reported before the start.
    let mut builder = Builder::new(&system).control();
    let missing = builder.directory().join("missing");
    builder.control = Some(missing.join("control.socket"));
    let config = builder.write();
    for arguments in [&["check"][..], &[]] {
        let Outcome { code, stdout, stderr } = program(arguments, &config).await;
        let output = if arguments.is_empty() { &stdout } else { &stderr };
        let error = format!("the directory {} does not exist; create it", missing.display());
        assert!(code == Some(78) && output.contains(&error), "{arguments:?}: {stdout}{stderr}");
    }
    assert!(!missing.exists());
}

/// For systems without a service manager that creates it: `/run` is empty after a boot.
#[tokio::test]
async fn directory_of_the_command_socket_below_run_is_created() {
    let system = System::new().await;
    for root in ["/run", "/var/run"] {
        let machine = Machine::new(&system, &format!("command_socket = {root}/own/socket"));
        let config = fs::read_to_string(&machine.config).expect("zuul.conf");
        fs::write(&machine.config, format!("{config}user = nobody\n")).expect("zuul.conf");
        for directory in ["run/zuul", "log/zuul"] {
            let directory = machine.directory.path().join(directory);
            chown(&directory, Some(65534), None).expect("an owner who may write there");
        }
        assert_eq!(machine.run(&["check"]).await.code, Some(0));
        let made = machine.directory.path().join("run/own");
        assert!(!made.exists(), "check changes nothing");
        let daemon = machine.start().await;
        let metadata = fs::metadata(&made).expect("the directory");
        let owner = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        assert_eq!(owner, (0o750, 65534, 65534));
        assert!(made.join("socket").exists());
        let Outcome { code, stderr, .. } = machine.run(&["stop"]).await;
        assert_eq!(code, Some(0), "{stderr}");
        daemon.ends().await;
    }
}

#[tokio::test]
async fn stale_command_socket_is_replaced() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket"));
    assert!(program(&["status"], &config).await.stderr.contains("no gateway answers"));
    let mut first = builder.ready().await;
    assert_eq!(status(&config).await["pid"], first.pid().as_raw_nonzero().get());

    // A second gateway logs a warning and does not touch the socket, neither while it runs nor at
    // its exit.
    let mut builder = Builder::new(&system);
    builder.control = Some(socket.clone());
    let mut second = builder.ready().await;
    let warned =
        |line: &str| line.contains(" WARN ") && line.contains("cannot create the command socket");
    let line = second.logged("a warning", warned).await;
    let path = socket.display().to_string();
    assert!(line.contains(&path) && line.contains("another process listens on it"), "{line}");
    let pid = first.pid().as_raw_nonzero().get();
    assert_eq!(status(&config).await["pid"], pid);
    second.signal(Signal::TERM);
    second.exit().await;
    assert_eq!(status(&config).await["pid"], pid);
    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    assert!(!socket.exists());
}

/// The socket belongs to the user, and only this user and root may connect.
#[tokio::test]
async fn command_socket_is_for_owner_and_root_only() {
    let system = System::new().await;
    let builder = unprivileged(&system).control();
    let (config, socket) = (builder.write(), builder.control.clone().expect("a path"));
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let binary = builder.directory().join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that every user can run");
    let _gateway = builder.ready().await;
    assert_eq!(mode(&socket) & 0o777, 0o600);
    let mut codes = Vec::new();
    for user in ["0", "65534", "12345"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", user, "--clear-groups", "--"]).arg(&binary);
        let outcome = run(command.args(["status", "-c"]).arg(&config)).await;
        let refused = outcome.stderr.contains("only root and the user that the gateway runs as");
        codes.push((outcome.code, refused));
    }
    assert_eq!(codes, [(Some(0), false), (Some(0), false), (Some(1), true)]);
}

#[tokio::test]
async fn commands_without_a_command_socket_fail() {
    let system = System::new().await;
    let builder = Builder::new(&system);
    let Outcome { code, stderr, .. } = program(&["stop"], &builder.write()).await;
    assert_eq!(code, Some(1));
    assert!(stderr.contains("sets no command socket"), "{stderr}");
}

/// A directory tree for daemonized processes: paths that `zuul.conf` does not set have Zuul's
/// defaults below /run, /var/lib and /var/log, which are directories of the test there.
struct Machine {
    directory: TempDir,
    config: PathBuf,
}

/// Mounts the test's directories, and its user database if there is one, and runs the rest of the
/// command line.
const MOUNTS: &str = r#"mount --bind "$0/run" /run && mount --bind "$0/lib" /var/lib &&
    mount --bind "$0/log" /var/log && { [ ! -e "$0/passwd" ] || mount --bind "$0/passwd" /etc/passwd; } &&
    exec "$@""#;

impl Machine {
    /// With these additional lines in `[fingergw]`.
    fn new(system: &System, lines: &str) -> Self {
        as_root();
        let directory = TempDir::new().expect("a directory");
        open_to_all(directory.path());
        for name in ["run/zuul", "lib/zuul", "log/zuul"] {
            fs::create_dir_all(directory.path().join(name)).expect("a directory");
        }
        let copy = |name: &str, pem: &Path| {
            let path = directory.path().join(name);
            fs::copy(pem, &path).expect("a copy");
            open_to_all(&path);
            path.display().to_string()
        };
        let Identity { cert, key, ca, .. } = &system.zookeeper.identity;
        let [cert, key, ca] = [copy("cert", cert), copy("key", key), copy("ca", ca)];
        fs::set_permissions(&key, Permissions::from_mode(0o640)).expect("permissions");
        chown(&key, None, Some(65534)).expect("a group that may read the key");
        let hosts = system.hosts();
        let text = format!(
            "[zookeeper]\nhosts = {hosts}\ntls_cert = {cert}\ntls_key = {key}\ntls_ca = {ca}\n\
             [fingergw]\nlisten_address = 127.0.0.1\nport = 0\nhostname = localhost\n{lines}\n"
        );
        let config = directory.path().join("zuul.conf");
        fs::write(&config, text).expect("zuul.conf");
        Self { directory, config }
    }

    /// Path of the configuration relative to the parent directory.
    fn relative_config(&self) -> &Path {
        let above = self.directory.path().parent().expect("a directory above");
        self.config.strip_prefix(above).expect("it lies below")
    }

    /// Runs the program with `arguments` until the parent process exits.
    async fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with(arguments, &self.config).await
    }

    /// The same in the parent directory, with the configuration under another path.
    async fn run_with(&self, arguments: &[&str], config: &Path) -> Outcome {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", MOUNTS]).arg(self.directory.path());
        command.current_dir(self.directory.path().parent().expect("a directory above"));
        run(command.arg(BINARY).args(arguments).arg("-c").arg(config)).await
    }

    /// Starts a daemon.
    async fn start(&self) -> Daemon {
        self.start_with(&self.config).await
    }

    async fn start_with(&self, config: &Path) -> Daemon {
        let Outcome { code, stdout, stderr } = self.run_with(&[], config).await;
        let output = (code, stdout.as_str(), stderr.as_str());
        assert_eq!(output, (Some(0), "", ""), "{}", self.log());
        let number = fs::read_to_string(self.pid_file()).expect("the pid file is there already");
        let number = number.strip_suffix('\n').expect("a line").parse().expect("a number");
        let pid = Pid::from_raw(number).expect("a pid");
        let ended = pidfd_open(pid, PidfdFlags::empty()).expect("the process is there");
        Daemon { pid, ended: Arc::new(ended) }
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.path().join("run/zuul/fingergw.pid")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("lib/zuul/fingergw.socket")
    }

    /// Waits until the log contains exactly so many starts; a separate thread writes the log.
    async fn started(&self, times: usize) {
        let starts = || self.log().matches(" starts").count();
        within("the log", async {
            while starts() < times {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(starts(), times, "{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log/zuul/fingergw.log")).unwrap_or_default()
    }
}

impl Drop for Machine {
    /// Ends every process of the test, also those of which the test has no handle.
    fn drop(&mut self) {
        let ours = [self.config.as_path(), self.relative_config()];
        let ours = ours.map(|path| path.as_os_str().as_bytes());
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let number = process.file_name().to_str().and_then(|name| name.parse().ok());
            if command.split(|byte| *byte == 0).any(|word| ours.contains(&word))
                && let Some(pid) = number.and_then(Pid::from_raw)
            {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// A daemonized process.
struct Daemon {
    pid: Pid,
    ended: Arc<OwnedFd>,
}

impl Daemon {
    /// Waits for the process to exit. It is not a child of the test, so this waits on a pidfd.
    async fn ends(&self) {
        let ended = Arc::clone(&self.ended);
        let deadline = Timespec { tv_sec: DEADLINE.as_secs().cast_signed(), tv_nsec: 0 };
        let wait = move || poll(&mut [PollFd::new(&*ended, PollFlags::IN)], Some(&deadline));
        let ended = tokio::task::spawn_blocking(wait).await.expect("a thread that waits");
        assert_eq!(ended, Ok(1), "waited for the daemon to end");
    }

    fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.ended, signal).expect("a signal");
    }

    /// Returns the value of `key` in /proc/PID/status.
    fn status(&self, key: &str) -> String {
        let status = format!("/proc/{}/status", self.pid.as_raw_nonzero());
        let status = fs::read_to_string(status).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("its line");
        line.trim().to_owned()
    }

    fn link(&self, name: &str) -> PathBuf {
        let link = format!("/proc/{}/{name}", self.pid.as_raw_nonzero());
        fs::read_link(link).expect("a link")
    }
}

/// Returns the session of the process `pid` from /proc/PID/stat. Not by getsid(2) through rustix,
/// which rejects the result 0; that is ours if the session leader lives in another PID namespace.
fn session(pid: &str) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its state");
    let (_, behind_name) = stat.rsplit_once(") ").expect("the end of its name");
    behind_name.split(' ').nth(3).expect("its session").to_owned()
}

#[tokio::test]
async fn daemonized_gateway_is_stopped_by_command() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let daemon = machine.start().await;
    for descriptor in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(daemon.link(descriptor), Path::new("/dev/null"), "{descriptor}");
    }
    assert_eq!(daemon.link("cwd"), Path::new("/"));
    assert_eq!(daemon.status("Umask:"), "0022");
    let its = session(&daemon.pid.to_string());
    assert_ne!(its, session("self"), "the daemon has its own session");
    assert_ne!(its, daemon.pid.to_string(), "the daemon is not the session leader");

    // Only one daemon runs, whichever user starts another.
    let Outcome { code, stdout, stderr } = machine.run(&[]).await;
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    let holder = format!("process {} has locked it", daemon.pid);
    assert!(stderr.contains("/var/run/zuul/fingergw.pid") && stderr.contains(&holder), "{stderr}");
    machine.started(1).await;

    let status = machine.run(&["status", "--json"]).await;
    let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
    assert_eq!(status["pid"], json!(daemon.pid.as_raw_nonzero().get()));
    assert_eq!(machine.run(&["stop"]).await.code, Some(0));
    daemon.ends().await;
    assert!(!machine.pid_file().exists() && !machine.socket().exists());
    assert!(machine.log().ends_with(" stopped\n"), "{}", machine.log());
    assert_eq!(system.entries().await.len(), 0);

    // The existing log is appended to.
    let daemon = machine.start().await;
    machine.started(2).await;
    daemon.signal(Signal::TERM);
    daemon.ends().await;
}

#[tokio::test]
async fn signal_stops_a_daemonized_gateway() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let daemon = machine.start().await;
    let running = |all: &[Entry]| all.iter().any(|entry| entry.content["state"] == "running");
    system.until("the gateway to run", running).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let port = system.entries().await[0].content["public_port"].as_u64().expect("a port");
    let port = u16::try_from(port).expect("a port");
    let mut client = Client::ask((Ipv4Addr::LOCALHOST, port).into(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");

    daemon.signal(Signal::TERM);
    system.until("the entry to be removed", <[Entry]>::is_empty).await;
    daemon.ends().await;
    assert!(!machine.pid_file().exists() && !machine.socket().exists());
}

/// A pid file that no process has locked does not prevent a start, whatever it contains.
#[tokio::test]
async fn stale_pid_file_is_replaced() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    fs::write(machine.pid_file(), "1\n").expect("a file");
    let killed = machine.start().await;
    killed.signal(Signal::KILL);
    killed.ends().await;
    assert!(machine.pid_file().exists());
    let daemon = machine.start().await;
    assert_ne!(daemon.pid, killed.pid);
}

/// The parent process prints the error that prevents a start, and no file is left.
#[tokio::test]
async fn startup_error_is_reported_before_daemonizing() {
    let system = System::new().await;
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let taken = taken.local_addr().expect("its address");
    let machine = Machine::new(&system, "");
    let config = fs::read_to_string(&machine.config).expect("zuul.conf");
    let without = |name: &str| {
        fs::remove_dir(machine.directory.path().join(name)).expect("an empty directory");
    };
    let refused = async |lines: &str, code: i32, error: &str| {
        fs::write(&machine.config, lines).expect("zuul.conf");
        let outcome = machine.run(&[]).await;
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(code), ""), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(error), "{error}: {}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
        assert!(!machine.pid_file().exists() && !machine.socket().exists());
    };
    refused(&config.replace("port = 0", "port = x"), 78, "[fingergw] port = x").await;
    let cert = config.replace(&format!("{}/cert", machine.directory.path().display()), "/missing");
    refused(&cert, 78, "/missing: cannot be read").await;
    let in_use = config.replace("port = 0", &format!("port = {}", taken.port()));
    refused(&in_use, 1, &format!("cannot listen on {taken}")).await;
    assert!(machine.log().contains("cannot listen on"), "in the log as well: {}", machine.log());
    let user = format!("{config}user = nobody\n");
    fs::set_permissions(machine.directory.path().join("key"), Permissions::from_mode(0o600))
        .expect("permissions");
    let run = machine.directory.path().join("run/zuul");
    chown(&run, Some(65534), None).expect("an owner who may remove the pid file");
    refused(&user, 78, "key: cannot be read by user nobody: Permission denied").await;

    fs::remove_file(machine.directory.path().join("log/zuul/fingergw.log")).expect("the log");
    without("log/zuul");
    refused(&config, 78, "/var/log/zuul/fingergw.log: cannot be opened as the log file").await;
    without("run/zuul");
    refused(&config, 1, "pid file /var/run/zuul/fingergw.pid: cannot be created").await;
}

/// Relative paths stay valid as long as the directory exists; the gateway warns in time when it
/// changes.
#[tokio::test]
async fn startup_error_after_the_fork_is_reported() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let directory = machine.directory.path().display().to_string() + "/";
    let config = fs::read_to_string(&machine.config).expect("zuul.conf");
    fs::write(&machine.config, config.replace(&directory, "")).expect("zuul.conf");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", MOUNTS]).arg(machine.directory.path());
    command.arg(BINARY).arg("-c").arg(&machine.config).current_dir(machine.directory.path());
    let Outcome { code, stderr, .. } = run(&mut command).await;
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(" tls_cert = cert: cannot be read"), "{stderr}");
    assert!(!machine.pid_file().exists() && !machine.socket().exists());
}

#[tokio::test]
async fn daemonizing_works_without_root() {
    let system = System::new().await;
    let machine = Machine::new(&system, "user = nobody");
    let nobody = Some(65534);
    chown(machine.directory.path().join("lib/zuul"), nobody, nobody).expect("an owner");
    let daemon = machine.start().await;
    assert_eq!(daemon.status("Uid:"), "65534\t65534\t65534\t65534");
    for file in [machine.pid_file(), machine.socket()] {
        assert_eq!(fs::metadata(&file).expect("a file").uid(), 65534, "{}", file.display());
    }
    assert_eq!(machine.run(&["stop"]).await.code, Some(0));
    daemon.ends().await;
    assert!(!machine.socket().exists());
    // The directory belongs to root: the file stays, but is empty.
    assert_eq!(fs::read_to_string(machine.pid_file()).expect("the file"), "");

    chown(machine.directory.path().join("run/zuul"), nobody, nobody).expect("an owner");
    let daemon = machine.start().await;
    daemon.signal(Signal::TERM);
    daemon.ends().await;
    assert!(!machine.pid_file().exists());
}

/// The daemon's working directory is different, and the same relative path names another file
/// there.
#[tokio::test]
async fn daemonized_gateway_reloads() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let daemon = machine.start_with(machine.relative_config()).await;
    let Outcome { code, stdout, stderr } = machine.run(&["reload"]).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let expected = format!("reloaded {}\nnothing has changed\n", machine.config.display());
    assert_eq!(stdout, expected);
    daemon.signal(Signal::TERM);
    daemon.ends().await;
    assert_eq!(machine.log().matches(" reloaded; nothing has changed").count(), 1);
}

/// A start resolves the path in the current directory and warns if a reload would not find the
/// file. Zuul's Python programs read it after they have changed the directory.
#[tokio::test]
async fn daemonized_gateway_reads_a_relative_log_config() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let below = machine.relative_config().parent().expect("its directory").to_owned();
    let text = format!(
        "version: 1\nformatters: {{simple: {{format: '%(asctime)s %(levelname)s %(name)s: \
         %(message)s'}}}}\nhandlers:\n  file: {{class: logging.FileHandler, formatter: simple, \
         filename: {}/own.log}}\nroot: {{level: INFO, handlers: [file]}}\n",
        below.display()
    );
    fs::write(machine.directory.path().join("log.yaml"), text).expect("a log_config");
    let option = format!("log_config = {}/log.yaml\n", below.display());
    let config = fs::read_to_string(&machine.config).expect("zuul.conf") + &option;
    fs::write(&machine.config, config).expect("zuul.conf");
    let daemon = machine.start().await;
    let Outcome { code, stderr, .. } = machine.run(&["reload"]).await;
    let error = "log.yaml: cannot be read: No such file";
    assert!(code == Some(1) && stderr.contains(error), "{stderr}");
    // The log stays at its path from the start, also when it is reopened.
    let [path, rotated] = ["own.log", "own.log.1"].map(|name| machine.directory.path().join(name));
    fs::rename(&path, &rotated).expect("rotation");
    daemon.signal(Signal::TERM);
    daemon.ends().await;
    let log = fs::read_to_string(&rotated).expect("the old log");
    let line = log
        .lines()
        .find(|line| line.contains("configuration cannot be reloaded until this is fixed: "));
    assert!(line.is_some_and(|text| text.contains(" WARNING ") && text.contains(error)), "{log}");
    assert!(log.contains(" starts config=") && !log.contains(" stopped\n"), "{log}");
    let log = fs::read_to_string(&path).expect("the new log");
    assert!(log.ends_with(" stopped\n"), "{log}");
    assert_eq!(machine.log(), "");
}

/// The terminal is gone, but log lines are not lost.
#[tokio::test]
async fn daemonized_gateway_with_a_console_log_handler_runs() {
    let system = System::new().await;
    let machine = Machine::new(&system, "");
    let file = machine.directory.path().join("log.yaml");
    let text = "version: 1\nhandlers: {console: {class: logging.StreamHandler}}\n\
                root: {level: INFO, handlers: [console]}\n";
    fs::write(&file, text).expect("a log_config");
    let config = fs::read_to_string(&machine.config).expect("zuul.conf");
    fs::write(&machine.config, format!("{config}log_config = {}\n", file.display()))
        .expect("zuul.conf");
    let daemon = machine.start().await;
    daemon.signal(Signal::USR2);
    daemon.signal(Signal::TERM);
    daemon.ends().await;
    assert!(machine.log().ends_with(" stopped\n"), "{}", machine.log());
}

/// `~user` is that user's home directory, independently of environment variables.
#[tokio::test]
async fn pid_file_below_a_users_home_is_written_and_removed() {
    let system = System::new().await;
    let machine = Machine::new(&system, "pidfile = ~someone/zuul/fingergw.pid");
    let home = machine.directory.path().join("run");
    let users = format!("root:x:0:0::/root:/bin/sh\nsomeone:x:4242:4242::{}:\n", home.display());
    fs::write(machine.directory.path().join("passwd"), users).expect("users");
    let daemon = machine.start().await;
    daemon.signal(Signal::TERM);
    daemon.ends().await;
    assert!(!machine.pid_file().exists());
}

#[tokio::test]
async fn toml_configuration_never_daemonizes() {
    let system = System::new().await;
    let builder = Builder::new(&system);
    let mut command = Command::new(BINARY);
    command.arg("-c").arg(builder.write()).stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.kill_on_drop(true).spawn().expect("the built binary");
    let running = |all: &[Entry]| all.iter().any(|entry| entry.content["state"] == "running");
    system.until("the gateway to run", running).await;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a pid");
    assert!(stopped((child, pid)).await.ends_with(" stopped\n"));
}
