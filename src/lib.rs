//! A finger gateway for Zuul CI: streams the logs of running builds across zones.
//!
//! The way of a connection, which is the order to read the modules in:
//!
//! ```text
//! client ──▶ gateway::listener ─▶ session ─▶ finger ─▶ resolver ─▶ upstream ─▶ relay ──▶ executor,
//!            accepts, limits      one task   request   where to    dials       copies    or gateway
//!                                                         ▲                              of its zone
//!                 registry: our entry, the other gateways, where a build runs
//!                 (ZooKeeper, or in memory for the demo)
//! ```
//!
//! - `cli` reads the command line, `daemon` starts, reloads and stops the gateway, told as one story.
//! - `config` makes one validated configuration of our TOML or of Zuul's `zuul.conf`.
//! - `gateway` is the line above, one module for each step.
//! - `registry` answers the gateway's questions and keeps its own entry.
//! - `admin` tells health and metrics over HTTP.
//! - `tls` makes server and client sides of certificates.
//! - `otlp` tells a collector of streams, if it is compiled in.
//! - `service` is about being a good daemon: signals, service manager, command socket, user.
//! - `demo` is a whole small system on loopback.
//! - `eviction` closes the oldest connection to make room for a new one.
//! - `log` says what the levels mean, `small_file` reads what operators name.
//! - `fuzzing` has what the fuzz targets call, and is not in the program.
//!
//! Live state travels by `watch` channels; no lock is held across an await. The pure parts (query,
//! route, component and build documents, configuration) know no socket, clock or ZooKeeper.

mod admin;
pub mod cli;
mod config;
mod control;
mod daemon;
#[cfg_attr(not(feature = "demo"), path = "demo/absent.rs")]
mod demo;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gateway;
mod model;
mod os;
mod registry;
mod telemetry;
mod tls;
