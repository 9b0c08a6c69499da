//! Configuration files that the program accepts or rejects, and its command line.

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{BasicConstraints, CertificateParams, IsCa};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::executor::{self, Executor};
use crate::support::gateway::{BINARY, Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{Entry, System, Worker};
use crate::support::within;

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the program until it ends.
async fn run(arguments: &[&OsStr]) -> Outcome {
    let mut command = Command::new(BINARY);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = within("the program to end", command.output()).await.expect("the built binary");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

async fn check(config: &Path) -> Outcome {
    run(&["check".as_ref(), "-c".as_ref(), config.as_ref()]).await
}

/// Returns the errors in `config`, one per line. `check` and a start must report the same.
async fn errors_in(config: &Path) -> Vec<String> {
    let checked = check(config).await;
    let started = run(&["-f".as_ref(), "-c".as_ref(), config.as_ref()]).await;
    for Outcome { code, stdout, stderr } in [&checked, &started] {
        assert_eq!((*code, stdout.as_str()), (Some(78), ""), "{stderr}");
    }
    assert_eq!(checked.stderr, started.stderr);
    checked.stderr.lines().map(str::to_owned).collect()
}

/// A directory for the files of one test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().expect("a directory"))
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("permissions");
        path
    }

    fn missing(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Returns the identity's files as keys of a TOML table, each with `prefix`.
fn keys(prefix: &str, Identity { cert, key, ca, .. }: &Identity) -> String {
    format!("{prefix}cert = {cert:?}\n{prefix}key = {key:?}\n{prefix}ca = {ca:?}\n")
}

/// Returns a configuration with these identities and no other errors.
fn toml(tls: &Identity, zookeeper: &Identity) -> String {
    let (tls, zookeeper) = (keys("", tls), keys("tls_", zookeeper));
    format!("[tls]\n{tls}[zookeeper]\nhosts = \"127.0.0.1:1\"\n{zookeeper}")
}

#[tokio::test]
async fn valid_configuration_is_accepted() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let toml = files.write("good.toml", toml(&identity, &identity));
    let Identity { cert, key, ca, .. } = &identity;
    let (cert, key, ca) = (cert.display(), key.display(), ca.display());
    let sections = format!("tls_cert = {cert}\ntls_key = {key}\ntls_ca = {ca}\n");
    let conf = files.write(
        "zuul.conf",
        format!("[zookeeper]\nhosts = a:1\n{sections}[fingergw]\nuser = root\nhostname = localhost\npidfile =\n{sections}"),
    );
    for config in [&toml, &conf] {
        let checked = check(config).await;
        assert_eq!(checked.code, Some(0), "{}", checked.stderr);
        let first = checked.stdout.lines().next().map(str::to_owned);
        assert_eq!(first, Some(format!("{}: OK", config.display())));
        assert_eq!(checked.stderr, "");
    }
    let checked = run(&["-c".as_ref(), toml.as_ref(), "check".as_ref()]).await;
    assert_eq!(checked.code, Some(0), "the option before the command");
}

#[tokio::test]
async fn all_errors_of_a_toml_file_are_reported_together() {
    let files = Files::new();
    let config = files.write(
        "faulty.toml",
        "hostname = 7\npublic_port = \"79\"\nzones = \"west\"\n\n[[listener]]\n\
         address = \"79\"\ntls = \"yes\"\n\n[zookeeper]\ntls_cert = \"a.pem\"\n\n\
         [limits]\ngrace = 30\n\n[log]\nlevel = \"loud\"\n\n[metrics]\nport = 1\n",
    );
    let errors = errors_in(&config).await;
    let at = |line: &str| format!("{}{line}: ", config.display());
    let expected = [
        (at(":1"), "hostname = 7"),
        (at(":2"), "public_port = \"79\""),
        (at(":3"), "zones"),
        (at(":6"), "listener.address = \"79\""),
        (at(":7"), "listener.tls = \"yes\""),
        (at(":10"), "zookeeper.tls_cert = \"a.pem\""),
        (at(":13"), "limits.grace = 30"),
        (at(":16"), "log.level = \"loud\""),
        (at(":18"), "metrics"),
        (at(""), "zookeeper.hosts"),
        (at(""), "zookeeper.tls_key"),
        (at(""), "zookeeper.tls_ca"),
    ];
    for (place, what) in &expected {
        let found = errors.iter().filter(|f| f.starts_with(&format!("{place}{what}: "))).count();
        assert_eq!(found, 1, "{place}{what} in {errors:#?}");
    }
    assert_eq!(errors.len(), expected.len(), "{errors:#?}");
}

#[tokio::test]
async fn toml_syntax_error_is_reported_with_its_line() {
    let files = Files::new();
    let config =
        files.write("broken.toml", "zone = \"west\"\nhostname = \"gw\n\n[log\nlevel = 1\n");
    let errors = errors_in(&config).await;
    for line in [2, 4] {
        let place = format!("{}:{line}: ", config.display());
        assert!(errors.iter().any(|error| error.starts_with(&place)), "{line} in {errors:#?}");
    }
}

#[tokio::test]
async fn all_errors_of_a_zuul_conf_are_reported_together() {
    let files = Files::new();
    let config = files.write(
        "zuul.conf",
        "[zookeeper]\nhosts = zk:x\ntls_ca = /ca\n\n[connection \"x\"]\npassword = 5%\n\n\
         [fingergw]\nport = 79 ; comment\ntls_cert = /cert\ntls_client_only = maybe\n",
    );
    let errors = errors_in(&config).await;
    let at = |line: &str| format!("{}{line}: ", config.display());
    let expected = [
        (at(":2"), "[zookeeper] hosts = zk:x"),
        (at(":9"), "[fingergw] port = 79 ; comment"),
        (at(":11"), "[fingergw] tls_client_only = maybe"),
        (at(""), "[fingergw] tls_key"),
        (at(""), "[fingergw] tls_ca"),
        (at(""), "[zookeeper] tls_cert"),
        (at(""), "[zookeeper] tls_key"),
    ];
    for (place, what) in &expected {
        let found = errors.iter().filter(|f| f.starts_with(&format!("{place}{what}: "))).count();
        assert_eq!(found, 1, "{place}{what} in {errors:#?}");
    }
    assert_eq!(errors.len(), expected.len(), "{errors:#?}");
}

#[tokio::test]
async fn file_is_read_by_its_suffix_and_a_wrong_suffix_is_reported() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let text = toml(&identity, &identity);
    assert_eq!(check(&files.write("gateway.TOML", &text)).await.code, Some(0));
    for text in [text.as_str(), "[[listener]]\naddress = \"[::]:79\"\n"] {
        let config = files.write("gateway.conf", text);
        let expected = format!(
            "{}: cannot be read as a zuul.conf, and looks like TOML: rename it so that its name ends \
             in .toml",
            config.display()
        );
        assert_eq!(errors_in(&config).await, [expected]);
    }
    let Identity { cert, key, ca, .. } = &identity;
    let zookeeper = format!(
        "[zookeeper]\nhosts = a:1\ntls_cert = {}\ntls_key = {}\ntls_ca = {}\n[fingergw]\npidfile =\n",
        cert.display(),
        key.display(),
        ca.display()
    );
    for (name, text) in [("zuul.conf", &zookeeper), ("marked.toml", &text)] {
        let checked = check(&files.write(name, format!("\u{feff}{text}"))).await;
        assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""), "{name}");
    }
    let conf = files.write("typo.conf", format!("{zookeeper}listen_adress = ::1\n"));
    let Outcome { code, stderr, .. } = check(&conf).await;
    let warning =
        ":8: [fingergw] listen_adress: unknown option, ignored; did you mean listen_address?";
    assert_eq!((code, stderr), (Some(0), format!("{}{warning}\n", conf.display())));
}

