//! Metrics, traces and logs. Knows nothing of the gateway.

pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod otlp;
