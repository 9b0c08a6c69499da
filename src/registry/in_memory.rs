//! A registry in the memory of this process, for `zuul-fingergw demo` and for tests. It has the
//! same interface as the one in ZooKeeper.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::{Registration, RegistrationCommands, RegistrationStatus};
use crate::model::build_id::BuildId;
use crate::model::build_request::Build;
use crate::model::component::{Component, FINGERGW, Gateway, MODEL_API, OwnComponent, State};

/// The builds and components of one small system.
#[derive(Default)]
pub(crate) struct InMemoryRegistry {
    builds: watch::Sender<HashMap<BuildId, Build>>,
    components: watch::Sender<HashMap<String, Component>>,
    sequence: AtomicU64,
}

impl InMemoryRegistry {
    pub(crate) fn add_build(&self, id: BuildId, build: Build) {
        self.builds.send_modify(|builds| {
            builds.insert(id, build);
        });
    }

    pub(super) fn find_build(&self, id: &BuildId) -> Option<Build> {
        self.builds.borrow().get(id).cloned()
    }

    pub(super) fn gateways(&self) -> Arc<[Gateway]> {
        self.components.borrow().values().filter_map(|entry| entry.gateway.clone()).collect()
    }

    /// Waits until at least `count` gateways can be dialed.
    pub(crate) async fn wait_for_gateways(&self, count: usize) {
        let mut components = self.components.subscribe();
        let has_enough = |components: &HashMap<String, Component>| {
            components.values().filter(|entry| entry.gateway.is_some()).count() >= count
        };
        // Cannot fail: `self` holds the sender.
        let _ = components.wait_for(has_enough).await;
    }

    /// Registers a gateway.
    pub(crate) fn register(self: &Arc<Self>, own: OwnComponent) -> Registration {
        let registry = Arc::clone(self);
        Registration::spawn(|commands| async move { registry.keep_entry(&own, commands).await })
    }

    async fn keep_entry(&self, own: &OwnComponent, mut commands: RegistrationCommands) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{sequence:010}", own.hostname);
        loop {
            let state = *commands.state.borrow_and_update();
            let status = if state == State::Stopped {
                self.components.send_modify(|components| {
                    components.remove(&name);
                });
                RegistrationStatus::Withdrawn
            } else {
                // Written and read as JSON, so that it is what other gateways read from ZooKeeper.
                let json = own.to_json(state, MODEL_API);
                let entry = Component::from_json(FINGERGW, &name, json.as_bytes())
                    .expect("our own entry is valid");
                self.components.send_modify(|components| {
                    components.insert(name.clone(), entry);
                });
                RegistrationStatus::Registered(name.clone())
            };
            commands.status.send_replace(status);
            tokio::select! {
                changed = commands.state.changed() => if changed.is_err() { return },
                () = commands.close.cancelled() => return,
            }
        }
    }
}
