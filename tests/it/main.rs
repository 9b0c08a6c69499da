//! The built binary against a real ZooKeeper.

mod admin;
mod check;
mod config;
mod demo;
mod drift;
mod ends;
mod ensemble;
mod environment;
mod failover;
mod faults;
mod hostile;
mod imports;
mod lame_duck;
mod limits;
mod limits_of_streams;
mod limits_per_address;
mod limits_reloaded;
mod log;
mod log_output;
mod misrouting;
mod next_hops;
mod passthrough;
mod peer_protocol;
mod places;
mod pour;
mod proxy_protocol;
mod refuse;
mod registration;
mod reload;
mod route;
mod rules;
mod sandbox;
mod service;
mod socket_activation;
mod stalled_clients;
mod stop;
mod stream;
mod stream_tls;
#[allow(dead_code, reason = "shared with the other test binaries")]
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod tls_trust;
mod watchdog;
mod zookeeper_trouble;