/// Zuul's gateway takes two of the three for unset, and serves plain text where TLS was intended.
#[tokio::test]
async fn zuul_conf_with_a_missing_tls_file_is_an_error() {
    let files = Files::new();
    let zookeeper = "[zookeeper]\nhosts = a:1\ntls_cert = /c\ntls_key = /k\ntls_ca = /a\n";
    for missing in ["tls_cert", "tls_key", "tls_ca"] {
        let mut conf = format!("{zookeeper}[fingergw]\n");
        for option in ["tls_cert", "tls_key", "tls_ca"].iter().filter(|o| **o != missing) {
            conf.push_str(&format!("{option} = /file\n"));
        }
        let config = files.write("zuul.conf", conf);
        let errors = errors_in(&config).await;
        let error = format!("{}: [fingergw] {missing}: missing;", config.display());
        assert!(errors.len() == 1 && errors[0].starts_with(&error), "{errors:#?}");
    }
}

/// Returns the errors of a configuration whose `[tls]` and `[zookeeper]` use the files of
/// `identity`, without the names of the keys. Each error must be reported once, with the keys of
/// both tables.
async fn pem_errors(files: &Files, identity: &Identity) -> Vec<String> {
    let config = files.write("gateway.toml", toml(identity, identity));
    let each = |error: String| {
        let (keys, rest) = error.split_once(" = ").expect("the keys that name the file");
        assert!(keys.contains(&format!("{}:", config.display())), "{error}");
        assert!(keys.contains(": tls.") && keys.contains(": zookeeper.tls_"), "{error}");
        rest.to_owned()
    };
    errors_in(&config).await.into_iter().map(each).collect()
}

/// Returns `line` without the keys that name the file in it.
fn unkeyed(line: &str) -> String {
    let (severity, rest) = match line.strip_prefix("warning: ") {
        Some(rest) => ("warning: ", rest),
        None => ("", line),
    };
    let (keys, rest) = rest.split_once(" = ").unwrap_or_else(|| panic!("no key in {line:?}"));
    assert!(keys.contains(".toml:"), "{line}");
    format!("{severity}{rest}")
}

