//! Spans of streams for an OpenTelemetry collector: a stream joins the trace that the request of its
//! build carries, as the executor's part of the build does (`zuul/lib/tracing.py`).
//!
//! The cargo feature `otlp` brings it. Without it the types of `absent` stand here, which have no size and
//! do nothing, so that nobody else has to know of two kinds of programs.
//!
//! With it: `origin` reads of a build request whose trace it belongs to, `span` is what a session tells,
//! `export` hands ended spans on, `backlog` counts those that wait, and `collector` dials.

#[cfg(not(feature = "otlp"))]
mod absent;
#[cfg(feature = "otlp")]
mod backlog;
#[cfg(feature = "otlp")]
mod collector;
#[cfg(feature = "otlp")]
mod export;
#[cfg(feature = "otlp")]
mod origin;
#[cfg(feature = "otlp")]
mod span;

#[cfg(not(feature = "otlp"))]
pub(crate) use self::absent::{Origin, Origins, Span, Tracer, check};
#[cfg(feature = "otlp")]
pub(crate) use self::{
    collector::check,
    origin::{Origin, Origins},
    span::{Span, Tracer},
};

/// Whether this program can export spans.
pub(crate) const COMPILED: bool = cfg!(feature = "otlp");
