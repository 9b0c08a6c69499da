//! The built binary against a real ZooKeeper.

mod config;
mod demo;
mod refuse;
mod registration;
mod route;
mod stop;
mod stream;
#[allow(dead_code, reason = "shared with the other test binary")]
#[path = "../support/mod.rs"]
mod support;
mod zookeeper_trouble;
