//! Entries of Zuul's component registry, `/zuul/components/<kind>/<name>`: reading all of them,
//! writing our own.
//!
//! The format is Zuul's (`zuul/zk/components.py`): one JSON object with sorted keys. Only the
//! members that are used are required to be valid, and an error in one entry affects that entry
//! only.

use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use super::excerpt::Excerpt;
use super::json::{EntryError, Field, object};
use super::{is_hostname, is_name};

/// The data model that this gateway announces if no other component announces one: that of Zuul
/// 14.3.0 (`zuul/model_api.py`).
pub(crate) const MODEL_API: u64 = 38;

/// The lowest data model that this gateway announces: that of Zuul 9.0.0, long after build requests
/// took the form that is read here (`doc/source/developer/model-changelog.rst`). Zuul uses the
/// minimum over all components, so announcing more than the others has no effect, and announcing
/// less would make all of them write older formats.
const MODEL_API_FLOOR: u64 = 15;

/// The kind under which finger gateways register.
pub(crate) const FINGERGW: &str = "fingergw";

/// The state of a component, in Zuul's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Starting: the entry exists, but the component does not serve yet.
    Initializing,
    /// Serving.
    Running,
    /// Shutting down.
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

/// Our own component: what its entry says, except for the state and the data model, which change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnComponent {
    /// The name that other components dial and send as SNI.
    pub(crate) hostname: String,
    /// The port that other components dial. `None` keeps them from dialing.
    pub(crate) public_port: Option<u16>,
    /// The zone that this gateway serves.
    pub(crate) zone: Option<String>,
    /// Whether the public port speaks TLS.
    pub(crate) use_ssl: bool,
}

impl OwnComponent {
    /// The content of the entry in `state`, announcing `model_api`.
    pub(crate) fn to_json(&self, state: State, model_api: u64) -> String {
        let entry = OwnComponentJson {
            hostname: &self.hostname,
            kind: FINGERGW,
            model_api,
            public_port: self.public_port,
            state,
            use_ssl: self.use_ssl,
            version: env!("CARGO_PKG_VERSION"),
            zone: self.zone.as_deref(),
        };
        serde_json::to_string(&entry).expect("strings and numbers can always be written")
    }
}

/// Our entry as it is written: all members, in alphabetical order, as Zuul writes them.
#[derive(Serialize)]
struct OwnComponentJson<'a> {
    hostname: &'a str,
    kind: &'a str,
    model_api: u64,
    public_port: Option<u16>,
    state: State,
    use_ssl: bool,
    version: &'a str,
    zone: Option<&'a str>,
}

/// A finger gateway that accepts connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gateway {
    pub(crate) hostname: String,
    pub(crate) port: u16,
    pub(crate) zone: Option<String>,
    pub(crate) tls: bool,
}

/// What this gateway uses of a component's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Component {
    /// The data model that it announces; 0 if it announces none, as Zuul reads it.
    pub(crate) model_api: u64,
    /// Set for a finger gateway that can be dialed: one that is `running` and has a port.
    pub(crate) gateway: Option<Gateway>,
}

/// The members of a component's entry that are used.
#[derive(Deserialize)]
struct ComponentJson {
    #[serde(default)]
    model_api: Field<u64>,
    #[serde(default)]
    state: Field<State>,
    #[serde(default)]
    public_port: Field<NonZeroU16>,
    #[serde(default)]
    hostname: Field<String>,
    #[serde(default)]
    zone: Field<String>,
    #[serde(default)]
    use_ssl: Field<bool>,
}

