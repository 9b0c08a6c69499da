//! The built binary with real Zuul: Zuul's own classes and programs, run by the Python of
//! `target/venv`, are scheduler, executor, web server, registry and gateway of the other zone.
//! Their behavior is the reference.

mod build_requests;
mod clients;
mod command_line;
mod components;
mod executor;
mod haproxy;
mod hostname;
mod log_streamer;
mod metrics;
mod mixed_zones;
mod passthrough;
mod protocol_comparison;
mod script;
mod shared_zuul_conf;
#[allow(dead_code, reason = "shared with the other test binaries")]
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "otlp")]
mod tracing;
mod tracing_conf;
mod zuul_conf;
mod zuul_gateway;
mod zuul_gateway_zones;
mod zuul_web;
