//! Alerts, dashboard and scrape configuration, compared with a gateway and checked by Prometheus'
//! own tools.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::support::admin::{admin, exposition, until_metric, with_admin};
use crate::support::checkout::{installed, read, top};
use crate::support::prometheus::{Prometheus, promtool};
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

/// An alert's name, expression, severity, and the words of its summary and description.
struct Alert {
    name: String,
    expression: String,
    severity: String,
    words: [String; 2],
}

fn alerts() -> Vec<Alert> {
    let text = read("etc/prometheus/alerts.yaml");
    let rules: Value = serde_saphyr::from_str(&text).expect("YAML");
    let groups = rules["groups"].as_array().expect("groups");
    let rules = groups.iter().flat_map(|group| group["rules"].as_array().expect("rules"));
    let string = |value: &Value| value.as_str().expect("a string").to_owned();
    rules
        .map(|rule| Alert {
            name: string(&rule["alert"]),
            expression: string(&rule["expr"]),
            severity: string(&rule["labels"]["severity"]),
            words: ["summary", "description"].map(|key| string(&rule["annotations"][key])),
        })
        .collect()
}

/// Panels with data; without rows.
fn panels() -> Vec<Value> {
    let dashboard: Value =
        serde_json::from_str(&read("etc/grafana/zuul-fingergw.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels").clone();
    panels.into_iter().filter(|panel| panel["type"] != "row").collect()
}

/// Every expression of the dashboard, with its variables replaced as Grafana does for all gateways.
fn dashboard_expressions() -> Vec<String> {
    let panels = panels();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let expressions = targets.map(|target| {
        let expression = target["expr"].as_str().expect("an expression");
        let expression = expression.replace("$__rate_interval", "1m");
        let expression = expression.replace("$instance", ".*").replace("$zone", ".*");
        assert!(!expression.contains('$'), "an unknown variable: {expression}");
        expression
    });
    expressions.collect()
}

/// A metric in an expression, with its matchers: label, operator and value. Parsed here, because
/// none of the tools prints the parts of an expression.
struct Selector {
    metric: String,
    matchers: Vec<[String; 3]>,
}

fn is_of_name(char: char) -> bool {
    char.is_ascii_alphanumeric() || char == '_' || char == ':'
}

fn selectors(expression: &str) -> Vec<Selector> {
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_of_name) {
        rest = &rest[start..];
        let (word, after) =
            rest.split_at(rest.find(|char| !is_of_name(char)).unwrap_or(rest.len()));
        rest = after;
        let mut matchers = Vec::new();
        if let Some(within) = after.strip_prefix('{') {
            let (within, after) = within.split_once('}').expect("a closing brace");
            rest = after;
            for matcher in within.split(", ") {
                let (label, operator) = matcher.split_at(matcher.find(['=', '!']).expect(matcher));
                let (operator, value) = operator.split_once('"').expect(matcher);
                let value = value.strip_suffix('"').expect(matcher);
                matchers.push([label, operator, value].map(str::to_owned));
            }
        }
        if word.starts_with("zuul_fingergw_") || word.starts_with("process_") {
            found.push(Selector { metric: word.to_owned(), matchers });
        }
    }
    found
}

/// Returns the values of each label, by the names of the series in an exposition.
fn exported(exposition: &str) -> BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> {
    let mut exported: BTreeMap<_, BTreeMap<_, BTreeSet<_>>> = BTreeMap::new();
    for line in exposition.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').expect("a value");
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let of_name = exported.entry(name).or_default();
        for label in labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()) {
            let (label, value) = label.split_once('=').expect("a label");
            of_name.entry(label).or_default().insert(value.trim_matches('"'));
        }
    }
    exported
}

