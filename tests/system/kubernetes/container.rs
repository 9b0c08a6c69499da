//! The manifests' own configuration in the container that they describe: mounts, user and
//! confinement as in the Deployment, by podman. ZooKeeper is real, at the port of the
//! configuration.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sched::CloneFlags;
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

use super::{DEPLOYED, Rendered, list, rendered, text};
use crate::support::admin;
use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::container::{Image, confined, may_run, run};
use crate::support::executor::Executor;
use crate::support::gateway::{Gateway, open_to_all};
use crate::support::namespace::in_namespaces;
use crate::support::process::process_of;
use crate::support::static_program::static_program;
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;

/// Writes a Secret as cert-manager creates it.
fn secret(directory: &Path, Identity { cert, key, ca, .. }: &Identity) {
    for (name, file) in [("tls.crt", cert), ("tls.key", key), ("ca.crt", ca)] {
        fs::copy(file, directory.join(name)).expect("a copy");
        // Every user of the pod can read a Secret's files.
        fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o644))
            .expect("a mode");
    }
}

/// Returns podman options that correspond to the Deployment. Mounted files are below `directory`.
fn options(rendered: &Rendered, directory: &Path, identities: &[(&str, &Identity)]) -> Vec<String> {
    // `pods_are_confined` checks that the Deployment requires exactly this.
    let mut options = confined();
    let pod = &rendered.one("Deployment")["spec"]["template"]["spec"];
    for mount in list(&rendered.container()["volumeMounts"]) {
        let (name, path) = (text(&mount["name"]), text(&mount["mountPath"]));
        let volume = list(&pod["volumes"]).iter().find(|volume| volume["name"] == name);
        let volume = volume.unwrap_or_else(|| panic!("no volume {name}"));
        if volume["emptyDir"].is_object() {
            options.push(format!("--mount=type=tmpfs,destination={path},tmpfs-mode=0777"));
            continue;
        }
        let source = directory.join(name);
        fs::create_dir(&source).expect("a directory");
        open_to_all(&source);
        if let Some(secret_name) = volume["secret"]["secretName"].as_str() {
            let identity = identities.iter().find(|(name, _)| *name == secret_name);
            secret(&source, identity.unwrap_or_else(|| panic!("no Secret {secret_name}")).1);
        } else {
            let map = rendered.one("ConfigMap");
            assert_eq!(map["metadata"]["name"], volume["configMap"]["name"]);
            for (file, content) in map["data"].as_object().expect("files") {
                fs::write(source.join(file), text(content)).expect("a file");
            }
        }
        assert_eq!(mount["readOnly"], true, "{name}");
        options.push(format!("--volume={}:{path}:ro", source.display()));
    }
    // ZooKeeper's names in the configuration.
    let hosts = text(&rendered.toml["zookeeper"]["hosts"]);
    let (host, port) = hosts.rsplit_once(':').expect("a port");
    assert_eq!(port, "2281");
    options.push(format!("--add-host={host}:127.0.0.1"));
    options
}

/// Forwards 127.0.0.1:2281 to ZooKeeper's port.
async fn lead_to(zookeeper: &ZooKeeper) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 2281)).await.expect("a port");
    let port = zookeeper.port;
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
}

/// Returns the response to a probe of the kubelet.
async fn probe(rendered: &Rendered, name: &str) -> String {
    let path = text(&rendered.container()[name]["httpGet"]["path"]);
    admin::get(SocketAddr::from((Ipv4Addr::LOCALHOST, 9090)), path).await.status
}

/// Runs one gateway from start to stop.
async fn serve(directory: &str, image: &Image, system: &System, own: &Identity) {
    let rendered = rendered(directory);
    let identities =
        [("zookeeper-client-tls", &system.zookeeper.identity), ("zuul-fingergw-tls", own)];
    let files = TempDir::new().expect("a directory");
    open_to_all(files.path());
    let options = options(rendered, files.path(), &identities);
    let check = ["/usr/local/bin/zuul-fingergw", "check"];
    // The command succeeds. Its output may be lost: podman may attach after its end.
    run(&mut image.container(&options, &check)).await;

    let change = |command: &mut _| image.instead_of(command, &options);
    let mut gateway = Gateway::with_command(files, Path::new("unused"), change).await;
    gateway.ready().await;
    for name in ["startupProbe", "readinessProbe", "livenessProbe"] {
        assert_eq!(probe(rendered, name).await, "HTTP/1.1 200 OK", "{directory}, {name}");
    }
    let entries = system.entries().await;
    let [entry] = &entries[..] else { panic!("{directory}: {entries:?}") };
    let toml = &rendered.toml;
    assert_eq!(entry.content["zone"], toml["zone"], "{directory}");
    if toml["zone"] != Value::Null {
        assert_eq!(entry.content["hostname"], toml["hostname"], "{directory}");
        assert_eq!(entry.content["public_port"], toml["public_port"], "{directory}");
        assert_eq!(entry.content["use_ssl"], true, "{directory}");
    }

    let executor = Executor::start().await;
    let zone = toml["zone"].as_str();
    let build = system.put_build(zone, Some(&executor.worker(zone))).await;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 9079));
    if zone.is_some() {
        // As a gateway of another zone does.
        let name = text(&toml["hostname"]);
        let connecting = Client::try_connect_tls(address, name, own, Some(own)).await;
        let mut client = connecting.expect("a TLS connection");
        client.send(format!("{build}\n").as_bytes()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{directory}");
    } else {
        let mut client = Client::ask(address, &build).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{directory}");
    }

    // Not ready as soon as it has left the registry, and alive during the lame duck period.
    kill_process(process_of(&gateway), Signal::TERM).expect("a signal");
    system.until("it to leave", <[_]>::is_empty).await;
    assert_eq!(probe(rendered, "readinessProbe").await, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(probe(rendered, "livenessProbe").await, "HTTP/1.1 200 OK");
    // The lame duck period is not tested here.
    kill_process(process_of(&gateway), Signal::KILL).expect("a signal");
    gateway.exit().await;
}

#[test]
fn every_configuration_serves_in_its_pod() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        if !may_run().await {
            return;
        }
        let image = Image::build(static_program()).await;
        let zookeeper = ZooKeeper::start().await;
        lead_to(&zookeeper).await;
        let system = System::at_root(&zookeeper).await;
        let authority = Authority::new();
        let own = authority.identity_only_for("fingergw.west.example.org");
        for directory in DEPLOYED {
            serve(directory, &image, &system, &own).await;
        }
    });
}
