//! The built binary against a real ZooKeeper.

#[path = "../support/mod.rs"]
mod support;
