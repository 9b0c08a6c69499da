//! Consistency of the manifests with each other and with the configuration, beyond the schemas.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use super::{DEPLOYED, Rendered, list, rendered, text};

/// The labels that zuul-operator sets on the pods of its own zuul-fingergw, except the instance,
/// and its name for their port (its `templates/zuul.yaml`).
const OPERATORS_LABELS: [(&str, &str); 3] = [
    ("app.kubernetes.io/name", "zuul"),
    ("app.kubernetes.io/part-of", "zuul"),
    ("app.kubernetes.io/component", "zuul-fingergw"),
];
const OPERATORS_PORT: (&str, u64) = ("zuul-fingergw", 9079);

/// The executors' log port.
const EXECUTOR: u64 = 7900;

/// Returns the port of an address such as `[::]:9079`.
fn port(address: &Value) -> u64 {
    let (_, port) = text(address).rsplit_once(':').expect("a port");
    port.parse().expect("a number")
}

/// Returns the seconds of a time such as `5m`.
fn seconds(time: &Value) -> u64 {
    let time = text(time);
    let (number, unit) = time.split_at(time.len() - 1);
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        _ => panic!("{time}"),
    };
    Duration::from_secs(number.parse::<u64>().expect("a number") * factor).as_secs()
}

/// Returns the number of the container's port with this name or number.
fn container_port(rendered: &Rendered, name: &Value) -> u64 {
    let ports = list(&rendered.container()["ports"]);
    let port = ports.iter().find(|port| port["name"] == *name || port["containerPort"] == *name);
    port.unwrap_or_else(|| panic!("the container has no port {name}"))["containerPort"]
        .as_u64()
        .expect("a number")
}

/// Ports of every gateway match its listeners, by name through all objects.
#[test]
fn ports_lead_to_listeners() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let toml = &rendered.toml;
        let [finger, admin] =
            [&toml["listener"][0]["address"], &toml["admin"]["address"]].map(port);
        assert_eq!(list(&toml["listener"]).len(), 1, "{directory}");
        assert_eq!(container_port(rendered, &json!("finger")), finger, "{directory}");
        assert_eq!(container_port(rendered, &json!("metrics")), admin, "{directory}");

        let service = rendered.one("Service");
        let ports = list(&service["spec"]["ports"]);
        for port in ports {
            assert_eq!(container_port(rendered, &port["targetPort"]), finger, "{directory}");
        }
        let ports: Vec<_> = ports.iter().filter_map(|port| port["port"].as_u64()).collect();
        let tls = toml["listener"][0]["tls"] == true;
        assert_eq!(ports, if tls { vec![9079] } else { vec![79, 9079] }, "{directory}");

        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            let port = &rendered.container()[probe]["httpGet"]["port"];
            assert_eq!(container_port(rendered, port), admin, "{directory}, {probe}");
        }
        let endpoint = &rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"][0];
        assert_eq!(container_port(rendered, &endpoint["port"]), admin, "{directory}");
        assert_eq!(endpoint["path"], "/metrics");
    }
}

