//! The manifests in `etc/kubernetes`: rendered by kustomize, validated against the schemas of their
//! kinds, and checked for consistency with each other and with the configuration.

mod consistency;
mod container;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::checkout::{installed, top};
use crate::support::pages;
use crate::support::run_with_input;

/// Rendered objects of an overlay or the base.
struct Rendered {
    objects: Vec<Value>,
    /// The configuration in it, if any.
    toml: Value,
}

impl Rendered {
    /// Returns the only object of `kind`.
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

/// Renders a directory below `etc/kubernetes` with kustomize.
fn yaml(directory: &str) -> String {
    built(&top().join("etc/kubernetes").join(directory))
}

fn built(path: &Path) -> String {
    let kustomize = installed("debian/usr/bin/kustomize");
    let Output { status, stdout, stderr } =
        Command::new(kustomize).arg("build").arg(path).output().expect("kustomize (tests/run)");
    // kustomize prints warnings about deprecated keys.
    assert!(status.success() && stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("UTF-8")
}

/// Returns the result of the validation, or its errors.
fn validated(yaml: &str) -> Result<Rendered, String> {
    let mut python = Command::new(installed("validators/bin/python"));
    python.arg(top().join("tests/system/kubernetes/validate.py"));
    python.arg(installed("debian/usr/share/gocode/src/github.com/openshift/api"));
    let Output { status, stdout, stderr } = run_with_input(&mut python, yaml);
    if !status.success() {
        return Err(String::from_utf8_lossy(&stderr).into_owned());
    }
    let mut output: Value = serde_json::from_slice(&stdout).expect("JSON");
    let Value::Array(objects) = output["objects"].take() else { panic!("no objects") };
    Ok(Rendered { objects, toml: output["toml"]["zuul-fingergw.toml"].take() })
}

/// Returns the objects of a directory below `etc/kubernetes`; all directories are rendered and
/// validated once.
fn rendered(directory: &str) -> &'static Rendered {
    static ALL: LazyLock<BTreeMap<String, Rendered>> = LazyLock::new(|| {
        let valid = |directory: String| {
            let rendered = validated(&yaml(&directory));
            let rendered = rendered.unwrap_or_else(|errors| panic!("{directory}: {errors}"));
            (directory, rendered)
        };
        directories().into_iter().map(valid).collect()
    });
    ALL.get(directory).unwrap_or_else(|| panic!("no {directory}"))
}

/// All overlays, so that new ones are not forgotten.
fn directories() -> Vec<String> {
    let overlays = top().join("etc/kubernetes/overlays");
    let overlays = fs::read_dir(overlays).expect("overlays").flatten();
    let overlays = overlays.map(|entry| format!("overlays/{}", entry.file_name().display()));
    ["base".to_owned()].into_iter().chain(overlays).collect()
}

/// Overlays with gateways of their own.
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

/// Errors that the schemas must detect, kind by kind.
#[test]
fn misspelled_keys_are_invalid() {
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
    // In one run, because its start takes most of the time.
    let mut all = String::new();
    for (directory, right, wrong, _) in wrong {
        let yaml = yaml(directory);
        assert!(yaml.contains(right), "{directory} has no {right}");
        all += &yaml.replace(right, wrong);
        all += "\n---\n";
    }
    let Err(errors) = validated(all.trim_end_matches("---\n")) else { panic!("all is valid") };
    for (directory, _, wrong, named) in wrong {
        assert!(errors.contains(named), "{directory}: {wrong} is valid\n{errors}");
    }
}

/// Returns a page's blocks in this language, in order.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let page = pages::all().into_iter().find(|found| found.name == page).expect("the page");
    let blocks = page.blocks().into_iter().filter(|block| block.language() == language);
    blocks.map(|block| block.text).collect()
}

/// The configuration of a zone below the Route in docs/zones.md. Both overlays begin with it.
#[test]
fn overlays_begin_with_the_documented_zone() {
    let shown = blocks("docs/zones.md", "toml");
    let shown = shown.iter().find(|text| text.contains("[::]:9079")).expect("a zone of pods");
    let stated = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    };
    for overlay in ["zone-openshift", "zone-gateway-api"] {
        let path = format!("etc/kubernetes/overlays/{overlay}/zuul-fingergw.toml");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let whole = stated(&fs::read_to_string(path).expect("a configuration"));
        assert!(whole.starts_with(&stated(shown)), "{overlay}: {whole:?}");
    }
}

/// The site overlay at the start of docs/kubernetes.md: its name is everywhere, with either kind of
/// route, and what the page leaves out is removed.
#[test]
fn documented_overlay_is_valid() {
    const HOST: &str = "fingergw.west.site.example";
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let blocks = blocks("docs/kubernetes.md", "yaml");
    let [overlay, gateway_api, certificate, leave_out] = &blocks[..] else {
        panic!("{} blocks", blocks.len())
    };
    let (for_all, of_route) = overlay.split_at(overlay.find("- target:").expect("a patch"));
    let of_gateway = format!("{for_all}{gateway_api}");
    let of_gateway = of_gateway.replace("overlays/zone-openshift", "overlays/zone-gateway-api");
    assert!(of_route.contains("kind: Route") && of_gateway != *overlay);
    assert!(certificate.contains(&format!("dnsNames:\n  - {HOST}\n")), "{certificate}");

    let directory = TempDir::new().expect("a directory");
    symlink(root, directory.path().join("zuul-fingergw")).expect("a link");
    let own = directory.path().join("own");
    fs::create_dir(&own).expect("a directory");
    let toml = root.join("etc/kubernetes/overlays/zone-openshift/zuul-fingergw.toml");
    let toml = fs::read_to_string(toml).expect("a configuration");
    let toml = toml.replace("fingergw.west.example.org", HOST);
    fs::write(own.join("zuul-fingergw.toml"), toml).expect("a configuration");
    let render = |kustomization: &str| {
        fs::write(own.join("kustomization.yaml"), kustomization).expect("a file");
        let rendered = validated(&built(&own)).unwrap_or_else(|errors| panic!("{errors}"));
        let image = text(&rendered.container()["image"]);
        assert_eq!(image, "registry.site.example/zuul-fingergw:0.1.0");
        assert_eq!(rendered.one("Service")["metadata"]["namespace"], "zuul");
        rendered
    };
    let zone = |kustomization: &str| {
        let rendered = render(kustomization);
        assert_eq!(rendered.toml["hostname"], HOST);
        // Nothing refers to the name of the original overlay or to its class.
        let all = format!("{:?}", rendered.objects);
        assert!(!all.contains("example.org\"") && !all.contains("\"example\""), "{all}");
        rendered
    };
    let rendered = zone(overlay);
    assert_eq!(rendered.one("Route")["spec"]["host"], HOST);
    assert!(rendered.any("PodMonitor").is_some());
    assert!(zone(&format!("{overlay}{leave_out}")).any("PodMonitor").is_none());

    let rendered = zone(&of_gateway);
    assert_eq!(rendered.one("Gateway")["spec"]["listeners"][0]["hostname"], HOST);
    assert_eq!(rendered.one("TLSRoute")["spec"]["hostnames"][0], HOST);

    // With zuul-operator, namespace and image are enough, as the page states.
    let (beside, _) = overlay.split_at(overlay.find("configMapGenerator").expect("a generator"));
    let rendered = render(&beside.replace("overlays/zone-openshift", "overlays/zuul-operator"));
    assert_eq!(rendered.one("Deployment")["metadata"]["name"], "zuul-fingergw-native");
}
