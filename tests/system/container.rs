//! The container image: its contents, and that it runs as any user, with a read-only root and
//! without capabilities. It is built from the real Containerfile (`support::container`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::support::checkout::{installed, read};
use crate::support::client::Client;
use crate::support::container::{Image, confined, may_run};
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::process::{field, process_of};
use crate::support::run_with_input;
use crate::support::static_program::static_program;
use crate::support::system::System;

/// Returns owner, group and mode of everything below `root`.
fn tree(root: &Path) -> BTreeMap<String, (u32, u32, u32)> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).expect("a directory").flatten() {
            let metadata = entry.metadata().expect("its metadata");
            let path = entry.path();
            let name = path.strip_prefix(root).expect("below it").display().to_string();
            let mode = metadata.permissions().mode() & 0o7777;
            found.insert(name, (metadata.uid(), metadata.gid(), mode));
            if metadata.is_dir() {
                todo.push(path);
            }
        }
    }
    found
}

/// Returns the findings of hadolint.
fn linted(text: &str) -> String {
    // Package versions follow the base image.
    let mut hadolint = Command::new(installed("validators/bin/hadolint"));
    hadolint.args(["--no-color", "--ignore", "DL3008", "-"]);
    let Output { status, stdout, .. } = run_with_input(&mut hadolint, text);
    assert_eq!(status.success(), stdout.is_empty());
    String::from_utf8(stdout).expect("UTF-8")
}

#[test]
fn hadolint_accepts_the_containerfile() {
    let text = read("etc/container/Containerfile");
    assert_eq!(linted(&text), "");
    let output = linted(&text.replace("STOPSIGNAL", "STOPSINGAL"));
    assert!(output.contains("STOPSINGAL") || output.contains("unexpected"), "{output}");
}

/// An image contains what the packages of a release contain.
#[test]
fn image_has_the_features_of_a_release() {
    let read = |path| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        fs::read_to_string(path).expect("a file")
    };
    let release = read("etc/release");
    let features = release.split_once("FEATURES=${FEATURES-").and_then(|(_, rest)| {
        let (features, _) = rest.split_once("}\n")?;
        Some(features)
    });
    let features = features.expect("what a release is built with");
    let argument = format!("\nARG FEATURES=\"{features}\"\n");
    assert!(read("etc/container/Containerfile").contains(&argument), "no {argument}");
}

#[tokio::test]
async fn image_has_the_program_and_its_directories() {
    let image = Image::build(static_program()).await;
    let mut config = image.config().await;
    let labels = config["Labels"].as_object_mut().expect("labels");
    labels.remove("io.buildah.version");
    let expected = json!({
        "User": "10001:0",
        "ExposedPorts": {"9079/tcp": {}, "9090/tcp": {}},
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        // No entry point: an operator's arguments are the whole command line.
        "Cmd": ["/usr/local/bin/zuul-fingergw", "-f"],
        "Labels": {
            "org.opencontainers.image.title": "zuul-fingergw",
            "org.opencontainers.image.description": "Finger gateway for Zuul CI",
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.opencontainers.image.version": "1.2.3",
            "org.opencontainers.image.revision": "abcdef",
            "org.opencontainers.image.source": "https://source.example.org/",
        },
        "StopSignal": "SIGTERM",
    });
    assert_eq!(config, expected);

    let root = image.root().await;
    let (shared, own) = ((0, 0, 0o755), (10001, 0, 0o775));
    let mut expected: BTreeMap<_, _> =
        ["etc", "usr", "usr/local", "usr/local/bin", "var", "var/lib", "var/run"]
            .into_iter()
            .map(|directory| (directory.to_owned(), shared))
            .collect();
    expected.extend([
        ("usr/local/bin/zuul-fingergw".to_owned(), shared),
        ("etc/passwd".to_owned(), (0, 0, 0o644)),
        ("var/lib/zuul".to_owned(), own),
        ("var/run/zuul".to_owned(), own),
    ]);
    assert_eq!(tree(&root), expected);
    let passwd = fs::read_to_string(root.join("etc/passwd")).expect("passwd");
    assert_eq!(passwd, "zuul:x:10001:0:Zuul:/var/lib/zuul:/bin/false\n");
}

/// The other image behaves the same, and its user can write to the same directories.
#[tokio::test]
async fn image_with_a_shell_has_the_same() {
    let image = Image::build_shell(static_program()).await;
    let config = image.config().await;
    assert_eq!(config["User"], "10001:0");
    assert_eq!(config["ExposedPorts"], json!({"9079/tcp": {}, "9090/tcp": {}}));
    assert_eq!(config["Cmd"], json!(["/usr/local/bin/zuul-fingergw", "-f"]));
    assert_eq!(config["StopSignal"], "SIGTERM");
    assert!(config["Entrypoint"].is_null() && config["Volumes"].is_null());
    let tree = tree(&image.root().await);
    // Debian's /var/run is its /run.
    for directory in ["var/lib/zuul", "run/zuul"] {
        assert_eq!(tree.get(directory), Some(&(10001, 0, 0o775)), "{directory}");
    }
    assert_eq!(tree.get("usr/local/bin/zuul-fingergw"), Some(&(0, 0, 0o755)));
}

/// With a `zuul.conf` where zuul-operator mounts it, and nothing else.
#[tokio::test]
async fn container_serves_as_any_user_on_a_read_only_root() {
    if !may_run().await {
        return;
    }
    let system = System::new().await;
    let image = Image::build(static_program()).await;
    let builder = Builder::new(&system).readable_by_all();
    let directory = builder.directory().display().to_string();
    let mut options = confined();
    options.push(format!("--volume={directory}/zuul.conf:/etc/zuul/zuul.conf:ro"));
    let change = |command: &mut _| image.instead_of(command, &options);
    let mut gateway = builder.ready_from_zuul_conf("", change).await;
    let pid = process_of(&gateway);
    assert_eq!(field(pid, "Uid:"), "1000660000 1000660000 1000660000 1000660000");
    assert_eq!(field(pid, "Gid:"), "0 0 0 0");
    assert_eq!(field(pid, "NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(pid, set), 16), Ok(0), "{set}");
    }
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"from a container\n").await;
    assert_eq!(client.text().await, "from a container\n");

    kill_process(pid, Signal::TERM).expect("a signal");
    let status = gateway.exit().await;
    assert!(status.success(), "{status}");
    assert!(system.entries().await.is_empty());
}
