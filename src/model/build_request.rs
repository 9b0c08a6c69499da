//! Build requests, `/zuul/executor/{zones/<zone>,unzoned}/requests/<uuid>`: where a build runs.
//! Pure.
//!
//! The scheduler writes the request, the executor that takes it adds `worker_info`
//! (`zuul/model.py`, `zuul/executor/server.py`). Of a document with a dozen keys this reader needs
//! two; builds of any state have a log as long as their executor keeps it.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{member, object};
use super::trace_parent::TraceParent;
use crate::registry::{is_dialable, is_name};

/// A build's UUID as Zuul's executors accept it: hexadecimal digits; not more than
/// [`BuildId::MAX`], where Zuul makes 32.
///
/// Being nothing else, it is safe as part of a znode's path and on a log line. Its case is kept:
/// znode names know the difference.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BuildId(String);

impl BuildId {
    /// The most digits: what a stranger sends is asked for in every zone.
    pub(crate) const MAX: usize = 64;

    /// Takes `text` if it is a build id, else nothing.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let hex = (1..=Self::MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then(|| Self(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an executor serves a build's log. Executors speak no TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executor {
    pub(crate) hostname: String,
    pub(crate) port: u16,
    /// The zone the executor is in, which need not be that of the queue: executors may take
    /// unzoned builds as well.
    pub(crate) zone: Option<String>,
}

/// The members of a build request that are used.
#[derive(Deserialize)]
struct Request<'j> {
    #[serde(borrow)]
    tenant_name: Option<&'j RawValue>,
    #[serde(borrow)]
    worker_info: Option<&'j RawValue>,
}

/// The members of `worker_info`.
#[derive(Deserialize)]
struct WorkerInfo<'j> {
    #[serde(borrow)]
    hostname: Option<&'j RawValue>,
    #[serde(borrow)]
    log_port: Option<&'j RawValue>,
    #[serde(borrow)]
    zone: Option<&'j RawValue>,
}

/// What the queues know of one build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Build {
    /// Whose it is; `None` if the request does not say, as no request of Zuul's does.
    pub(crate) tenant: Option<Arc<str>>,
    pub(crate) place: Place,
    /// The trace that it belongs to, if that is requested.
    pub(crate) trace_parent: Option<Arc<TraceParent>>,
}

/// Where a build is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// No executor has taken it yet.
    Waiting,
    /// This executor has it.
    On(Executor),
}

impl Build {
    /// Reads a build request as [`Self::from_json`] does, and `with_trace` the trace parent of a build
    /// that has a log.
    ///
    /// # Errors
    /// Those of [`Self::from_json`].
    pub(crate) fn from_request(json: &[u8], with_trace: bool) -> Result<Option<Self>, String> {
        let mut build = Self::from_json(json)?;
        if let Some(build @ Self { place: Place::On(_), .. }) = &mut build
            && with_trace
        {
            build.trace_parent = TraceParent::from_request(json).map(Arc::new);
        }
        Ok(build)
    }

