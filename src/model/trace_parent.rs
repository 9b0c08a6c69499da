//! The trace that a build belongs to.
//!
//! The scheduler writes `span_context` into each build request, whether it exports spans or not: the
//! span that becomes the parent of the executor's span (`zuul/model.py`, `zuul/lib/tracing.py`). IDs
//! are JSON numbers of 128 and 64 bits, which [`serde_json::Value`] would round to floating point.

use serde::Deserialize;
use serde_json::value::RawValue;

/// The longest event ID that is used, in bytes; Zuul's have 32.
const EVENT_ID_MAX: usize = 64;

/// The parent of the spans of a build's streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent {
    /// Not 0.
    pub(crate) trace_id: u128,
    /// Not 0.
    pub(crate) span_id: u64,
    /// Trace flags of W3C Trace Context; bit 0 is `sampled`.
    pub(crate) flags: u8,
    /// Zuul's ID of the event that triggered the build, for searching the logs of its services.
    /// Letters, digits and hyphens only, because it is logged.
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
struct SpanContext {
    trace_id: u128,
    span_id: u64,
    trace_flags: u8,
}

impl TraceParent {
    /// Reads the JSON of a build request. Returns `None` if it has no usable `span_context`; the log
    /// can be streamed all the same.
    pub(crate) fn from_request(json: &[u8]) -> Option<Self> {
        let Request { span_context, event_id } = serde_json::from_slice(json).ok()?;
        let SpanContext { trace_id, span_id, trace_flags } =
            serde_json::from_str(span_context?.get()).ok()?;
        if trace_id == 0 || span_id == 0 {
            return None;
        }
        let event_id = event_id.and_then(|id| serde_json::from_str::<String>(id.get()).ok());
        let is_plain = |id: &String| {
            (1..=EVENT_ID_MAX).contains(&id.len())
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        Some(Self { trace_id, span_id, flags: trace_flags, event_id: event_id.filter(is_plain) })
    }

    /// Returns whether spans of this trace are recorded.
    #[cfg(feature = "otlp")]
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(request: &str) -> Option<TraceParent> {
        TraceParent::from_request(request.as_bytes())
    }

    /// Every key that Zuul 14.3.0 writes, with IDs beyond what a floating point number holds.
    #[test]
    fn request_of_the_scheduler_is_read() {
        let request = r#"{"build_set_uuid": "a", "event_id": "0123456789abcdef0123456789abcdef",
            "job_uuid": "c", "pipeline_name": "gate", "precedence": 200, "result_path": null,
            "state": "running", "tenant_name": "t", "worker_info": {"hostname": "h", "log_port": 1},
            "zone": null, "span_context": {"span_id": 18446744073709551615,
            "trace_flags": 1, "trace_id": 340282366920938463463374607431768211455}, "uuid": "d"}"#;
        let expected = TraceParent {
            trace_id: u128::MAX,
            span_id: u64::MAX,
            flags: 1,
            event_id: Some("0123456789abcdef0123456789abcdef".to_owned()),
        };
        assert_eq!(read(request), Some(expected));
    }

    #[test]
    fn unusable_span_context_is_none() {
        for context in [
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
            assert_eq!(read(&format!(r#"{{"span_context": {context}}}"#)), None, "{context}");
        }
        for request in ["", "[]", "{}", "\u{0}", r#"{"span_context": {"trace_id""#] {
            assert_eq!(read(request), None, "{request}");
        }
    }

    #[test]
    fn event_id_with_other_characters_is_none() {
        let event_id = |id: &str| {
            let context = r#"{"trace_id": 1, "span_id": 1, "trace_flags": 1}"#;
            read(&format!(r#"{{"event_id": {id}, "span_context": {context}}}"#)).unwrap().event_id
        };
        assert_eq!(event_id(r#""ab-9""#).as_deref(), Some("ab-9"));
        let long = format!("\"{}\"", "a".repeat(65));
        for bad in [r#""""#, r#""a b""#, r#""a\n""#, "null", "7", &long] {
            assert_eq!(event_id(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_ids_are_read_exactly(trace_id in 1_u128.., span_id in 1_u64.., flags: u8) {
            let context = format!(
                r#"{{"trace_id": {trace_id}, "span_id": {span_id}, "trace_flags": {flags}}}"#
            );
            let parent = read(&format!(r#"{{"span_context": {context}}}"#)).unwrap();
            prop_assert_eq!(parent, TraceParent { trace_id, span_id, flags, event_id: None });
        }
    }
}
