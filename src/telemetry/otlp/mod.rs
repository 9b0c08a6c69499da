//! Spans of streams for an OpenTelemetry collector. A span's parent is the span that the build's
//! request carries, as that of the executor's span is (`zuul/lib/tracing.py`).
//!
//! Compiled in with the feature `otlp`: `span` records, `exporter` sends. Without it `noop` has the
//! same interface and does nothing.

#[cfg(feature = "otlp")]
mod exporter;
#[cfg(not(feature = "otlp"))]
mod noop;
#[cfg(feature = "otlp")]
mod span;

#[cfg(not(feature = "otlp"))]
pub(crate) use self::noop::{Span, Tracer, check};
#[cfg(feature = "otlp")]
pub(crate) use self::{
    exporter::check,
    span::{Span, Tracer},
};
