//! Reloading configuration and certificates while the gateway runs: all of it or nothing, without
//! losing a stream.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::date_time_ymd;
use rustix::process::Signal;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::executor::{Executor, acceptor, refusing_port};
use crate::support::gateway::Builder;
use crate::support::limits::TOO_MANY;
use crate::support::process::raise_file_limit;
use crate::support::program::{Outcome, program, unprivileged};
use crate::support::proxy::Proxy;
use crate::support::reloadable::{Reloadable, replace};
use crate::support::running_stream::RunningStream;
use crate::support::system::{Entry, System, Worker};
use crate::support::within;

const OK: &str = "zuul_fingergw_config_reloads_total{result=\"ok\"}";
const FAILED: &str = "zuul_fingergw_config_reloads_total{result=\"failed\"}";
const SUCCESSFUL: &str = "zuul_fingergw_config_last_reload_successful";
const SUCCESS_TIME: &str = "zuul_fingergw_config_last_reload_success_timestamp_seconds";

impl Reloadable {
    /// Returns the certificate that a new connection gets.
    async fn presented_certificate(&self, identity: &Identity) -> CertificateDer<'static> {
        let client = Client::connect_tls(self.address(), identity).await;
        peer_certificate(&client.stream)
    }
}

fn peer_certificate(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    let certificates = stream.get_ref().1.peer_certificates().expect("a certificate");
    certificates[0].clone().into_owned()
}

fn certificate(identity: &Identity) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(&identity.cert).expect("a certificate")
}

/// Replaces the files of `old` by those of `new`.
fn renew(old: &Identity, new: &Identity) {
    fs::copy(&new.cert, &old.cert).expect("a certificate");
    fs::copy(&new.key, &old.key).expect("a key");
}

/// A gateway with one TLS listener, and its identity.
async fn with_tls(system: &System, limits: &str) -> (Reloadable, Identity) {
    let identity = system.zookeeper.authority.identity("localhost");
    let builder = Builder::new(system).tls(&identity).listeners(&["tls = true"]).limits(limits);
    (Reloadable::start(builder).await, identity)
}

#[tokio::test]
async fn renewed_certificate_is_used_for_new_connections() {
    let system = System::new().await;
    let (served, identity) = with_tls(&system, "").await;
    let authority = &system.zookeeper.authority;
    let client = authority.identity("client");
    let old = certificate(&identity);
    let mut running = RunningStream::start_tls(&system, served.address(), &client).await;
    let entries = system.entries().await;

    let until = date_time_ymd(2099, 5, 6);
    let new = authority.identity_with("localhost", |params| params.not_after = until);
    renew(&identity, &new);
    assert_eq!(served.presented_certificate(&client).await, old, "no reload yet");
    let before = served.metric(SUCCESS_TIME).await;
    assert_eq!(served.reloads().await, ["changed: certificate, key or CA of the gateway"]);
    assert_eq!(served.presented_certificate(&client).await, certificate(&new));
    assert_eq!(peer_certificate(&running.client.stream), old);
    running.pass("with the old certificate\n").await;
    for (series, value) in [(OK, 1.0), (FAILED, 0.0), (SUCCESSFUL, 1.0)] {
        assert_eq!(served.metric(series).await, value, "{series}");
    }
    assert!(served.metric(SUCCESS_TIME).await >= before && before > 1e9);
    let not_after = "zuul_fingergw_certificate_not_after_timestamp_seconds";
    let of_gateway = served.metric(&format!("{not_after}{{role=\"gateway\"}}")).await;
    assert_eq!(of_gateway, until.unix_timestamp() as f64);
    assert!(served.metric(&format!("{not_after}{{role=\"zookeeper\"}}")).await > of_gateway);
    for role in ["gateway_ca", "zookeeper_ca"] {
        let end = served.metric(&format!("{not_after}{{role=\"{role}\"}}")).await;
        assert!(end > of_gateway, "{role}: {end}");
    }

    assert_eq!(served.reloads().await, ["nothing has changed"]);
    running.finish().await;
    // The registry entry has not changed.
    let now = system.entries().await;
    assert_eq!((now.len(), now[0].stat), (1, entries[0].stat));
}

