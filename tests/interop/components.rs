//! Our entry as Zuul's own component registry reads it, and the system's data model, which our
//! presence must not change.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::script::Script;
use crate::support::gateway::Builder;
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;

/// The data model of Zuul 14.3.0: the result of its registry if there is no older component.
const MODEL_API: u64 = 38;

/// A Zuul program's view of the registry, run by `components.py`.
struct Registry {
    script: Script,
    /// The lowest minimum so far.
    lowest: u64,
    /// The minimum of the last view.
    minimum: u64,
}

impl Registry {
    async fn start(system: &System) -> Self {
        Self::start_as(system, MODEL_API).await
    }

    /// Starts a program of a Zuul version with the data model `model_api`. Zuul 14.3.0's own
    /// minimum never exceeds 38.
    async fn start_as(system: &System, model_api: u64) -> Self {
        let conf = ZuulConf::new(system, "");
        let model_api = model_api.to_string();
        let script = Script::start("components.py", [conf.path(), Path::new(&model_api)]);
        let mut registry = Self { script, lowest: u64::MAX, minimum: u64::MAX };
        registry.until(|_| true).await;
        registry
    }

    /// Reads views until one satisfies `wanted`. In none of them may our entry cause the minimum:
    /// it must be that of the other components, or have been as low before and be rising.
    async fn until(&mut self, wanted: impl Fn(&View) -> bool) -> View {
        loop {
            let view = View(self.script.next().await);
            let (minimum, others) = (view.minimum(), view.minimum_of_others());
            let was = std::mem::replace(&mut self.minimum, minimum);
            assert!(minimum >= others.min(was), "{minimum} after {was} by us: {:#}", view.0);
            self.lowest = self.lowest.min(minimum);
            if wanted(&view) {
                return view;
            }
        }
    }

    async fn register(&mut self, kind: &str, hostname: &str, model_api: u64) {
        self.script.ask(&format!("register {kind} {hostname} {model_api}")).await;
    }

    async fn unregister(&mut self, hostname: &str) {
        self.script.ask(&format!("unregister {hostname}")).await;
    }
}

/// A program's view of the registry.
struct View(Value);

impl View {
    fn minimum(&self) -> u64 {
        self.0["minimum"].as_u64().expect("a number")
    }

    /// The minimum without our entry.
    fn minimum_of_others(&self) -> u64 {
        let others = self.components().filter(|entry| !is_ours(entry));
        let models = others.map(|entry| entry["model_api"].as_u64().expect("a number"));
        models.chain(self.0["own"].as_u64()).min().expect("at least the program's own")
    }

    fn components(&self) -> impl Iterator<Item = &Value> {
        let kinds = self.0["components"].as_object().into_iter().flat_map(|kinds| kinds.values());
        kinds.filter_map(Value::as_object).flat_map(|entries| entries.values())
    }

    fn ours(&self) -> Option<&Value> {
        self.components().find(|entry| is_ours(entry))
    }

    fn has(&self, attribute: &str, value: impl Into<Value>) -> bool {
        self.ours().is_some_and(|entry| entry[attribute] == value.into())
    }
}

/// These tests have one gateway of ours. Other gateways have the version of Zuul 14.3.0.
fn is_ours(entry: &Value) -> bool {
    entry["version"] == env!("CARGO_PKG_VERSION")
}

#[tokio::test]
async fn zuul_reads_every_attribute_of_the_entry() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).zone("west").tls(&identity).listeners(&["", "tls = true"]);
    let gateway = gateway.ready().await;

    let view = registry.until(|view| view.has("state", "running")).await;
    let expected = json!({
        "hostname": "localhost",
        "kind": "fingergw",
        "model_api": MODEL_API,
        "public_port": gateway.addresses[1].port(),
        "state": "running",
        "use_ssl": true,
        "version": env!("CARGO_PKG_VERSION"),
        "zone": "west",
    });
    assert_eq!(view.ours(), Some(&expected));

    // A watch may skip `stopped`, because it reports only the latest state.
    gateway.signal(Signal::TERM);
    registry.until(|view| view.ours().is_none()).await;
    assert_eq!(registry.lowest, MODEL_API);
}

