//! Output of `zuul-fingergw check` for a configuration without errors, and with `--connect` for the
//! ZooKeeper of the configuration.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;
use tokio::process::Command;

use crate::support::certificates::Identity;
use crate::support::executor::full_listener;
use crate::support::gateway::{BINARY, Builder};
use crate::support::program::{Outcome, program, run, unprivileged};
use crate::support::proxy::Proxy;
use crate::support::system::System;

#[tokio::test]
async fn check_prints_what_the_gateway_will_be() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("fingergw.example.org");
    let mut builder = Builder::new(&system).zone("west").tls(&identity).control();
    builder.hostname = "fingergw.example.org".to_owned();
    builder.root = "public_port = 443\nuser = \"root\"".to_owned();
    builder.admin = true;
    let builder = builder.listeners(&["", "tls = true"]);
    let config = builder.write();
    let Outcome { code, stdout, stderr } = program(&["check"], &config).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    let socket = builder.control.clone().expect("a path");
    let zookeeper = &system.zookeeper.identity.cert;
    let features = if cfg!(feature = "otlp") { "demo, otlp" } else { "demo" };
    let lines = [
        format!("{}: OK", config.display()),
        format!("  program: zuul-fingergw {}, features: {features}", env!("CARGO_PKG_VERSION")),
        "  registers as: fingergw.example.org, port 443, TLS, zone west".to_owned(),
        "  listens on: 127.0.0.1:0, plain".to_owned(),
        "  listens on: 127.0.0.1:0, TLS".to_owned(),
        format!("  certificate: {}, subject \"CN=", identity.cert.display()),
        format!("  ZooKeeper: {}, host names verified", system.hosts()),
        format!("  certificate for ZooKeeper: {}, subject \"CN=", zookeeper.display()),
        "  health and metrics: 127.0.0.1:0".to_owned(),
        format!("  command socket: {}", socket.display()),
        "  user: root".to_owned(),
    ];
    assert_eq!(stdout.lines().count(), lines.len(), "{stdout}");
    for (line, expected) in stdout.lines().zip(&lines) {
        let is_certificate = expected.ends_with("\"CN=");
        let alike = match is_certificate {
            true => line.starts_with(expected) && line.contains("\", valid until "),
            false => line == expected,
        };
        assert!(alike, "{expected}\n{stdout}");
    }

    let mut builder = Builder::new(&system);
    builder.zookeeper = "verify_hostnames = false".to_owned();
    let Outcome { stdout, .. } = program(&["check"], &builder.write()).await;
    let expected = "  registers as: localhost, without a zone: other gateways do not ask it\n";
    assert!(stdout.contains(expected) && stdout.contains("host names not verified"), "{stdout}");
}

/// Root can read every file; the gateway reads them as its user.
#[tokio::test]
async fn files_are_read_as_the_user_of_the_configuration() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let config = builder.write();
    fs::set_permissions(&config, Permissions::from_mode(0o600)).expect("permissions");
    let Outcome { code, stderr, .. } = program(&["check"], &config).await;
    let unreadable = format!("{}: cannot be read by user nobody", config.display());
    assert!(code == Some(0) && stderr.contains(&unreadable), "{stderr}");
    assert!(stderr.contains("the gateway starts, but cannot reload"), "{stderr}");
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let Outcome { code, stderr, .. } = program(&["check"], &config).await;
    assert!(code == Some(0) && !stderr.contains("cannot be read"), "{stderr}");

    let directory = builder.directory();
    let socket = directory.join("roots/control.socket");
    fs::create_dir(directory.join("roots")).expect("a directory");
    let text = fs::read_to_string(&config).expect("the configuration");
    fs::write(&config, format!("{text}\n[control]\nsocket = {socket:?}\n")).expect("a file");
    let Outcome { code, stderr, .. } = program(&["check"], &config).await;
    let expected_error = format!(
        "cannot create the command socket {}: its directory: Permission denied (os error 13) (as \
         user nobody); stop, reload, status and resolve need it\n",
        socket.display()
    );
    assert!(code == Some(0) && stderr.contains(&expected_error), "{stderr}");

    let keys = [&builder.tls.as_ref().expect("certificates").key, &builder.zookeeper_identity.key];
    for key in keys {
        fs::set_permissions(key, Permissions::from_mode(0o600)).expect("permissions");
    }
    let Outcome { code, stdout, stderr } = program(&["check"], &config).await;
    assert_eq!((code, stdout.as_str()), (Some(78), ""), "{stderr}");
    for key in keys {
        let expected_error =
            format!("{}: cannot be read by user nobody: Permission denied", key.display());
        assert_eq!(stderr.matches(&expected_error).count(), 1, "{expected_error}: {stderr}");
    }
}

