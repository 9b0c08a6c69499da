//! Zuul's registry in ZooKeeper.

mod build_cache;
mod build_lookup;
mod component_watcher;
mod connect;
mod connect_diagnostics;
mod read;
mod registration;
mod retry;
mod session;
pub(crate) mod survey;

pub(crate) use self::build_lookup::BuildLookup;
pub(crate) use self::connect::Tls;
pub(crate) use self::session::{SessionSettings, register};
