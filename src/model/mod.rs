//! Zuul's data as plain types: build IDs, build requests, components. No I/O.

pub(crate) mod build_id;
pub(crate) mod build_request;
pub(crate) mod component;
pub(crate) mod excerpt;
pub(crate) mod json;
