//! Build requests, `/zuul/executor/{zones/<zone>,unzoned}/requests/<uuid>`: where a build runs.
//!
//! The scheduler writes the request, and the executor that takes it adds `worker_info`
//! (`zuul/model.py`, `zuul/executor/server.py`). The state of a build does not matter: its log can
//! be streamed for as long as the executor keeps it.

use std::num::NonZeroU16;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::excerpt::Excerpt;
use super::json::{EntryError, Field, object};
use super::trace_parent::{SpanContext, TraceParent};
use super::{is_hostname, is_name};

/// The tenant, location and trace of a build, as its build request has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Build {
    /// `None` if the request names no valid tenant. Zuul's always do.
    pub(crate) tenant: Option<Arc<str>>,
    pub(crate) location: BuildLocation,
    pub(crate) trace_parent: Option<Arc<TraceParent>>,
}

/// Where a build is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BuildLocation {
    /// In the queue: no executor has taken it yet.
    Queued,
    /// On this executor.
    Executor(Executor),
}

/// Where an executor serves build logs. It speaks plain TCP: executors have no TLS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Executor {
    pub(crate) hostname: String,
    pub(crate) port: u16,
    /// The zone of the executor. The queue may be another one: executors of a zone can also take
    /// unzoned builds.
    pub(crate) zone: Option<String>,
}

/// The members of a build request that are used.
#[derive(Deserialize)]
struct RequestJson<'j> {
    #[serde(default)]
    tenant_name: Field<String>,
    #[serde(borrow)]
    worker_info: Option<&'j RawValue>,
    #[serde(default)]
    span_context: Field<SpanContext>,
    #[serde(default)]
    event_id: Field<String>,
}

/// The members of `worker_info` that are used.
#[derive(Deserialize)]
struct WorkerInfoJson {
    #[serde(default)]
    hostname: Field<String>,
    #[serde(default)]
    log_port: Field<NonZeroU16>,
    #[serde(default)]
    zone: Field<String>,
}

impl Build {
    /// Reads a build request. Returns `None` for an empty znode, which Zuul does not regard as a
    /// request either.
    ///
    /// # Errors
    /// The request is not a JSON object, or its `worker_info` does not say where the build runs.
    pub(crate) fn from_json(json: &[u8]) -> Result<Option<Self>, EntryError> {
        if json.is_empty() {
            return Ok(None);
        }
        let request: RequestJson<'_> = object("the request", json)?;
        let tenant = request.tenant_name.lenient().filter(|tenant| is_name(tenant));
        let location = match request.worker_info.map(RawValue::get) {
            Some(info) if !is_empty_object(info) => {
                BuildLocation::Executor(Executor::from_worker_info(info)?)
            }
            _ => BuildLocation::Queued,
        };
        Ok(Some(Self {
            tenant: tenant.map(Arc::from),
            location,
            trace_parent: TraceParent::new(request.span_context, request.event_id),
        }))
    }
}

/// Whether the valid JSON `text` is `{}`. Zuul regards an empty `worker_info` as a missing one.
fn is_empty_object(text: &str) -> bool {
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}'));
    inner.is_some_and(|inner| inner.trim_ascii().is_empty())
}