/// A certificate renewal in progress, step by step.
#[tokio::test]
async fn certificate_without_its_key_is_not_loaded() {
    let system = System::new().await;
    let (mut served, identity) = with_tls(&system, "").await;
    let authority = &system.zookeeper.authority;
    let (client, new) = (authority.identity("client"), authority.identity("localhost"));
    let old = certificate(&identity);
    let text = |path: &Path| fs::read_to_string(path).expect("PEM");
    let (cert, key, ca) = (text(&new.cert), text(&new.key), text(&identity.ca));
    let own_ca = identity.cert.with_file_name("ca.pem");
    replace(&own_ca, &ca);
    served.edit(&format!("\nca = {:?}", identity.ca), &format!("\nca = {own_ca:?}"));
    let moved = "changed: tls.cert, tls.key or tls.ca";
    assert_eq!(served.reloads().await, [moved]);

    let mut failures = 0.0;
    let mut stays = async |error: &str| {
        let reported = served.refuses().await;
        assert!(reported.len() == 1 && reported[0].contains(error), "{error}: {reported:#?}");
        failures += 1.0;
        assert_eq!(served.metric(FAILED).await, failures);
        assert_eq!(served.metric(SUCCESSFUL).await, 0.0);
        assert_eq!(served.presented_certificate(&client).await, old, "{error}");
        RunningStream::start_tls(&system, served.address(), &client).await.finish().await;
    };
    fs::write(&identity.cert, "").expect("a file");
    stays("holds no certificate").await;
    fs::write(&identity.cert, &cert[..cert.len() / 2]).expect("a file");
    stays("not valid PEM").await;
    fs::write(&identity.cert, &cert).expect("a file");
    stays("is not the key of the certificate").await;
    fs::write(&identity.key, "").expect("a file");
    stays("holds no private key").await;
    fs::write(&identity.key, &key[..key.len() - 40]).expect("a file");
    stays("not valid PEM").await;
    fs::remove_file(&identity.key).expect("gone");
    stays("cannot be read").await;
    fs::write(&identity.key, &key).expect("a file");
    fs::set_permissions(&identity.key, Permissions::from_mode(0o600)).expect("permissions");
    fs::write(&own_ca, "").expect("a file");
    stays("holds no certificate").await;

    replace(&own_ca, &ca);
    let replaced = "changed: certificate, key or CA of the gateway";
    assert_eq!(served.reloads().await, [replaced]);
    assert_eq!(served.presented_certificate(&client).await, cert_of(&cert));
    assert_eq!(served.metric(SUCCESSFUL).await, 1.0);
    // One line each, with the error and the advice.
    served.gateway.logged_times("each error", 7, |line| line.contains("ERROR")).await;
    let log = served.gateway.log();
    let errors: Vec<_> = log.iter().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 7, "{errors:#?}");
    let advice = "; nothing has changed; if files were being replaced just now, reload again";
    assert!(errors.iter().all(|line| line.ends_with(advice)), "{errors:#?}");
}

fn cert_of(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}

/// A certificate that peers will reject does not replace a valid one; one that has become invalid
/// does not prevent other changes.
#[tokio::test]
async fn reload_warns_of_a_certificate_that_peers_will_reject() {
    let system = System::new().await;
    let (served, identity) = with_tls(&system, "").await;
    let authority = &system.zookeeper.authority;
    let client = authority.identity("client");
    let (old, expired) = (certificate(&identity), authority.expired("localhost"));
    renew(&identity, &expired);
    let errors = served.refuses().await;
    assert!(errors.len() == 1 && errors[0].contains("has expired"), "{errors:#?}");
    assert_eq!(served.presented_certificate(&client).await, old);

    let builder = Builder::new(&system).tls(&expired).listeners(&["tls = true"]);
    let served = Reloadable::start(builder.limits("grace = \"5s\"")).await;
    served.edit("grace = \"5s\"", "grace = \"6s\"");
    let lines = served.reloads().await;
    assert_eq!(lines[0], "changed: limits.grace");
    assert!(lines.len() == 2 && lines[1].contains("has expired"), "{lines:#?}");
}

