//! The trace that a build belongs to, as its build request names it.
//!
//! The scheduler writes `span_context` with the span that the executor's becomes a child of
//! (`zuul/model.py`, `zuul/lib/tracing.py`), whether or not it exports spans.

use std::sync::Arc;

use serde::Deserialize;

use super::json::Field;

/// The longest event ID that is used, in bytes. Zuul's have 32.
const EVENT_ID_MAX: usize = 64;

/// The parent of the spans of a build's log streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent {
    /// Not 0.
    pub(crate) trace_id: u128,
    /// Not 0.
    pub(crate) span_id: u64,
    /// The W3C trace flags: bit 0 is set if the trace is sampled.
    pub(crate) flags: u8,
    /// Zuul's ID of the event that started the build, by which the logs of its services are
    /// searched. At most 64 ASCII letters, digits and hyphens.
    pub(crate) event_id: Option<String>,
}

/// The member `span_context` of a build request. The IDs are JSON numbers of 128 and 64 bits: as
/// `serde_json::Value` they would become floating point numbers and lose digits.
#[derive(Deserialize)]
pub(super) struct SpanContext {
    trace_id: u128,
    span_id: u64,
    trace_flags: u8,
}

impl TraceParent {
    /// Returns `None` if the request does not name a valid span. That must not keep its log from
    /// being streamed.
    pub(super) fn new(context: Field<SpanContext>, event_id: Field<String>) -> Option<Arc<Self>> {
        let SpanContext { trace_id, span_id, trace_flags } = context.lenient()?;
        if trace_id == 0 || span_id == 0 {
            return None;
        }
        let event_id = event_id.lenient().filter(|id| is_plain(id));
        Some(Arc::new(Self { trace_id, span_id, flags: trace_flags, event_id }))
    }
}

/// Whether `event_id` can be written to a log line as it is.
fn is_plain(event_id: &str) -> bool {
    (1..=EVENT_ID_MAX).contains(&event_id.len())
        && event_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::build_request::Build;

    const WORKER: &str = r#""worker_info": {"hostname": "ze01", "log_port": 7900}"#;

    /// The trace parent of a build request with these members.
    fn read(members: &str) -> Option<Arc<TraceParent>> {
        let request = format!("{{{members}, {WORKER}}}");
        let build = Build::from_json(request.as_bytes()).expect("a valid request");
        build.expect("a build").trace_parent
    }

    fn context(context: &str) -> Option<Arc<TraceParent>> {
        read(&format!(r#""span_context": {context}"#))
    }

    #[test]
    fn trace_parent_of_a_request_as_zuul_writes_it_keeps_all_digits() {
        let parent = read(
            r#""event_id": "0123456789abcdef0123456789abcdef", "params": {"span_context": 1},
            "span_context": {"span_id": 18446744073709551615, "trace_flags": 1,
            "trace_id": 340282366920938463463374607431768211455}"#,
        );
        let expected = TraceParent {
            trace_id: u128::MAX,
            span_id: u64::MAX,
            flags: 1,
            event_id: Some("0123456789abcdef0123456789abcdef".to_owned()),
        };
        assert_eq!(parent.as_deref(), Some(&expected));
    }

    #[test]
    fn unusable_span_context_is_ignored() {
        for bad in [
            "null",
            "{}",
            "7",
            r#"{"trace_id": 0, "span_id": 0, "trace_flags": 0}"#,
            r#"{"trace_id": 1, "span_id": 0, "trace_flags": 1}"#,
            r#"{"trace_id": 0, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": -1, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 1.5, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": "1", "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 340282366920938463463374607431768211456, "span_id": 1, "trace_flags": 1}"#,
            r#"{"trace_id": 1, "span_id": 18446744073709551616, "trace_flags": 1}"#,
            r#"{"trace_id": 1, "span_id": 1}"#,
        ] {
            assert_eq!(context(bad), None, "{bad}");
        }
    }

    #[test]
    fn event_id_that_is_not_plain_is_ignored() {
        let event_id = |id: &str| {
            let context = r#"{"trace_id": 1, "span_id": 1, "trace_flags": 1}"#;
            let parent = read(&format!(r#""event_id": {id}, "span_context": {context}"#));
            parent.expect("a trace parent").event_id.clone()
        };
        assert_eq!(event_id(r#""ab-9""#).as_deref(), Some("ab-9"));
        let long = format!("\"{}\"", "a".repeat(65));
        for bad in [r#""""#, r#""a b""#, r#""a\n""#, "null", "7", &long] {
            assert_eq!(event_id(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn valid_ids_are_kept(trace_id in 1_u128.., span_id in 1_u64.., trace_flags: u8) {
            let parent = context(&format!(
                r#"{{"trace_id": {trace_id}, "span_id": {span_id}, "trace_flags": {trace_flags}}}"#
            ));
            let parent = parent.expect("a trace parent");
            prop_assert_eq!(parent.trace_id, trace_id);
            prop_assert_eq!(parent.span_id, span_id);
            prop_assert_eq!(parent.flags, trace_flags);
        }
    }
}
