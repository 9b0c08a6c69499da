//! Spans of streams for an OpenTelemetry collector: a stream joins the trace that the request of its
//! build carries, as the executor's part of the build does (`zuul/lib/tracing.py`).
//!
//! The cargo feature `otlp` brings it. Without it the types of `absent` stand here, which have no size and
//! do nothing, so that nobody else has to know of two kinds of programs.
//!
//! With it: `span` is what a session tells,
//! `export` hands ended spans on, `backlog` counts those that wait, and `collector` dials.

#[cfg(feature = "otlp")]
pub(crate) mod bounded_processor;
#[cfg(feature = "otlp")]
pub(crate) mod exporter;
#[cfg(not(feature = "otlp"))]
pub(crate) mod noop;
#[cfg(feature = "otlp")]
pub(crate) mod span;
#[cfg(feature = "otlp")]
pub(crate) mod transport;

#[cfg(not(feature = "otlp"))]
pub(crate) use self::noop::{Span, Tracer, check};
#[cfg(feature = "otlp")]
pub(crate) use self::span::{Span, Tracer};
#[cfg(feature = "otlp")]
pub(crate) use self::transport::check;