/// Also in a `zuul.conf`, where sections with different files get one line each.
#[tokio::test]
async fn errors_in_certificate_files_name_the_key_and_line() {
    let (files, authority) = (Files::new(), Authority::new());
    let Identity { cert, ca, .. } = authority.identity("localhost");
    let (cert, ca) = (cert.display(), ca.display());
    let (gone, lost) = (files.missing("gone"), files.missing("lost"));
    let sections = |missing: &Path| {
        format!("tls_cert = {cert}\ntls_key = {}\ntls_ca = {ca}\n", missing.display())
    };
    let text = format!(
        "[zookeeper]\nhosts = a:1\n{}[fingergw]\nuser = root\n{}",
        sections(&gone),
        sections(&lost) + "hostname = localhost\n"
    );
    let config = files.write("zuul.conf", text);
    let conf = config.display();
    let expected = [
        format!("{conf}:9: [fingergw] tls_key = {}: cannot be read: ", lost.display()),
        format!("{conf}:4: [zookeeper] tls_key = {}: cannot be read: ", gone.display()),
    ];
    let errors = errors_in(&config).await;
    assert_eq!(errors.len(), 2, "{errors:#?}");
    for (error, expected) in errors.iter().zip(expected) {
        assert!(error.starts_with(&expected), "{expected}: {error}");
    }
    let conf = files.write(
        "one.conf",
        format!(
            "[zookeeper]\nhosts = a:1\n{}[fingergw]\n{}hostname = localhost\n",
            sections(&gone),
            sections(&gone)
        ),
    );
    let errors = errors_in(&conf).await;
    let conf = conf.display();
    let expected = format!("{conf}:8: [fingergw] tls_key and {conf}:4: [zookeeper] tls_key = ");
    assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{errors:#?}");
}

#[tokio::test]
async fn unusable_pem_files_are_errors() {
    let (files, authority) = (Files::new(), Authority::new());
    let good = authority.identity("localhost");
    let other = authority.identity("localhost");
    let text = Identity::text(&good.cert);
    let binary = files.write("binary", b"\x30\x82\x01\xff\x00");
    let empty = files.write("empty", "");
    let cut = files.write("cut", &text[..text.len() / 2]);
    let garbled = files.write("garbled", text.replacen('M', "!", 3));
    let not_der = files.write("not-der", text.replacen("MII", "AAA", 1));
    let missing = files.missing("missing");
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let intermediate = files.write("intermediate", format!("{text}{garbage}"));
    let swapped = Identity { cert: good.key.clone(), key: good.cert.clone(), ..good.clone() };
    let cert = |path: &Path| Identity { cert: path.to_owned(), ..good.clone() };
    let key = |path: &Path| Identity { key: path.to_owned(), ..good.clone() };
    let ca = |path: &Path| Identity { ca: path.to_owned(), ..good.clone() };
    let cases = [
        (cert(&missing), &missing, ": cannot be read: No such file"),
        (cert(&binary), &binary, ": is not PEM (binary data)"),
        (cert(&empty), &empty, ": holds no certificate"),
        (cert(&good.key), &good.key, ": holds no certificate"),
        (cert(&cut), &cut, ":1: not valid PEM: -----BEGIN CERTIFICATE----- has no -----END"),
        (cert(&garbled), &garbled, ":1: not valid PEM: the block is not valid base64"),
        (cert(&not_der), &not_der, ": cannot be used"),
        (key(&missing), &missing, ": cannot be read: No such file"),
        (key(&binary), &binary, ": is not PEM (binary data)"),
        (key(&empty), &empty, ": holds no private key"),
        (key(&good.cert), &good.cert, ": holds no private key"),
        (key(&other.key), &other.key, ": is not the key of the certificate in"),
        (swapped, &good.key, ": holds the private key, and "),
        (cert(&intermediate), &intermediate, ":11: cannot be used: this is not a certificate"),
        (ca(&missing), &missing, ": cannot be read: No such file"),
        (ca(&binary), &binary, ": is not PEM (binary data)"),
        (ca(&empty), &empty, ": holds no certificate"),
        (ca(&not_der), &not_der, ":1: cannot be used"),
    ];
    for (identity, file, error) in &cases {
        let errors = pem_errors(&files, identity).await;
        let expected = format!("{}{error}", file.display());
        assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{expected}: {errors:#?}");
    }
    let all = Identity { cert: missing, key: binary, ca: empty, ..good };
    assert_eq!(pem_errors(&files, &all).await.len(), 3, "all three in one run");
}

/// Files that OpenSSL reads, and with it Zuul's own program, are accepted in each role and for
/// ZooKeeper.
#[tokio::test]
async fn pem_files_that_openssl_reads_are_accepted() {
    let (files, authority) = (Files::new(), Authority::new());
    let good = authority.identity("localhost");
    let other = authority.identity("other");
    let directory = files.0.path();
    let ca = good.ca.display();
    openssl(directory, &format!("x509 -in {ca} -trustout -out trusted")).await;
    openssl(
        directory,
        &format!("x509 -in {ca} -addtrust clientAuth -addtrust serverAuth -setalias x -out uses"),
    )
    .await;
    openssl(directory, "ecparam -name prime256v1 -out parameters").await;
    let read = |path: &Path| fs::read(path).expect("a PEM file");
    let [cert, key, ca] = [&good.cert, &good.key, &good.ca].map(|path| read(path));
    let renamed = |text: &[u8], from: &str, to: &str| {
        String::from_utf8_lossy(text).replace(from, to).into_bytes()
    };
    let labelled = |text: &[u8]| renamed(text, " CERTIFICATE-", " X509 CERTIFICATE-");
    let attributes = b"Bag Attributes\n    friendlyName: G\xe4teway\nsubject=CN = G\xe4teway\n";
    let mark = b"\xef\xbb\xbf";
    let parameters = read(&directory.join("parameters"));
    // The modification of each of the three files.
    type Change<'c> = Box<dyn Fn(&[u8]) -> Vec<u8> + 'c>;
    let changes: [Change<'_>; 6] = [
        Box::new(|text| [&attributes[..], text].concat()),
        Box::new(|text| [&mark[..], text].concat()),
        Box::new(|text| [text, &mark[..], &parameters].concat()),
        Box::new(|text| renamed(text, "\n", "\r\n")),
        Box::new(labelled),
        Box::new(|text| renamed(text, "\n", "  \n  ")),
    ];
    let mut identities: Vec<_> = changes
        .iter()
        .enumerate()
        .map(|(index, change)| Identity {
            cert: files.write(&format!("cert{index}"), change(&cert)),
            key: files.write(&format!("key{index}"), change(&key)),
            ca: files.write(&format!("ca{index}"), change(&ca)),
            ..good.clone()
        })
        .collect();
    for trusted in ["trusted", "uses"] {
        let old = read(&other.ca);
        let both =
            files.write(&format!("both-{trusted}"), [old, read(&directory.join(trusted))].concat());
        identities.push(Identity { ca: both, ..good.clone() });
    }
    // One file for everything, and a key labelled as by another tool.
    let all = files.write("all", [&key[..], &cert, &ca].concat());
    identities.push(Identity { cert: all.clone(), key: all, ..good.clone() });
    let as_rsa = files.write("rsa", renamed(&key, " PRIVATE KEY", " RSA PRIVATE KEY"));
    identities.push(Identity { key: as_rsa, ..good.clone() });
    for identity in &identities {
        for (tls, zookeeper) in [(identity, &good), (&good, identity)] {
            let checked = check(&files.write("gateway.toml", toml(tls, zookeeper))).await;
            assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""), "{identity:?}");
        }
    }
}

