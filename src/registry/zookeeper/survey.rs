//! One look into ZooKeeper for `zuul-fingergw check --connect`: which components of Zuul there are.
//! Reads only.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use zookeeper_client::{Client, Error, TlsDynamicCerts};

use super::components::COMPONENTS;
use super::diagnosis::Diagnosis;
use super::{Tls, connect};
use crate::config::Hosts;
use crate::registry::component::{Component, FINGERGW};

/// For everything, the reasons of a failure included.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The components without which no build runs.
const ESSENTIAL: [&str; 2] = ["scheduler", "executor"];

/// What ZooKeeper has.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    hosts: String,
    /// How many components of each kind are registered.
    kinds: BTreeMap<String, usize>,
    zones: BTreeMap<Option<String>, Zone>,
}

/// One zone, or what is in none.
#[derive(Debug, Default)]
struct Zone {
    executors: usize,
    /// The gateways that others can connect to, as host and port.
    gateways: Vec<String>,
}

/// Gets a session with the ZooKeeper at `hosts` and reads the component registry.
///
/// # Errors
/// No session comes about: what each server answers. Or the registry cannot be read.
pub(crate) async fn survey(hosts: &Hosts, tls: Tls, session_timeout: Duration) -> Result<Survey> {
    let work = async {
        let certs = TlsDynamicCerts::new(tls.certs.clone());
        let connected = connect(hosts, &tls, session_timeout, certs).await;
        let Ok(client) = connected else {
            let (_sender, tls) = watch::channel(tls);
            bail!(Diagnosis::new(hosts.servers.clone(), tls).why().await);
        };
        let mut survey = Survey { hosts: hosts.to_string(), ..Survey::default() };
        survey.read(&client).await.map_err(|error| anyhow!("{COMPONENTS}: {error}"))?;
        Ok(survey)
    };
    timeout(TIMEOUT, work).await.unwrap_or_else(|_| bail!("no answer within {TIMEOUT:?}"))
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

    /// Whether a Zuul is registered there.
    pub(crate) fn is_zuul(&self) -> bool {
        ESSENTIAL.iter().any(|kind| self.kinds.contains_key(*kind))
    }

    /// In lines.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("ZooKeeper at {}: connected\n", self.hosts);
        if !self.is_zuul() {
            let _ = writeln!(
                text,
                "  no Zuul: no scheduler and no executor is registered below {COMPONENTS}; is the \
                 path after the last server in hosts the one that Zuul's services use?"
            );
        }
        let kinds = self.kinds.iter().map(|(kind, count)| format!("{count} {}", shown(kind)));
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

/// The names below `path`; none if it does not exist.
async fn children(client: &Client, path: &str) -> Result<Vec<String>, Error> {
    match client.list_children(path).await {
        Err(Error::NoNode) => Ok(Vec::new()),
        listed => listed,
    }
}

/// A name out of ZooKeeper as one that can be printed.
fn shown(name: &str) -> String {
    name.escape_default().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_zones_with_their_executors_and_gateways() {
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
            "ZooKeeper at zk:2281/z: connected\n  components: 3 executor, 2 fingergw, 1 scheduler\n  \
             no zone: 2 executors, no gateway\n  zone west: 1 executor, gateways gw:79 (TLS)\n"
        );
    }
}
