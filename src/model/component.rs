//! Entries of Zuul's component registry, `/zuul/components/<kind>/<name>`: reading everybody's,
//! writing our own. Pure.
//!
//! The format is Zuul's (`zuul/zk/components.py`): one JSON object with sorted keys. The reader is
//! tolerant: it wants the few keys it uses, and a fault in one entry concerns that entry alone.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::json::{member, object, wrong};
use crate::registry::{is_dialable, is_name};

/// The data model this gateway announces where no other component says what the system speaks:
/// that of Zuul 14.3.0 (`zuul/model_api.py`).
pub(crate) const MODEL_API: u64 = 38;

/// The lowest data model this gateway announces: that of Zuul 9.0.0, long after build requests
/// took the form read here (`doc/source/developer/model-changelog.rst`). A number above the
/// system's minimum changes nothing for anybody; one below would drag all components down.
const MODEL_API_FLOOR: u64 = 15;

/// The kind under which finger gateways register.
pub(crate) const FINGERGW: &str = "fingergw";

/// A component's state, in Zuul's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Starting: the entry is there, nobody is served yet.
    Initializing,
    /// Serving.
    Running,
    /// Going away.
    Stopped,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// What this gateway says of itself, but for its state and data model, which change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnComponent {
    /// The name others dial and send as SNI.
    pub(crate) hostname: String,
    /// The port others dial; `None` tells them not to.
    pub(crate) public_port: Option<u16>,
    /// The zone it serves.
    pub(crate) zone: Option<String>,
    /// Whether that port speaks TLS.
    pub(crate) use_ssl: bool,
}

impl OwnComponent {
    /// The entry's content in `state`, speaking `model_api`.
    pub(crate) fn to_json(&self, state: State, model_api: u64) -> String {
        let entry = Entry {
            hostname: &self.hostname,
            kind: FINGERGW,
            model_api,
            public_port: self.public_port,
            state: state.as_str(),
            use_ssl: self.use_ssl,
            version: env!("CARGO_PKG_VERSION"),
            zone: self.zone.as_deref(),
        };
        serde_json::to_string(&entry).expect("strings and numbers are always JSON")
    }
}

/// Our entry as it is written: every key, in alphabetical order as Zuul writes them.
#[derive(Serialize)]
struct Entry<'a> {
    hostname: &'a str,
    kind: &'a str,
    model_api: u64,
    public_port: Option<u16>,
    state: &'a str,
    use_ssl: bool,
    version: &'a str,
    zone: Option<&'a str>,
}

/// Another finger gateway that takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gateway {
    pub(crate) hostname: String,
    pub(crate) port: u16,
    pub(crate) zone: Option<String>,
    pub(crate) tls: bool,
}

/// What this gateway needs to know of any component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Component {
    /// The data model it speaks; 0 where the entry does not say, as Zuul reads it.
    pub(crate) model_api: u64,
    /// Set if it is a finger gateway that can be dialed: `running` and with a port.
    pub(crate) gateway: Option<Gateway>,
}

impl Component {
    /// Reads the entry `name` of `kind`.
    ///
    /// # Errors
    /// Says what is wrong with an entry that is no JSON object or has a used key of another type.
    pub(crate) fn from_json(kind: &str, name: &str, json: &[u8]) -> Result<Self, String> {
        let entry: ComponentEntry<'_> = object(json)?;
        let model_api = member("model_api", entry.model_api)?.unwrap_or(0);
        let gateway = if kind == FINGERGW { gateway(name, &entry)? } else { None };
        Ok(Self { model_api, gateway })
    }
}

/// The members of a component's entry that are used.
#[derive(Deserialize)]
struct ComponentEntry<'j> {
    #[serde(borrow)]
    model_api: Option<&'j RawValue>,
    #[serde(borrow)]
    state: Option<&'j RawValue>,
    #[serde(borrow)]
    public_port: Option<&'j RawValue>,
    #[serde(borrow)]
    hostname: Option<&'j RawValue>,
    #[serde(borrow)]
    zone: Option<&'j RawValue>,
    #[serde(borrow)]
    use_ssl: Option<&'j RawValue>,
}

/// The gateway an entry of kind `fingergw` describes, if it can be dialed now.
fn gateway(name: &str, entry: &ComponentEntry<'_>) -> Result<Option<Gateway>, String> {
    let ComponentEntry { state, public_port, hostname, zone, use_ssl, .. } = *entry;
    let state: Option<Cow<'_, str>> = member("state", state).unwrap_or_default();
    if state.as_deref() != Some(State::Running.as_str()) {
        return Ok(None);
    }
    let Some(port) = member("public_port", public_port)? else { return Ok(None) };
    if port == 0 {
        return Err(wrong("public_port", "0"));
    }
    let hostname = member("hostname", hostname)?.unwrap_or_else(|| name.to_owned());
    if !is_dialable(&hostname) {
        return Err(wrong("hostname", &hostname));
    }
    let zone: Option<String> = member("zone", zone)?;
    if let Some(zone) = zone.as_deref().filter(|zone| !is_name(zone)) {
        return Err(wrong("zone", zone));
    }
    let tls = member("use_ssl", use_ssl)?.unwrap_or(false);
    Ok(Some(Gateway { hostname, port, zone, tls }))
}