/// A Kubernetes secret: files behind one link, which is replaced.
#[tokio::test]
async fn kubernetes_secret_is_read_again() {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let client = authority.identity("client");
    let [old, new] = ["localhost"; 2].map(|name| authority.identity(name));
    let mut builder = Builder::new(&system).listeners(&["tls = true"]);
    let mount = builder.directory().join("secret");
    let put = |version: &str, identity: &Identity| {
        let directory = mount.join(version);
        fs::create_dir_all(&directory).expect("a directory");
        for (name, file) in
            [("tls.crt", &identity.cert), ("tls.key", &identity.key), ("ca.crt", &identity.ca)]
        {
            fs::copy(file, directory.join(name)).expect("a copy");
        }
        symlink(version, mount.join("..data_tmp")).expect("a link");
        fs::rename(mount.join("..data_tmp"), mount.join("..data")).expect("the swap");
    };
    put("..2026_11_21_one", &old);
    let link = |name: &str| {
        symlink(Path::new("..data").join(name), mount.join(name)).expect("a link");
        mount.join(name)
    };
    let mounted = Identity {
        cert: link("tls.crt"),
        key: link("tls.key"),
        ca: link("ca.crt"),
        both: PathBuf::new(),
    };
    builder = builder.tls(&mounted);
    let served = Reloadable::start(builder).await;
    let stream = RunningStream::start_tls(&system, served.address(), &client).await;
    assert_eq!(served.presented_certificate(&client).await, certificate(&old));

    put("..2026_11_22_two", &new);
    fs::remove_dir_all(mount.join("..2026_11_21_one")).expect("the kubelet cleans up");
    assert_eq!(served.presented_certificate(&client).await, certificate(&old));
    served.reloads().await;
    assert_eq!(served.presented_certificate(&client).await, certificate(&new));
    stream.finish().await;
}

/// A secret that is replaced continuously while it is read: each reload uses one complete version,
/// or none and reports that. No stream is lost, and every client gets a valid pair.
#[tokio::test]
async fn kubernetes_secret_replaced_during_a_reload_is_never_mixed() {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let client = authority.identity("client");
    let versions = ["localhost"; 2].map(|name| authority.identity(name));
    let mut builder = Builder::new(&system).listeners(&["tls = true"]);
    let mount = builder.directory().join("secret");
    for (version, identity) in versions.iter().enumerate() {
        let directory = mount.join(version.to_string());
        fs::create_dir_all(&directory).expect("a directory");
        for (name, file) in
            [("tls.crt", &identity.cert), ("tls.key", &identity.key), ("ca.crt", &identity.ca)]
        {
            fs::copy(file, directory.join(name)).expect("a copy");
        }
    }
    let swap = |mount: &Path, version: usize| {
        symlink(version.to_string(), mount.join("..data_tmp")).expect("a link");
        fs::rename(mount.join("..data_tmp"), mount.join("..data")).expect("the swap");
    };
    swap(&mount, 0);
    let file = |name: &str| mount.join("..data").join(name);
    let (cert, key, ca) = (file("tls.crt"), file("tls.key"), file("ca.crt"));
    builder = builder.tls(&Identity { cert, key, ca, both: PathBuf::new() });
    let served = Reloadable::start(builder).await;
    let mut stream = RunningStream::start_tls(&system, served.address(), &client).await;

    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let swapping = std::thread::spawn({
        let mount = mount.clone();
        move || {
            let mut swaps = 0;
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                swaps += 1;
                swap(&mount, swaps % 2);
                // Without a pause the files could never be read.
                std::thread::sleep(Duration::from_micros(fastrand::u64(..3000)));
            }
            swaps
        }
    });
    let valid = versions.each_ref().map(certificate);
    let mut taken = 0;
    for _ in 0..30 {
        let Outcome { code, stdout, stderr } = program(&["reload"], &served.config).await;
        match code {
            Some(0) => taken += 1,
            _ => assert!(stderr.contains("is being replaced"), "{stdout}{stderr}"),
        }
        assert!(valid.contains(&served.presented_certificate(&client).await));
        stream.pass("all the time\n").await;
    }
    drop(stop);
    let swaps = swapping.join().expect("no panic");
    assert!(taken > 0 && swaps > 30, "{taken} of 30 during {swaps} swaps");

    // Recovery: the replacements stop.
    swap(&mount, 1);
    served.reloads().await;
    assert_eq!(served.presented_certificate(&client).await, valid[1]);
    stream.finish().await;
}

