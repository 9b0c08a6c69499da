//! `[tracing]` of a `zuul.conf`: values with which Zuul's services start are accepted, values that
//! they reject are rejected, except for differences that are listed here. A build without the cargo
//! feature `otlp` starts with all of them.

use serde_json::json;
use tokio::process::Command;

use crate::script::Script;
use crate::support::gateway::{BINARY, Builder};
use crate::support::system::System;
use crate::support::within;

/// Whether the programs accept a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Both,
    Neither,
    /// Zuul's manual documents it, but its services do not start with it.
    Ours,
    /// Zuul's services start with it, and then every export fails.
    Theirs,
}

use Verdict::{Both, Neither, Ours, Theirs};

const HTTP: &str = "enabled = true\nprotocol = http/protobuf\n";
const GRPC: &str = "enabled = true\nprotocol = grpc\n";

/// `FILES` stands for a directory with `ca.pem`, `cert.pem` and `key.pem`.
const CASES: [(&str, &str, Verdict); 38] = [
    ("", "", Both),
    ("", "enabled = no\nprotocol = no such", Both),
    ("", "enabled = maybe\ntimeout = no such", Both),
    ("", "enabled = ON", Both),
    ("", "enabled = true\nprotocol = GRPC", Neither),
    ("", "enabled = true\nprotocol =", Neither),
    (GRPC, "", Both),
    (GRPC, "endpoint =\nservice_name =\ntls_ca =\ncertificate_file =\ncompression =", Both),
    (GRPC, "endpoint = collector:4317", Both),
    (GRPC, "endpoint = http://collector", Both),
    (GRPC, "endpoint = https://collector:4317\ninsecure = true", Both),
    (GRPC, "endpoint = a b", Theirs),
    (GRPC, "certificate_file = FILES/ca.pem", Neither),
    (GRPC, "endpoint = https://c:1\ntls_ca = FILES/ca.pem", Both),
    (GRPC, "endpoint = https://c:1\ntls_ca = FILES/none.pem", Neither),
    (GRPC, "endpoint = https://c:1\ntls_cert = FILES/cert.pem", Neither),
    (GRPC, "endpoint = https://c:1\ntls_key = FILES/key.pem", Neither),
    (GRPC, "endpoint = https://c:1\ntls_cert = FILES/cert.pem\ntls_key = FILES/key.pem", Both),
    (GRPC, "endpoint = https://c:1\ntls_ca = FILES/key.pem", Theirs),
    (GRPC, "insecure = maybe", Both),
    (GRPC, "timeout = 5", Both),
    (GRPC, "timeout = 10000", Both),
    (GRPC, "timeout = 0", Both),
    (GRPC, "timeout = -1", Theirs),
    (GRPC, "timeout =", Neither),
    (GRPC, "timeout = 1.5", Neither),
    (GRPC, "compression = gzip", Ours),
    (GRPC, "compression = none", Ours),
    (GRPC, "compression = 2", Both),
    (GRPC, "compression = brotli", Neither),
    (HTTP, "", Both),
    (HTTP, "endpoint = http://collector:4318/v1/traces", Both),
    (HTTP, "endpoint = collector:4318", Theirs),
    (HTTP, "insecure = true", Neither),
    (HTTP, "insecure = false\ntls_ca =", Both),
    (HTTP, "tls_ca = FILES/ca.pem", Neither),
    (HTTP, "endpoint = https://c:1\ncertificate_file = FILES/ca.pem", Both),
    (HTTP, "compression = gzip", Ours),
];

#[tokio::test]
async fn tracing_options_of_zuuls_gateway_are_accepted() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let files = identity.cert.parent().expect("a directory").to_owned();
    std::fs::copy(&identity.ca, files.join("ca.pem")).expect("a copy");
    let mut theirs = Script::start("tracing_conf.py", []);
    for (start, lines, expected) in CASES {
        let lines = format!("{start}{lines}").replace("FILES", &files.display().to_string());
        // One argument of the script.
        let word = json!(lines).to_string().replace(' ', "\\u0020");
        let they_do = theirs.ask(&format!("take {word}")).await == true;
        let builder = Builder::new(&system);
        let path = builder.write_zuul_conf(&format!("[tracing]\n{lines}"));
        let check = Command::new(BINARY).args(["check", "-c"]).arg(path).output();
        let output = within("the check", check).await.expect("the built binary");
        let (we_do, text) = (output.status.success(), String::from_utf8_lossy(&output.stderr));
        if cfg!(feature = "otlp") {
            let verdict = match (they_do, we_do) {
                (true, true) => Both,
                (false, false) => Neither,
                (false, true) => Ours,
                (true, false) => Theirs,
            };
            assert_eq!(verdict, expected, "{lines}\n{text}");
            assert!(we_do || text.contains("[tracing]") || text.contains(".pem: "), "{text}");
        } else {
            // As Zuul's gateway, which has no tracing; ours logs that it ignores the section.
            assert_eq!(they_do, matches!(expected, Both | Theirs), "{lines}");
            let on = lines.contains("enabled = true") || lines.contains("enabled = ON");
            assert!(we_do && text.contains("built without it") == on, "{lines}\n{text}");
        }
    }
}
