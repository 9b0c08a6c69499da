//! Reads the component registry once, for `zuul-fingergw check --connect`. Changes nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use zookeeper_client::{Client, Error, TlsDynamicCerts};

use super::component_watcher::COMPONENTS;
use super::connect::{Tls, connect};
use super::connect_diagnostics::ConnectDiagnostics;
use crate::config::Hosts;
use crate::model::component::{Component, FINGERGW};

/// Time for the session and all reads.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Time for a session before the servers are diagnosed.
const DIAGNOSE_AFTER: Duration = Duration::from_secs(5);

/// The kinds of components without which no build runs.
const ESSENTIAL: [&str; 2] = ["scheduler", "executor"];

/// The components that are registered.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    hosts: String,
    /// How many components of each kind are registered.
    kinds: BTreeMap<String, usize>,
    zones: BTreeMap<Option<String>, Zone>,
}

/// The components of one zone, or of none.
#[derive(Debug, Default)]
struct Zone {
    executors: usize,
    /// The gateways that can be dialed, as host and port.
    gateways: Vec<String>,
}

/// Establishes a session with the ZooKeeper at `hosts` and reads the component registry.
///
/// # Errors
/// No session can be established: the cause for each server. Or the registry cannot be read.
pub(crate) async fn survey(hosts: &Hosts, tls: Tls, session_timeout: Duration) -> Result<Survey> {
    let deadline = Instant::now() + TIMEOUT;
    let client = session(hosts, tls, session_timeout, deadline).await?;
    let mut survey = Survey { hosts: hosts.to_string(), ..Survey::default() };
    match timeout_at(deadline, survey.read(&client)).await {
        Ok(Ok(())) => Ok(survey),
        Ok(Err(error)) => bail!("{COMPONENTS}: {error}"),
        Err(_) => bail!("{COMPONENTS}: no answer within {TIMEOUT:?}"),
    }
}

/// Establishes a session. After [`DIAGNOSE_AFTER`] the servers are diagnosed at the same time.
///
/// # Errors
/// The cause for each server, if none of them grants a session before `deadline`.
async fn session(
    hosts: &Hosts,
    tls: Tls,
    session_timeout: Duration,
    deadline: Instant,
) -> Result<Client> {
    let (_sender, shown) = watch::channel(tls.clone());
    let diagnostics = ConnectDiagnostics::new(hosts.servers.clone(), shown);
    let certs = TlsDynamicCerts::new(tls.certs.clone());
    let mut connecting = pin!(connect(hosts, &tls, session_timeout, certs));
    let connected = match timeout(DIAGNOSE_AFTER, &mut connecting).await {
        Ok(connected) => connected,
        Err(_) => tokio::select! {
            connected = &mut connecting => connected,
            causes = diagnostics.run() => {
                if !causes.any_reachable {
                    bail!(causes.text);
                }
                let Ok(connected) = timeout_at(deadline, connecting).await else {
                    bail!(causes.text);
                };
                connected
            }
        },
    };
    match connected {
        Ok(client) => Ok(client),
        Err(_) => bail!(diagnostics.run().await.text),
    }
}

impl Survey {
    async fn read(&mut self, client: &Client) -> Result<(), Error> {
        for kind in children(client, COMPONENTS).await? {
            let directory = format!("{COMPONENTS}/{kind}");
            let names = children(client, &directory).await?;
            if !names.is_empty() {
                self.kinds.insert(kind.clone(), names.len());
            }
            for name in names {
                match client.get_data(&format!("{directory}/{name}")).await {
                    Ok((json, _)) => self.add(&kind, &name, &json),
                    Err(Error::NoNode) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: &str, name: &str, json: &[u8]) {
        if kind == "executor" {
            let entry: Value = serde_json::from_slice(json).unwrap_or_default();
            let zone = entry["zone"].as_str().map(str::to_owned);
            self.zones.entry(zone).or_default().executors += 1;
        }
        let component = Component::from_json(kind, name, json).ok();
        if let Some(gateway) = component.and_then(|component| component.gateway) {
            let tls = if gateway.tls { "TLS" } else { "plain" };
            let shown = format!("{}:{} ({tls})", gateway.hostname, gateway.port);
            self.zones.entry(gateway.zone).or_default().gateways.push(shown);
        }
    }

    /// Whether a scheduler or an executor is registered.
    pub(crate) fn is_zuul(&self) -> bool {
        ESSENTIAL.iter().any(|kind| self.kinds.contains_key(*kind))
    }

    /// The report for the operator.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("ZooKeeper at {}: connected\n", self.hosts);
        if !self.is_zuul() {
            let _ = writeln!(
                text,
                "  no Zuul: no scheduler and no executor is registered below {COMPONENTS}: check that \
                 the path after the last server in hosts is that of Zuul's services"
            );
        }
        let kinds = self.kinds.iter().map(|(kind, count)| format!("{} ({count})", shown(kind)));
        let kinds: Vec<_> = kinds.collect();
        if !kinds.is_empty() {
            let _ = writeln!(text, "  components: {}", kinds.join(", "));
        }
        for (zone, Zone { executors, gateways }) in &self.zones {
            let zone =
                zone.as_deref().map_or("no zone".to_owned(), |z| format!("zone {}", shown(z)));
            let gateways = match gateways.is_empty() {
                true => "no gateway".to_owned(),
                false => format!("gateways {}", gateways.join(", ")),
            };
            let executors =
                if *executors == 1 { "1 executor" } else { &format!("{executors} executors") };
            let _ = writeln!(text, "  {zone}: {executors}, {gateways}");
        }
        if !self.kinds.contains_key(FINGERGW) && self.is_zuul() {
            let _ = writeln!(text, "  no gateway is registered yet");
        }
        text
    }
}

/// The names of the children of `path`; none if it does not exist.
async fn children(client: &Client, path: &str) -> Result<Vec<String>, Error> {
    match client.list_children(path).await {
        Err(Error::NoNode) => Ok(Vec::new()),
        listed => listed,
    }
}

/// `name`, as ZooKeeper has it, in printable form.
fn shown(name: &str) -> String {
    name.escape_default().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_lists_the_executors_and_gateways_of_each_zone() {
        let mut survey = Survey { hosts: "zk:2281/z".to_owned(), ..Survey::default() };
        let empty = survey.text();
        assert!(!survey.is_zuul() && empty.contains("no Zuul: no scheduler"), "{empty}");
        for (kind, json) in [
            ("executor", r#"{"zone": "west"}"#),
            ("executor", r#"{"zone": null}"#),
            ("executor", "garbage"),
            ("scheduler", "{}"),
            (
                "fingergw",
                r#"{"hostname": "gw", "public_port": 79, "state": "running", "zone": "west",
                    "use_ssl": true}"#,
            ),
            ("fingergw", r#"{"hostname": "gw2", "state": "initializing"}"#),
        ] {
            *survey.kinds.entry(kind.to_owned()).or_default() += 1;
            survey.add(kind, "name", json.as_bytes());
        }
        assert!(survey.is_zuul());
        assert_eq!(
            survey.text(),
            "ZooKeeper at zk:2281/z: connected\n  \
             components: executor (3), fingergw (2), scheduler (1)\n  \
             no zone: 2 executors, no gateway\n  zone west: 1 executor, gateways gw:79 (TLS)\n"
        );
    }
}