/// Runs openssl(1).
async fn openssl(directory: &Path, arguments: &str) {
    let mut command = Command::new("openssl");
    command.args(arguments.split(' ')).current_dir(directory).stdin(Stdio::null());
    let output = within("openssl", command.output()).await.expect("openssl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns the openssl command at the end of an error.
fn command(error: &str) -> &str {
    &error[error.find("openssl ").unwrap_or_else(|| panic!("no command in {error:?}"))..]
}

/// Runs `command` in a shell in `directory` and returns its output.
async fn typed(directory: &Path, command: &str) -> String {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(directory).stdin(Stdio::null());
    let output = within(command, shell.output()).await.expect("a shell");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// What Zuul's documentation recommends to create, and current TLS libraries reject.
#[tokio::test]
async fn version_1_certificate_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let directory = files.0.path();
    let request = "req -newkey rsa:2048 -nodes -keyout key.pem -subj /CN=gw -out request.pem";
    openssl(directory, request).await;
    openssl(directory, "x509 -req -in request.pem -signkey key.pem -out v1.pem").await;
    let good = authority.identity("localhost");
    let (cert, key) = (directory.join("v1.pem"), directory.join("key.pem"));
    let identity = Identity { cert: cert.clone(), key, ..good.clone() };
    for (tls, zookeeper) in [(&identity, &good), (&good, &identity)] {
        let errors = errors_in(&files.write("gateway.toml", toml(tls, zookeeper))).await;
        let expected = format!("{}: is an X.509 version 1 certificate", cert.display());
        assert!(errors.len() == 1 && unkeyed(&errors[0]).starts_with(&expected), "{errors:#?}");
    }
}

/// Returns a configuration with a TLS listener for the name gw.example.org.
fn listening(tls: &Identity, zookeeper: &Identity) -> String {
    let listener = "hostname = \"gw.example.org\"\n[[listener]]\naddress = \"127.0.0.1:0\"\n";
    format!("{listener}tls = true\n{}", toml(tls, zookeeper))
}

/// Errors and warnings of `check` for certificates that peers will reject.
#[tokio::test]
async fn certificates_that_peers_will_reject_are_reported() {
    use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let (files, authority) = (Files::new(), Authority::new());
    let good = authority.identity("gw.example.org");
    let gateway =
        |change: fn(&mut CertificateParams)| authority.identity_with("gw.example.org", change);
    let serving = gateway(|params| params.extended_key_usages = vec![ServerAuth]);
    let dialing = gateway(|params| params.extended_key_usages = vec![ClientAuth]);
    let expired = gateway(|params| params.not_after = rcgen::date_time_ymd(2021, 7, 1));
    let soon = gateway(|params| {
        let week = Duration::from_secs(7 * 24 * 60 * 60 + 60);
        let end = SystemTime::now().duration_since(UNIX_EPOCH).expect("now") + week;
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + end;
    });
    let authoritys = gateway(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let nameless = gateway(|params| params.subject_alt_names.clear());
    let elsewhere = authority.identity_only_for("elsewhere.example.org");
    // In this order: as [tls] certificate of a listener, for outgoing connections, as ZooKeeper
    // client.
    type Expected = Option<(bool, &'static str)>;
    let (error, warning) = (|text| Some((true, text)), |text| Some((false, text)));
    let cases: [(&Identity, [Expected; 3]); 8] = [
        (&good, [None, None, None]),
        (
            &serving,
            [
                warning("is not for clients"),
                error("is not for clients"),
                error("is not for clients"),
            ],
        ),
        (&dialing, [error("is not for servers"), None, None]),
        (&expired, [error("has expired: valid until Jul  1"); 3]),
        (&soon, [warning("expires soon, in 7 days"); 3]),
        (&authoritys, [error("is a CA certificate (CA:TRUE)"), error("is a CA certificate"), None]),
        (
            &nameless,
            [warning("has no subjectAltName, only the common name \"gw.example.org\""), None, None],
        ),
        (&elsewhere, [warning("does not carry the hostname gw.example.org"), None, None]),
    ];
    for (identity, texts) in &cases {
        let configurations = |identity: &Identity| {
            [listening(identity, &good), toml(identity, &good), toml(&good, identity)]
        };
        for (index, text) in texts.iter().enumerate() {
            let config = files.write("gateway.toml", &configurations(identity)[index]);
            let Outcome { code, stdout, stderr } = check(&config).await;
            let Some((error, text)) = text else {
                assert_eq!((code, stderr.as_str()), (Some(0), ""), "{index}");
                continue;
            };
            let severity = if *error { "" } else { "warning: " };
            let expected = format!("{severity}{}: {text}", identity.cert.display());
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            assert!(unkeyed(&stderr).starts_with(&expected), "{expected}: {stderr}");
            assert_eq!((code, stdout.is_empty()), (Some(if *error { 78 } else { 0 }), *error));
        }
    }
}

/// Certificate files that are valid on their own, but that peers with the same CA file reject.
#[tokio::test]
async fn certificate_and_key_that_do_not_match_are_an_error() {
    let (files, authority, other) = (Files::new(), Authority::new(), Authority::new());
    let directory = files.0.path();
    let good = authority.identity("gw.example.org");
    let untrusted = Identity { ca: other.ca(), ..good.clone() };
    let intermediate = authority.intermediate();
    let incomplete = intermediate.identity("gw.example.org");
    let complete = Identity::text(&incomplete.cert) + &intermediate.pem();
    let complete = Identity { cert: files.write("complete", complete), ..incomplete.clone() };
    let (key, ca) = (good.key.display(), good.ca.display());
    let ca_key = authority.directory().join("CA.key");
    let sha1 = format!(
        "req -x509 -new -key {key} -subj /CN=gw.example.org -CA {ca} -CAkey {} -sha1 -days 30 -addext \
         basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:gw.example.org -out sha1.pem",
        ca_key.display()
    );
    openssl(directory, &sha1).await;
    let sha1 = Identity { cert: directory.join("sha1.pem"), ..good.clone() };
    let ended = Authority::self_signed_for("ca", |params| {
        params.not_after = rcgen::date_time_ymd(2024, 7, 1);
    });
    let ended = ended_identity(&ended, &files);
    let many = (0..600).map(|_| Identity::text(&good.cert)).collect::<String>();
    let many = Identity { cert: files.write("many", many), ..good.clone() };
    let open = Identity { key: files.write("open", Identity::text(&good.key)), ..good.clone() };
    fs::set_permissions(&open.key, fs::Permissions::from_mode(0o644)).expect("permissions");
    let refuse = "peers with the same CA file refuse it: ";
    for (identity, file, text) in [
        (&good, None, String::new()),
        (&complete, None, String::new()),
        (&untrusted, Some(&untrusted.cert), format!("warning: {refuse}bad signature: ")),
        (&incomplete, Some(&incomplete.cert), format!("warning: {refuse}is not signed by")),
        (&sha1, Some(&sha1.cert), format!("warning: {refuse}it, or a certificate of its chain, is signed with")),
        (&ended, Some(&ended.ca), "warning: the CA certificate 1 of the file (\"test CA\") has expired: valid until Jul  1".to_owned()),
        (&many, Some(&many.cert), "holds 600 certificates with a total of ".to_owned()),
        (&open, Some(&open.key), "warning: the private key can be read by every user of this host (mode 0644): chmod o= ".to_owned()),
    ] {
        for config in [listening(identity, &good), toml(&good, identity)] {
            let Outcome { code, stderr, .. } = check(&files.write("gateway.toml", config)).await;
            let Some(file) = file else {
                assert_eq!((code, stderr.as_str()), (Some(0), ""));
                continue;
            };
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            let severity = if text.starts_with("warning: ") { "warning: " } else { "" };
            let text = text.strip_prefix(severity).expect("a severity");
            let expected = format!("{severity}{}: {text}", file.display());
            assert!(unkeyed(&stderr).starts_with(&expected), "{expected}: {stderr}");
            assert_eq!(code, Some(if severity.is_empty() { 78 } else { 0 }), "{stderr}");
        }
    }
}

/// Issues an identity whose files stay when `authority` is dropped.
fn ended_identity(authority: &Authority, files: &Files) -> Identity {
    let of = authority.identity("gw.example.org");
    let copy = |name: &str, file: &Path| files.write(name, Identity::text(file));
    let (cert, key) = (copy("ended.crt", &of.cert), copy("ended.key", &of.key));
    Identity { cert, key, ca: copy("ended-ca.crt", &of.ca), both: of.both }
}

/// Returns the host name that is registered by default.
#[tokio::test]
async fn certificate_for_another_name_than_the_default_hostname_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let other = authority.identity_only_for("elsewhere.example.org");
    let configured = "hostname = \"gw.example.org\"\n";
    let config = listening(&other, &other).replace(configured, "");
    let Outcome { code, stderr, .. } = check(&files.write("gateway.toml", config)).await;
    assert_eq!(code, Some(0), "{stderr}");
    let expected = format!("warning: {}: does not carry the hostname ", other.cert.display());
    assert!(stderr.lines().count() == 1 && unkeyed(&stderr).starts_with(&expected), "{stderr}");
    assert!(!stderr.contains("gw.example.org"), "{stderr}");
}

/// Keys that rustls does not accept, and the advice for each.
#[tokio::test]
async fn unsupported_private_keys_are_errors() {
    let (files, authority) = (Files::new(), Authority::new());
    let directory = files.0.path();
    let good = authority.identity("localhost");
    for (name, generate, text) in [
        (
            "rsa",
            "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:1024",
            "an RSA key of 1024 bits is not supported",
        ),
        (
            "pss",
            "genpkey -algorithm RSA-PSS -pkeyopt rsa_keygen_bits:2048",
            "this kind of key is not supported (RSA-PSS)",
        ),
        ("ed448", "genpkey -algorithm ED448", "this kind of key is not supported (Ed448)"),
        (
            "k1",
            "ecparam -name secp256k1 -genkey",
            "this kind of key is not supported (ECDSA on secp256k1)",
        ),
        (
            "explicit",
            "ecparam -name prime256v1 -param_enc explicit -genkey",
            "an EC key with explicit parameters is not supported",
        ),
        (
            "pkcs8",
            "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -pkeyopt ec_param_enc:explicit",
            "an EC key with explicit parameters is not supported",
        ),
    ] {
        openssl(directory, &format!("{generate} -out {name}.key")).await;
        let request = format!(
            "req -x509 -new -key {name}.key -subj /CN=localhost -days 30 -addext \
                               basicConstraints=critical,CA:FALSE -out {name}.crt"
        );
        openssl(directory, &request).await;
        let (cert, key) =
            (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
        let identity = Identity { cert, key, ..good.clone() };
        let errors: Vec<_> = pem_errors(&files, &identity).await;
        let errors: Vec<_> =
            errors.iter().filter(|error| !error.contains("peers with the same CA file")).collect();
        let expected = format!("{}: {text}", identity.key.display());
        assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{expected}: {errors:#?}");
    }
}

#[tokio::test]
async fn certificate_that_is_not_valid_yet_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let early = authority
        .identity_with("gw", |params| params.not_before = rcgen::date_time_ymd(3021, 7, 1));
    let checked = check(&files.write("gateway.toml", toml(&early, &early))).await;
    let expected = format!("{}: is not valid yet: valid from Jul  1", early.cert.display());
    assert_eq!(checked.code, Some(78));
    assert_eq!(checked.stderr.lines().count(), 1, "once, for both: {}", checked.stderr);
    assert!(unkeyed(&checked.stderr).starts_with(&expected), "{}", checked.stderr);
    let dates = typed(files.0.path(), command(&checked.stderr)).await;
    assert!(dates.contains("notBefore=Jul  1"), "{dates}");
}

/// Files in another format: the command in the error message converts them.
#[tokio::test]
async fn der_files_and_encrypted_keys_are_errors_with_a_command_to_convert_them() {
    let (files, authority) = (Files::new(), Authority::new());
    let directory = files.0.path();
    let good = authority.identity("localhost");
    let (cert, key) = (good.cert.display(), good.key.display());
    openssl(directory, &format!("x509 -in {cert} -outform DER -out cert.der")).await;
    openssl(directory, &format!("pkey -in {key} -outform DER -out key.der")).await;
    let encrypt = |format: &str| format!("{format} -in {key} -aes128 -passout pass:x -out");
    openssl(directory, &format!("{} new.key", encrypt("pkey"))).await;
    openssl(directory, &format!("{} old.key", encrypt("ec"))).await;
    let path = |name: &str| directory.join(name);
    let pkcs12 = format!("pkcs12 -export -inkey {key} -in {cert} -passout pass:x -out both.p12");
    openssl(directory, &pkcs12).await;
    openssl(directory, &format!("crl2pkcs7 -nocrl -certfile {cert} -outform DER -out cert.p7b"))
        .await;
    let wide: Vec<u8> = "\u{feff}"
        .encode_utf16()
        .chain(Identity::text(&good.cert).encode_utf16())
        .flat_map(u16::to_le_bytes)
        .collect();
    files.write("utf-16", wide);
    let both = |name: &str| Identity { cert: path(name), key: path(name), ..good.clone() };
    let with_cert = |cert: PathBuf| Identity { cert, ..good.clone() };
    let with_key = |key: PathBuf| Identity { key, ..good.clone() };
    let cases = [
        (with_cert(path("cert.der")), with_cert(path("cert.der.pem")), "cert.der", "is DER"),
        (both("both.p12"), both("both.p12.pem"), "both.p12", "is PKCS#12"),
        (with_cert(path("cert.p7b")), with_cert(path("cert.p7b.pem")), "cert.p7b", "is PKCS#7"),
        (with_cert(path("utf-16")), with_cert(path("utf-16.pem")), "utf-16", "is UTF-16"),
        (with_key(path("key.der")), with_key(path("key.der.pem")), "key.der", "is DER"),
        (with_key(path("new.key")), with_key(path("new.key.plain")), "new.key", "is encrypted"),
        (with_key(path("old.key")), with_key(path("old.key.plain")), "old.key", "is encrypted"),
    ];
    for (identity, fixed, name, error) in &cases {
        let errors = pem_errors(&files, identity).await;
        let expected = format!("{}: {error}", path(name).display());
        assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{expected}: {errors:#?}");
        // Non-interactive, since the test cannot type a passphrase.
        let asks = ["is encrypted", "is PKCS#12"].contains(error);
        let passphrase = if asks { " -passin pass:x" } else { "" };
        let (_, command) = errors[0].rsplit_once(": ").expect("a command");
        typed(directory, &format!("{command}{passphrase}")).await;
        let checked = check(&files.write("gateway.toml", toml(fixed, fixed))).await;
        assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""), "{name}");
    }
}

/// The advice in an error message must fix it.
#[tokio::test]
async fn commands_in_error_messages_show_the_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let (good, other) = (authority.identity("localhost"), authority.identity("localhost"));
    let mixed = Identity { key: other.key.clone(), ..good.clone() };
    let shown = typed(files.0.path(), command(&pem_errors(&files, &mixed).await[0])).await;
    let keys: Vec<_> = shown.split_inclusive("-----END PUBLIC KEY-----\n").collect();
    assert!(keys.len() == 2 && keys[0] != keys[1], "{shown}");

    let wrong = [
        (Identity { cert: good.key.clone(), ..good.clone() }, "Pkey"),
        (Identity { key: good.cert.clone(), ..good.clone() }, "Certificate"),
    ];
    for (identity, kind) in wrong {
        let shown = typed(files.0.path(), command(&pem_errors(&files, &identity).await[0])).await;
        assert!(shown.contains(&format!("0: {kind}")), "{shown}");
    }
}

#[tokio::test]
async fn files_that_are_not_configurations_are_errors() {
    let files = Files::new();
    for name in ["missing.toml", "missing.conf"] {
        let config = files.missing(name);
        let expected = format!("{}: cannot be read: No such file", config.display());
        let errors = errors_in(&config).await;
        assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{errors:#?}");
        let config = files.write(name, b"\xff\xfe");
        let expected = format!("{}: cannot be read: it is not UTF-8 text", config.display());
        assert_eq!(errors_in(&config).await, [expected]);
    }
}

/// Reading such files would never end or use all memory.
#[tokio::test]
async fn devices_directories_and_huge_files_are_errors() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let pipe = files.missing("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).expect("a pipe");
    let long = files.write("long", vec![b'\n'; (1 << 20) + 1]);
    for (path, why) in [
        (Path::new("/dev/zero"), "not a regular file"),
        (&pipe, "not a regular file"),
        (files.0.path(), "not a regular file"),
        (&long, "longer than 1048576 bytes"),
    ] {
        let error = format!("{}: cannot be read: {why}", path.display());
        assert_eq!(errors_in(path).await, [error.as_str()]);
        let cert = Identity { cert: path.to_owned(), ..identity.clone() };
        let config = files.write("gateway.toml", toml(&cert, &identity));
        let found = errors_in(&config).await;
        assert_eq!(found.iter().map(|error| unkeyed(error)).collect::<Vec<_>>(), [error.as_str()]);
        let option = format!("[fingergw]\nlog_config = {}\n", path.display());
        let zookeeper = format!("[zookeeper]\nhosts = a:1\n{}", conf(&identity));
        let config = files.write("zuul.conf", zookeeper + &option);
        let found = errors_in(&config).await;
        assert!(
            found.len() == 1 && found[0].ends_with(&format!("cannot be read: {why}")),
            "{found:?}"
        );
    }
}

#[tokio::test]
async fn log_file_that_cannot_be_opened_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let good = toml(&identity, &identity);
    for (path, why) in [
        (files.missing("nowhere/gateway.log"), "No such file or directory"),
        (files.0.path().to_owned(), "Is a directory"),
    ] {
        let log = format!("[log]\noutput = {path:?}\n");
        let errors = errors_in(&files.write("gateway.toml", log + &good)).await;
        let error = format!("{}: cannot be opened as the log file (create its", path.display());
        assert!(errors.len() == 1 && errors[0].starts_with(&error), "{errors:#?}");
        assert!(errors[0].contains(why), "{errors:#?}");
    }
    let path = files.missing("gateway.log");
    let log = format!("[log]\noutput = {path:?}\n");
    assert_eq!(check(&files.write("gateway.toml", log + &good)).await.code, Some(0));
    assert!(!path.exists(), "check creates nothing");
}

/// Zuul's own gateway does not start with such a file, either.
#[tokio::test]
async fn unusable_log_config_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let zookeeper = format!("[zookeeper]\nhosts = a:1\n{}", conf(&identity));
    let zuul_conf = |file: &Path| {
        let option = format!("[fingergw]\npidfile =\nlog_config = {}\n", file.display());
        files.write("zuul.conf", zookeeper.clone() + &option)
    };
    let missing = files.missing("missing.yaml");
    let config = zuul_conf(&missing);
    let expected = format!(
        "{}:8: [fingergw] log_config = {}: cannot be read: No such file",
        config.display(),
        missing.display()
    );
    let found = errors_in(&config).await;
    assert!(found.len() == 1 && found[0].starts_with(&expected), "{found:#?}");

    for (name, text, error) in [
        ("tab.yaml", "version: 1\n\tx: 2\n", ":1: "),
        ("list.json", "[1]", ":1: not a dictConfig: "),
        (
            "level.yml",
            "version: 1\nroot: {level: loud}",
            ": level of logger root = loud: must be one of CRITICAL",
        ),
        ("none.conf", "loggers\n", ":1: no [section] before it"),
        ("binary", "\0", ":1: "),
    ] {
        let file = files.write(name, text);
        let found = errors_in(&zuul_conf(&file)).await;
        let expected = format!("{}{error}", file.display());
        assert!(found.len() == 1 && found[0].starts_with(&expected), "{expected}: {found:#?}");
    }

    let good = files.write("good.yaml", "version: 1\nloggers: {kazoo: {level: INFO}}\n");
    let checked = check(&zuul_conf(&good)).await;
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    let warnings: Vec<_> = checked.stderr.lines().collect();
    assert!(
        warnings.len() == 1 && warnings[0].starts_with(&good.display().to_string()),
        "{warnings:#?}"
    );
    assert!(
        warnings[0].contains("no handler of zuul.fingergw writes to a file or stream"),
        "{warnings:#?}"
    );
}

/// The configuration is checked before sockets are bound; otherwise this start would fail with an
/// error about the address.
#[tokio::test]
async fn invalid_configuration_binds_no_socket() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = taken.local_addr().expect("its address");
    let other = Identity { key: authority.identity("x").key, ..identity.clone() };
    let listener = format!("[[listener]]\naddress = \"{address}\"\n");
    for tail in [toml(&other, &identity), toml(&identity, &identity) + "spurious = 1\n"] {
        let errors = errors_in(&files.write("gateway.toml", listener.clone() + &tail)).await;
        assert_eq!(errors.len(), 1, "{errors:#?}");
        assert!(!errors[0].contains("cannot listen"), "{errors:#?}");
    }
}