/// Prometheus accepts the files, and each alert fires exactly when it should.
#[tokio::test]
async fn alerts_fire_and_do_not_fire_as_tested() {
    let directory = top().join("etc/prometheus");
    promtool(&directory, &["check", "config", "scrape.yaml"]).await;
    promtool(&directory, &["check", "rules", "alerts.yaml"]).await;
    promtool(&directory, &["test", "rules", "alerts.test.yaml"]).await;

    // Each alert has a case of either kind.
    let tests = read("etc/prometheus/alerts.test.yaml");
    let tests: Value = serde_saphyr::from_str(&tests).expect("YAML");
    let mut cases: BTreeMap<String, [bool; 2]> = BTreeMap::new();
    for group in tests["tests"].as_array().expect("tests") {
        for case in group["promql_expr_test"].as_array().expect("cases") {
            let expression = case["expr"].as_str().expect("an expression");
            let fires = !case["exp_samples"].as_array().expect("samples").is_empty();
            for alert in alerts() {
                let only = format!("ALERTS{{alertname=\"{}\", alertstate=\"firing\"}}", alert.name);
                if expression == only {
                    cases.entry(alert.name).or_default()[usize::from(fires)] = true;
                }
            }
        }
    }
    let page = read("docs/metrics.md");
    for Alert { name, severity, .. } in alerts() {
        assert!(page.contains(&format!("| `{name}` | {severity} |")), "docs/metrics.md: {name}");
        assert_eq!(cases.get(&name), Some(&[true, true]), "{name} has no test of either kind");
        assert!(["critical", "warning"].contains(&severity.as_str()), "{name}: {severity}");
    }
}

/// The sections that alerts link to exist.
#[test]
fn alerts_name_sections_that_exist() {
    let operating = read("docs/operating.md");
    let mut named = 0;
    for Alert { name, words: [_, description], .. } in alerts() {
        let description = description.replace('\n', " ");
        for section in description.split("Section \"").skip(1) {
            let (section, _) = section.split_once('"').expect("a closing quote");
            let heading = format!("## {section}\n");
            assert!(operating.contains(&heading), "{name}: docs/operating.md has no {section:?}");
            named += 1;
        }
    }
    assert!(named > 5, "{named} sections");
}

/// A gateway exports every metric, label and value that alerts and dashboard use.
#[tokio::test]
async fn every_metric_of_alerts_and_dashboard_is_exported() {
    let system = System::new().await;
    let mut gateway = with_admin(&system).ready().await;
    gateway.until_running(&system).await;
    // The gateway reads its own entry slightly later than this test, without a notification.
    until_metric(&gateway, "zuul_fingergw_zone_gateways{zone=\"west\"}", 1.0).await;
    let text = exposition(&gateway).await;
    let exported = exported(&text);
    let rules: Vec<_> = alerts().into_iter().map(|alert| alert.expression).collect();
    let mut asked = 0;
    for expression in rules.into_iter().chain(dashboard_expressions()) {
        for Selector { metric, matchers } in selectors(&expression) {
            let labels = exported.get(metric.as_str());
            let labels = labels.unwrap_or_else(|| panic!("no {metric}: {expression}"));
            for [label, operator, value] in matchers {
                // Metrics of Prometheus itself.
                if ["job", "instance"].contains(&label.as_str()) || value == ".*" {
                    continue;
                }
                let known = labels.get(label.as_str());
                let known =
                    known.unwrap_or_else(|| panic!("{metric} has no {label}: {expression}"));
                let several = operator.contains('~');
                for value in value.split(|char| several && char == '|') {
                    assert!(known.contains(value), "{metric} has no {label}={value}: {expression}");
                    asked += 1;
                }
            }
        }
    }
    assert!(asked > 20, "{asked} values were asked for");
}

/// Grafana accepts the dashboard, and its panels have titles and descriptions.
#[tokio::test]
async fn grafana_accepts_the_dashboard() {
    let python = installed("grafana/bin/python");
    let mut check = Command::new(python);
    check.args(["-B", "tests/system/dashboard.py", "etc/grafana/zuul-fingergw.json"]);
    check.current_dir(top()).stdin(Stdio::null()).kill_on_drop(true);
    let checked = within("Grafana's SDK", check.output()).await;
    let checked = checked.expect("Grafana's SDK in target/grafana (tests/run puts it there)");
    let printed = [checked.stdout, checked.stderr].concat();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&printed));

    let text = read("etc/grafana/zuul-fingergw.json");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let all = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<_> = all.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), all.len(), "ids are unique");
    let mut taken = BTreeSet::new();
    for panel in all {
        let place = |key: &str| panel["gridPos"][key].as_u64().expect(key);
        let (x, y) = (place("x"), place("y"));
        assert!(x + place("w") <= 24, "{} is too wide", panel["title"]);
        for column in x..x + place("w") {
            for row in y..y + place("h") {
                assert!(taken.insert((column, row)), "{} overlaps", panel["title"]);
            }
        }
    }
    let mut titles = BTreeSet::new();
    for panel in panels() {
        let title = panel["title"].as_str().expect("a title");
        assert!(titles.insert(title.to_owned()), "{title} twice");
        assert!(panel["description"].as_str().is_some_and(|text| !text.is_empty()), "{title}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
        for target in panel["targets"].as_array().expect("targets") {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
        }
    }

    let mut rules = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    for (number, expression) in dashboard_expressions().iter().enumerate() {
        let expression = Value::from(expression.as_str());
        rules.push_str(&format!("      - record: panel:{number}\n        expr: {expression}\n"));
    }
    let directory = TempDir::new().expect("a directory");
    fs::write(directory.path().join("dashboard.yaml"), rules).expect("rules");
    promtool(directory.path(), &["check", "rules", "dashboard.yaml"]).await;
}