/// A configuration that is being written in place, truncated wherever a required part is missing:
/// nothing of it is used.
#[tokio::test]
async fn truncated_configuration_is_not_loaded() {
    let system = System::new().await;
    let mut served = Reloadable::start(Builder::new(&system).limits("grace = \"5s\"")).await;
    let whole = fs::read_to_string(&served.config).expect("the configuration");
    let end = whole.find("tls_ca = ").expect("what must be there") + "tls_ca = ".len();
    let mut stream = RunningStream::start(&system, served.address()).await;
    for cut in (0..=end).step_by(9) {
        fs::write(&served.config, &whole[..cut]).expect("a part of it");
        served.gateway.signal(Signal::HUP);
        stream.pass("all the time\n").await;
    }
    // Signals that arrive during a reload are merged: the last one may be the only one that counts.
    served.gateway.logged("a refusal", |line| line.contains("not reloaded")).await;
    replace(&served.config, &whole);
    assert_eq!(served.reloads().await, ["nothing has changed"]);
    assert!(served.metric(OK).await >= 1.0);
    let taken =
        |line: &String| line.contains("changed=") || line.contains("take effect after a restart");
    assert!(!served.gateway.log().iter().any(taken), "{:#?}", served.gateway.log());
    stream.finish().await;
}

/// Errors in the configuration: all of them, in the output and in one log line.
#[tokio::test]
async fn invalid_configuration_is_not_loaded() {
    let system = System::new().await;
    let builder = Builder::new(&system).limits("grace = \"5s\"\nconnections = 7");
    let mut served = Reloadable::start(builder).await;
    served.edit("grace = \"5s\"", "grace = \"soon\"");
    served.edit("connections = 7", "connections = 0");
    // The running gateway rejects the file, so its log and metrics report the errors.
    let errors = served.refuses().await;
    assert!(errors.len() == 2 && errors[0].contains("limits.grace = "), "{errors:?}");
    assert!(errors[1].contains("limits.connections = 0"), "{errors:?}");
    assert_eq!(served.metric(FAILED).await, 1.0);
    // Other commands are not affected.
    assert_eq!(program(&["status"], &served.config).await.code, Some(0));
    served.gateway.logged("the errors", |line| line.contains("not reloaded")).await;

    served.gateway.signal(Signal::HUP);
    let line = served.gateway.logged("the errors", |line| line.contains("not reloaded")).await;
    let errors = line.contains("limits.grace = ") && line.contains("limits.connections = 0");
    assert!(errors && line.contains("ERROR"), "{line}");
    within("the second failure", async { while served.metric(FAILED).await < 2.0 {} }).await;
    served.edit("grace = \"soon\"", "grace = \"9s\"");
    served.edit("connections = 0", "connections = 7");
    assert_eq!(served.reloads().await, ["changed: limits.grace"]);

    fs::remove_file(&served.config).expect("gone");
    served.gateway.signal(Signal::HUP);
    served.gateway.logged("the error", |line| line.contains("gateway.toml: cannot be read")).await;
}

#[tokio::test]
async fn connection_limit_changes() {
    const TOO_MANY: &str = "Internal streaming error: too many connections\r\n";
    let system = System::new().await;
    let builder = Builder::new(&system).limits("connections = 1");
    let served = Reloadable::start(builder).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let refused = async || Client::ask(served.address(), &build).await.text().await == TOO_MANY;
    let mut streams = Vec::new();
    let mut begins = async || {
        let client = Client::ask(served.address(), &build).await;
        streams.push((client, executor.accept().await));
    };
    begins().await;
    assert!(refused().await);
    served.edit("connections = 1", "connections = 3");
    assert_eq!(served.reloads().await, ["changed: limits.connections"]);
    begins().await;
    begins().await;
    assert!(refused().await);

    // Fewer than are open: those stay, and new connections are rejected.
    served.edit("connections = 3", "connections = 2");
    served.reloads().await;
    for (client, log) in &mut streams {
        log.write(b"line\n").await;
        client.expect(b"line\n").await;
    }
    assert!(refused().await);
    for (mut client, log) in streams.drain(1..) {
        log.finish().await;
        assert_eq!(client.text().await, "");
    }
    // No notification exists for freed permits, so a rejected client tries again.
    let serving = async { executor.serve(b"log\n").await };
    let asking = within("a free permit", async {
        while Client::ask(served.address(), &build).await.text().await != "log\n" {}
    });
    tokio::join!(serving, asking);
}

