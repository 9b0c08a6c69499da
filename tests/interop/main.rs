//! The built binary beside real Zuul.

#[allow(dead_code, reason = "shared with the other test binary")]
#[path = "../support/mod.rs"]
mod support;