impl Component {
    /// Reads the entry `name` of a component of this `kind`.
    ///
    /// # Errors
    /// The entry is not a JSON object, or a member that is used is invalid.
    pub(crate) fn from_json(kind: &str, name: &str, json: &[u8]) -> Result<Self, EntryError> {
        let entry: ComponentJson = object("the entry", json)?;
        let model_api = entry.model_api.strict("model_api")?.unwrap_or(0);
        let is_running = matches!(entry.state, Field::Value(State::Running));
        if kind != FINGERGW || !is_running {
            return Ok(Self { model_api, gateway: None });
        }
        let Some(port) = entry.public_port.strict("public_port")? else {
            return Ok(Self { model_api, gateway: None });
        };
        let hostname = entry.hostname.strict("hostname")?.unwrap_or_else(|| name.to_owned());
        if !is_hostname(&hostname) {
            return Err(invalid("hostname", &hostname));
        }
        let zone = entry.zone.strict("zone")?;
        if let Some(zone) = zone.as_deref().filter(|zone| !is_name(zone)) {
            return Err(invalid("zone", zone));
        }
        let tls = entry.use_ssl.strict("use_ssl")?.unwrap_or(false);
        Ok(Self { model_api, gateway: Some(Gateway { hostname, port: port.get(), zone, tls }) })
    }
}

fn invalid(key: &'static str, value: &str) -> EntryError {
    EntryError::Invalid { key, value: Excerpt::new(value.as_bytes()) }
}