/// A connection keeps the limits of the moment it was accepted.
#[tokio::test]
async fn changed_request_timeout_applies_to_new_connections() {
    let system = System::new().await;
    let builder = Builder::new(&system).limits("request_timeout = \"1h\"");
    let served = Reloadable::start(builder).await;
    let mut patient = Client::connect(served.address()).await;
    // It has been accepted when `status` counts it.
    let open = "zuul_fingergw_connections_active{listener=\"plain\"}";
    within("the connection", async { while served.metric(open).await < 1.0 {} }).await;
    served.edit("request_timeout = \"1h\"", "request_timeout = \"100ms\"");
    assert_eq!(served.reloads().await, ["changed: limits.request_timeout"]);
    let mut hasty = Client::connect(served.address()).await;
    let late = "Internal streaming error: no request within the time allowed\r\n";
    assert_eq!(hasty.text().await, late);
    patient.send(b"abc\r\n").await;
    assert_eq!(patient.text().await, "Build not found\r\n");
}

#[tokio::test]
async fn client_certificate_requirement_changes() {
    let system = System::new().await;
    let (served, identity) = with_tls(&system, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let anonymous = async || {
        let connected =
            Client::try_connect_tls(served.address(), "localhost", &identity, None).await;
        let mut client = connected.expect("its side of the handshake");
        client.send(format!("{build}\n").as_bytes()).await;
        client
    };
    let refused = async || {
        // TLS 1.3 reports this only now.
        let mut client = anonymous().await;
        let error = tokio::io::AsyncReadExt::read_u8(&mut client.stream).await;
        error.expect_err("an alert").to_string().contains("CertificateRequired")
    };
    assert!(refused().await);
    served.edit("tls = true", "tls = true\nclient_certificate = \"none\"");
    assert_eq!(served.reloads().await, ["changed: listener.client_certificate"]);
    let mut client = anonymous().await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
    served.edit("\"none\"", "\"required\"");
    served.reloads().await;
    assert!(refused().await);
}

/// The gateway's identity towards peers, and the verification of their names.
#[tokio::test]
async fn certificate_towards_other_gateways_changes() {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let (ours, new) = (authority.identity("gateway"), authority.identity("gateway"));
    let theirs = acceptor(&authority.identity_only_for("elsewhere.example.org"));
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), true, "running").await;
    let mut builder = Builder::new(&system).tls(&ours);
    builder.verify_hostnames = false;
    let served = Reloadable::start(builder).await;
    let worker = Worker {
        hostname: "127.0.0.1".into(),
        port: refusing_port().await,
        zone: Some("west".into()),
    };
    let build = system.put_build(Some("west"), Some(&worker)).await;
    let asked = async || {
        let client = Client::ask(served.address(), &build).await;
        (client, other.accept_tls(&theirs).await.into_inner())
    };
    let (_first, stream) = asked().await;
    assert_eq!(stream.get_ref().1.peer_certificates(), Some(&[certificate(&ours)][..]));
    renew(&ours, &new);
    served.reloads().await;
    let (_second, stream) = asked().await;
    assert_eq!(stream.get_ref().1.peer_certificates(), Some(&[certificate(&new)][..]));

    served.edit("verify_hostnames = false", "verify_hostnames = true");
    let changed = "changed: tls.verify_hostnames or tls.common_name_fallback";
    assert_eq!(served.reloads().await, [changed]);
    let mut client = Client::ask(served.address(), &build).await;
    let dialed = async {
        let (stream, _) =
            within("a connection", other.listener.accept()).await.expect("a connection");
        assert!(theirs.accept(stream).await.is_err(), "its name is different");
    };
    let ((), answer) = tokio::join!(dialed, client.text());
    assert_eq!(answer, "Internal streaming error: the zone's gateways cannot be reached\r\n");
}

/// Keys that cannot change are reported and keep their values; the others change.
#[tokio::test]
async fn keys_that_need_a_restart_are_reported() {
    let system = System::new().await;
    let builder = Builder::new(&system).zone("west").limits("grace = \"5s\"");
    let mut served = Reloadable::start(builder.log("format = \"text\"")).await;
    served.gateway.until_running(&system).await;
    let before = system.entries().await;
    served.edit("zone = \"west\"", "zone = \"north\"");
    served.edit("format = \"text\"", "format = \"json\"");
    served.edit("address = \"127.0.0.1:0\"\n\n", "address = \"127.0.0.2:0\"\n\n");
    served.edit("grace = \"5s\"", "grace = \"6s\"");
    let expected =
        ["changed: limits.grace", "effective after a restart: zone; listener; log.format"];
    assert_eq!(served.reloads().await, expected);
    let warning =
        |line: &str| line.contains("WARN") && line.contains("take effect after a restart");
    let line = served.gateway.logged("a warning", warning).await;
    assert!(line.contains("keys=\"zone; listener; log.format\""), "{line}");
    assert_eq!(served.gateway.log().iter().filter(|line| warning(line)).count(), 1);
    let now = system.entries().await;
    assert_eq!((now.len(), now[0].stat, &now[0].text), (1, before[0].stat, &before[0].text));
    assert_eq!(
        Client::ask(served.address(), "abc").await.text().await,
        "Build not found\r\n",
        "the listeners are unchanged"
    );
    // Also at the next reload: the comparison is with the running values.
    assert_eq!(served.reloads().await, [expected[1]]);
}

