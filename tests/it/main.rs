//! The built binary against a real ZooKeeper.

mod access_rules;
mod admin;
mod build_cache;
mod bulk;
mod check;
mod component_failures;
mod config;
mod daemon;
mod demo;
mod doc_consistency;
mod end_reasons;
mod ensemble;
mod environment;
mod error_replies;
mod failover;
mod hostile_clients;
mod imports;
mod lame_duck;
mod limits;
mod limits_per_address;
mod limits_reload;
mod log;
mod log_output;
mod misrouting;
mod next_hops;
mod passthrough;
mod peer_protocol;
mod proxy_protocol;
mod registration;
mod reload;
mod routing;
mod sandbox;
mod shutdown;
mod socket_activation;
mod stalled_clients;
mod stream;
mod stream_limits;
mod stream_tls;
#[allow(dead_code, reason = "shared with the other test binaries")]
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod tls_trust;
mod watchdog;
mod zookeeper_outages;
