//! Gateways that cannot register in ZooKeeper.

use super::gateway::{Builder, Gateway};
use super::system::System;

pub(crate) const CANNOT_REGISTER: &str = "cannot register in ZooKeeper, retrying";
pub(crate) const STILL_CANNOT_REGISTER: &str = "still cannot register in ZooKeeper";

/// Waits until more than one attempt has failed, and returns the one warning that was logged for
/// them.
pub(crate) async fn registration_warning(gateway: &mut Gateway) -> String {
    gateway.logged_times("two more attempts", 2, |line| line.contains(STILL_CANNOT_REGISTER)).await;
    let warnings: Vec<_> =
        gateway.log().into_iter().filter(|line| line.contains(CANNOT_REGISTER)).collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].contains(" WARN "), "{warnings:?}");
    gateway.status("to be connecting", |line| line.ends_with("ZooKeeper: connecting")).await;
    warnings.into_iter().next().expect("one warning")
}

/// Builder of a gateway in the shared ZooKeeper that logs every attempt.
pub(crate) fn debug_logging(system: &System) -> Builder {
    Builder::new(system).log("level = \"debug\"")
}
