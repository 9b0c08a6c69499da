//! Renders reports as text, for the command line and for the log.

use std::fmt::Write;

use super::protocol::ReloadReport;
use super::status::{BoundListener, IdentityRole, ProcessState, StatusReport, ZooKeeperStatus};
use crate::gateway::routing::explain::{BuildState, HopReport, HopState, RouteReport};

/// The most zones that are listed for a route.
const MAX_ZONES: usize = 20;

/// Writes one line to a `String`, which cannot fail.
macro_rules! line {
    ($text:expr, $($argument:tt)*) => {
        {
            let _ = writeln!($text, $($argument)*);
        }
    };
}

/// Renders the report of `status`.
pub(crate) fn status(report: &StatusReport) -> String {
    let mut text = String::new();
    let state = match report.state {
        ProcessState::Initializing => "initializing",
        ProcessState::Running => "running",
        ProcessState::Stopping => "stopping",
    };
    let StatusReport { version, hostname, pid, .. } = report;
    line!(text, "zuul-fingergw {version} on {hostname}, pid {pid}: {state}");
    line!(text, "{}", listeners(report.zone.as_deref(), &report.listeners));
    line!(text, "ZooKeeper: {}", zookeeper(&report.zookeeper));
    line!(text, "up for {} s with {}", report.uptime_seconds as u64, report.configuration);
    let connections = &report.connections;
    line!(text, "connections: {} of at most {}", connections.open, connections.limit);
    for certificate in &report.certificates {
        let role = match certificate.role {
            IdentityRole::Gateway => "gateway",
            IdentityRole::ZooKeeper => "zookeeper",
        };
        let not_after = certificate.not_after.as_deref().unwrap_or("?");
        line!(text, "certificate ({role}): {}, valid until {not_after}", certificate.file);
    }
    if report.gateways.is_empty() {
        line!(text, "no gateway of another zone is registered");
    } else {
        line!(text, "gateways of other zones:");
    }
    for gateway in &report.gateways {
        line!(text, "  {}", hop(gateway));
    }
    match report.streams.len() {
        0 => line!(text, "no streams"),
        1 => line!(text, "1 stream:"),
        count => line!(text, "{count} streams:"),
    }
    for stream in &report.streams {
        line!(
            text,
            "  {:.0} s, {} bytes of {} from {} to {}",
            stream.seconds,
            stream.bytes,
            stream.build,
            stream.hop,
            stream.peer
        );
    }
    text
}

fn zookeeper(status: &ZooKeeperStatus) -> String {
    match (&status.disconnected_reason, status.disconnected_seconds) {
        (Some(reason), Some(seconds)) => format!("not connected for {seconds:.0} s: {reason}"),
        _ => status.registration.clone(),
    }
}

/// Renders a zone and its listeners: `zone west; plain [::]:79, TLS [::]:7979`.
pub(crate) fn listeners(zone: Option<&str>, listeners: &[BoundListener]) -> String {
    let zone = zone.map_or("no zone".to_owned(), |zone| format!("zone {zone}"));
    let listeners: Vec<_> = listeners
        .iter()
        .map(|listener| {
            let protocol = if listener.tls { "TLS" } else { "plain" };
            format!("{protocol} {}", listener.address)
        })
        .collect();
    format!("{zone}; {}", listeners.join(", "))
}

