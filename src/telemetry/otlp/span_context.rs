//! Whose trace a build belongs to, as its request tells. Pure.
//!
//! The scheduler writes `span_context` with the span of its that the executor's becomes a child of
//! (`zuul/model.py`, `zuul/lib/tracing.py`), and does so whether it exports spans or not. Ids are JSON
//! numbers: 128 and 64 bits, so they need a structure of their own. Through [`serde_json::Value`] they
//! would be floating point numbers, and other ones.

use std::sync::Arc;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Whether requests are read for it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Origins {
    pub(crate) wanted: bool,
}

/// Where a build's spans belong; nowhere if nobody wants to know or its request does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin(pub(crate) Option<Arc<Carried>>);

impl Origin {
    #[cfg(test)]
    pub(crate) const NONE: Self = Self(None);
}

/// What a request carries.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Carried {
    pub(crate) parent: SpanContext,
    /// Zuul's name for what started it all, by which its services' logs are searched.
    pub(crate) event_id: Option<String>,
}

#[derive(Deserialize)]
struct Request<'r> {
    #[serde(borrow)]
    span_context: Option<&'r RawValue>,
    #[serde(borrow)]
    event_id: Option<&'r RawValue>,
}

#[derive(Deserialize)]
struct Context {
    trace_id: u128,
    span_id: u64,
    trace_flags: u8,
}

/// The longest event id that is passed on, in bytes; Zuul's have 32.
const EVENT_ID_MAX: usize = 64;

impl Origins {
    /// Reads `request`, the JSON of a build request. What is wrong with this part of it is no reason
    /// not to stream a log.
    pub(crate) fn read(self, request: &[u8]) -> Origin {
        Origin(self.wanted.then(|| carried(request)).flatten().map(Arc::new))
    }
}

fn carried(request: &[u8]) -> Option<Carried> {
    let Request { span_context, event_id } = serde_json::from_slice(request).ok()?;
    let Context { trace_id, span_id, trace_flags } =
        serde_json::from_str(span_context?.get()).ok()?;
    let parent = SpanContext::new(
        TraceId::from(trace_id),
        SpanId::from(span_id),
        TraceFlags::new(trace_flags),
        true,
        TraceState::NONE,
    );
    let event_id = event_id.and_then(|id| serde_json::from_str::<String>(id.get()).ok());
    let plain = |id: &String| {
        (1..=EVENT_ID_MAX).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    parent.is_valid().then(|| Carried { parent, event_id: event_id.filter(plain) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(request: &str) -> Option<Arc<Carried>> {
        Origins { wanted: true }.read(request.as_bytes()).0
    }

    #[test]
    fn a_request_as_zuul_writes_it() {
        let request = r#"{"build_set_uuid": "a", "event_id": "0123456789abcdef0123456789abcdef",
            "params": {"span_context": 1}, "span_context": {"span_id": 18446744073709551615,
            "trace_flags": 1, "trace_id": 340282366920938463463374607431768211455}, "uuid": "d"}"#;
        let carried = read(request).unwrap();
        assert_eq!(carried.parent.trace_id().to_string(), "f".repeat(32));
        assert_eq!(carried.parent.span_id().to_string(), "f".repeat(16));
        assert!(carried.parent.is_sampled() && carried.parent.is_remote());
        assert_eq!(carried.event_id.as_deref(), Some("0123456789abcdef0123456789abcdef"));
        assert_eq!(Origins::default().read(request.as_bytes()), Origin(None), "nobody asked");
    }

    #[test]
    fn what_is_of_no_use_is_nothing() {
        let context = |context: &str| format!(r#"{{"span_context": {context}}}"#);
        for bad in [
            "null",
            "{}",
            "7",
            r#"{"trace_id": 0, "span_id": 0, "trace_flags": 0}"#,
            r#"{"trace_id": 1, "span_id": 0, "trace_flags": 1}"#,
            r#"{"trace_id": -1, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 1.5, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": "1", "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 340282366920938463463374607431768211456, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 1, "span_id": 18446744073709551616, "trace_flags": 1}"#,
            r#"{"trace_id": 1, "span_id": 1}"#,
        ] {
            assert_eq!(read(&context(bad)), None, "{bad}");
        }
        for request in ["", "[]", "{}", "\u{0}", r#"{"span_context": {"trace_id""#] {
            assert_eq!(read(request), None, "{request}");
        }
        let unsampled = read(&context(r#"{"trace_id": 1, "span_id": 1, "trace_flags": 0}"#));
        assert!(!unsampled.unwrap().parent.is_sampled());
    }

    /// It goes into log lines.
    #[test]
    fn an_event_id_is_plain_or_none() {
        let event_id = |id: &str| {
            let context = r#"{"trace_id": 1, "span_id": 1, "trace_flags": 1}"#;
            let carried = read(&format!(r#"{{"event_id": {id}, "span_context": {context}}}"#));
            carried.unwrap().event_id.clone()
        };
        assert_eq!(event_id(r#""ab-9""#).as_deref(), Some("ab-9"));
        let long = format!("\"{}\"", "a".repeat(65));
        for bad in [r#""""#, r#""a b""#, r#""a\n""#, "null", "7", &long] {
            assert_eq!(event_id(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes(request in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Origins { wanted: true }.read(&request);
        }

        #[test]
        fn any_ids(trace_id in 1_u128.., span_id in 1_u64.., trace_flags: u8) {
            let request = format!(
                r#"{{"span_context": {{"trace_id": {trace_id}, "span_id": {span_id}, "trace_flags": {trace_flags}}}}}"#
            );
            let carried = read(&request).unwrap();
            prop_assert_eq!(carried.parent.trace_id(), TraceId::from(trace_id));
            prop_assert_eq!(carried.parent.span_id(), SpanId::from(span_id));
            prop_assert_eq!(carried.parent.is_sampled(), trace_flags & 1 == 1);
        }
    }
}
