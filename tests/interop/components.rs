//! Our entry as Zuul's own component registry reads it, and the data model of the system, which
//! our presence must not change.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::script::Script;
use crate::support::gateway::Builder;
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;

/// The data model of Zuul 14.3.0: what its registry reports without any older component.
const MODEL_API: u64 = 38;

/// A Zuul program's view of the registry, by `components.py`.
struct Registry {
    script: Script,
    /// The lowest minimum it ever had.
    lowest: u64,
}

impl Registry {
    async fn start(system: &System) -> Self {
        let conf = ZuulConf::new(system, "");
        let script = Script::start("components.py", [conf.path()]);
        let mut registry = Self { script, lowest: u64::MAX };
        registry.until(|_| true).await;
        registry
    }

    /// Reads view after view until one is as `wanted` says.
    async fn until(&mut self, wanted: impl Fn(&View) -> bool) -> View {
        loop {
            let view = View(self.script.next().await);
            self.lowest = self.lowest.min(view.minimum());
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

struct View(Value);

impl View {
    fn minimum(&self) -> u64 {
        self.0["minimum"].as_u64().expect("a number")
    }

    /// Our entry; there is no other gateway in these tests.
    fn ours(&self) -> Option<&Value> {
        self.0["components"]["fingergw"].as_object().and_then(|entries| entries.values().next())
    }

    fn says(&self, attribute: &str, value: impl Into<Value>) -> bool {
        self.ours().is_some_and(|entry| entry[attribute] == value.into())
    }
}

#[tokio::test]
async fn every_attribute_until_it_leaves() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).zone("west").tls(&identity).listeners(&["", "tls = true"]);
    let gateway = gateway.ready().await;

    let view = registry.until(|view| view.says("state", "running")).await;
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

    // A watch may pass over `stopped`: what it tells of is the last state only.
    gateway.signal(Signal::TERM);
    registry.until(|view| view.ours().is_none()).await;
    assert_eq!(registry.lowest, MODEL_API);
}

#[tokio::test]
async fn the_data_model_stays_that_of_the_others() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    registry.register("scheduler", "old", 36).await;
    registry.register("executor", "new", 38).await;
    registry.until(|view| view.minimum() == 36).await;

    let _gateway = Builder::new(&system).zone("west").ready().await;
    let view = registry.until(|view| view.says("state", "running")).await;
    assert_eq!((view.minimum(), registry.lowest), (36, 36), "joining");

    // Down with somebody older, up again when the older ones have left or have been upgraded.
    registry.register("merger", "older", 35).await;
    registry.until(|view| view.says("model_api", 35)).await;
    registry.unregister("older").await;
    registry.until(|view| view.says("model_api", 36) && view.minimum() == 36).await;
    registry.register("scheduler", "upgraded", 38).await;
    registry.unregister("old").await;
    registry.until(|view| view.says("model_api", 38) && view.minimum() == 38).await;
    assert_eq!(registry.lowest, 35);
}

/// A system newer than any we know of: we say what it says and hold nobody back.
#[tokio::test]
async fn a_newer_system() {
    let system = System::new().await;
    let mut registry = Registry::start(&system).await;
    registry.register("scheduler", "future", 40).await;
    registry.register("executor", "future", 41).await;
    let _gateway = Builder::new(&system).ready().await;
    registry.until(|view| view.says("model_api", 40) && view.says("state", "running")).await;
    // This registry counts its own data model in.
    assert_eq!(registry.lowest, MODEL_API);
}