/// A TLS listener keeps its certificate if the configuration no longer has one: it must not become
/// a plain listener.
#[tokio::test]
async fn removed_tls_listener_needs_a_restart() {
    let system = System::new().await;
    let (served, identity) = with_tls(&system, "").await;
    let text = fs::read_to_string(&served.config).expect("the configuration");
    let (before, rest) = text.split_once("[tls]\n").expect("a table");
    let (_, after) = rest.split_once("[zookeeper]\n").expect("the next table");
    let without = format!("{}[zookeeper]\n{after}", before.replace("tls = true", ""));
    replace(&served.config, &without);
    let restart = "effective after a restart: listener";
    let changed = "changed: tls.cert, tls.key or tls.ca; certificate, key or CA of the gateway";
    for expected in [&[changed, restart][..], &[restart]] {
        assert_eq!(served.reloads().await, expected);
        assert_eq!(served.presented_certificate(&identity).await, certificate(&identity));
    }
    RunningStream::start_tls(&system, served.address(), &identity).await.finish().await;
}

/// The service manager is notified when a reload begins and ends, whether it succeeds or fails.
#[tokio::test]
async fn service_manager_is_notified_of_a_reload() {
    let system = System::new().await;
    let mut served = Reloadable::start(Builder::new(&system).limits("grace = \"5s\"")).await;
    for (round, grace) in ["6s", "soon"].into_iter().enumerate() {
        let line = fs::read_to_string(&served.config).expect("the configuration");
        let line = line
            .lines()
            .find(|line| line.starts_with("grace = "))
            .expect("a grace line")
            .to_owned();
        served.edit(&line, &format!("grace = \"{grace}\""));
        served.gateway.signal(Signal::HUP);
        let readies = round + 2;
        let is_over = |messages: &[String]| {
            messages.iter().filter(|line| *line == "READY=1").count() == readies
        };
        let notices = served.gateway.notice("READY=1 again", |now| is_over(&now.messages)).await;
        let [reloading, moment, ready] = &notices.messages[notices.messages.len() - 3..] else {
            panic!("{:?}", notices.messages)
        };
        assert_eq!((reloading.as_str(), ready.as_str()), ("RELOADING=1", "READY=1"));
        let moment = moment.strip_prefix("MONOTONIC_USEC=").expect("the moment");
        assert!(moment.parse::<u64>().is_ok_and(|moment| moment > 0), "{moment}");
    }
    assert_eq!((served.metric(OK).await, served.metric(FAILED).await), (1.0, 1.0));
}

#[tokio::test]
async fn log_level_changes() {
    let system = System::new().await;
    let builder = Builder::new(&system).log("level = \"info\"");
    let mut served = Reloadable::start(builder).await;
    let refused = |line: &str| line.contains(" DEBUG ") && line.contains("request refused");
    let ask = async || Client::ask(served.address(), "abc").await.text().await;
    ask().await;
    served.edit("level = \"info\"", "level = \"debug\"");
    assert_eq!(served.reloads().await, ["changed: log.level"]);
    ask().await;
    served.gateway.logged("a debug line", refused).await;
    assert_eq!(served.gateway.log().iter().filter(|line| refused(line)).count(), 1);
    served.edit("level = \"debug\"", "level = \"warn\"");
    served.reloads().await;
    Client::ask(served.address(), "abc").await.text().await;
    served.gateway.signal(Signal::TERM);
    served.gateway.exit().await;
    let log = served.gateway.log();
    assert_eq!(log.iter().filter(|line| refused(line)).count(), 1);
    assert!(!log.iter().any(|line| line.contains(" INFO ") && line.contains("stopped")));
}