/// Receives the alerts of Prometheus, as Alertmanager does.
async fn alertmanager() -> (SocketAddr, mpsc::UnboundedReceiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let address = listener.local_addr().expect("its address");
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sender = sender.clone();
            let answer = service_fn(move |request: Request<Incoming>| {
                let sender = sender.clone();
                async move {
                    let body = request.into_body().collect().await.expect("a body").to_bytes();
                    let alerts: Vec<Value> = serde_json::from_slice(&body).expect("alerts");
                    for alert in alerts {
                        // The test may have ended.
                        let _ = sender.send(alert);
                    }
                    Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
        }
    });
    (address, receiver)
}

/// Waits for the alert with this name.
async fn alert(alerts: &mut mpsc::UnboundedReceiver<Value>, name: &str) -> Value {
    within(name, async {
        loop {
            let alert = alerts.recv().await.expect("the task lives");
            if alert["labels"]["alertname"] == name {
                return alert;
            }
        }
    })
    .await
}

/// A real Prometheus scrapes a gateway, every panel has data, and when ZooKeeper is stopped,
/// exactly one alert fires.
#[tokio::test]
async fn prometheus_scrapes_a_gateway_and_fires_an_alert() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let mut gateway = with_admin(&system).ready().await;
    gateway.until_running(&system).await;
    let (alertmanager, mut alerts) = alertmanager().await;

    let directory = TempDir::new().expect("a directory for the configuration");
    let rules = read("etc/prometheus/alerts.yaml");
    let rules: Vec<_> = rules
        .lines()
        .map(|line| if line.trim_start().starts_with("for: ") { "        for: 1s" } else { line })
        .collect();
    // Has data after enough scrapes for a rate.
    let scraped = "groups: [{name: test, rules: [{alert: Scraped, \
                   expr: 'count_over_time(zuul_fingergw_ready[1m]) >= 3'}]}]";
    let config = read("etc/prometheus/scrape.yaml");
    let targets = config.find("          - fingergw01").expect("the targets of the example");
    let config = format!(
        "global: {{evaluation_interval: 500ms}}\n\
         alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{alertmanager}']}}]}}]}}\n\
         {}          - {}\n",
        config[..targets]
            .replace("scrape_interval: 30s", "scrape_interval: 1s")
            .replace("  - alerts.yaml", "  - alerts.yaml\n  - scraped.yaml"),
        admin(&gateway)
    );
    for (name, text) in [
        ("alerts.yaml", rules.join("\n")),
        ("scraped.yaml", scraped.to_owned()),
        ("prometheus.yaml", config),
    ] {
        fs::write(directory.path().join(name), text).expect(name);
    }
    let prometheus = Prometheus::start(&directory.path().join("prometheus.yaml")).await;
    alert(&mut alerts, "Scraped").await;
    for expression in dashboard_expressions() {
        assert!(!prometheus.query(&expression).await.is_empty(), "shows nothing: {expression}");
    }
    let firing = "ALERTS{alertstate=\"firing\", alertname!=\"Scraped\"}";
    assert_eq!(prometheus.query(firing).await, Vec::<Value>::new(), "nothing is wrong yet");

    zookeeper.kill().await;
    gateway.status("the loss", |status| status.ends_with("lost")).await;
    let away = alert(&mut alerts, "ZuulFingergwZooKeeperAway").await;
    assert_eq!(away["labels"]["severity"], "critical");
    let summary = "No gateway of zuul-fingergw is registered in ZooKeeper";
    assert_eq!(away["annotations"]["summary"], summary);
    let others = "ALERTS{alertstate=\"firing\", alertname!~\"Scraped|ZuulFingergwZooKeeperAway\"}";
    assert_eq!(prometheus.query(others).await, Vec::<Value>::new(), "one cause, one alert");
}