/// The address that a zone registers is that of its Route or TLSRoute, which leads to its Service.
#[test]
fn routes_have_the_registered_host_name() {
    let of_openshift = rendered("overlays/zone-openshift");
    let of_gateway_api = rendered("overlays/zone-gateway-api");
    for zone in [&of_openshift, &of_gateway_api] {
        assert_eq!(zone.toml["public_port"], 443);
        assert!(zone.toml["zone"].is_string() && zone.toml["listener"][0]["tls"] == true);
    }

    let (route, service) = (of_openshift.one("Route"), of_openshift.one("Service"));
    assert_eq!(route["spec"]["host"], of_openshift.toml["hostname"]);
    assert_eq!(route["spec"]["to"]["name"], service["metadata"]["name"]);
    assert_eq!(route["spec"]["tls"]["termination"], "passthrough");
    // A Route names the port of the Service, not of the pod.
    assert_eq!(route["spec"]["port"]["targetPort"], service["spec"]["ports"][0]["name"]);
    let annotations = &route["metadata"]["annotations"];
    assert_eq!(annotations["haproxy.router.openshift.io/balance"], "leastconn");
    assert!(annotations["haproxy.router.openshift.io/timeout-tunnel"].is_string());

    let (gateway, route) = (of_gateway_api.one("Gateway"), of_gateway_api.one("TLSRoute"));
    let (listener, hostname) = (&gateway["spec"]["listeners"][0], &of_gateway_api.toml["hostname"]);
    assert_eq!(&listener["hostname"], hostname);
    assert_eq!(listener["port"], of_gateway_api.toml["public_port"]);
    assert_eq!(
        (&listener["protocol"], &listener["tls"]["mode"]),
        (&json!("TLS"), &json!("Passthrough"))
    );
    assert_eq!(route["spec"]["hostnames"], json!([hostname]));
    let parent = &route["spec"]["parentRefs"][0];
    assert_eq!(parent["name"], gateway["metadata"]["name"]);
    assert_eq!(parent["sectionName"], listener["name"]);
    let (backend, service) =
        (&route["spec"]["rules"][0]["backendRefs"][0], of_gateway_api.one("Service"));
    assert_eq!(backend["name"], service["metadata"]["name"]);
    assert_eq!(backend["port"], service["spec"]["ports"][0]["port"]);
}

/// An empty selector would select every pod of the namespace.
#[test]
fn selectors_select_only_these_pods() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let spec = |kind| &rendered.one(kind)["spec"];
        let template = &spec("Deployment")["template"];
        let spread = &template["spec"]["topologySpreadConstraints"][0];
        // Otherwise pods that a rollout replaces count, and both new pods could go to one node.
        assert_eq!(spread["matchLabelKeys"], json!(["pod-template-hash"]), "{directory}");
        for selector in [
            &spec("Service")["selector"],
            &spec("Deployment")["selector"]["matchLabels"],
            &spec("PodDisruptionBudget")["selector"]["matchLabels"],
            &spec("NetworkPolicy")["podSelector"]["matchLabels"],
            &spec("PodMonitor")["selector"]["matchLabels"],
            &spread["labelSelector"]["matchLabels"],
        ] {
            assert_eq!(
                selector,
                &json!({"app.kubernetes.io/name": "zuul-fingergw"}),
                "{directory}"
            );
        }
        let labels = &template["metadata"]["labels"];
        assert_eq!(labels["app.kubernetes.io/name"], "zuul-fingergw", "{directory}");
        assert_ne!(OPERATORS_LABELS[0].1, "zuul-fingergw");
    }
}

/// Returns all ports that a rule of the policy permits.
fn allowed(rules: &Value, rendered: &Rendered) -> BTreeSet<u64> {
    let ports = list(rules).iter().flat_map(|rule| list(&rule["ports"]));
    let number = |port: &Value| match port["port"].as_u64() {
        Some(number) => number,
        None => container_port(rendered, &port["port"]),
    };
    ports.map(number).collect()
}

/// The API server adds an omitted protocol, and the next `kubectl apply` would see a difference.
#[test]
fn network_policy_ports_name_their_protocol() {
    for directory in DEPLOYED {
        let policy = &rendered(directory).one("NetworkPolicy")["spec"];
        for rule in ["ingress", "egress"].map(|direction| list(&policy[direction])).concat() {
            for port in list(&rule["ports"]) {
                assert!(port["protocol"].is_string(), "{directory}: {port}");
            }
        }
    }
}

/// Share of the connections that may stall at a time (`limits.connections`).
const WAITING: u64 = 8;

/// KiB per connection, and in addition per stalled stream (`src/os/memory_limit.rs`).
const CONNECTION_KIB: u64 = 32;
const WAITING_KIB: u64 = 128;

/// MiB of a pod that are reserved for the program itself.
const PROGRAM_MIB: u64 = 64;

