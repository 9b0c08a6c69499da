//! The default host name for the registry entry: the result of Python's `socket.getfqdn`, which
//! Zuul's gateway registers.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use nix::sched::CloneFlags;
use tempfile::TempDir;

use crate::script::python;
use crate::support::certificates::Authority;
use crate::support::gateway::BINARY;
use crate::support::namespace::in_namespaces;
use crate::support::tool;

/// Returns Python's name for this machine.
async fn getfqdn() -> String {
    let output = python().args(["-c", "import socket; print(socket.getfqdn())"]).output().await;
    String::from_utf8(output.expect("Python").stdout).expect("UTF-8").trim().to_owned()
}

/// Returns the program's name for this machine, from the first line of its log, which is written
/// even if the start fails.
fn registered(config: &Path) -> String {
    let output = Command::new(BINARY).args(["-f", "-c"]).arg(config).output().expect("the program");
    let log = String::from_utf8(output.stdout).expect("UTF-8");
    let (_, rest) = log.split_once(" registers=").unwrap_or_else(|| panic!("no name in {log}"));
    rest.split_whitespace().next().expect("a name").to_owned()
}

#[test]
fn default_host_name_is_the_one_that_python_finds() {
    in_namespaces(CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNS, async || {
        let directory = TempDir::new().expect("a directory");
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let authority = Authority::new();
        let identity = authority.identity("localhost");
        let (cert, key, ca) = (&identity.cert, &identity.key, &identity.ca);
        let config = directory.path().join("gateway.toml");
        let text = format!(
            "[[listener]]\naddress = \"{}\"\n[zookeeper]\nhosts = \"127.0.0.1:1\"\n\
             tls_cert = {cert:?}\ntls_key = {key:?}\ntls_ca = {ca:?}\n",
            taken.local_addr().expect("its address")
        );
        fs::write(&config, text).expect("the configuration");
        let [hosts, resolver] = ["hosts", "resolv.conf"].map(|name| directory.path().join(name));
        for (file, place) in [(&hosts, "/etc/hosts"), (&resolver, "/etc/resolv.conf")] {
            fs::write(file, "").expect("a file");
            tool(Command::new("mount").arg("--bind").arg(file).arg(place));
        }
        let mut names = Vec::new();
        for (own, lines) in [
            ("node1", "10.0.0.5 node1 node1.example.org\n"),
            ("node1", "10.0.0.5 node1.example.org node1\n"),
            ("node1", "10.0.0.5 other node1\n"),
            ("node1", "10.0.0.5 node1 # node1.example.org\n"),
            ("node1", "10.0.0.5 node1\n10.0.0.5 node1.example.org\n"),
            ("node1", "10.0.0.5 node1.example.org\n10.0.0.5 node1\n"),
            ("node1", "127.0.0.1 localhost\n127.0.1.1 node1.example.org node1\n"),
            ("node1", "::1 localhost node1 v6.example.org\n127.0.0.1 node1 v4.example.org\n"),
            ("node1.example.org", "10.0.0.5 other.example.org node1.example.org\n"),
            ("node1", ""),
        ] {
            rustix::system::sethostname(own.as_bytes()).expect("a host name");
            fs::write(&hosts, lines).expect("hosts");
            let name = registered(&config);
            assert_eq!(name, getfqdn().await, "{own}: {lines:?}");
            names.push(name);
        }
        assert_eq!(names[..3], ["node1.example.org", "node1.example.org", "other"]);
    });
}
