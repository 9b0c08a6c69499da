//! The built binary against a real ZooKeeper.

mod admin;
mod config;
mod demo;
mod docs;
mod ends;
mod faults;
mod limits;
mod log;
mod places;
mod pour;
mod refuse;
mod registration;
mod reload;
mod route;
mod service;
mod stop;
mod stream;
mod stream_tls;
#[allow(dead_code, reason = "shared with the other test binary")]
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod zookeeper_trouble;