#[tokio::test]
async fn common_mistakes_on_the_command_line_get_a_hint() {
    let stderr = async |arguments: &[&str]| {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        let Outcome { code, stderr, .. } = run(&arguments).await;
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        stderr
    };
    for arguments in [&["check", "/etc/zuul/gw.toml"][..], &["/etc/zuul/gw.toml"]] {
        let output = stderr(arguments).await;
        let tip = "tip: to use a configuration file: '-c /etc/zuul/gw.toml'";
        assert!(output.contains(tip), "{arguments:?}: {output}");
    }
    let output = stderr(&["start"]).await;
    assert!(
        output.contains("tip: the gateway runs without a command") && !output.contains("'status'"),
        "{output}"
    );
    assert!(stderr(&["stauts"]).await.contains("a similar subcommand exists: 'status'"));
}

/// Help fits into 80 columns and ends with examples.
#[tokio::test]
async fn help_text_is_wrapped_to_the_terminal() {
    for arguments in [&["-h"][..], &["--help"], &["check", "--help"], &["resolve", "-h"]] {
        let mut command = Command::new(BINARY);
        command.args(arguments).env("COLUMNS", "80").stdin(Stdio::null()).kill_on_drop(true);
        let output = within("help", command.output()).await.expect("the program");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let longest = text.lines().max_by_key(|line| line.chars().count()).expect("lines");
        assert!(longest.chars().count() <= 80, "{arguments:?}: {longest}");
        let examples = text.contains("Examples:\n") && text.contains("See zuul-fingergw(8)");
        assert_eq!(examples, !arguments[0].starts_with(char::is_alphabetic), "{text}");
    }
}