#[tokio::test]
async fn connect_prints_the_zones_and_gateways_of_the_registry() {
    let system = System::new().await;
    system.put("/empty", b"").await;
    let mut builder = Builder::new(&system);
    builder.hosts.push_str("/empty");
    let config = builder.write();
    let Outcome { code, stdout, stderr } = program(&["check", "--connect"], &config).await;
    assert_eq!((code, stderr.as_str()), (Some(1), ""), "{stdout}");
    let no_zuul = "no Zuul: no scheduler and no executor is registered below /zuul/components: \
                   check that the path after the last server in hosts is that";
    assert!(stdout.contains(no_zuul), "{stdout}");
    let written = system.client.list_children("/empty").await.expect("the chroot");
    assert!(written.is_empty(), "check writes nothing: {written:?}");

    builder.hosts = system.hosts();
    let config = builder.write();
    system.put_component("scheduler", 38).await;
    system.put("/zuul/components/executor/e1", br#"{"zone": "west"}"#).await;
    system.put_gateway(Some("west"), Some(7979), true, "running").await;
    system.put_gateway(Some("west"), Some(7979), true, "stopped").await;
    let Outcome { code, stdout, stderr } = program(&["check", "--connect"], &config).await;
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    let expected = format!(
        "ZooKeeper at {}: connected\n  \
         components: executor (1), fingergw (2), scheduler (1)\n  \
         zone west: 1 executor, gateways localhost:7979 (TLS)\n",
        system.hosts()
    );
    assert!(stdout.ends_with(&expected), "{stdout}");
}

#[tokio::test]
async fn connect_without_zookeeper_reports_the_answer_of_each_server() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    proxy.refuse();
    let mut builder = Builder::new(&system);
    builder.hosts = system.hosts_via(&proxy);
    let Outcome { code, stderr, .. } = program(&["check", "--connect"], &builder.write()).await;
    let expected = format!("cannot get a session with ZooKeeper: {}: ", proxy.address);
    assert!(code == Some(1) && stderr.starts_with(&expected), "{stderr}");
}

/// Packets to both servers are dropped, as by a firewall. The session timeout of this `zuul.conf`
/// is so long that the attempts at both servers together would exceed the command's deadline.
#[tokio::test]
async fn connect_reports_how_each_server_that_does_not_answer_fails() {
    let system = System::new().await;
    let (one, _in_its_queue) = full_listener().await;
    let (other, _in_its_queue) = full_listener().await;
    let [one, other] = [&one, &other].map(|listener| listener.local_addr().expect("its address"));
    let Identity { cert, key, ca, .. } = &system.zookeeper.identity;
    let directory = TempDir::new().expect("a directory");
    let config = directory.path().join("zuul.conf");
    let text = format!(
        "[zookeeper]\nhosts = {one},{other}\ntls_cert = {}\ntls_key = {}\ntls_ca = {}\n[fingergw]\n\
         command_socket =\n",
        cert.display(),
        key.display(),
        ca.display()
    );
    fs::write(&config, text).expect("zuul.conf");
    let Outcome { code, stderr, .. } = program(&["check", "--connect"], &config).await;
    let expected = format!(
        "cannot get a session with ZooKeeper: {one}, {other}: no connection within 5s: is a firewall"
    );
    assert!(code == Some(1) && stderr.contains(&expected), "{stderr}");
}

/// The gateway creates a directory in /run only when it starts as root.
#[tokio::test]
async fn missing_directory_below_run_is_a_warning_if_the_user_cannot_create_it() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let config = builder.write();
    let text = fs::read_to_string(&config).expect("the configuration");
    let socket = "/run/of-no-package/control.socket";
    fs::write(&config, format!("{text}\n[control]\nsocket = \"{socket}\"\n")).expect("a file");
    let binary = builder.directory().join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that every user can run");
    for (user, is_warned) in [("0", false), ("65534", true)] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", user, "--regid", user, "--clear-groups", "--"]).arg(&binary);
        let Outcome { code, stderr, .. } = run(command.args(["check", "-c"]).arg(&config)).await;
        let error = format!(
            "cannot create the command socket {socket}: the directory /run/of-no-package does not \
             exist and cannot be created: Permission denied"
        );
        assert_eq!((code, stderr.contains(&error)), (Some(0), is_warned), "{user}: {stderr}");
    }
}

#[tokio::test]
async fn log_config_that_the_user_cannot_read_is_a_warning() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let Identity { cert, key, ca, .. } = &builder.zookeeper_identity;
    let [config, log_config] = ["zuul.conf", "log.conf"].map(|name| builder.directory().join(name));
    let handler = "class=StreamHandler\nargs=(sys.stdout,)\n";
    let logging = format!(
        "[loggers]\nkeys=root\n[handlers]\nkeys=out\n[formatters]\nkeys=\n[logger_root]\nlevel=INFO\n\
         handlers=out\n[handler_out]\n{handler}"
    );
    fs::write(&log_config, logging).expect("a file");
    let text = format!(
        "[zookeeper]\nhosts = zk:2281\ntls_cert = {}\ntls_key = {}\ntls_ca = {}\n[fingergw]\n\
         user = nobody\ncommand_socket =\nlog_config = {}\n",
        cert.display(),
        key.display(),
        ca.display(),
        log_config.display()
    );
    fs::write(&config, text).expect("zuul.conf");
    let unreadable = format!("{}: cannot be read by user nobody", log_config.display());
    for (mode, is_warned) in [(0o600, true), (0o644, false)] {
        fs::set_permissions(&log_config, Permissions::from_mode(mode)).expect("permissions");
        let Outcome { code, stderr, .. } = program(&["check"], &config).await;
        assert_eq!(
            (code, stderr.contains(&unreadable)),
            (Some(0), is_warned),
            "{mode:o}: {stderr}"
        );
    }
}
