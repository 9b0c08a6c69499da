//! The gateway's entry in Zuul's component registry: its content, when it changes, and what it
//! depends on.

use std::net::Ipv4Addr;

use rustix::process::Signal;
use serde_json::json;
use tokio::net::TcpListener;

use crate::support::admin::{exposition, until_metric, with_admin};
use crate::support::executor::serves;
use crate::support::gateway::Builder;
use crate::support::proxy::Proxy;
use crate::support::system::{Entry, GATEWAYS, System};

/// Returns the entry's text, byte for byte as Zuul's `json.dumps(..., sort_keys=True)` orders it.
fn text(port: Option<u16>, use_ssl: bool, zone: Option<&str>) -> String {
    let (port, zone) = (json!(port), json!(zone));
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "{{\"hostname\":\"localhost\",\"kind\":\"fingergw\",\"model_api\":38,\
         \"public_port\":{port},\"state\":\"running\",\"use_ssl\":{use_ssl},\
         \"version\":\"{version}\",\"zone\":{zone}}}"
    )
}

fn state(entry: &Entry) -> &str {
    entry.content["state"].as_str().expect("a state")
}

fn model_api(entries: &[Entry]) -> Option<u64> {
    entries.first().and_then(|entry| entry.content["model_api"].as_u64())
}

/// Returns the only entry.
fn only(entries: Vec<Entry>) -> Entry {
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.into_iter().next().expect("one entry")
}

/// Waits until there is one entry, in state `running`.
async fn running(system: &System) -> Entry {
    let one = |entries: &[Entry]| entries.len() == 1 && state(&entries[0]) == "running";
    only(system.until("a running entry", one).await)
}

/// Waits until the only entry announces `expected`.
async fn announced(system: &System, expected: u64) -> Entry {
    let what = format!("model_api {expected}");
    only(system.until(&what, |entries| model_api(entries) == Some(expected)).await)
}

#[tokio::test]
async fn entry_of_a_plain_gateway_without_a_zone() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let entry = running(&system).await;
    assert_eq!(entry.text, text(Some(gateway.port()), false, None));
}

/// No other gateway connects to a gateway without a zone, so Zuul announces a port only where the
/// configuration lets the kernel choose it.
#[tokio::test]
async fn public_port_is_not_announced_without_a_zone() {
    let system = System::new().await;
    let mut builder = Builder::new(&system);
    // An address that only this test uses, so that the port stays free until the gateway binds it.
    let host = Ipv4Addr::new(127, 79, 1, 1);
    let free = TcpListener::bind((host, 0)).await.expect("a port");
    let address = free.local_addr().expect("its address");
    drop(free);
    builder.listeners = Vec::new();
    builder.root = format!("listener = [{{ address = \"{address}\" }}]");
    let gateway = builder.ready().await;
    assert_eq!(gateway.address(), address);
    assert_eq!(running(&system).await.text, text(None, false, None));
}

#[tokio::test]
async fn entry_names_the_advertised_listener() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let (plain, tls) = ("", "tls = true");
    let cases: [(&[&str], usize, bool); 4] = [
        (&[plain], 0, false),
        (&[tls], 0, true),
        (&[plain, tls], 1, true),
        (&["advertised = true", tls], 0, false),
    ];
    for (listeners, advertised, use_ssl) in cases {
        let builder = Builder::new(&system).zone("west").tls(&identity).listeners(listeners);
        let mut gateway = builder.ready().await;
        let port = gateway.addresses[advertised].port();
        let entry = running(&system).await;
        assert_eq!(entry.text, text(Some(port), use_ssl, Some("west")), "{listeners:?}");
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
    }
}

#[tokio::test]
async fn gateway_behind_nat_announces_its_public_port() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).zone("west");
    builder.root = "public_port = 443".to_owned();
    let gateway = builder.ready().await;
    assert_ne!(gateway.port(), 443);
    assert_eq!(running(&system).await.text, text(Some(443), false, Some("west")));
}