#[tokio::test]
async fn port_in_use_is_an_error() {
    let (files, authority) = (Files::new(), Authority::new());
    let identity = authority.identity("localhost");
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = taken.local_addr().expect("its address");
    let listeners = ["127.0.0.1:0".to_owned(), address.to_string()]
        .map(|address| format!("[[listener]]\naddress = \"{address}\"\n"));
    let config = files.write("gateway.toml", listeners.concat() + &toml(&identity, &identity));
    assert_eq!(check(&config).await.code, Some(0), "the configuration has no error");
    let Outcome { code, stdout, stderr } =
        run(&["-f".as_ref(), "-c".as_ref(), config.as_ref()]).await;
    assert_eq!(code, Some(1), "{stdout}{stderr}");
    let expected = format!("cannot listen on {address}: Address already in use");
    assert!(stdout.lines().any(|l| l.contains(" ERROR ") && l.contains(&expected)), "{stdout}");
}

/// Returns the example in `etc/` with its files in another directory.
#[tokio::test]
async fn example_configuration_lacks_only_its_files() {
    const EXAMPLE: &str = include_str!("../../etc/zuul-fingergw.toml");
    let files = Files::new();
    let directory = files.0.path().to_str().expect("UTF-8");
    let example = EXAMPLE.replace("/etc/zuul/ssl", directory);
    let config = files.write("zuul-fingergw.toml", &example);
    let errors = errors_in(&config).await;
    assert_eq!(errors.len(), 3, "{errors:#?}");
    for name in ["zookeeper.crt", "zookeeper.key", "zookeeper-ca.crt"] {
        let error = format!("{}: cannot be read: ", files.missing(name).display());
        assert_eq!(
            errors.iter().filter(|f| unkeyed(f).starts_with(&error)).count(),
            1,
            "{errors:#?}"
        );
    }
    let authority = Authority::new();
    let identity = authority.identity("client");
    for (name, pem) in [
        ("zookeeper.crt", &identity.cert),
        ("zookeeper.key", &identity.key),
        ("zookeeper-ca.crt", &identity.ca),
    ] {
        files.write(name, Identity::text(pem));
    }
    let checked = check(&config).await;
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
}