/// The data model to announce in a system of `components`, given as kinds and data models: the
/// minimum that the system already uses, at least [`MODEL_API_FLOOR`].
///
/// Finger gateways do not count. Zuul writes old formats for as long as any component announces an
/// old data model, so two gateways that follow each other would keep the system at the older
/// format.
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
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn own_component() -> OwnComponent {
        OwnComponent {
            hostname: "gw.example.org".to_owned(),
            public_port: Some(7979),
            zone: Some("zone2".to_owned()),
            use_ssl: true,
        }
    }

    fn read(json: &str) -> Result<Component, EntryError> {
        Component::from_json(FINGERGW, "gw.example.org0000000003", json.as_bytes())
    }

    fn read_gateway(json: &str) -> Option<Gateway> {
        read(json).expect(json).gateway
    }

    #[test]
    fn own_entry_has_all_members_sorted() {
        assert_eq!(
            own_component().to_json(State::Running, 38),
            format!(
                r#"{{"hostname":"gw.example.org","kind":"fingergw","model_api":38,"public_port":7979,"state":"running","use_ssl":true,"version":"{}","zone":"zone2"}}"#,
                env!("CARGO_PKG_VERSION")
            )
        );
        let plain =
            OwnComponent { public_port: None, zone: None, use_ssl: false, ..own_component() };
        let json: Value =
            serde_json::from_str(&plain.to_json(State::Stopped, 15)).expect("valid JSON");
        assert_eq!(json["zone"], Value::Null);
        assert_eq!(json["public_port"], Value::Null);
        assert_eq!(json["state"], "stopped");
    }

    #[test]
    fn own_entry_can_be_read_back() {
        let component = read(&own_component().to_json(State::Running, 38)).expect("a valid entry");
        let gateway = Gateway {
            hostname: "gw.example.org".to_owned(),
            port: 7979,
            zone: Some("zone2".to_owned()),
            tls: true,
        };
        assert_eq!(component, Component { model_api: 38, gateway: Some(gateway) });
    }

    #[test]
    fn names_of_states_are_the_same_in_json_and_text() {
        for state in [State::Initializing, State::Running, State::Stopped] {
            let json = serde_json::to_value(state).expect("valid JSON");
            assert_eq!(json, state.as_str());
        }
    }

    #[test]
    fn gateway_that_is_not_running_or_has_no_port_cannot_be_dialed() {
        for state in [State::Initializing, State::Stopped] {
            assert_eq!(read_gateway(&own_component().to_json(state, 38)), None);
        }
        let without_port = OwnComponent { public_port: None, ..own_component() };
        assert_eq!(read_gateway(&without_port.to_json(State::Running, 38)), None);
        assert_eq!(read_gateway(r#"{"public_port": 1}"#), None, "no state");
        assert_eq!(read_gateway(r#"{"public_port": 1, "state": "paused"}"#), None);
        assert_eq!(read_gateway(r#"{"public_port": 1, "state": 5}"#), None);
    }

    #[test]
    fn missing_members_have_the_defaults_of_zuul() {
        let component = read(r#"{"state": "running", "public_port": 79, "new": [1]}"#);
        let gateway = Gateway {
            hostname: "gw.example.org0000000003".to_owned(),
            port: 79,
            zone: None,
            tls: false,
        };
        assert_eq!(component, Ok(Component { model_api: 0, gateway: Some(gateway) }));
    }

    #[test]
    fn error_names_the_member() {
        let long_zone =
            format!(r#"{{"state":"running","public_port":79,"zone":"{}"}}"#, "z".repeat(256));
        for (json, expected) in [
            ("", "EOF"),
            ("[]", "not a JSON object"),
            (r#"{"model_api": "38"}"#, "model_api"),
            (r#"{"model_api": -1}"#, "model_api"),
            (r#"{"model_api": 1, "model_api": 2}"#, "model_api"),
            (r#"{"state": "running", "public_port": "79"}"#, "public_port"),
            (r#"{"state": "running", "public_port": 0}"#, "public_port"),
            (r#"{"state": "running", "public_port": 70000}"#, "public_port"),
            (r#"{"state": "running", "public_port": 79, "hostname": 1}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "hostname": ""}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "hostname": "a\u0000b"}"#, "hostname"),
            (r#"{"state": "running", "public_port": 79, "zone": 1}"#, "zone"),
            (r#"{"state": "running", "public_port": 79, "zone": "a\u0000b"}"#, "zone"),
            (&long_zone, "zone"),
            (r#"{"state": "running", "public_port": 79, "use_ssl": 1}"#, "use_ssl"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
            assert!(error.len() < 200, "{error}");
        }
    }

    #[test]
    fn other_kinds_need_only_a_data_model() {
        let json = br#"{"model_api": 37, "public_port": "x", "state": 5}"#;
        let component = Component::from_json("executor", "ze01", json);
        assert_eq!(component, Ok(Component { model_api: 37, gateway: None }));
    }

    #[test]
    fn announced_data_model_is_the_minimum_of_the_other_components() {
        let announced = |components: &[(&str, u64)]| model_api(components.iter().copied());
        assert_eq!(announced(&[]), MODEL_API);
        assert_eq!(announced(&[("fingergw", 7)]), MODEL_API, "gateways do not count");
        assert_eq!(announced(&[("scheduler", 40), ("fingergw", 38), ("executor", 39)]), 39);
        assert_eq!(announced(&[("scheduler", 36), ("web", 38)]), 36);
        assert_eq!(announced(&[("merger", 0)]), MODEL_API_FLOOR, "never 0");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(json in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Component::from_json(FINGERGW, "name", &json);
        }

        #[test]
        fn announced_data_model_never_lowers_that_of_the_system(
            models in prop::collection::vec(0u64..60, 0..9),
        ) {
            let announced = model_api(models.iter().map(|model| ("executor", *model)));
            if let Some(minimum) = models.iter().min() {
                prop_assert!(announced >= *minimum);
            }
            prop_assert!(announced >= MODEL_API_FLOOR);
        }

        #[test]
        fn valid_port_and_zone_are_read_back(port in any::<i64>(), zone in "\\PC{0,20}") {
            let entry = json!({"state": "running", "public_port": port, "zone": zone}).to_string();
            let component = read(&entry);
            let is_valid = (1..=65535).contains(&port);
            prop_assert_eq!(component.is_ok(), is_valid);
            if let Ok(Component { gateway: Some(gateway), .. }) = component {
                prop_assert_eq!(i64::from(gateway.port), port);
                prop_assert_eq!(gateway.zone, Some(zone));
            }
        }
    }
}