#[tokio::test]
async fn entry_is_an_ephemeral_sequential_node() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    let entry = running(&system).await;
    let sequence = entry.name.strip_prefix("localhost").expect("the host name in front");
    assert!(sequence.len() == 10 && sequence.bytes().all(|b| b.is_ascii_digit()), "{entry:?}");
    let session = format!("session={:#x}", entry.stat.ephemeral_owner);
    gateway.logged("its session", |line| line.contains(&session)).await;
    let status = format!("ZooKeeper: registered as {}", entry.name);
    gateway.status("the entry's name", |line| line.ends_with(&status)).await;
}

/// Every state is held until the test has checked it: the gateway waits for ZooKeeper's response to
/// one change before it makes the next.
#[tokio::test]
async fn entry_goes_through_its_states() {
    let system = System::new().await;
    let (proxy, mut answers) = Proxy::stepping(system.zookeeper.port).await;
    let mut builder = Builder::new(&system).zone("west");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.start().await;

    let there = |entries: &[Entry]| !entries.is_empty();
    let (answer, entries) = answers.until("an entry", &system, there).await;
    let first = only(entries);
    assert_eq!((state(&first), first.stat.version), ("initializing", 0));
    answer.pass();

    let next = |entries: &[Entry]| entries.iter().any(|entry| entry.stat.version == 1);
    let (answer, entries) = answers.until("the second state", &system, next).await;
    let entry = only(entries);
    assert_eq!((state(&entry), &entry.name), ("running", &first.name));
    assert_eq!(entry.text, text(Some(gateway.port()), false, Some("west")));
    answer.pass();
    gateway.ready().await;

    gateway.signal(Signal::TERM);
    let next = |entries: &[Entry]| entries.iter().any(|entry| entry.stat.version == 2);
    let (answer, entries) = answers.until("the third state", &system, next).await;
    let entry = only(entries);
    let stopped = text(Some(gateway.port()), false, Some("west")).replace("running", "stopped");
    assert_eq!((entry.text, entry.name), (stopped, first.name));
    answer.pass();

    let gone = |entries: &[Entry]| entries.is_empty();
    let (answer, _) = answers.until("its removal", &system, gone).await;
    answer.pass();
    drop(answers);
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn data_model_is_the_lowest_of_the_other_components() {
    let system = System::new().await;
    let scheduler = system.put_component("scheduler", 35).await;
    let executor = system.put_component("executor", 36).await;
    let gateway = Builder::new(&system).ready().await;
    assert_eq!(model_api(&[running(&system).await]), Some(35));
    // The same node with other content: an upgraded component.
    let upgraded = json!({"kind": "scheduler", "model_api": 38, "state": "running"}).to_string();
    system.put(&scheduler, upgraded.as_bytes()).await;
    announced(&system, 36).await;
    let unknown = system.put_component("of-tomorrow", 37).await;
    system.remove(&executor).await;
    announced(&system, 37).await;
    system.remove(&unknown).await;
    announced(&system, 38).await;
    drop(gateway);
}

/// An older component lowers the system's version as long as it is registered, and this gateway's
/// own entry must not keep it low: it is never written with the lower version.
#[tokio::test]
async fn data_model_is_never_lowered() {
    let system = System::new().await;
    let mut components = Vec::new();
    for kind in ["scheduler", "merger", "web", "launcher"] {
        components.push(system.put_component(kind, 40).await);
    }
    let mut gateway = Builder::new(&system).log("level = \"debug\"").ready().await;
    let before = running(&system).await;
    assert_eq!(model_api(std::slice::from_ref(&before)), Some(40));
    // A write because of the first change precedes the reaction to the last one: requests of one
    // session are answered in order.
    for (path, model) in components.iter().zip([30, 40, 40, 40]) {
        let content = json!({"model_api": model, "state": "running"}).to_string();
        system.put(path, content.as_bytes()).await;
        let heeded =
            |line: &str| line.contains("component registry changed") && line.contains(path);
        gateway.logged(path, heeded).await;
    }
    assert_eq!(only(system.entries().await).stat, before.stat);
    system.remove(&components[0]).await;
    for path in &components[1..] {
        system.put(path, b"{\"model_api\": 41}").await;
    }
    announced(&system, 41).await;
}

/// Another gateway with an old version must not hold this one's version down, nor the reverse.
#[tokio::test]
async fn other_gateways_do_not_affect_the_data_model() {
    let system = System::new().await;
    let twin = format!("{GATEWAYS}/twin0000000001");
    let content = json!({"hostname": "twin", "kind": "fingergw", "model_api": 20});
    system.put(&twin, content.to_string().as_bytes()).await;
    system.put_component("scheduler", 37).await;
    let _gateway = Builder::new(&system).ready().await;
    let ours = |entries: &[Entry]| {
        entries.iter().find(|e| e.name.starts_with("localhost") && state(e) == "running").cloned()
    };
    let entries = system.until("ours", |entries| ours(entries).is_some()).await;
    assert_eq!(ours(&entries).expect("found").content["model_api"], 37);
}

/// A version of 0 would make every component of the system use its oldest formats.
#[tokio::test]
async fn data_model_is_never_0() {
    let system = System::new().await;
    // Present from the start: otherwise the gateway could see the merger's end before it sees a new
    // component, and would be alone for that moment.
    system.put_component("scheduler", 40).await;
    let merger = system.put_component("merger", 0).await;
    let _gateway = Builder::new(&system).ready().await;
    assert_eq!(model_api(&[running(&system).await]), Some(15));
    system.put(&merger, b"{\"kind\": \"merger\"}").await;
    // The only remaining observation is that the version does not fall while both are registered.
    system.remove(&merger).await;
    let entry = announced(&system, 40).await;
    assert!(entry.stat.version <= 2, "needless write: {entry:?}");
}

#[tokio::test]
async fn invalid_entry_is_logged_once_and_ignored() {
    let system = System::new().await;
    let garbage: [(&str, &[u8]); 6] = [
        ("executor/binary0000000001", b"\xff\x00{"),
        ("executor/empty0000000002", b""),
        ("executor/list0000000003", b"[38]"),
        ("scheduler/text0000000004", b"{\"model_api\": \"38\"}"),
        ("scheduler/negative0000000005", b"{\"model_api\": -1}"),
        ("of tomorrow \u{e9}/cut0000000006", b"{\"model_api\": 3"),
    ];
    for (path, content) in garbage {
        system.put(&format!("/zuul/components/{path}"), content).await;
    }
    // A kind that is no directory but has content, and a kind without components.
    system.put("/zuul/components/file", b"not a kind").await;
    system.put("/zuul/components/empty", b"").await;
    let oldest = system.put_component("scheduler", 35).await;
    let mut gateway = Builder::new(&system).ready().await;
    assert_eq!(model_api(&[running(&system).await]), Some(35));

    // A change of the list of kinds or of one kind's list reads everything again, or not.
    let old = system.put_component("executor", 36).await;
    system.remove(&oldest).await;
    announced(&system, 36).await;
    system.put_component("launcher", 37).await;
    system.remove(&old).await;
    announced(&system, 37).await;
    for (path, _) in garbage {
        gateway.logged(path, |line| line.contains(path)).await;
    }
    let warnings: Vec<_> = gateway
        .log()
        .into_iter()
        .filter(|line| line.contains("ignoring invalid component entry"))
        .collect();
    assert_eq!(warnings.len(), garbage.len(), "{warnings:#?}");
}

/// A broken entry that is corrected counts from then on, even if the component that held the
/// system's version down leaves in the same moment: there never was a state with neither.
#[tokio::test]
async fn corrected_entry_is_used() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system);
    builder.hosts = system.hosts_via(&proxy);
    let mut oldest = system.put_component("scheduler", 20).await;
    let mut gateway = builder.ready().await;
    announced(&system, 20).await;
    for model_api in 21..30 {
        let path = format!("/zuul/components/executor/ze{model_api:010}");
        system.put(&path, b"{").await;
        gateway.logged(&path, |line| line.contains(&path)).await;
        // The gateway sees both changes together.
        proxy.hold();
        system.put(&path, format!("{{\"model_api\": {model_api}}}").as_bytes()).await;
        system.remove(&oldest).await;
        proxy.release();
        announced(&system, model_api).await;
        oldest = path;
    }
}