#[tokio::test]
async fn version_help_and_usage_errors() {
    let version = run(&["--version".as_ref()]).await;
    let expected = concat!("zuul-fingergw ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!((version.code, version.stdout.as_str()), (Some(0), expected));

    let help = run(&["--help".as_ref()]).await;
    assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""));
    for word in ["check", "demo", "status", "stop", "-c <FILE>", "-f", "-d", "zuul.conf"] {
        assert!(help.stdout.contains(word), "{word} in {}", help.stdout);
    }
    for wrong in [["--frobnicate"].as_slice(), &["frobnicate"], &["-c"], &["demo", "--log"]] {
        let arguments: Vec<&OsStr> = wrong.iter().map(OsStr::new).collect();
        let refused = run(&arguments).await;
        assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{wrong:?}");
        assert!(refused.stderr.contains(wrong[wrong.len() - 1]), "{}", refused.stderr);
    }
}

/// A gateway from a `zuul.conf` that reaches ZooKeeper under an address that is not in its
/// certificate: Zuul's services do not check that.
struct FromZuulConf {
    gateway: Gateway,
    _proxy: Proxy,
}

impl FromZuulConf {
    async fn start(system: &System, fingergw: &str) -> Self {
        let proxy =
            Proxy::start_on(Ipv4Addr::new(127, 0, 0, 2).into(), system.zookeeper.port).await;
        let directory = TempDir::new().expect("a directory");
        let config = directory.path().join("zuul.conf");
        let zookeeper = conf(&system.zookeeper.identity);
        let hosts = system.hosts_via(&proxy);
        let text = format!(
            "# Other services' sections are none of our business.\n\
             [connection \"gerrit\"]\ndriver = gerrit\npassword = 100%\n\n\
             [zookeeper]\nhosts = {hosts}\n{zookeeper}session_timeout = 20.5\n\n\
             [fingergw]\nlisten_address = 127.0.0.1\nport = 0\nhostname = localhost\n\
             user = root\nstate_dir = /var/lib/zuul\ncommand_socket = {}\n{fingergw}",
            directory.path().join("socket").display()
        );
        fs::write(&config, text).expect("zuul.conf");
        let mut gateway = Gateway::with_config(directory, &config).await;
        gateway.ready().await;
        Self { gateway, _proxy: proxy }
    }
}

