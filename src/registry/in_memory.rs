//! A registry in this process, for `zuul-fingergw demo`: the same interface as ZooKeeper's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::{Registration, RegistrationCommands, RegistrationStatus, registration};
use crate::model::build_id::BuildId;
use crate::model::build_request::Build;
use crate::model::component::{Component, FINGERGW, Gateway, MODEL_API, OwnComponent, State};

/// The entries of one small system.
#[derive(Default)]
pub(crate) struct InMemoryRegistry {
    builds: watch::Sender<HashMap<BuildId, Build>>,
    components: watch::Sender<HashMap<String, Component>>,
    sequence: AtomicU64,
}

impl InMemoryRegistry {
    /// Adds a build.
    pub(crate) fn add_build(&self, id: BuildId, build: Build) {
        self.builds.send_modify(|builds| {
            builds.insert(id, build);
        });
    }

    pub(crate) fn find_build(&self, id: &BuildId) -> Option<Build> {
        self.builds.borrow().get(id).cloned()
    }

    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        self.components.borrow().values().filter_map(|entry| entry.gateway.clone()).collect()
    }

    /// Waits until `count` gateways can be dialed.
    pub(crate) async fn wait_for_gateway_count(&self, count: usize) {
        let dialable = |components: &HashMap<String, Component>| {
            components.values().filter(|entry| entry.gateway.is_some()).count()
        };
        // Cannot fail: the sender is ours.
        let _ = self.components.subscribe().wait_for(|now| dialable(now) >= count).await;
    }

    /// Registers a gateway, as [`crate::registry::zookeeper::session::register`] does.
    pub(crate) fn register(self: &Arc<Self>, announcement: OwnComponent) -> Registration {
        let embedded = Arc::clone(self);
        registration(|orders| async move { embedded.keep(&announcement, orders).await })
    }

    async fn keep(&self, announcement: &OwnComponent, mut orders: RegistrationCommands) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{sequence:010}", announcement.hostname);
        loop {
            let state = *orders.wanted.borrow_and_update();
            let standing = if state == State::Stopped {
                self.components.send_modify(|components| {
                    components.remove(&name);
                });
                RegistrationStatus::Withdrawn
            } else {
                // Through the same text as ZooKeeper's, so that the demo shows what peers read.
                let json = announcement.to_json(state, MODEL_API);
                let entry = Component::from_json(FINGERGW, &name, json.as_bytes())
                    .expect("our own entry can be read");
                self.components.send_modify(|components| {
                    components.insert(name.clone(), entry);
                });
                RegistrationStatus::Registered(name.clone())
            };
            orders.standing.send_replace(standing);
            tokio::select! {
                changed = orders.wanted.changed() => if changed.is_err() { return },
                () = orders.close.cancelled() => return,
            }
        }
    }
}
