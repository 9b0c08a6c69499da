//! What is in `etc/kubernetes`: rendered by kustomize, valid by the schemas of its kinds, and what no
//! schema knows: that its parts fit each other, and the configuration in it.

mod facts;
mod started;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::checkout::{installed, top};
use crate::support::fed;

/// What an overlay says, or the base.
struct Rendered {
    objects: Vec<Value>,
    /// The configuration in it, if there is one.
    toml: Value,
}

impl Rendered {
    /// The one object of `kind`.
    fn one(&self, kind: &str) -> &Value {
        self.any(kind).unwrap_or_else(|| panic!("no {kind}"))
    }

    fn any(&self, kind: &str) -> Option<&Value> {
        let mut found = self.objects.iter().filter(|object| object["kind"] == kind);
        let first = found.next();
        assert!(found.next().is_none(), "more than one {kind}");
        first
    }

    fn container(&self) -> &Value {
        let containers = list(&self.one("Deployment")["spec"]["template"]["spec"]["containers"]);
        assert_eq!(containers.len(), 1);
        &containers[0]
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

/// What kustomize makes of a directory below `etc/kubernetes`.
fn yaml(directory: &str) -> String {
    built(&top().join("etc/kubernetes").join(directory))
}

fn built(path: &Path) -> String {
    let kustomize = installed("debian/usr/bin/kustomize");
    let Output { status, stdout, stderr } =
        Command::new(kustomize).arg("build").arg(path).output().expect("kustomize (tests/run)");
    // It warns of keys that a later one will not know.
    assert!(status.success() && stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("UTF-8")
}

/// What it says if it is valid, or what is wrong.
fn validated(yaml: &str) -> Result<Rendered, String> {
    let mut python = Command::new(installed("validators/bin/python"));
    python.arg(top().join("tests/it/kubernetes/validate.py"));
    python.arg(installed("debian/usr/share/gocode/src/github.com/openshift/api"));
    let Output { status, stdout, stderr } = fed(&mut python, yaml);
    if !status.success() {
        return Err(String::from_utf8_lossy(&stderr).into_owned());
    }
    let mut told: Value = serde_json::from_slice(&stdout).expect("JSON");
    let Value::Array(objects) = told["objects"].take() else { panic!("no objects") };
    Ok(Rendered { objects, toml: told["toml"]["zuul-fingergw.toml"].take() })
}

/// What is in a directory below `etc/kubernetes`, all of which are rendered and validated once.
fn rendered(directory: &str) -> &'static Rendered {
    static ALL: LazyLock<BTreeMap<String, Rendered>> = LazyLock::new(|| {
        let valid = |directory: String| {
            let rendered = validated(&yaml(&directory));
            let rendered = rendered.unwrap_or_else(|faults| panic!("{directory}: {faults}"));
            (directory, rendered)
        };
        directories().into_iter().map(valid).collect()
    });
    ALL.get(directory).unwrap_or_else(|| panic!("no {directory}"))
}

/// All that there is, so that what comes is not forgotten.
fn directories() -> Vec<String> {
    let overlays = top().join("etc/kubernetes/overlays");
    let overlays = fs::read_dir(overlays).expect("overlays").flatten();
    let overlays = overlays.map(|entry| format!("overlays/{}", entry.file_name().display()));
    ["base".to_owned()].into_iter().chain(overlays).collect()
}

/// Those that bring gateways of their own.
const DEPLOYED: [&str; 4] =
    ["base", "overlays/zone-openshift", "overlays/zone-gateway-api", "overlays/zuul-operator"];

#[test]
fn every_manifest_is_valid() {
    let directories = directories();
    assert_eq!(directories.len(), 5);
    for directory in directories {
        let rendered = rendered(&directory);
        let deployed = DEPLOYED.contains(&directory.as_str());
        assert_eq!(rendered.any("Deployment").is_some(), deployed, "{directory}");
    }
}

/// What the schemas are there for, kind by kind.
#[test]
fn misspelt_keys_are_found() {
    let (openshift, gateway) = ("overlays/zone-openshift", "overlays/zone-gateway-api");
    let wrong = [
        ("base", "readinessProbe:", "readynessProbe:", "readynessProbe"),
        ("base", "PeriodSeconds: 330", "PeriodSeconds: 330s", "330s"),
        ("base", "maxUnavailable: 1", "maxUnavailble: 1", "maxUnavailble"),
        ("base", "targetPort:", "targetport:", "targetport"),
        ("base", "podSelector:", "podSelectors:", "podSelectors"),
        ("base", "podMetricsEndpoints:", "podMetricEndpoints:", "podMetricEndpoints"),
        (openshift, "wildcardPolicy:", "wildcardpolicy:", "wildcardpolicy"),
        (openshift, "insecureEdgeTerminationPolicy:", "insecure:", "insecure"),
        (openshift, "weight: 100", "wait: 100", "wait"),
        (gateway, "gatewayClassName:", "gatewayClass:", "gatewayClass"),
        (gateway, "mode: Passthrough", "mode: passthrough", "passthrough"),
        (gateway, "sectionName:", "section:", "section"),
        (gateway, "hostnames:", "hosts:", "hosts"),
        ("overlays/zuul-operator-service", "selector:", "selectors:", "selectors"),
    ];
    // All at once: most of a run is its start.
    let mut all = String::new();
    for (directory, right, wrong, _) in wrong {
        let yaml = yaml(directory);
        assert!(yaml.contains(right), "{directory} has no {right}");
        all += &yaml.replace(right, wrong);
        all += "\n---\n";
    }
    let Err(faults) = validated(all.trim_end_matches("---\n")) else { panic!("all is valid") };
    for (directory, _, wrong, named) in wrong {
        assert!(faults.contains(named), "{directory}: {wrong} is valid\n{faults}");
    }
}

/// The overlay of one's own that docs/kubernetes.md begins with, and what it says to leave out.
#[test]
fn the_documentations_own_overlay_is_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/kubernetes.md")).expect("the page");
    let blocks = page.split("```yaml\n").skip(1);
    let blocks: Vec<_> = blocks.filter_map(|block| Some(block.split_once("```")?.0)).collect();
    let [overlay, certificate, leave_out] = &blocks[..] else { panic!("{} blocks", blocks.len()) };
    let directory = TempDir::new().expect("a directory");
    symlink(root, directory.path().join("zuul-fingergw")).expect("a link");
    let own = directory.path().join("own");
    fs::create_dir(&own).expect("a directory");
    let of_overlay = root.join("etc/kubernetes/overlays/zone-openshift/zuul-fingergw.toml");
    fs::copy(of_overlay, own.join("zuul-fingergw.toml")).expect("a copy");
    for (more, monitored) in [("", true), (*leave_out, false)] {
        fs::write(own.join("kustomization.yaml"), format!("{overlay}{more}")).expect("a file");
        let rendered = validated(&built(&own)).unwrap_or_else(|faults| panic!("{faults}"));
        assert_eq!(rendered.any("PodMonitor").is_some(), monitored);
        let image = text(&rendered.container()["image"]);
        assert_eq!(image, "registry.site.example/zuul-fingergw:0.1.0");
        assert_eq!(rendered.one("Service")["metadata"]["namespace"], "zuul");
        let hostname = text(&rendered.toml["hostname"]);
        assert!(certificate.contains(&format!("dnsNames:\n  - {hostname}\n")), "{certificate}");
    }
}