/// The data model to announce beside components of the given kinds and numbers: never missing,
/// never lower than what the system speaks already.
///
/// The minimum over everything but finger gateways: Zuul writes old formats as long as anybody
/// announces an old number, so two gateways must not hold each other, and with them the system,
/// at the number of yesterday.
pub(crate) fn model_api<'a>(components: impl Iterator<Item = (&'a str, u64)>) -> u64 {
    components
        .filter(|(kind, _)| *kind != FINGERGW)
        .map(|(_, model_api)| model_api)
        .min()
        .unwrap_or(MODEL_API)
        .max(MODEL_API_FLOOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn announcement() -> OwnComponent {
        OwnComponent {
            hostname: "gw.example.org".into(),
            public_port: Some(7979),
            zone: Some("zone2".into()),
            use_ssl: true,
        }
    }

    fn read(json: &str) -> Result<Component, String> {
        Component::from_json(FINGERGW, "gw.example.org0000000003", json.as_bytes())
    }

    #[test]
    fn our_entry_has_every_key_sorted() {
        assert_eq!(
            announcement().to_json(State::Running, 38),
            format!(
                r#"{{"hostname":"gw.example.org","kind":"fingergw","model_api":38,"public_port":7979,"state":"running","use_ssl":true,"version":"{}","zone":"zone2"}}"#,
                env!("CARGO_PKG_VERSION")
            )
        );
        let plain =
            OwnComponent { public_port: None, zone: None, use_ssl: false, ..announcement() };
        let json: Value = serde_json::from_str(&plain.to_json(State::Stopped, 15)).unwrap();
        assert_eq!(json["zone"], Value::Null);
        assert_eq!(json["public_port"], Value::Null);
        assert_eq!(json["state"], "stopped");
    }

    #[test]
    fn our_own_entry_reads_back() {
        let component = read(&announcement().to_json(State::Running, 38)).unwrap();
        let gateway = component.gateway.unwrap();
        assert_eq!((gateway.hostname.as_str(), gateway.port), ("gw.example.org", 7979));
        assert_eq!((gateway.zone.as_deref(), gateway.tls), (Some("zone2"), true));
        assert_eq!(component.model_api, 38);
    }

    #[test]
    fn only_running_gateways_with_a_port_can_be_dialed() {
        for state in [State::Initializing, State::Stopped] {
            assert_eq!(read(&announcement().to_json(state, 38)).unwrap().gateway, None);
        }
        let portless = OwnComponent { public_port: None, ..announcement() };
        assert_eq!(read(&portless.to_json(State::Running, 38)).unwrap().gateway, None);
        assert_eq!(read(r#"{"public_port": 1}"#).unwrap().gateway, None, "no state: stopped");
        assert_eq!(read(r#"{"public_port": 1, "state": "paused"}"#).unwrap().gateway, None);
    }

    #[test]
    fn missing_keys_have_zuuls_defaults() {
        let component = read(r#"{"state": "running", "public_port": 79, "new": [1]}"#).unwrap();
        assert_eq!(component.model_api, 0);
        assert_eq!(
            component.gateway,
            Some(Gateway {
                hostname: "gw.example.org0000000003".into(),
                port: 79,
                zone: None,
                tls: false
            })
        );
    }

    #[test]
    fn faults_are_named() {
        for (json, fault) in [
            ("", "EOF"),
            ("[]", "not a JSON object"),
            (r#"{"model_api": "38"}"#, "model_api"),
            (r#"{"model_api": -1}"#, "model_api"),
            (r#"{"state": "running", "public_port": "79"}"#, "public_port"),
            (r#"{"state": "running", "public_port": 0}"#, "public_port"),
            (r#"{"state": "running", "public_port": 70000}"#, "public_port"),
            (r#"{"state": "running", "public_port": 79, "hostname": 1}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "hostname": ""}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "hostname": "a\u0000b"}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "zone": 1}"#, "zone"),
            (r#"{"state": "running", "public_port": 79, "zone": "a\u0000b"}"#, "zone"),
            (
                &format!(r#"{{"state":"running","public_port":79,"zone":"{}"}}"#, "z".repeat(256)),
                "zone",
            ),
            (r#"{"state": "running", "public_port": 79, "use_ssl": 1}"#, "use_ssl"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(fault), "{json}: {error}");
        }
    }

    #[test]
    fn other_kinds_need_only_their_model() {
        let json = br#"{"model_api": 37, "public_port": "x", "state": 5}"#;
        let component = Component::from_json("executor", "ze01", json).unwrap();
        assert_eq!(component, Component { model_api: 37, gateway: None });
    }

    #[test]
    fn the_announced_model_follows_the_others() {
        let announced = |models: &[(&str, u64)]| model_api(models.iter().copied());
        assert_eq!(announced(&[]), MODEL_API);
        assert_eq!(announced(&[("fingergw", 7)]), MODEL_API, "gateways do not pin each other");
        assert_eq!(announced(&[("scheduler", 40), ("fingergw", 38), ("executor", 39)]), 39);
        assert_eq!(announced(&[("scheduler", 36), ("web", 38)]), 36);
        assert_eq!(announced(&[("merger", 0)]), MODEL_API_FLOOR, "never 0");
    }

    proptest! {
        /// No bytes panic, and what is read can be announced without lowering anybody.
        #[test]
        fn any_bytes(json in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Component::from_json(FINGERGW, "name", &json);
        }

        #[test]
        fn never_below_the_system(models in prop::collection::vec(0u64..60, 0..9)) {
            let announced = model_api(models.iter().map(|model| ("executor", *model)));
            if let Some(minimum) = models.iter().min() {
                prop_assert!(announced >= *minimum);
            }
            prop_assert!(announced >= MODEL_API_FLOOR);
        }

        #[test]
        fn any_port_and_zone(port in any::<i64>(), zone in "\\PC{0,20}") {
            let entry = json!({"state": "running", "public_port": port, "zone": zone}).to_string();
            let valid = (1..=65535).contains(&port);
            let read = read(&entry);
            prop_assert_eq!(read.is_ok(), valid);
            if let Ok(Component { gateway: Some(gateway), .. }) = read {
                prop_assert_eq!((gateway.port as i64, gateway.zone), (port, Some(zone)));
            }
        }
    }
}
