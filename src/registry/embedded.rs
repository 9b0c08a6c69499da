//! A registry in this process, for `zuul-fingergw demo`: the same interface as ZooKeeper's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::build::{Build, BuildId};
use super::component::{Announcement, Component, FINGERGW, Gateway, MODEL_API, State};
use super::{Orders, Registration, Standing, registration};

/// The entries of one small system.
#[derive(Default)]
pub(crate) struct Embedded {
    builds: Mutex<HashMap<BuildId, Build>>,
    components: Mutex<HashMap<String, Component>>,
    sequence: AtomicU64,
}

impl Embedded {
    /// Adds a build.
    pub(crate) fn add_build(&self, id: BuildId, build: Build) {
        lock(&self.builds).insert(id, build);
    }

    pub(super) fn find_build(&self, id: &BuildId) -> Option<Build> {
        lock(&self.builds).get(id).cloned()
    }

    pub(super) fn gateways(&self) -> Arc<[Gateway]> {
        lock(&self.components).values().filter_map(|entry| entry.gateway.clone()).collect()
    }

    /// Registers a gateway, as [`super::zookeeper::register`] does.
    pub(crate) fn register(self: &Arc<Self>, announcement: Announcement) -> Registration {
        let embedded = Arc::clone(self);
        registration(|orders| async move { embedded.keep(&announcement, orders).await })
    }

    async fn keep(&self, announcement: &Announcement, mut orders: Orders) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{sequence:010}", announcement.hostname);
        loop {
            let state = *orders.wanted.borrow_and_update();
            if state == State::Stopped {
                lock(&self.components).remove(&name);
                orders.standing.send_replace(Standing::Withdrawn);
            } else {
                // Through the same text as ZooKeeper's, so that the demo shows what peers read.
                let json = announcement.to_json(state, MODEL_API);
                let entry = Component::from_json(FINGERGW, &name, json.as_bytes())
                    .expect("our own entry can be read");
                lock(&self.components).insert(name.clone(), entry);
                orders.standing.send_replace(Standing::Registered(name.clone()));
            }
            tokio::select! {
                changed = orders.wanted.changed() => if changed.is_err() { return },
                () = orders.close.cancelled() => return,
            }
        }
    }
}

/// The maps are whole between any two statements, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
