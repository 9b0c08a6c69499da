//! The built binary beside real Zuul.

#[path = "../support/mod.rs"]
mod support;
