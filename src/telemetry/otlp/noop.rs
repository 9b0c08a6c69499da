//! The interface of this module in a program without the feature `otlp`: nothing is recorded.

use std::fmt::Display;
use std::net::IpAddr;
use std::time::Instant;

use anyhow::Result;

use crate::config::Tracing;
use crate::model::build_id::BuildId;
use crate::model::trace_parent::TraceParent;
use crate::telemetry::metrics::{Metrics, Route};

#[derive(Clone, Default)]
pub(crate) struct Tracer(());

impl Tracer {
    pub(crate) fn start(_: Option<&Tracing>, _hostname: &str, _: Metrics) -> Result<Self> {
        Ok(Self(()))
    }

    pub(crate) fn span(
        &self,
        _parent: Option<&TraceParent>,
        _build: &BuildId,
        _zone: Option<&str>,
        _began: Instant,
    ) -> Span {
        Span
    }

    pub(crate) async fn stop(self) {}
}

pub(crate) struct Span;

impl Span {
    pub(crate) fn event_id(&self) -> Option<&str> {
        None
    }

    pub(crate) fn trace_id(&self) -> Option<&str> {
        None
    }

    pub(crate) fn requested_by(&self, _peer: IpAddr) {}

    pub(crate) fn connected(&self, _host: &str, _port: u16) {}

    pub(crate) fn attempt_failed(&self, _host: &str, _port: u16, _reason: &dyn Display) {}

    pub(crate) fn first_byte(&self) {}

    pub(crate) fn stream_closed(&self, _host: &str, _port: u16, _route: Route, _bytes: u64) {}

    pub(crate) fn end(&self, _result: &'static str, _error: Option<String>) {}
}

pub(crate) fn check(_: Option<&Tracing>) -> Result<()> {
    Ok(())
}