impl Executor {
    fn from_worker_info(json: &str) -> Result<Self, EntryError> {
        let info: WorkerInfoJson = object("worker_info", json.as_bytes())?;
        let hostname = info.hostname.lenient().filter(|hostname| is_hostname(hostname));
        let hostname = hostname
            .ok_or(EntryError::Required { key: "worker_info.hostname", expected: "a host name" })?;
        let port = info.log_port.lenient().ok_or(EntryError::Required {
            key: "worker_info.log_port",
            expected: "a port between 1 and 65535",
        })?;
        let zone = info.zone.strict("worker_info.zone")?.filter(|zone| !zone.is_empty());
        if let Some(zone) = &zone
            && !is_name(zone)
        {
            let value = Excerpt::new(zone.as_bytes());
            return Err(EntryError::Invalid { key: "worker_info.zone", value });
        }
        Ok(Self { hostname, port: port.get(), zone })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A request with all members that Zuul 14.3.0 writes, and a trace ID of more than 64 bits.
    fn request(worker_info: &str) -> String {
        format!(
            r#"{{"build_set_uuid": "a", "event_id": "b", "job_uuid": "c", "pipeline_name": "gate",
            "precedence": 200, "result_path": null, "span_context": {{"span_id": 9007199254740993,
            "trace_flags": 1, "trace_id": 170141183460469231731687303715884105727}},
            "state": "running", "tenant_name": "t", "uuid": "d", "worker_info": {worker_info},
            "zone": null}}"#
        )
    }

    fn read(worker_info: &str) -> Result<Build, EntryError> {
        let build = Build::from_json(request(worker_info).as_bytes());
        build.map(|build| build.expect("not empty"))
    }

    fn on_executor(zone: Option<&str>) -> BuildLocation {
        BuildLocation::Executor(Executor {
            hostname: "ze01".to_owned(),
            port: 7900,
            zone: zone.map(str::to_owned),
        })
    }

    fn queued() -> Build {
        Build { tenant: None, location: BuildLocation::Queued, trace_parent: None }
    }

    #[test]
    fn running_build_is_on_its_executor() {
        let build = read(r#"{"hostname": "ze01", "log_port": 7900, "zone": "west"}"#);
        let build = build.expect("a valid request");
        assert_eq!(build.location, on_executor(Some("west")));
        assert_eq!(build.tenant.as_deref(), Some("t"));
        assert_eq!(build.trace_parent.expect("a trace parent").event_id.as_deref(), Some("b"));
        for unzoned in [
            r#"{"hostname": "ze01", "log_port": 7900, "zone": null}"#,
            r#"{"hostname": "ze01", "log_port": 7900, "zone": ""}"#,
            r#"{"hostname": "ze01", "log_port": 7900, "other": [1]}"#,
        ] {
            assert_eq!(read(unzoned).expect(unzoned).location, on_executor(None));
        }
    }

    #[test]
    fn only_worker_info_with_host_and_port_is_required() {
        let least = br#"{"worker_info": {"hostname": "ze01", "log_port": 7900}}"#;
        let expected = Build { location: on_executor(None), ..queued() };
        assert_eq!(Build::from_json(least), Ok(Some(expected)));
    }

    #[test]
    fn build_without_worker_info_is_queued() {
        for worker_info in ["null", "{}", "{ \n}"] {
            let build = read(worker_info).expect(worker_info);
            assert_eq!(build.location, BuildLocation::Queued, "{worker_info}");
        }
        assert_eq!(Build::from_json(b"{}"), Ok(Some(queued())));
    }

    #[test]
    fn empty_znode_is_no_build() {
        assert_eq!(Build::from_json(b""), Ok(None));
    }

    #[test]
    fn invalid_tenant_is_ignored() {
        let long = format!(r#"{{"tenant_name": "{}"}}"#, "t".repeat(256));
        for request in [r#"{"tenant_name": ["t"]}"#, &long] {
            assert_eq!(Build::from_json(request.as_bytes()), Ok(Some(queued())), "{request}");
        }
    }

    #[test]
    fn other_members_may_be_anything() {
        let worker = r#"{"hostname": "ze01", "log_port": 7900, "new": "#;
        let nested = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        let request =
            format!(r#"{{"a": {nested}, "b": 1e999, "worker_info": {worker}{nested}}}}}"#);
        let build = Build::from_json(request.as_bytes()).expect("valid").expect("not empty");
        assert_eq!(build.location, on_executor(None));
    }

    #[test]
    fn used_members_of_any_depth_are_read_without_recursion() {
        let nested = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        let request = format!(r#"{{"tenant_name": {nested}, "span_context": {nested}}}"#);
        assert_eq!(Build::from_json(request.as_bytes()), Ok(Some(queued())));
    }

    #[test]
    fn error_names_the_member() {
        let long_zone =
            format!(r#"{{"hostname": "h", "log_port": 1, "zone": "{}"}}"#, "z".repeat(256));
        for (worker_info, key) in [
            ("[]", "worker_info"),
            (r#"["h", 1, "z"]"#, "worker_info"),
            (r#"{"log_port": 1}"#, "hostname"),
            (r#"{"hostname": "", "log_port": 1}"#, "hostname"),
            (r#"{"hostname": "h"}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": "7900"}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 0}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 65536}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 1, "zone": 3}"#, "zone"),
            (r#"{"hostname": "h", "log_port": 1, "zone": "a\u0007"}"#, "zone"),
            (&long_zone, "zone"),
        ] {
            let error = read(worker_info).unwrap_err().to_string();
            assert!(error.contains(key), "{worker_info}: {error}");
            assert!(error.len() < 200, "{error}");
        }
    }

    #[test]
    fn document_that_is_no_object_or_has_a_member_twice_is_an_error() {
        for json in ["[]", "[null, null]", "7", "nan", r#"{"worker_info": NaN}"#, "{", "\u{0}"] {
            assert!(Build::from_json(json.as_bytes()).is_err(), "{json}");
        }
        assert!(Build::from_json(b"\xff{").is_err());
        assert!(Build::from_json(br#"{"worker_info": null, "worker_info": null}"#).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(json in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Build::from_json(&json);
        }

        #[test]
        fn valid_worker_info_is_read_back(
            hostname in "\\PC{0,20}",
            port in any::<i64>(),
            zone in "\\PC{0,9}",
        ) {
            let request = json!({
                "worker_info": {"hostname": hostname, "log_port": port, "zone": zone}
            });
            let build = Build::from_json(request.to_string().as_bytes());
            let is_valid = !hostname.is_empty() && (1..=65535).contains(&port);
            prop_assert_eq!(build.is_ok(), is_valid);
            if let Ok(Some(Build { location: BuildLocation::Executor(executor), .. })) = build {
                prop_assert_eq!(executor.hostname, hostname);
                prop_assert_eq!(i64::from(executor.port), port);
                prop_assert_eq!(executor.zone.unwrap_or_default(), zone);
            }
        }
    }
}
