//! Zuul's registry in ZooKeeper: sessions, our registration, the other components, lookups of builds.

pub(crate) mod build_cache;
pub(crate) mod build_lookup;
pub(crate) mod component_watcher;
pub(crate) mod connect_diagnostics;
pub(crate) mod lookup_batcher;
pub(crate) mod registration;
pub(crate) mod registration_status;
pub(crate) mod session;
pub(crate) mod survey;
