//! Tests of the documentation: every command and configuration of its pages is run or checked, and
//! every link is followed. `tests/run docs` installs the tools that the pages use and runs this.

mod commands;
mod links;
mod man_pages;
mod pages;
#[allow(dead_code, reason = "shared with the other test binaries")]
#[path = "../support/mod.rs"]
mod support;