#[tokio::test]
async fn data_model_of_the_system_is_not_changed() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    registry.register("scheduler", "old", 36).await;
    registry.register("executor", "new", 38).await;
    registry.until(|view| view.minimum() == 36).await;

    let _gateway = Builder::new(&system).zone("west").ready().await;
    let view = registry.until(|view| view.has("state", "running")).await;
    assert_eq!((view.minimum(), registry.lowest), (36, 36), "joining");

    // An older component lowers the minimum only while it is registered; ours rises with the others
    // when older components have left or have been upgraded.
    registry.register("merger", "older", 35).await;
    registry.until(|view| view.minimum() == 35).await;
    registry.unregister("older").await;
    let view = registry.until(|view| view.minimum_of_others() == 36).await;
    assert_eq!(view.minimum(), 36);
    assert!(view.has("model_api", 36));
    registry.register("scheduler", "upgraded", 38).await;
    registry.unregister("old").await;
    registry.until(|view| view.has("model_api", 38) && view.minimum() == 38).await;
    assert_eq!(registry.lowest, 35);
}

/// In a system newer than any known one, our entry has the system's version and lowers nothing.
#[tokio::test]
async fn data_model_of_a_newer_system_is_announced() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    registry.register("scheduler", "future", 40).await;
    registry.register("executor", "future", 41).await;
    let _gateway = Builder::new(&system).ready().await;
    registry.until(|view| view.has("model_api", 40) && view.has("state", "running")).await;
    // This registry includes its own data model.
    assert_eq!(registry.lowest, MODEL_API);
}

/// A system is upgraded one component after the other, twice, the second time to an unknown data
/// model. Each component is stopped and returns with the new one, and our gateway is restarted in
/// between.
#[tokio::test]
async fn data_model_follows_a_rolling_upgrade() {
    let system = System::new().await;
    let mut registry = Registry::start_as(&system, 42).await;
    let components = [
        ("scheduler", "s1", 35),
        ("scheduler", "s2", 35),
        ("executor", "e1", 36),
        ("executor", "e2", 36),
        ("web", "w1", 37),
        ("fingergw", "theirs", 37),
    ];
    for (kind, hostname, model_api) in components {
        registry.register(kind, hostname, model_api).await;
    }
    registry.until(|view| view.minimum() == 35).await;
    let mut gateway = Builder::new(&system).ready().await;

    let mut settled = (35, 35);
    let is = |view: &View, (system_speaks, we_say): (u64, u64)| {
        view.minimum() == system_speaks
            && view.has("model_api", we_say)
            && view.has("state", "running")
    };
    registry.until(|view| is(view, settled)).await;
    // The component that is upgraded and its version; then the system's version, and ours.
    for (hostname, model_api, system_speaks, we_say) in [
        ("s1", 38, 35, 35),
        ("s2", 38, 36, 36),
        ("e1", 38, 36, 36),
        ("e2", 38, 37, 37),
        // Another gateway holds the system's version down; our entry is not a reason.
        ("w1", 38, 37, 38),
        ("theirs", 38, 38, 38),
        ("s1", 40, 38, 38),
        ("s2", 41, 38, 38),
        ("e1", 40, 38, 38),
        ("e2", 41, 38, 38),
        ("theirs", 40, 38, 38),
        ("w1", 41, 40, 40),
    ] {
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
        registry.until(|view| view.ours().is_none()).await;
        gateway = Builder::new(&system).ready().await;
        registry.until(|view| is(view, settled)).await;

        let kind = components.iter().find(|(_, name, _)| *name == hostname).expect("a component").0;
        registry.unregister(hostname).await;
        registry.register(kind, hostname, model_api).await;
        settled = (system_speaks, we_say);
        let upgraded = |view: &View| {
            view.components()
                .any(|entry| entry["hostname"] == hostname && entry["model_api"] == model_api)
        };
        registry.until(|view| upgraded(view) && is(view, settled)).await;
    }
    assert_eq!(registry.lowest, 35);
}