/// Renders the report of `resolve`.
pub(crate) fn route(report: &RouteReport) -> String {
    let mut text = String::new();
    let build = &report.build;
    match report.state {
        BuildState::Running => {
            let executor = report.executor.as_ref().map(ToString::to_string).unwrap_or_default();
            let zone = report.executor_zone.as_deref();
            let zone = zone.map(|zone| format!(" of zone {}", zone.escape_default()));
            let zone = zone.unwrap_or_default();
            line!(text, "running: {build} on {executor}{zone}");
        }
        BuildState::Queued => {
            line!(text, "queued: no executor has taken {build} yet");
        }
        BuildState::Unknown => {
            line!(text, "unknown: no queue has {build}; Zuul removes builds when they have ended");
        }
        BuildState::Error => {
            let error = report.error.as_deref().unwrap_or_default();
            line!(text, "error: {build}: {error}");
        }
    }
    line!(text, "gateway: {}", report.gateway);
    if let Some(zone) = zone_without_gateway(report) {
        let zone = zone.escape_default();
        line!(text, "no gateway of zone {zone} is registered; {}", zones_with_gateways(report));
    }
    for (number, candidate) in (1..).zip(&report.hops) {
        line!(text, "{number}. {}", hop(candidate));
    }
    if !report.attempts.is_empty() {
        line!(text, "recent attempts:");
    }
    for attempt in &report.attempts {
        let result = attempt.failure.as_deref().unwrap_or("answered");
        let times = match attempt.times {
            1 => String::new(),
            times => format!(" ({times} times)"),
        };
        line!(
            text,
            "  {} s ago, {} from {}: {result}{times}",
            attempt.seconds_ago,
            attempt.build,
            attempt.address
        );
    }
    text
}

/// Returns the executor's zone if that is not our own and has no gateway.
fn zone_without_gateway(report: &RouteReport) -> Option<&str> {
    let zone = report.executor_zone.as_deref()?;
    let is_other_zone = report.own_zone.as_deref() != Some(zone);
    (is_other_zone && !report.zones_with_gateways.contains(zone)).then_some(zone)
}

fn zones_with_gateways(report: &RouteReport) -> String {
    let zones = report.zones_with_gateways.iter().map(|zone| zone.escape_default().to_string());
    let mut zones: Vec<_> = zones.take(MAX_ZONES + 1).collect();
    if zones.is_empty() {
        return "no zone has a gateway".to_owned();
    }
    if zones.len() > MAX_ZONES {
        zones[MAX_ZONES] = "...".to_owned();
    }
    format!("zones with gateways: {}", zones.join(", "))
}

/// Renders a hop and its health.
fn hop(report: &HopReport) -> String {
    let address = &report.address;
    let last = report.last_failure.as_deref().unwrap_or_default();
    let seconds = report.retry_seconds.unwrap_or_default();
    let failed = match report.failures {
        1 => "failed once".to_owned(),
        failures => format!("failed {failures} times"),
    };
    match report.state {
        None => address.to_string(),
        Some(HopState::Untried) => format!("{address}: not tried yet"),
        Some(HopState::Healthy) => format!("{address}: healthy"),
        Some(HopState::RetryDue) => format!("{address}: retry due, {failed}; last: {last}"),
        Some(HopState::BackingOff) => {
            format!("{address}: backing off for {seconds} s, {failed}; last: {last}")
        }
        Some(HopState::Loop) => {
            format!(
                "{address}: requests to it go in a loop, not tried for {seconds} s; last: {last}"
            )
        }
    }
}