/// A `zuul.conf`, whose keys have other names.
#[tokio::test]
async fn zuul_conf_is_loaded_again() {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let (identity, client) = (authority.identity("localhost"), authority.identity("client"));
    let new = authority.identity("localhost");
    let builder = Builder::new(&system);
    let config = builder.directory().join("zuul.conf");
    let Identity { cert, key, ca, .. } = &identity;
    let fingergw = format!(
        "tls_cert = {}\ntls_key = {}\ntls_ca = {}\ncommand_socket = {}\nprometheus_port = 0\n\
         prometheus_addr = 127.0.0.1\npidfile =",
        cert.display(),
        key.display(),
        ca.display(),
        builder.directory().join("socket").display(),
    );
    let gateway = builder.ready_from_zuul_conf(&fingergw, |_| {}).await;
    let served = Reloadable { gateway, config };
    let stream = RunningStream::start_tls(&system, served.address(), &client).await;
    renew(&identity, &new);
    served.edit("command_socket = ", "zone = west\ncommand_socket = ");
    let expected = [
        "changed: certificate, key or CA of the gateway",
        "effective after a restart: [fingergw] zone",
    ];
    assert_eq!(served.reloads().await, expected);
    assert_eq!(served.presented_certificate(&client).await, certificate(&new));
    fs::write(&identity.key, "").expect("a file");
    assert!(served.refuses().await[0].contains("holds no private key"));
    assert_eq!(served.presented_certificate(&client).await, certificate(&new));
    let before = served.metric(FAILED).await;
    served.edit("zone = west\n", "zone west\n");
    assert!(served.refuses().await[0].contains("neither \"option = value\" nor a [section]"));
    assert_eq!(served.metric(FAILED).await, before + 1.0, "the running gateway rejects it");
    stream.finish().await;
}

/// The ZooKeeper client keeps its settings for all connections of a session: no change is reported.
#[tokio::test]
async fn verify_hostnames_of_zookeeper_needs_a_restart() {
    let system = System::new().await;
    let builder = Builder::new(&system).zookeeper("verify_hostnames = false");
    let served = Reloadable::start(builder).await;
    served.edit("verify_hostnames = false", "verify_hostnames = true");
    for _ in 0..2 {
        let restart = "effective after a restart: zookeeper.verify_hostnames";
        assert_eq!(served.reloads().await, [restart]);
    }
}

/// A working session continues; the next session uses the new certificate.
#[tokio::test]
async fn certificate_for_zookeeper_changes() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let authority = &system.zookeeper.authority;
    let (first, other) = (authority.identity("client"), Authority::new());
    let untrusted = other.identity("client");
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"2s\"");
    builder.zookeeper_identity = first.clone();
    builder.hosts = system.hosts_via(&proxy);
    let mut served = Reloadable::start(builder).await;
    served.gateway.until_running(&system).await;
    let entry = system.entries().await.swap_remove(0);

    // ZooKeeper would reject this certificate, but the gateway does not connect with it.
    renew(&first, &untrusted);
    let changed = "changed: certificate, key or CA for ZooKeeper, from the next connection on";
    for first in [changed, "nothing has changed"] {
        let lines = served.reloads().await;
        assert!(lines.len() == 2 && lines[0] == first, "{lines:#?}");
        assert!(lines[1].contains("peers with the same CA file refuse it"), "{lines:#?}");
    }
    let now = system.entries().await;
    assert_eq!((now.len(), now[0].stat), (1, entry.stat));

    proxy.cut();
    let refused = |line: &str| line.contains("does it trust our certificate?");
    served.gateway.logged("the refusal", refused).await;
    system.until("the entry to be removed with its session", <[Entry]>::is_empty).await;
    renew(&first, &authority.identity("client"));
    assert_eq!(served.reloads().await, [changed]);
    let running =
        |entries: &[Entry]| entries.len() == 1 && entries[0].content["state"] == "running";
    let back = system.until("a new entry", running).await;
    assert_ne!(back[0].stat.ephemeral_owner, entry.stat.ephemeral_owner);
}