/// Returns the identity's files as options of a `zuul.conf`.
fn conf(Identity { cert, key, ca, .. }: &Identity) -> String {
    let (cert, key, ca) = (cert.display(), key.display(), ca.display());
    format!("tls_cert = {cert}\ntls_key = {key}\ntls_ca = {ca}\n")
}

/// Returns port, TLS and zone of the registry entry of the one real gateway.
async fn entry(system: &System) -> (Option<u64>, bool, Option<String>) {
    let real =
        |entry: &&Entry| entry.stat.ephemeral_owner != 0 && entry.content["state"] == "running";
    let entries = system.until("a running entry", |all| all.iter().any(|e| real(&e))).await;
    let content = &entries.iter().find(real).expect("it is there").content;
    let zone = content["zone"].as_str().map(str::to_owned);
    (content["public_port"].as_u64(), content["use_ssl"] == true, zone)
}

#[tokio::test]
async fn zuul_conf_without_tls_makes_a_plain_gateway() {
    let system = System::new().await;
    let started = FromZuulConf::start(&system, "zone = west\npublic_port = 7979\n").await;
    assert_eq!(entry(&system).await, (Some(7979), false, Some("west".to_owned())));
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(started.gateway.address(), &build).await;
    let mut log = executor.accept().await;
    log.write(b"log\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// Without a zone, Zuul's gateway registers only a port that the kernel has chosen.
#[tokio::test]
async fn public_port_without_a_zone_is_a_warning() {
    for (lines, given) in [("public_port = 7979\n", false), ("public_port = 0\n", true), ("", true)]
    {
        let system = System::new().await;
        let started = FromZuulConf::start(&system, lines).await;
        let port = given.then(|| u64::from(started.gateway.port()));
        assert_eq!(entry(&system).await, (port, false, None), "{lines}");
    }
}

#[tokio::test]
async fn zuul_conf_with_tls_makes_a_tls_gateway() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let started = FromZuulConf::start(&system, &conf(&identity)).await;
    let port = u64::from(started.gateway.port());
    assert_eq!(entry(&system).await, (Some(port), true, None));
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask_tls(started.gateway.address(), &identity, &build).await;
    let mut log = executor.accept().await;
    log.write(b"log\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// A plain listener for clients, and one with TLS for gateways of other zones.
#[tokio::test]
async fn zuul_conf_with_tls_client_only_makes_a_plain_gateway_that_dials_by_tls() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let options = conf(&identity) + "tls_client_only = True\nzone = east\n";
    let west = Executor::start().await;
    system.put_gateway(Some("west"), Some(west.address.port()), true, "running").await;
    let started = FromZuulConf::start(&system, &options).await;
    let port = u64::from(started.gateway.port());
    assert_eq!(entry(&system).await, (Some(port), false, Some("east".to_owned())));

    let executor = executor::refusing_port().await;
    let worker = Worker { port: executor, ..west.worker(Some("west")) };
    let build = system.put_build(Some("west"), Some(&worker)).await;
    let mut client = Client::ask(started.gateway.address(), &build).await;
    let mut log = west.accept_tls(&executor::acceptor(&identity)).await;
    assert_eq!(log.request, format!("{build}\n"));
    log.write(b"log\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// A gateway behaves as its `check` has predicted.
#[tokio::test]
async fn check_and_start_report_the_same() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let listeners = ["client_certificate = \"none\"", "tls = true"];
    let builder = Builder::new(&system).zone("west").tls(&identity).listeners(&listeners);
    assert_eq!(check(&builder.write()).await.code, Some(0));
    let gateway = builder.ready().await;
    assert_eq!(gateway.addresses.len(), 2);
}

/// `check` rejects an expired certificate; a start logs the error and continues, because plain
/// listeners and executors do not use the certificate.
#[tokio::test]
async fn expired_certificate_is_an_error() {
    let system = System::new().await;
    let expired = system.zookeeper.authority.expired("gateway");
    let builder = Builder::new(&system).tls(&expired);
    let outcome = check(&builder.write()).await;
    let error = format!("{}: has expired: valid until Jul  1", expired.cert.display());
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(78), ""));
    assert!(unkeyed(&outcome.stderr).starts_with(&error), "{}", outcome.stderr);
    let mut gateway = builder.ready().await;
    gateway.logged("the line", |line| line.contains("ERROR") && line.contains(&error)).await;
}

/// A warning does not prevent a start, and is logged once.
#[tokio::test]
async fn certificate_with_a_warning_is_accepted() {
    let system = System::new().await;
    let nameless = system.zookeeper.authority.common_name_only("localhost");
    let builder = Builder::new(&system).tls(&nameless).listeners(&["tls = true"]);
    let mut gateway = builder.ready().await;
    let error = format!("{}: has no", nameless.cert.display());
    let is_it = |line: &str| line.contains(" WARN ") && line.contains(&error);
    gateway.logged("the line", is_it).await;
    let warnings = gateway.log().iter().filter(|line| is_it(line)).count();
    assert_eq!(warnings, 1);
}

/// Such a certificate gets no message for ZooKeeper, because Java accepts it.
#[tokio::test]
async fn zookeeper_accepts_a_ca_certificate_of_a_client() {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let mut builder = Builder::new(&system);
    builder.zookeeper_identity = authority
        .identity_with("gw", |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(check(&builder.write()).await.stderr, "");
    builder.ready().await;
}

/// A certificate that is not valid for clients is an error, because Java rejects it.
#[tokio::test]
async fn zookeeper_rejects_a_certificate_that_is_not_for_clients() {
    let system = System::new().await;
    let mut builder = Builder::new(&system);
    builder.zookeeper_identity = system.zookeeper.authority.identity_with("gw", |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let mut gateway = builder.start().await;
    gateway
        .logged("the line", |line| line.contains(" ERROR ") && line.contains("not for clients"))
        .await;
    gateway
        .logged("ZooKeeper's refusal", |line| {
            line.contains("registry::zookeeper") && line.contains("received fatal alert")
        })
        .await;
}
