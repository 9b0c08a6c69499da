//! The built binary against a real ZooKeeper.

mod admin;
mod boot;
mod config;
mod container;
mod demo;
mod documentation;
mod drift;
mod empty_root;
mod ends;
mod ensemble;
mod failover;
mod faults;
mod hostile;
mod kubernetes;
mod lame_duck;
mod limits;
mod limits_of_streams;
mod limits_per_address;
mod limits_reloaded;
mod log;
mod packages;
mod pages;
mod passthrough;
mod places;
mod pour;
mod proxy_protocol;
mod quadlet;
mod refuse;
mod registration;
mod reload;
mod route;
mod rules;
mod service;
mod socket_activation;
mod stop;
mod stream;
mod stream_tls;
#[allow(dead_code, reason = "shared with the other test binary")]
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod typed;
mod watchdog;
mod watching;
mod wiring;
mod zookeeper_trouble;