#[tokio::test]
async fn deleted_entry_is_created_again() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    let first = running(&system).await;
    system.remove(&format!("{GATEWAYS}/{}", first.name)).await;
    let fresh = |entries: &[Entry]| entries.len() == 1 && entries[0].name != first.name;
    let second = only(system.until("another entry", fresh).await);
    assert_eq!(state(&second), "running");
    assert_eq!(second.stat.ephemeral_owner, first.stat.ephemeral_owner, "the same session");
    let status = format!("registered as {}", second.name);
    gateway.status("the new name", |line| line.ends_with(&status)).await;
    let taken_out = |line: &str| line.contains("our registry entry was deleted");
    assert_eq!(gateway.count_logged("the reason", taken_out).await, 1);

    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    assert_eq!(system.entries().await.len(), 0);
}

/// Each is deleted before the gateway can have seen it in a list.
#[tokio::test]
async fn immediately_deleted_entries_are_created_again() {
    let system = System::new().await;
    let (proxy, mut answers) = Proxy::stepping(system.zookeeper.port).await;
    let mut builder = Builder::new(&system);
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.start().await;
    for _ in 0..4 {
        let there = |entries: &[Entry]| !entries.is_empty();
        let (answer, entries) = answers.until("an entry", &system, there).await;
        system.remove(&format!("{GATEWAYS}/{}", only(entries).name)).await;
        answer.pass();
    }
    drop(answers);
    let entry = running(&system).await;
    let status = format!("registered as {}", entry.name);
    gateway.status("the new name", |line| line.ends_with(&status)).await;
}