    /// Reads a build request. An empty znode is no build, as upstream reads it.
    ///
    /// # Errors
    /// Says what is wrong with a request that is no JSON object or whose `worker_info` cannot be
    /// used.
    pub(crate) fn from_json(json: &[u8]) -> Result<Option<Self>, String> {
        if json.is_empty() {
            return Ok(None);
        }
        let Request { tenant_name, worker_info } = object(json)?;
        let tenant: Option<String> = member("tenant_name", tenant_name).unwrap_or_default();
        let tenant = tenant.filter(|tenant| is_name(tenant)).map(Arc::from);
        let at = |place| Ok(Some(Self { tenant, place, trace_parent: None }));
        // Upstream takes an empty object for none.
        let is_empty = |info: &str| info.trim_matches(['{', '}']).trim_ascii().is_empty();
        let info = match worker_info.map(RawValue::get) {
            None => return at(Place::Waiting),
            Some(info) if !info.starts_with('{') => {
                return Err("worker_info is not an object".to_owned());
            }
            Some(info) if is_empty(info) => return at(Place::Waiting),
            Some(info) => info,
        };
        let WorkerInfo { hostname, log_port, zone } = object(info.as_bytes())?;
        let hostname: Option<String> = member("hostname", hostname).unwrap_or_default();
        let hostname = hostname.filter(|hostname| is_dialable(hostname));
        let hostname = hostname.ok_or("worker_info has no hostname")?;
        let port: Option<u16> = member("log_port", log_port).unwrap_or_default();
        let port = port.filter(|port| *port != 0);
        let port = port.ok_or("worker_info has no log_port between 1 and 65535")?;
        let zone: Option<String> = member("worker_info.zone", zone)?;
        if zone.as_deref().is_some_and(|zone| !is_name(zone)) {
            return Err("worker_info has a zone that is too long or not printable".to_owned());
        }
        let zone = zone.filter(|zone| !zone.is_empty());
        let executor = Executor { hostname, port, zone };
        at(Place::On(executor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A request with every key Zuul 14.3.0 writes, its trace id beyond 64 bits included.
    fn request(worker_info: &str) -> String {
        format!(
            r#"{{"build_set_uuid": "a", "event_id": "b", "job_uuid": "c", "pipeline_name": "gate",
            "precedence": 200, "result_path": null, "span_context": {{"span_id": 9007199254740993,
            "trace_flags": 1, "trace_id": 170141183460469231731687303715884105727}},
            "state": "running", "tenant_name": "t", "uuid": "d", "worker_info": {worker_info},
            "zone": null}}"#
        )
    }

    fn read(worker_info: &str) -> Result<Option<Build>, String> {
        Build::from_json(request(worker_info).as_bytes())
    }

    fn build(tenant: Option<&str>, place: Place) -> Result<Option<Build>, String> {
        Ok(Some(Build { tenant: tenant.map(Arc::from), place, trace_parent: None }))
    }

    #[test]
    fn a_build_on_an_executor() {
        let on = |zone: Option<&str>| {
            Place::On(Executor {
                hostname: "ze01".into(),
                port: 7900,
                zone: zone.map(str::to_owned),
            })
        };
        let executor = |zone| build(Some("t"), on(zone));
        assert_eq!(
            read(r#"{"hostname": "ze01", "log_port": 7900, "zone": "west"}"#),
            executor(Some("west"))
        );
        for unzoned in [
            r#"{"hostname": "ze01", "log_port": 7900, "zone": null}"#,
            r#"{"hostname": "ze01", "log_port": 7900, "zone": ""}"#,
            r#"{"hostname": "ze01", "log_port": 7900, "other": [1]}"#,
        ] {
            assert_eq!(read(unzoned), executor(None));
        }
        let least = br#"{"worker_info": {"hostname": "ze01", "log_port": 7900}}"#;
        assert_eq!(Build::from_json(least), build(None, on(None)), "needs only what it uses");
    }

    #[test]
    fn a_build_that_waits_or_is_not_there() {
        assert_eq!(read("null"), build(Some("t"), Place::Waiting));
        assert_eq!(read("{}"), build(Some("t"), Place::Waiting));
        assert_eq!(Build::from_json(b"{}"), build(None, Place::Waiting));
        let nobodys = Build::from_json(br#"{"tenant_name": ["t"]}"#);
        assert_eq!(nobodys, build(None, Place::Waiting), "no name");
        let long = format!(r#"{{"tenant_name": "{}"}}"#, "t".repeat(256));
        assert_eq!(Build::from_json(long.as_bytes()), build(None, Place::Waiting), "no tenant's");
        assert_eq!(Build::from_json(b""), Ok(None));
    }

    #[test]
    fn members_that_are_not_used_may_be_anything() {
        let worker = r#"{"hostname": "ze01", "log_port": 7900, "new": "#;
        let nested = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        let request =
            format!(r#"{{"a": {nested}, "b": 1e999, "worker_info": {worker}{nested}}}}}"#);
        let read = Build::from_json(request.as_bytes()).expect("a request").expect("a build");
        assert!(matches!(read.place, Place::On(Executor { port: 7900, .. })));
    }

    #[test]
    fn faults_are_named() {
        for (worker_info, fault) in [
            ("[]", "worker_info"),
            (r#"{"log_port": 1}"#, "hostname"),
            (r#"{"hostname": "", "log_port": 1}"#, "hostname"),
            (r#"{"hostname": "h"}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": "7900"}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 0}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 65536}"#, "log_port"),
            (r#"{"hostname": "h", "log_port": 1, "zone": 3}"#, "zone"),
            (r#"{"hostname": "h", "log_port": 1, "zone": "a\u0007"}"#, "zone"),
            (
                &format!(r#"{{"hostname": "h", "log_port": 1, "zone": "{}"}}"#, "z".repeat(256)),
                "zone",
            ),
        ] {
            let error = read(worker_info).unwrap_err();
            assert!(error.contains(fault), "{worker_info}: {error}");
        }
        assert!(Build::from_json(b"\xff{").is_err());
        assert!(Build::from_json(b"[]").is_err());
        assert!(Build::from_json(b"[null, null]").is_err(), "members need names");
    }

    proptest! {
        #[test]
        fn any_bytes(json in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Build::from_json(&json);
        }

        #[test]
        fn any_worker(hostname in "\\PC{0,20}", port in any::<i64>(), zone in "\\PC{0,9}") {
            let request = json!({
                "worker_info": {"hostname": hostname, "log_port": port, "zone": zone}
            });
            let read = Build::from_json(request.to_string().as_bytes());
            let valid = !hostname.is_empty() && (1..=65535).contains(&port);
            prop_assert_eq!(read.is_ok(), valid);
            if let Ok(Some(Build { place: Place::On(executor), .. })) = read {
                prop_assert_eq!(executor.hostname, hostname);
                prop_assert_eq!(executor.port as i64, port);
                prop_assert_eq!(executor.zone.unwrap_or_default(), zone);
            }
        }
    }
}