/// Cgroups of version 2 count socket buffers: two for each stalled stream.
#[test]
fn connection_limit_fits_the_memory_limit() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let memory = text(&rendered.container()["resources"]["limits"]["memory"]);
        let memory = memory.strip_suffix("Mi").and_then(|memory| memory.parse::<u64>().ok());
        let limit = |key: &str| rendered.toml["limits"][key].as_u64().expect("a number");
        let buffers = 2 * limit("stream_buffer") / 1024;
        let connection = CONNECTION_KIB + (WAITING_KIB + buffers) / WAITING;
        let streams = limit("connections") * connection / 1024;
        assert!(Some(streams + PROGRAM_MIB) <= memory, "{directory}: {streams} MiB");
    }
}

#[test]
fn network_policy_permits_what_is_configured() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let (toml, policy) = (&rendered.toml, &rendered.one("NetworkPolicy")["spec"]);
        let listening = [&toml["listener"][0]["address"], &toml["admin"]["address"]].map(port);
        assert_eq!(allowed(&policy["ingress"], rendered), listening.into(), "{directory}");
        // All clients may request logs; metrics are restricted.
        for rule in list(&policy["ingress"]) {
            let finger = rule["ports"][0]["port"] == "finger";
            assert_eq!(rule["from"].is_null(), finger, "{directory}: {rule}");
        }
        let out = allowed(&policy["egress"], rendered);
        // DNS, including OpenShift's port; ZooKeeper; executors; the other gateways.
        let wanted = [53, 5353, port(&toml["zookeeper"]["hosts"]), EXECUTOR, 443, 9079];
        assert_eq!(out, wanted.into(), "{directory}");
    }
}

#[test]
fn termination_grace_period_covers_the_grace() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let spec = &rendered.one("Deployment")["spec"];
        let period = &spec["template"]["spec"]["terminationGracePeriodSeconds"];
        let limits = &rendered.toml["limits"];
        let (lame_duck, grace) = (seconds(&limits["lame_duck"]), seconds(&limits["grace"]));
        assert!(period.as_u64() >= Some(lame_duck + grace + 5), "{directory}: {period} s");
        // Endpoints and routers notice an unready pod after this time.
        let readiness = &rendered.container()["readinessProbe"];
        let seen = readiness["periodSeconds"].as_u64().zip(readiness["failureThreshold"].as_u64());
        let (every, times) = seen.expect("numbers");
        assert!(lame_duck >= every * times, "{directory}");
        let update = json!({"maxUnavailable": 0, "maxSurge": 1});
        assert_eq!(spec["strategy"]["rollingUpdate"], update, "{directory}");
        assert!(
            spec["replicas"].as_u64() >= Some(2),
            "{directory}: a budget of 1 would block drains"
        );
    }
}

/// As the restricted Pod Security Standard and OpenShift's restricted-v2 require.
#[test]
fn pods_are_confined() {
    for directory in DEPLOYED {
        let rendered = rendered(directory);
        let pod = &rendered.one("Deployment")["spec"]["template"]["spec"];
        let user = json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}});
        assert_eq!(pod["securityContext"], user, "{directory}");
        let confined = json!({
            "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
        });
        assert_eq!(rendered.container()["securityContext"], confined, "{directory}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{directory}");
        let ndots = json!({"options": [{"name": "ndots", "value": "1"}]});
        assert_eq!(pod["dnsConfig"], ndots, "{directory}");
    }
}

/// The operator overwrites its own objects, so nothing here may have the same name.
#[test]
fn names_differ_from_those_of_zuul_operator() {
    let beside = rendered("overlays/zuul-operator");
    for object in &beside.objects {
        let name = text(&object["metadata"]["name"]);
        assert!(name.starts_with("zuul-fingergw-"), "{name}");
    }
    let service = rendered("overlays/zuul-operator-service");
    let service = service.one("Service");
    assert_ne!(service["metadata"]["name"], "zuul-fingergw");
    let labels: serde_json::Map<_, _> =
        OPERATORS_LABELS.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    assert_eq!(service["spec"]["selector"], Value::Object(labels));
    for port in list(&service["spec"]["ports"]) {
        assert_eq!(port["targetPort"], OPERATORS_PORT.0);
    }
    assert_eq!(service["spec"]["ports"][1]["port"], OPERATORS_PORT.1);
}