/// An ACL denies listing the gateways, so a removal cannot be watched.
#[tokio::test]
async fn gateways_are_listed_when_zookeeper_permits_it() {
    let system = System::new().await;
    system.put_gateway(Some("east"), Some(79), false, "running").await;
    system.hide(GATEWAYS).await;
    let mut gateway = with_admin(&system).ready().await;
    let warned = |line: &str| {
        line.contains(" WARN ")
            && line.contains("cannot read node of the component registry, retrying")
            && line.contains(GATEWAYS)
    };
    gateway.logged("the warning", warned).await;
    let east = "zuul_fingergw_zone_gateways{zone=\"east\"}";
    assert!(!exposition(&gateway).await.contains(east), "it cannot be known");

    system.show(GATEWAYS).await;
    until_metric(&gateway, east, 1.0).await;
    until_metric(&gateway, "zuul_fingergw_zone_gateways{zone=\"west\"}", 1.0).await;
    assert_eq!(gateway.count_logged("the warning", warned).await, 1);
}

#[tokio::test]
async fn two_gateways_on_one_host_have_an_entry_each() {
    let system = System::new().await;
    let mut first = Builder::new(&system).zone("west").ready().await;
    let firsts = running(&system).await;
    let second = Builder::new(&system).zone("west").ready().await;
    let both = |entries: &[Entry]| entries.iter().filter(|e| state(e) == "running").count() == 2;
    let entries = system.until("two running entries", both).await;
    let others = |entries: &[Entry]| {
        let mut others = entries.iter().filter(|entry| entry.name != firsts.name).cloned();
        (others.next().expect("the other"), others.count())
    };
    let (seconds, 0) = others(&entries) else { panic!("{entries:?}") };
    assert_eq!(seconds.content["public_port"], second.port());
    serves(&system, first.address()).await;
    serves(&system, second.address()).await;

    first.signal(Signal::TERM);
    assert!(first.exit().await.success());
    let left = only(system.entries().await);
    assert_eq!((&left.name, left.stat.version), (&seconds.name, seconds.stat.version));
    serves(&system, second.address()).await;
}