/// Renders the report of a successful `reload`.
pub(crate) fn reload(report: &ReloadReport) -> String {
    let mut text = format!("reloaded {}\n", report.configuration);
    if !report.changed.is_empty() {
        line!(text, "changed: {}", report.changed.join("; "));
    } else if report.needs_restart.is_empty() {
        line!(text, "nothing has changed");
    }
    if !report.needs_restart.is_empty() {
        line!(text, "effective after a restart: {}", report.needs_restart.join("; "));
    }
    for warning in &report.warnings {
        line!(text, "{warning}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::{Value, json};

    use crate::control::protocol::{Reply, ReplyStatus};

    /// A status report as it is sent, with this many streams.
    fn status_json(streams: usize) -> Value {
        let stream = json!({
            "seconds": 1.235, "peer": "127.0.0.1:79", "build": "ab", "bytes": 7,
            "hop": {"kind": "executor", "host": "ze01", "port": 7900, "zone": null, "tls": false},
        });
        json!({
            "status": "ok", "version": "1.0.0", "pid": 7, "state": "running", "hostname": "gw",
            "zone": "we\"st", "configuration": "/gw.toml", "uptime_seconds": 3.5,
            "listeners": [{"address": "127.0.0.1:79", "tls": true, "advertised": true}],
            "admin": null,
            "zookeeper": {
                "hosts": "zk:2281", "connected": false, "registration": "connecting",
                "entry": null, "disconnected_seconds": null, "disconnected_reason": null,
            },
            "certificates": [{
                "role": "gateway", "file": "/c", "subject": "CN=gw",
                "not_after": "2027-01-01T00:00:00Z",
            }],
            "connections": {"open": 2, "limit": 10},
            "gateways": [], "streams": vec![stream; streams],
        })
    }

    fn parse<T: serde::de::DeserializeOwned>(reply: Value) -> T {
        serde_json::from_value::<Reply<T>>(reply).expect("a reply").content
    }

    #[test]
    fn status_report_is_read_as_it_was_written() {
        let sent = status_json(1);
        let content = parse::<StatusReport>(sent.clone());
        let line = Reply { status: ReplyStatus::Ok, content }.to_line();
        assert_eq!(serde_json::from_str::<Value>(&line).expect("JSON"), sent);
    }

    #[test]
    fn status_report_has_a_line_for_each_stream() {
        let head = "zuul-fingergw 1.0.0 on gw, pid 7: running\n\
                    zone we\"st; TLS 127.0.0.1:79\nZooKeeper: connecting\n\
                    up for 3 s with /gw.toml\nconnections: 2 of at most 10\n\
                    certificate (gateway): /c, valid until 2027-01-01T00:00:00Z\n\
                    no gateway of another zone is registered\n";
        let stream = "  1 s, 7 bytes of ab from executor ze01:7900 to 127.0.0.1:79\n";
        let text = |streams| status(&parse(status_json(streams)));
        assert_eq!(text(0), format!("{head}no streams\n"));
        assert_eq!(text(1), format!("{head}1 stream:\n{stream}"));
        assert_eq!(text(2), format!("{head}2 streams:\n{stream}{stream}"));
    }

    #[test]
    fn status_names_the_reason_while_zookeeper_is_not_connected() {
        let mut report: StatusReport = parse(status_json(0));
        report.zookeeper.disconnected_seconds = Some(40.2);
        report.zookeeper.disconnected_reason = Some("zk:2281: refused".to_owned());
        let text = status(&report);
        assert!(text.contains("\nZooKeeper: not connected for 40 s: zk:2281: refused\n"), "{text}");
    }

    /// The report of a running build.
    fn route_json() -> Value {
        let hop = |host: &str,
                   state: &str,
                   failures: u32,
                   retry: Option<f64>,
                   last: Option<&str>| {
            json!({
                "kind": "gateway", "host": host, "port": 1, "zone": "west", "tls": true,
                "state": state, "failures": failures, "retry_seconds": retry, "last_failure": last,
            })
        };
        let executor =
            json!({"kind": "executor", "host": "d", "port": 7900, "zone": "west", "tls": false});
        let attempt = |failure: Option<&str>, times: usize| {
            json!({
                "seconds_ago": 1.5, "build": "ab", "failure": failure, "times": times,
                "kind": "gateway", "host": "c", "port": 1, "zone": "west", "tls": true,
            })
        };
        json!({
            "status": "ok", "state": "running", "build": "ab", "error": null, "executor": executor,
            "executor_zone": "west", "own_zone": null, "gateway": "gw",
            "hops": [
                hop("a", "untried", 0, None, None),
                hop("b", "healthy", 0, None, None),
                hop("c", "retry_due", 2, None, Some("refused")),
                hop("d", "backing_off", 1, Some(0.5), Some("refused")),
                hop("e", "loop", 1, Some(0.5), Some("loop")),
                {
                    "kind": "executor", "host": "d", "port": 7900, "zone": "west", "tls": false,
                    "state": null, "failures": 0, "retry_seconds": null, "last_failure": null,
                },
            ],
            "zones_with_gateways": ["west"],
            "attempts": [attempt(None, 1), attempt(Some("refused"), 2)],
        })
    }

    #[test]
    fn route_has_a_line_for_each_hop_and_attempt() {
        let gateway = |host: &str| format!("gateway {host}:1 of zone west (TLS)");
        let [a, b, c, d, e] = ["a", "b", "c", "d", "e"].map(gateway);
        assert_eq!(
            route(&parse(route_json())),
            format!(
                "running: ab on executor d:7900 of zone west\ngateway: gw\n1. {a}: not tried yet\n\
                 2. {b}: healthy\n3. {c}: retry due, failed 2 times; last: refused\n\
                 4. {d}: backing off for 0.5 s, failed once; last: refused\n\
                 5. {e}: requests to it go in a loop, not tried for 0.5 s; last: loop\n\
                 6. executor d:7900\nrecent attempts:\n  1.5 s ago, ab from {c}: answered\n  \
                 1.5 s ago, ab from {c}: refused (2 times)\n"
            )
        );
    }

    #[test]
    fn route_begins_with_the_state_of_the_build() {
        let first_line = |state| {
            let mut report: RouteReport = parse(route_json());
            report.state = state;
            report.error = Some("no session".to_owned());
            route(&report).lines().next().map(str::to_owned).expect("a line")
        };
        assert_eq!(first_line(BuildState::Queued), "queued: no executor has taken ab yet");
        assert_eq!(first_line(BuildState::Error), "error: ab: no session");
        let unknown = first_line(BuildState::Unknown);
        assert!(unknown.starts_with("unknown: no queue has ab;"), "{unknown}");
    }

    #[test]
    fn zone_without_a_gateway_is_named_with_the_zones_that_have_one() {
        let mut report: RouteReport = parse(route_json());
        let warning = |report: &RouteReport| {
            let text = route(report);
            text.lines().find(|line| line.starts_with("no gateway")).map(str::to_owned)
        };
        assert_eq!(warning(&report), None);
        report.zones_with_gateways = ["wst".to_owned(), "east".to_owned()].into();
        let expected = "no gateway of zone west is registered; zones with gateways: east, wst";
        assert_eq!(warning(&report).as_deref(), Some(expected));
        report.zones_with_gateways = (0..99).map(|number| format!("zone{number:02}")).collect();
        assert!(warning(&report).is_some_and(|line| line.ends_with("zone19, ...")));
        report.zones_with_gateways.clear();
        let expected = "no gateway of zone west is registered; no zone has a gateway";
        assert_eq!(warning(&report).as_deref(), Some(expected));
        report.own_zone = Some("west".to_owned());
        assert_eq!(warning(&report), None, "executors of the own zone need no gateway");
    }

    #[test]
    fn reload_lists_what_changed_and_what_needs_a_restart() {
        let report = |changed: &[&str], needs_restart: &[&str]| ReloadReport {
            configuration: "/gw.toml".to_owned(),
            changed: changed.iter().map(|&key| key.to_owned()).collect(),
            needs_restart: needs_restart.iter().map(|&key| key.to_owned()).collect(),
            warnings: vec!["a warning".to_owned()],
        };
        let text = |changed, needs_restart| reload(&report(changed, needs_restart));
        assert_eq!(text(&[], &[]), "reloaded /gw.toml\nnothing has changed\na warning\n");
        assert_eq!(text(&["a", "b"], &[]), "reloaded /gw.toml\nchanged: a; b\na warning\n");
        let expected = "reloaded /gw.toml\neffective after a restart: c\na warning\n";
        assert_eq!(text(&[], &["c"]), expected);
    }
}