/// The gateway then reads files as another user than the one that started it.
#[tokio::test]
async fn files_that_the_user_cannot_read_are_reported() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let identity = builder.tls.clone().expect("certificates");
    let authority = &system.zookeeper.authority;
    let (client, new) = (authority.identity("client"), authority.identity("localhost"));
    let mut served = Reloadable::start(builder).await;
    let tls = served.gateway.addresses[1];
    fs::set_permissions(&served.config, Permissions::from_mode(0o644)).expect("permissions");
    let old = certificate(&identity);
    renew(&identity, &new);
    fs::set_permissions(&identity.key, Permissions::from_mode(0o600)).expect("permissions");
    let errors = served.refuses().await;
    let error = format!("{}: cannot be read by user id 65534", identity.key.display());
    assert!(errors.len() == 1 && errors[0].contains(&error), "{errors:#?}");
    let presented_certificate =
        async || peer_certificate(&Client::connect_tls(tls, &client).await.stream);
    assert_eq!(presented_certificate().await, old);
    fs::set_permissions(&identity.key, Permissions::from_mode(0o644)).expect("permissions");
    served.reloads().await;
    assert_eq!(presented_certificate().await, certificate(&new));

    // A configuration that only root can read is accepted at the start, with a warning that it
    // cannot be reloaded.
    served.gateway.signal(Signal::TERM);
    served.gateway.exit().await;
    let builder = unprivileged(&system);
    let config = builder.write();
    fs::set_permissions(&config, Permissions::from_mode(0o600)).expect("permissions");
    let mut gateway = builder.ready().await;
    let warned = |line: &str| line.contains("configuration cannot be reloaded until this is fixed");
    let line = gateway.logged("a warning", warned).await;
    assert!(
        line.contains("gateway.toml: cannot be read by user id 65534: Permission denied"),
        "{line}"
    );
}

/// Every concurrent caller gets a reply, while streams run.
#[tokio::test]
async fn concurrent_reloads_all_succeed() {
    let system = System::new().await;
    let (served, identity) = with_tls(&system, "grace = \"5s\"").await;
    let stream = RunningStream::start_tls(&system, served.address(), &identity).await;
    let mut commands = tokio::task::JoinSet::new();
    for _ in 0..20 {
        served.gateway.signal(Signal::HUP);
        let config = served.config.clone();
        commands.spawn(async move { program(&["reload"], &config).await });
    }
    while let Some(outcome) = commands.join_next().await {
        let Outcome { code, stdout, stderr } = outcome.expect("a command");
        assert!(code == Some(0) && stdout.ends_with("\nnothing has changed\n"), "{stderr}");
    }
    assert!(served.metric(OK).await >= 20.0);
    assert_eq!(served.metric(FAILED).await, 0.0);
    stream.finish().await;
}

/// Streams that started with an older configuration continue, however many there are, and release
/// everything.
#[tokio::test]
async fn thousand_streams_continue_after_a_reload() {
    const STREAMS: usize = 1000;
    raise_file_limit();
    let system = System::new().await;
    let limits = "grace = \"5s\"\nconnections_per_address = 2000";
    let served = Reloadable::start(Builder::new(&system).limits(limits)).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let sockets = served.gateway.sockets();
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut client = Client::ask(served.address(), &build).await;
        let stream = executor.begin(&mut client).await;
        streams.push((client, stream));
    }
    served.edit("connections_per_address = 2000", "connections_per_address = 1000");
    assert_eq!(served.reloads().await, ["changed: limits.connections_per_address"]);
    let refused = Client::ask(served.address(), &build).await.text().await;
    assert_eq!(refused, TOO_MANY, "the old streams count against the new limit");

    for (client, stream) in &mut streams {
        stream.write(b"after the reload\n").await;
        client.expect(b"after the reload\n").await;
    }
    for (mut client, stream) in streams {
        stream.finish().await;
        assert_eq!(client.text().await, "");
    }
    served.gateway.until_sockets(sockets).await;
}

#[tokio::test]
async fn stopping_gateway_rejects_reload() {
    let system = System::new().await;
    let (mut served, identity) = with_tls(&system, "").await;
    let stream = RunningStream::start_tls(&system, served.address(), &identity).await;
    served.gateway.signal(Signal::TERM);
    system.until("the entry to be removed", <[Entry]>::is_empty).await;
    let Outcome { code, stdout, stderr } = program(&["reload"], &served.config).await;
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert_eq!(stderr, "not reloaded: the gateway is stopping\n");
    served.gateway.signal(Signal::HUP);
    let refused = |line: &str| line.contains("not reloaded: the gateway is stopping");
    served.gateway.logged_times("the refusals", 2, refused).await;
    stream.finish().await;
    assert!(served.gateway.exit().await.success());
}
