//! Zuul's data as plain types: build IDs, build requests, components. No I/O.

pub(crate) mod build_request;
pub(crate) mod component;
pub(crate) mod json;
pub(crate) mod trace_parent;
