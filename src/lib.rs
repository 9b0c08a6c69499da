//! A finger gateway for Zuul CI: streams the logs of running builds across zones.
//!
//! One request, which is also the order to read the modules in:
//!
//! ```text
//! client ─▶ gateway::accept ─▶ session ─▶ routing ─▶ upstream ─▶ relay ─▶ executor, or
//!           limits             one task   candidate  attempts    copy     gateway of its zone
//!                                         hops  ▲
//!           registry: our registration, the other gateways, where a build runs
//!           (ZooKeeper, or in memory for the demo)
//! ```
//!
//! A module imports only modules of lower levels, which `tests/it/imports.rs` checks:
//!
//! - `cli`: the command line.
//! - `daemon`: starts, reloads and stops the gateway.
//! - `control`: the command socket, `status` and `resolve`; `admin`: health and metrics over HTTP;
//!   `demo`: a small Zuul system in one process.
//! - `gateway`: everything between a client's connection and the connection to the next hop.
//! - `registry`: Zuul's component registry and build requests.
//! - `telemetry`: metrics, traces and logs; `tls`: both sides of TLS.
//! - `config`: the validated configuration, from TOML or Zuul's `zuul.conf`.
//! - `model`: Zuul's data as plain types; `os`: signals, sockets, users and limits of the system.
//!
//! `fuzzing` has the checks of the fuzz targets and is not in the program.
//!
//! Live state travels by `watch` channels or one swapped `Arc`; no lock is held across an await.
//! The pure parts (requests, routes, components, build requests, configuration, the schedule of
//! attempts) know no socket, clock or ZooKeeper.

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
